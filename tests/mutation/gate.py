"""The gate itself: a mutant's text in place of a spec's own, and the properties one after the other until one refuses it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock
from zlib import crc32

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from mlpdsl import MLPSpec, dispatch, loader, ops, source
from mlpdsl.cache import digest
from mlpdsl.dispatch import Runner, runner
from mlpdsl.tape import Tapes
from tests.mutation.families import FAMILIES, forced
from tests.mutation.mutant import Mutant
from tests.mutation.properties import PROPERTIES, VERDICTS, Property

__all__ = ["EXAMPLES", "Kill", "Malformed", "alarms", "hunt", "running", "timed_hunt", "verdict"]

EXAMPLES = 150
"""How many examples a property may draw to refuse a mutant."""


class Malformed(Exception):
    """A mutant crashes: that says nothing about the properties."""


@dataclass(frozen=True)
class Kill:
    """Who refused a mutant, and when."""

    property: str
    example: int
    """The number of the example, from 1, among those of that property."""
    verdict: str
    """Which rule was broken, and of what."""
    ratio: float | None
    """How many bounds away the result was, or how many times the limit its root mean square; None for NaN, bits and guard zones."""
    call: str
    """The example."""


class _Found(Exception):
    """Ends Hypothesis's search."""


@contextmanager
def running(text_of: Callable[[MLPSpec], str], family: str = "") -> Iterator[None]:
    """Inside, calls of every spec run the kernels of `text_of(spec)`, by the family's strategy."""
    found: dict[str, Runner] = {}

    def replaced(spec_json: str, device: torch.device) -> Runner:
        if spec_json not in found:
            text = text_of(MLPSpec.from_json(spec_json))
            key = digest(text)
            module = loader.load(f"mutant-{key[:16]}.py", text, key)
            found[spec_json] = runner(spec_json, device)._replace(module=module, tapes=Tapes(False))
        return found[spec_json]

    with dispatch.forcing(forced(family)) if forced(family) else nullcontext(), mock.patch.object(ops, "runner", replaced):
        yield


def properties(family: str) -> tuple[Property, ...]:
    """All of them; but where a strategy is forced, sums have another order in another layout or batch: no laws of bits."""
    return tuple(each for each in PROPERTIES if each.name != "laws" or not forced(family))


def hunt(mutant: Mutant, family: str, examples: int = EXAMPLES) -> Kill | None:
    """The first property's refusal of a mutant, each given so many examples; None where it survives.

    Equal in every run with one version of Hypothesis: examples are drawn from a seed that is the mutant's name. Raises
    `AssertionError` where the text no longer has what the mutant changes, `Malformed` where it crashes.
    """
    mutant.text(FAMILIES[family])
    for each in properties(family):
        if each.functions and mutant.within not in each.functions:
            continue
        drawn = each.examples(FAMILIES[family])
        if drawn is None:
            continue
        seed = crc32(f"{mutant.name}, {family}, {each.name}".encode())
        with running(mutant.text, family):
            count, example, error = _search(drawn, each.check, seed, max(1, examples // each.cost))
        if error is None:
            continue
        if not isinstance(error, VERDICTS):
            raise Malformed(f"{mutant.name} ({family}) crashes at {example!r}: {type(error).__name__}: {error}") from error
        said, ratio = verdict(error)
        return Kill(each.name, count, said, ratio, repr(example))
    return None


def timed_hunt(mutant: Mutant, family: str, examples: int) -> tuple[Kill | None, float]:
    """What `hunt` finds, and the seconds of a processor that it takes."""
    began = time.process_time()
    return hunt(mutant, family, examples), round(time.process_time() - began, 2)


def alarms(family: str, examples: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many correct cases were tried, and those refused: `examples` drawn calls, the sweep, a sixth as many laws."""
    tried, refused = 0, []
    for each in properties(family):
        drawn = each.examples(FAMILIES[family])
        if drawn is None:
            continue
        with running(lambda spec: source.generate(spec).text, family):
            count, example, error = _search(drawn, each.check, seed, max(1, examples // each.cost))
        tried += count
        if error is not None:
            refused.append(f"{each.name} of {family}, {example!r}: {type(error).__name__}: {error}")
    return tried, refused


def verdict(error: BaseException) -> tuple[str, float | None]:
    """Which rule an error of a property speaks of, in a few words, and by how much it was broken."""
    text = str(error)
    of = re.match(r"(y|gradient of (\S+)) of |\S+\((?:gate|x)\)|(\S+'?)\(x\)", text)
    what = "" if of is None else of[1] or of[0]
    rms = re.search(r"root mean square error (\S+) exceeds ([^,]+),", text)
    if rms:
        return f"root mean square, {what}", float(rms[1]) / float(rms[2])
    away = re.search(r"(\S+) bounds away", text)
    if away:
        ratio = float(away[1])
        nan = re.search(r"is nan where", text)
        return (f"NaN in {what}", None) if nan else (f"bound, {what}", ratio if ratio < float("inf") else None)
    if "elements written" in text:
        return "guard zone", None
    return text.partition(":")[0][:80], None


def _search(
    drawn: SearchStrategy[Any], check: Callable[[Any], object], seed: int, examples: int
) -> tuple[int, Any, Exception | None]:
    """Check drawn examples until one raises: how many there were, the last, and what it raised."""
    count, last, error = 0, None, None

    def each(example: Any) -> None:
        nonlocal count, last, error
        if error is None:  # Hypothesis runs a failing example again
            count, last = count + 1, example
            try:
                check(example)
            except Exception as raised:
                error = raised
        if error is not None:
            raise _Found

    chosen = settings(
        max_examples=examples, phases=(Phase.generate,), deadline=None, database=None, derandomize=False, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small, threads cost ten times what they save
    try:
        hypothesis.seed(seed)(chosen(given(drawn)(each)))()
    except _Found:
        pass
    finally:
        torch.set_num_threads(threads)
    return count, last, error
