"""`mlpdsl.explain`: what runs for a spec and a number of rows, and why."""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from mlpdsl.backends import BACKENDS, VARIABLE, requested_backend
from mlpdsl.ceilings import floor_us, known_gpu
from mlpdsl.codegen import blocks, narrow
from mlpdsl.codegen.config import INVARIANT_ROWS, SKINNY_ROWS, skinny
from mlpdsl.codegen.few_rows import EXACT_ROWS
from mlpdsl.codegen.float32 import worth_padding
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, Plan, products
from mlpdsl.errors import ShapeError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec, check_rows, check_spec
from mlpdsl.tables import Decision, Point, Product, Row, best_path, decide, find
from mlpdsl.target import VARIABLE as TARGET_VARIABLE
from mlpdsl.target import Target, detect

__all__ = ["Explanation", "configs", "explain"]


STRATEGIES = ("two_stage", "library", "skinny", "padded", "single_launch", "whole_network")
"""Every strategy that runs or has a reason why it does not."""

_NOT_BUILT = ("not in this release: it was slower in every row that was timed",)
"""Why single_launch does not run."""

_FORWARD = ("network", "hidden", "output")


@dataclass(frozen=True)
class Explanation:
    """What runs: `strategy`, the `config` of each kernel, `source` of the configs, and why other strategies do not.

    `predicted_us` is what tables measured for the products of a forward without gradients, each alone, summed, and `floor_us` the
    least time for it, both in microseconds on `gpu`; None where the products, or the GPU, were not measured. `notes` say what makes
    calls here run otherwise.
    """

    spec: MLPSpec
    m: int
    target: str
    strategy: str
    config: Mapping[str, Config]
    source: str
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    floor_us: float | None = None
    predicted_us: float | None = None
    gpu: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.spec.short_name} at m={self.m} on {self.target}: {self.strategy} (configs: {self.source})"]
        for name, c in self.config.items():
            if c.strategy == "blocks":
                lines.append(f"  {name:<18} blocks of {c.block_m}x{c.block_n}, {c.block_k} deep")
                continue
            if c.strategy == "library":
                apart = (c.bias_pass or c.batched) and self.spec.bias
                passes = name.startswith("hidden") or (name.startswith("output") and (self.spec.epilogue or apart))
                product = "one batched product of torch's" if c.batched else "torch's product"
                then = f", then {'biases, in ' if apart else ''}blocks of {c.block_m}x{c.block_n}" if passes else ""
                lines.append(f"  {name:<18} {product}{then}")
                continue
            if c.strategy == "whole_network":
                lines.append(f"  {name:<18} all linears, {c.block_m} rows at a time, {c.num_warps} warps, {c.num_stages} stages")
                continue
            few = "" if c.strategy == "two_stage" else f"{c.strategy}, "
            lines.append(
                f"  {name:<18} {few}tile {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, {c.num_stages} stages"
                + (f", {c.splits} splits" if c.splits > 1 else "")
            )
        times = _times(self.predicted_us, self.floor_us)
        if times:
            lines.append(f"  {times}" + (f", on an {self.gpu}" if self.gpu else ""))
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _decisions(spec: MLPSpec, m: int, target: Target, batch_invariant: bool = False) -> dict[str, Decision]:
    """The config of every launch with a product and where it comes from, by "role[stage]" or "network", where pointers and strides
    allow the best path."""
    plan = lower(spec, target)
    whole = narrow.network(plan, m, batch_invariant)
    found = {} if whole is None else {"network": Decision(whole, None)}
    for role, i, rows, n, k in products(plan, m):
        if whole is not None and role in _FORWARD:
            continue
        path = best_path(plan, plan.linears[i].width_out, plan.linears[i].width_in)
        found[f"{role}[{i}]"] = decide(plan, role, path, rows, n, k, batch_invariant)
    return found


def configs(spec: MLPSpec, m: int, target: Target, batch_invariant: bool = False) -> dict[str, Config]:
    """The config of every launch with a product, by "role[stage]" or "network", where pointers and strides allow the target's best
    path."""
    return {name: decision.config for name, decision in _decisions(spec, m, target, batch_invariant).items()}


def explain(
    spec: MLPSpec, m: int, target: str | Target | None = None, *, batch_invariant: bool = False, backend: str = "triton"
) -> Explanation:
    """What `compile(spec, batch_invariant=…)` runs on `m` rows (1 or more) of a target (default: this machine's, else sm_90).

    With backend="pallas", what `mlpdsl.jax.compile(spec)` runs (default: on a tpu_v5e). Raises `SpecError`, `ShapeError` for a bad
    m, `UnsupportedError` for an unknown target.
    """
    from mlpdsl.source import target_for

    check_spec(spec)
    rows = check_rows(m)
    if rows < 1:
        raise ShapeError(describe("m", m, "an integer, 1 or more", "Pass the number of rows of x."))
    chosen = target_for(backend, target)
    if backend == "pallas":
        return _explain_pallas(spec, rows, chosen)
    plan, notes = lower(spec, chosen), _notes(target, chosen)
    reasons = BACKENDS["triton"].supports(plan, chosen)
    if reasons:
        rejected = {name: _NOT_BUILT if name == "single_launch" else tuple(reasons) for name in STRATEGIES}
        return Explanation(spec, rows, chosen.name, "eager", {}, "none", rejected, notes=notes)
    found = _decisions(spec, rows, chosen, batch_invariant)
    config = {name: decision.config for name, decision in found.items()}
    forward = {name: decision for name, decision in found.items() if name.partition("[")[0] in _FORWARD}
    used = dict.fromkeys(decision.config.strategy for decision in forward.values())
    points = _points(plan, rows, batch_invariant)
    gpu = _gpu(points, chosen)
    copied = _copied(plan, rows, config)
    if copied:
        notes += (f"{', '.join(copied)}: torch multiplies copies, made in each call, because widths are no multiples of 4",)
    if plan.dtype == "float32" and "padded" in used and not any(width % 4 for width in spec.dims):
        notes += ("padded is for tensor descriptors here, and copies nothing that is aligned: every width is a multiple of 4",)
    return Explanation(
        spec=spec,
        m=rows,
        target=chosen.name,
        strategy=", ".join(used),
        config=config,
        source=_source(found, batch_invariant),
        rejected={name: _reasons(name, plan, rows, points, used, batch_invariant) for name in STRATEGIES if name not in used},
        floor_us=floor_us(spec, rows, gpu),
        predicted_us=None if batch_invariant or "network" in found else _measured(points, forward, rows),
        gpu=gpu,
        notes=notes,
    )


def _notes(asked: str | Target | None, chosen: Target) -> tuple[str, ...]:
    """What makes calls here run otherwise than is explained."""
    notes = []
    if requested_backend(None) == "eager":
        notes.append(f"{VARIABLE}=eager: here calls run PyTorch's operations, but where `compile` is given a backend")
    if asked is None and detect() is None:
        notes.append(f"{chosen.name} is assumed: which GPU is here is not known. Name a target, or set {TARGET_VARIABLE}")
    return tuple(notes)


def _copied(plan: Plan, m: int, config: Mapping[str, Config]) -> list[str]:
    """The products in TF32 that the library makes of copies of aligned tensors."""
    if plan.precision != "tf32":
        return []
    return [
        f"{role}[{i}]"
        for role, i, rows, n, k in products(plan, m)
        if f"{role}[{i}]" in config
        and config[f"{role}[{i}]"].strategy == "library"
        and worth_padding(rows, n, k)
        and (n % 4 or (rows if role == "weight_grad" else k) % 4)
    ]


def _explain_pallas(spec: MLPSpec, m: int, target: Target) -> Explanation:
    try:
        plan = lower(spec, target, "pallas")
        reasons = BACKENDS["pallas"].supports(plan, target)
    except UnsupportedError as error:
        reasons = list(error.reasons)
    if reasons:
        return Explanation(spec, m, target.name, "reference in jax.numpy", {}, "none", {"pallas": tuple(reasons)})
    return Explanation(spec, m, target.name, "pallas", blocks.configs(plan, m), "heuristic")


def _points(plan: Plan, m: int, batch_invariant: bool) -> dict[str, tuple[Row, Point] | None]:
    """The row of a table that covers each forward product, and its nearest point, by "role[stage]"."""
    found = {}
    for role, i, rows, n, k in products(plan, INVARIANT_ROWS if batch_invariant else m):
        if role in _FORWARD:
            found[f"{role}[{i}]"] = find(plan.target.name, *Product.of(plan, role, rows, n, k))
    return found


def _reasons(
    name: str,
    plan: Plan,
    m: int,
    points: Mapping[str, tuple[Row, Point] | None],
    used: Container[str],
    batch_invariant: bool,
) -> tuple[str, ...]:
    """Why no forward product runs by a strategy."""
    if name == "single_launch":
        return _NOT_BUILT
    if name == "whole_network":
        return tuple(narrow.reasons(plan)) or (narrow.limit(plan, m, batch_invariant),)
    if "whole_network" in used:
        return ("all linears are one launch",)
    if name == "library" and batch_invariant:
        return ("its sums depend on the number of rows",)
    if name == "padded":
        if plan.copies_reasons:
            return tuple(plan.copies_reasons)
        if batch_invariant:
            return ("batch_invariant takes masked loads in its place, at every number of rows",)
    if name == "skinny":
        limits = [f"for {SKINNY_ROWS} rows at most"] if m > SKINNY_ROWS else []
        if batch_invariant:
            limits.append(f"batch_invariant takes the configs for {INVARIANT_ROWS} rows")
        if not limits and not _has_skinny(plan, m):
            beyond = "" if plan.dtype != "float32" else f" beyond {EXACT_ROWS} rows" if m > EXACT_ROWS else " beyond one row"
            limits.append(f"none for {plan.dtype} on {plan.target.name}{beyond}")
        if limits:
            return tuple(limits)
    measured = any(found is not None for found in points.values())
    return ("slower where the table was measured" if measured else "the rule takes it for no product of forward here",)


def _has_skinny(plan: Plan, m: int) -> bool:
    """Whether any forward product has a kernel for so few rows."""
    return any(
        skinny(role, rows, n, k, dtype=plan.dtype, planes=plan.linears[i].planes, target=plan.target) is not None
        for role, i, rows, n, k in products(plan, m)
        if role in _FORWARD
    )


def _measured(points: Mapping[str, tuple[Row, Point] | None], forward: Mapping[str, Decision], m: int) -> float | None:
    """What tables measured for forward's products at m rows, summed, in microseconds; None unless every one has a row.

    Between two points of a row a time is read off the line through both in log M and log time.
    """
    total = 0.0
    for name, found in points.items():
        if found is None:
            return None
        row, nearest = found
        # Where the point's config does not run, the rule's does, which was timed beside it.
        rule = forward[name].row is None and nearest.config is not None
        below = max((p for p in row.points if p.m <= m), key=lambda p: p.m)
        above = min((p for p in row.points if p.m >= m), key=lambda p: p.m)
        total += _between(below, above, m, rule)
    return total


def _between(below: Point, above: Point, m: int, rule: bool) -> float:
    low, high = (p.default_us if rule else p.us for p in (below, above))
    if below.m == above.m:
        return low
    share = math.log(m / below.m) / math.log(above.m / below.m)
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def _gpu(points: Mapping[str, tuple[Row, Point] | None], target: Target) -> str | None:
    """The GPU that times are of: that of the tables' rows, else this process's, else the one of the target that was measured."""
    rows = {found[0].gpu for found in points.values() if found is not None}
    if rows:
        return rows.pop() if len(rows) == 1 else None
    here = _this_gpu()
    return here if here is not None and detect() == target else known_gpu(target.name)


def _times(predicted: float | None, floor: float | None) -> str:
    """For people; "" where nothing is known."""
    known = "" if floor is None else f"floor of {_us(floor)}"
    if predicted is None:
        return known
    return f"predicted {_us(predicted)}" + (f" against a {known}" if known else "")


def _us(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f} us"


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
