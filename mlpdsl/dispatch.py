"""From a spec and a device to what runs there: the loaded module, and the config of each launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from mlpdsl import source
from mlpdsl.backends import BACKENDS, interpreting
from mlpdsl.codegen import config
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Plan
from mlpdsl.errors import UnsupportedError
from mlpdsl.spec import MLPSpec
from mlpdsl.target import TARGETS, Target, detect, from_capability, parse_target

if TYPE_CHECKING:
    from mlpdsl.launch import Launch

__all__ = ["Runner", "plan_of", "runner", "target_of"]

Pick = Callable[[str, str, int, int, int], "Launch"]


class Runner(NamedTuple):
    """What an op needs to run one spec on one kind of device."""

    plan: Plan
    module: ModuleType
    pick: Pick

    def picker(self, batch_invariant: bool) -> Pick:
        """How configs are picked. Where batch-invariant, by M only for weight gradients, which sum over the batch anyway."""
        if not batch_invariant:
            return self.pick

        def pick(role: str, path: str, m: int, n: int, k: int) -> Launch:
            return self.pick(role, path, m if role == "weight_grad" else config.INVARIANT_ROWS, n, k)

        return pick


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
        raise UnsupportedError(
            f"{device} has compute capability {capability[0]}.{capability[1]}, which no kernel is written for yet",
            [f"known architectures: {', '.join(TARGETS)}", "set MLPDSL_TARGET to the nearest one to try, or use backend='eager'"],
        )
    return target


@lru_cache(maxsize=4096)
def plan_of(spec_json: str) -> Plan:
    """The plan of a spec given as JSON, for what does not depend on the target: shapes, what is saved, whose gradient is whose."""
    return lower(MLPSpec.from_json(spec_json), TARGETS[source.DEFAULT_TARGET])


_runners: dict[tuple[str, torch.device], Runner] = {}


def runner(spec_json: str, device: torch.device) -> Runner:
    """The loaded kernels of a spec on a device; the first call renders, compares with the cache and loads."""
    found = _runners.get((spec_json, device))
    if found is None:
        found = _runners[spec_json, device] = _load(MLPSpec.from_json(spec_json), target_of(device))
    return found


@cache
def _load(spec: MLPSpec, target: Target) -> Runner:
    key, text, path = source.publish(spec, target, "triton")
    plan = lower(spec, target)
    return Runner(plan, BACKENDS["triton"].load(path, text, key), _picker(plan))


def _picker(plan: Plan) -> Pick:
    """The config of each launch, remembered by shape."""
    from mlpdsl.launch import Launch

    rule = config.interpreted if interpreting() else config.choose
    known: dict[tuple[str, str, int, int, int], Launch] = {}

    def pick(role: str, path: str, m: int, n: int, k: int) -> Launch:
        shape = (role, path, m, n, k)
        found = known.get(shape)
        if found is None:
            if len(known) >= 4096:  # a server that sees every batch size there is
                known.clear()
            planes = 2 if plan.gated and role == "hidden" else 1
            chosen = rule(role, path, m, n, k, dtype=plan.dtype, planes=planes, target=plan.target)
            found = known[shape] = Launch.of(chosen)
        return found

    return pick
