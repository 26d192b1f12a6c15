"""One search by Hypothesis for a call that fails: what is drawn, how often, what is kept, and what a failure says."""

from __future__ import annotations

import contextlib
import json
import platform
import unittest
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

from mlpdsl.spec import MLPSpec
from mlpdsl.testing import strategies
from mlpdsl.testing.calls import Call, written
from mlpdsl.testing.child import Child
from mlpdsl.testing.places import words_here
from mlpdsl.testing.strategies import Recipe
from mlpdsl.version import __version__

__all__ = ["FuzzError", "TimeUp", "compile_failure", "compile_script", "in_child", "one_thread", "script", "search"]

PHASES = (Phase.reuse, Phase.generate, Phase.target, Phase.shrink)


class FuzzError(AssertionError):
    """A drawn call failed, or a spec's kernels did not compile. The message says how, and ends with a script that does it again."""

    def __init__(self, message: str, script: str = "", recipe: Recipe | None = None, origin: str = "") -> None:
        super().__init__(message)
        self.script = script
        """Python source that raises again."""
        self.recipe = recipe
        """Of the call that failed; None where kernels did not compile."""
        self.origin = origin
        """What tells this failure from others of the same spec, as text."""

    @property
    def call(self) -> Call | None:
        """The call that failed, made here."""
        return None if self.recipe is None else self.recipe.make()


class TimeUp(unittest.SkipTest):
    """Ends a search. Hypothesis lets a skip through at once."""


def search(
    body: Callable[[Recipe], object],
    drawn: SearchStrategy[MLPSpec],
    name: str,
    *,
    device: str = "cpu",
    examples: int | None = None,
    seed: int | None = None,
    phases: Sequence[Phase] = PHASES,
    where: str | None = None,
    **chosen: Any,
) -> None:
    """Run `body` on recipes of calls of the specs drawn, until one raises or there have been enough.

    `name` stands for the specs, equal in every process: failures are kept in Hypothesis's database under it. `device` is that of
    the calls, `chosen` more of Hypothesis's settings, `where` what runs the kernels, in words. Raises `FuzzError` for the call that
    failed, shrunk; what ends a search (`TimeUp`, a skip) and Hypothesis's own errors as they are.
    """
    failed: list[Recipe] = []

    def call_passes(call: Recipe) -> None:
        try:
            body(call)
        except (HypothesisException, unittest.SkipTest):  # assume() and the like, and a test that skips itself
            raise
        except Exception:
            failed.append(call)
            raise

    # Hypothesis tells tests apart by their source, and this is one source for all specs.
    call_passes.__dict__["_hypothesis_internal_add_digest"] = name.encode()
    options: dict[str, Any] = {"deadline": None, "print_blob": False, "report_multiple_bugs": False, **chosen}
    if examples is not None:
        options["max_examples"] = examples
    test = given(call=strategies.recipes(drawn, device=device))(call_passes)
    if seed is not None:
        test = hypothesis.seed(seed)(test)  # before the settings: it takes the database from those that are there
    test = settings(phases=phases, suppress_health_check=list(HealthCheck), **options)(test)
    try:
        test()
    except unittest.SkipTest:
        raise
    except Exception as error:
        if not failed:  # Hypothesis's own: nothing of ours ran
            raise
        text = script(failed[-1], where)
        origin = getattr(error, "origin", type(error).__name__)
        raise FuzzError(_message(error, "makes the call", text), text, failed[-1], origin) from error


def in_child(child: Child, recipe: Recipe) -> float:
    """What `check_call` says of the call in a child: the largest error as a fraction of its bound. Raises as it does there."""
    try:
        return float(child.ask("check", spec=recipe.spec.to_json(), recipe=recipe.recipe))
    except Exception as error:
        named(error, recipe.spec)
        raise


def named(error: Exception, spec: MLPSpec) -> None:
    """Put the spec's own words into what a child said of it: as JSON, functions have no names."""
    twin = MLPSpec.from_json(spec.to_json())
    error.args = tuple(arg.replace(repr(twin), repr(spec)) if isinstance(arg, str) else arg for arg in error.args)


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    """On the CPU, torch with one thread: on matrices this small, threads cost ten times what they save."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def script(call: Call | Recipe, where: str | None = None) -> str:
    """A Python script that makes `call` again and holds it against the oracle. Only for calls that `make_call` made.

    `where` is what ran the kernels, this process's own by default.
    """
    where = words_here() if where is None else where
    interpreted = where == "Triton's interpreter"
    lines = [f"# Found with {_versions()}, {'in' if interpreted else 'on'} {where}."]
    if interpreted:
        lines += ["import os", "", 'os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported', ""]
    lines += [
        "from mlpdsl import MLPSpec",
        "from mlpdsl.testing.calls import check_call, make_call",
        "",
        f"spec = MLPSpec.from_json({call.spec.to_json()!r})",
        f"call = {written('spec', call.recipe)}",
        "print(check_call(call))  # raises AssertionError where the kernels are wrong",
    ]
    return "\n".join(lines) + "\n"


def compile_script(spec: MLPSpec, target: str) -> str:
    """A Python script that compiles the kernels of `spec` for a target again."""
    lines = [
        f"# Found with {_versions()}, compiling for {target} without running.",
        "from mlpdsl import MLPSpec",
        "from mlpdsl.testing.compiling import check_compiled",
        "",
        f"spec = MLPSpec.from_json({spec.to_json()!r})",
        f"print(check_compiled(spec, {json.dumps(target)}))  # raises AssertionError where a kernel does not compile or fit",
    ]
    return "\n".join(lines) + "\n"


def compile_failure(error: Exception, spec: MLPSpec, target: str) -> FuzzError:
    """The failure of a spec whose kernels did not compile in a child."""
    named(error, spec)
    text = compile_script(spec, target)
    origin = getattr(error, "origin", type(error).__name__)
    return FuzzError(_message(error, "compiles them", text), text, None, f"compiling: {origin}")


def _message(error: Exception, does: str, script: str) -> str:
    """What was raised and what Hypothesis noted; last the script, so that it is what a terminal ends with."""
    notes: Sequence[str] = getattr(error, "__notes__", ())
    lines = [f"{type(error).__name__}: {error}", *notes, "", f"This script {does} again:", "", script]
    return "\n".join(lines).rstrip("\n")


def _versions() -> str:
    triton = "not installed"
    with contextlib.suppress(PackageNotFoundError):
        triton = version("triton")
    return f"mlpdsl {__version__}, torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
