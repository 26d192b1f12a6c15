"""From a spec and a device to what runs there: the loaded module, and the config of each launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mlpdsl import source
from mlpdsl.backends import BACKENDS, interpreting
from mlpdsl.errors import UnsupportedError
from mlpdsl.spec import MLPSpec
from mlpdsl.target import TARGETS, Target, detect, from_capability, parse_target

if TYPE_CHECKING:  # imported by the first call: a declaration decides nothing
    from mlpdsl.codegen.plan import Config, Plan
    from mlpdsl.launch import Launch
    from mlpdsl.tape import Tapes

__all__ = ["Runner", "forcing", "forcing_config", "plan_of", "runner", "target_of"]

_log = logging.getLogger("mlpdsl")

Pick = Callable[[str, str, int, int, int], "Launch"]
"""From role, path, M, N and K to the config of a launch."""


class Runner(NamedTuple):
    """What an op needs to run one spec on one device."""

    plan: Plan
    module: ModuleType
    pick: Pick
    invariant: Pick
    tapes: Tapes

    def picker(self, batch_invariant: bool) -> Pick:
        """How configs are picked. Where batch-invariant, by M only for weight gradients, which sum over the batch anyway; and all
        others by a kernel of ours."""
        return self.invariant if batch_invariant else self.pick


@cache
def target_of(device: torch.device) -> Target:
    """The architecture of a device; MLPDSL_TARGET where it is set. Raises `UnsupportedError` for an unknown one."""
    import os

    from mlpdsl.target import VARIABLE

    if os.environ.get(VARIABLE, "").strip() or device.type != "cuda":
        return detect() or parse_target(source.DEFAULT_TARGET)
    if torch.version.hip:
        return parse_target(torch.cuda.get_device_properties(device).gcnArchName, f"architecture of {device}")
    capability = torch.cuda.get_device_capability(device)
    target = from_capability(*capability)
    if target is None:
        known = ", ".join(name for name, each in TARGETS.items() if each.kind in ("cuda", "hip"))
        raise UnsupportedError(
            f"{device} has compute capability {capability[0]}.{capability[1]}, which no kernel is written for yet",
            [f"known architectures: {known}", "set MLPDSL_TARGET to the nearest one to try, or use backend='eager'"],
        )
    return target


@lru_cache(maxsize=4096)
def plan_of(spec_json: str) -> Plan:
    """The plan of a spec given as JSON, for what does not depend on the target: shapes, what is saved, whose gradient is whose."""
    from mlpdsl.codegen.lower import lower

    return lower(MLPSpec.from_json(spec_json), TARGETS[source.DEFAULT_TARGET])


_runners: dict[tuple[str, torch.device], Runner] = {}


def known_runner(spec_json: str, device: torch.device) -> Runner | None:
    """`runner`, if there was a first call."""
    return _runners.get((spec_json, device))


def runner(spec_json: str, device: torch.device) -> Runner:
    """The loaded kernels of a spec on a device; the first call renders, compares with the cache and loads."""
    found = _runners.get((spec_json, device))
    if found is None:
        from mlpdsl.launch import DIRECT
        from mlpdsl.tape import C_LAUNCHER, Tapes

        loaded = _load(MLPSpec.from_json(spec_json), target_of(device))
        found = _runners[spec_json, device] = Runner(*loaded, Tapes(DIRECT and C_LAUNCHER))
    return found


@cache
def _load(spec: MLPSpec, target: Target) -> tuple[Plan, ModuleType, Pick, Pick]:
    from mlpdsl.codegen.lower import lower

    key, text, path = source.publish(spec, target, "triton")
    plan = lower(spec, target)
    return plan, BACKENDS["triton"].load(path, text, key), _picker(plan, False), _picker(plan, True)


_forced: str | None = None


@contextmanager
def forcing(strategy: str) -> Iterator[None]:
    """Meanwhile every stage that can run by this strategy does, by "whole_network" where the rule would; by "generated", each
    linear by a kernel of its own, none by the library, and the rule alone decides among the others; by "batched", as by "library",
    with gate and up at once; by "bias_pass", with biases of float32 in the pass. For tests and measurements, in one thread."""
    global _forced
    before, _forced = _forced, strategy
    forget()
    try:
        yield
    finally:
        _forced = before
        forget()


_pinned: dict[tuple[str, int, int, int], tuple[Config, list[str]]] = {}


@contextmanager
def forcing_config(role: str, m: int, n: int, k: int, config: Config) -> Iterator[list[str]]:
    """Meanwhile every launch of this role with these M, N, K gets this config, in one thread: for tuning, and its checks.

    Yields the paths on which it was asked for, as they come."""
    product, paths = (role, m, n, k), list[str]()
    before = _pinned.get(product)
    _pinned[product] = (config, paths)
    forget()
    try:
        yield paths
    finally:
        del _pinned[product]
        if before is not None:
            _pinned[product] = before
        forget()


generation = 0
"""How often decisions were forgotten: what remembers one compares."""


def forget() -> None:
    """Decide anew from the next call on, whatever was decided and recorded."""
    global generation
    generation += 1
    _runners.clear()


def library_stages(spec_json: str, device: torch.device, rows: int, batch_invariant: bool = False) -> frozenset[str]:
    """The stages, named as in `explain(spec, m).config`, that the library multiplies for so many rows."""
    from mlpdsl.codegen import narrow
    from mlpdsl.codegen.plan import products

    run = runner(spec_json, device)
    pick = run.picker(batch_invariant)
    one = narrow.printed(run.plan) and pick("network", "masked", rows, 0, 0).strategy == "whole_network"
    return frozenset(
        f"{role}[{stage}]"
        for role, stage, m, n, k in products(run.plan, rows)
        if not (one and role in ("hidden", "output")) and pick(role, "masked", m, n, k).strategy == "library"
    )


def _picker(plan: Plan, batch_invariant: bool) -> Pick:
    """The config of each launch, remembered by shape."""
    from mlpdsl.codegen.config import INVARIANT_ROWS
    from mlpdsl.launch import Launch

    known: dict[tuple[int, str, str, int, int, int], Launch] = {}

    def pick(role: str, path: str, m: int, n: int, k: int) -> Launch:
        ours = batch_invariant and role != "weight_grad"
        shape = (generation, role, path, INVARIANT_ROWS if ours else m, n, k)
        found = known.get(shape)
        if found is None:
            if len(known) >= 4096:  # a server that sees every batch size there is
                known.clear()
            found = known[shape] = Launch.of(_decided(plan, role, path, m, n, k, batch_invariant))
        return found

    return pick


def _decided(plan: Plan, role: str, path: str, m: int, n: int, k: int, batch_invariant: bool) -> Config:
    """What is forced, else a table's config or the rule's; interpreted, tiles for the interpreter."""
    from mlpdsl.codegen import config, narrow

    ours = batch_invariant and role != "weight_grad"
    if role == "network":
        return _network(plan, m, ours) or narrow.LINEAR_BY_LINEAR
    pinned = None if ours else _pinned.get((role, m, n, k))
    if pinned is not None:
        pinned[1].append(path)
        return pinned[0]
    planes = 2 if plan.gated and role in ("hidden", "hidden_grad", "input_grad") else 1
    words: dict[str, Any] = {"dtype": plan.dtype, "planes": planes, "target": plan.target}
    if _forced in ("library", "batched", "bias_pass") and not ours:  # whatever the path: rounding must not depend on alignment
        chosen = config.library(role, m, n, dtype=plan.dtype, planes=planes)
        if chosen is not None:
            both = _forced == "batched" and role == "hidden" and planes == 2
            apart = _forced == "bias_pass" and plan.dtype == "float32" and role in ("hidden", "output")
            return replace(chosen, batched=both, bias_pass=apart)
    if _forced == "skinny" and not ours:
        few = (config.interpreted_skinny if interpreting() else config.skinny)(role, m, n, k, **words)
        if few is not None:
            return few
    if _forced == "padded" and not ours:
        copied = config.padded(role, m, n, k, precision=plan.precision, **words, epilogue=plan.finishes(role))
        if copied is not None:  # where tensors fit as they are, the same tiles without copies
            strategy = "padded" if path == "masked" else "two_stage"
            return replace(config.interpreted(role, "tma", m, n, k) if interpreting() else copied, strategy=strategy)
    if interpreting():
        return config.interpreted(role, path, config.INVARIANT_ROWS if ours else m, n, k, **words)
    if _forced == "generated" and not ours:
        return config.choose(role, path, m, n, k, precision=plan.precision, **words)
    from mlpdsl import tables

    _tell_of_tuning(plan.target.name)
    return tables.decide(plan, role, path, m, n, k, batch_invariant).config


def _network(plan: Plan, m: int, batch_invariant: bool) -> Config | None:
    """The config of all linears in one launch; None where each is asked for on its own."""
    from mlpdsl.codegen import narrow

    if _pinned or _forced not in (None, "whole_network"):
        return None
    if interpreting():
        return narrow.interpreted(plan) if _forced else None
    return narrow.network(plan, m, batch_invariant)


@cache
def _tell_of_tuning(target: str) -> None:
    """Once a process: nothing was measured on this architecture, and how it could be."""
    from mlpdsl import tables

    if not tables.has_rows(target):
        _log.info("mlpdsl: no table for %s: configs follow the rule; `mlpdsl tune SPEC` measures them on this GPU", target)
