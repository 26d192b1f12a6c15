"""`mlpdsl.explain`: what runs for a spec and a number of rows, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlpdsl.backends import BACKENDS
from mlpdsl.codegen.config import INVARIANT_ROWS, choose
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config
from mlpdsl.errors import ShapeError, describe
from mlpdsl.spec import MLPSpec, check_rows, check_spec
from mlpdsl.target import Target, detect, parse_target

__all__ = ["Explanation", "configs", "explain"]


_LATER = dict.fromkeys(("whole_network", "skinny", "single_launch", "library"), ("not in this release",))
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
            lines.append(
                f"  {name:<18} tile {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, {c.num_stages} stages"
                + (f", {c.splits} splits" if c.splits > 1 else "")
            )
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        return "\n".join(lines)


def configs(spec: MLPSpec, m: int, target: Target, batch_invariant: bool = False) -> dict[str, Config]:
    """The config of every product, by "role[stage]", where pointers and strides allow the target's best path."""
    plan = lower(spec, target)
    batch, m = m, INVARIANT_ROWS if batch_invariant else m
    path = "tma" if plan.uses_tma else "masked"
    found = {}

    def add(name: str, role: str, rows: int, n: int, k: int, planes: int = 1) -> None:
        found[name] = choose(role, path, rows, n, k, dtype=plan.dtype, planes=planes, target=target)

    last = len(plan.linears) - 1
    for i, linear in enumerate(plan.linears):
        role = "output" if i == last else "hidden"
        add(f"{role}[{i}]", role, m, linear.width_out, linear.width_in, linear.planes)
    for i in range(last, -1, -1):
        linear = plan.linears[i]
        if i > 0:
            add(f"hidden_grad[{i}]", "hidden_grad", m, linear.width_in, linear.width_out)
        add(f"weight_grad[{i}]", "weight_grad", linear.width_out, linear.width_in, batch)
    add("input_grad[0]", "input_grad", m, plan.linears[0].width_in, plan.linears[0].width_out)
    return found


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
        rejected = {"two_stage": tuple(reasons), **_LATER}
        return Explanation(spec, rows, chosen.name, "eager", {}, "none", rejected)
    source, rejected = "heuristic", dict(_LATER)
    if batch_invariant:
        source = f"heuristic for m={INVARIANT_ROWS}, whatever the batch"
        rejected["library"] = (*rejected["library"], "its sums depend on the number of rows")
    return Explanation(spec, rows, chosen.name, "two_stage", configs(spec, rows, chosen, batch_invariant), source, rejected)
