"""`mlpdsl.explain`: what runs for a spec and a number of rows, and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlpdsl.backends import BACKENDS
from mlpdsl.codegen.config import INVARIANT_ROWS
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, products
from mlpdsl.errors import ShapeError, describe
from mlpdsl.spec import MLPSpec, check_rows, check_spec
from mlpdsl.tables import Decision, best_path, decide
from mlpdsl.target import Target, detect, parse_target

__all__ = ["Explanation", "configs", "explain"]


_LATER = dict.fromkeys(("whole_network", "skinny", "single_launch"), ("not in this release",))
"""Strategies that are not built yet, with the reason."""


@dataclass(frozen=True)
class Explanation:
    """What runs: `strategy`, the `config` of each kernel, `source` of the configs, and why other strategies do not."""

    spec: MLPSpec
    m: int
    target: str
    strategy: str
    config: Mapping[str, Config]
    source: str
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.spec.short_name} at m={self.m} on {self.target}: {self.strategy} (configs: {self.source})"]
        for name, c in self.config.items():
            if c.strategy == "library":
                lines.append(f"  {name:<18} torch's product, then blocks of {c.block_m}x{c.block_n}")
                continue
            lines.append(
                f"  {name:<18} tile {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, {c.num_stages} stages"
                + (f", {c.splits} splits" if c.splits > 1 else "")
            )
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        return "\n".join(lines)


def _decisions(spec: MLPSpec, m: int, target: Target, batch_invariant: bool = False) -> dict[str, Decision]:
    """The config of every product and where it comes from, by "role[stage]", where pointers and strides allow the best path."""
    plan = lower(spec, target)
    path = best_path(plan)
    return {f"{role}[{i}]": decide(plan, role, path, rows, n, k, batch_invariant) for role, i, rows, n, k in products(plan, m)}


def configs(spec: MLPSpec, m: int, target: Target, batch_invariant: bool = False) -> dict[str, Config]:
    """The config of every product, by "role[stage]", where pointers and strides allow the target's best path."""
    return {name: decision.config for name, decision in _decisions(spec, m, target, batch_invariant).items()}


def explain(spec: MLPSpec, m: int, target: str | Target | None = None, *, batch_invariant: bool = False) -> Explanation:
    """What `compile(spec, batch_invariant=…)` runs on `m` rows (1 or more) of a target (default: this machine's, else sm_90).

    Raises `SpecError`, `ShapeError` for a bad m, `UnsupportedError` for an unknown target.
    """
    from mlpdsl.source import DEFAULT_TARGET

    check_spec(spec)
    rows = check_rows(m)
    if rows < 1:
        raise ShapeError(describe("m", m, "an integer, 1 or more", "Pass the number of rows of x."))
    chosen = parse_target(target) if target is not None else detect() or parse_target(DEFAULT_TARGET)
    plan = lower(spec, chosen)
    reasons = BACKENDS["triton"].supports(plan, chosen)
    if reasons:
        rejected = {"two_stage": tuple(reasons), "library": tuple(reasons), **_LATER}
        return Explanation(spec, rows, chosen.name, "eager", {}, "none", rejected)
    found = _decisions(spec, rows, chosen, batch_invariant)
    config = {name: decision.config for name, decision in found.items()}
    forward = {name: c for name, c in config.items() if name.startswith(("hidden[", "output["))}
    strategy = ", ".join(dict.fromkeys(c.strategy for c in forward.values()))
    rejected = dict(_LATER)
    if batch_invariant:
        rejected["library"] = ("its sums depend on the number of rows",)
    elif not any(c.strategy == "library" for c in forward.values()):
        measured = any(decision.row is not None for name, decision in found.items() if name in forward)
        rejected["library"] = ("slower where the table was measured" if measured else "no table has it faster here",)
    if all(c.strategy == "library" for c in forward.values()):
        rejected["two_stage"] = ("slower where the table was measured",)
    return Explanation(spec, rows, chosen.name, strategy, config, _source(found, batch_invariant), rejected)


def _source(found: Mapping[str, Decision], batch_invariant: bool) -> str:
    """Where the configs come from: the GPU of the rows of tables, and whether it is another than this process's."""
    rule = f"heuristic for m={INVARIANT_ROWS}, whatever the batch" if batch_invariant else "heuristic"
    gpus: dict[str, list[str]] = {}
    for name, decision in found.items():
        if decision.row is not None:
            gpus.setdefault(decision.row.gpu, []).append(name)
    if not gpus:
        return rule
    here = _this_gpu()
    parts = []
    for gpu, names in gpus.items():
        other = f", not on this {here}" if here is not None and here != gpu else ""
        parts.append(f"table measured on {gpu}{other}" + (f" for {', '.join(names)}" if len(names) < len(found) else ""))
    return "; ".join(parts if all(d.row for d in found.values()) else [*parts, f"else {rule}"])


def _this_gpu() -> str | None:
    """The name of the current GPU, where this process uses one already: nothing is started to find out."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_name())
