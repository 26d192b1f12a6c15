"""The kernels of a Triton module: which there are, and ONE argument list for each.

Signature and launch are printed from the same `Arg` list, so they cannot drift apart; the compile-only tools read it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlpdsl.codegen import narrow
from mlpdsl.codegen.few_rows import granule
from mlpdsl.codegen.plan import Linear, Plan

from .functions import OperandView

__all__ = ["Arg", "Kernel", "Stage", "by_pointer", "kernels", "stages", "strips"]


@dataclass(frozen=True)
class Arg:
    """One kernel argument: its name, what the launcher passes, and its kind.

    Kinds: `descriptor` (with its `block`, names of tile sizes), `pointer`, `rows` (M: never specialised on), `stride` (int,
    elements), `flag` (int 0 or 1), `constexpr`. `dtype` is the element type behind a descriptor or a pointer.
    """

    name: str
    passed: str
    kind: str
    dtype: str = ""
    block: tuple[str, ...] = ()

    @property
    def declared(self) -> str:
        return f"{self.name}: tl.constexpr" if self.kind == "constexpr" else self.name


@dataclass(frozen=True)
class Kernel:
    """A kernel of the generated file. `role` is what it computes, `path` how: `tma` or `masked`, by how it reads memory; or `row`
    for one row of x, and `skinny` for a few."""

    role: str
    path: str
    args: tuple[Arg, ...]

    @property
    def name(self) -> str:
        return f"{self.role}_{self.path}" if self.path else self.role

    @property
    def signature(self) -> list[str]:
        """The parameters, in lines."""
        return _fill(a.declared for a in self.args)

    @property
    def passed(self) -> list[str]:
        """The arguments of the launch, in lines: one for each parameter of the signature."""
        return _fill(a.passed for a in self.args)

    @property
    def unspecialised(self) -> str:
        """Integers whose value must never lead to another compilation: a batch of 1, or of 16, is no other kernel."""
        return ", ".join(f'"{a.name}"' for a in self.args if a.kind in ("rows", "flag"))


def _fill(items: Iterable[str], width: int = 112) -> list[str]:
    """Comma-separated items in lines of at most `width` characters, each line ending in a comma."""
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) + 2 > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{item},"
    return lines


@dataclass(frozen=True)
class Stage:
    """One linear of a network in one kernel: its place, widths, those padded to what products take, and names of what it reads and
    sums."""

    index: int
    linear: Linear

    @property
    def weights(self) -> tuple[str, ...]:
        return self._names("weight")

    @property
    def biases(self) -> tuple[str, ...]:
        return self._names("bias") if self.linear.biases else ()

    @property
    def sums(self) -> tuple[str, ...]:
        return ("gate", "up") if self.linear.planes == 2 else ("acc",)

    @property
    def k(self) -> int:
        return self.linear.width_in

    @property
    def n(self) -> int:
        return self.linear.width_out

    @property
    def block_k(self) -> int:
        return narrow.padded(self.k)

    @property
    def block_n(self) -> int:
        return narrow.padded(self.n)

    def _names(self, what: str) -> tuple[str, ...]:
        return (f"gate_{what}", f"up_{what}") if self.linear.planes == 2 else (f"{what}{self.index}",)


def stages(plan: Plan) -> tuple[Stage, ...]:
    """The linears, as the network in one kernel names them."""
    return tuple(map(Stage, range(len(plan.linears)), plan.linears))


def kernels(plan: Plan, operands: Sequence[OperandView]) -> tuple[Kernel, ...]:
    """Every kernel that is printed for a plan."""
    paths = ("tma", "masked") if plan.uses_tma else ("masked",)
    found = []
    for path in ("tma", "masked") if plan.copies else paths:
        if plan.hidden is not None:
            found.append(Kernel("hidden", path, _forward_args(plan, path, hidden=True, operands=())))
        found.append(Kernel("output", path, _forward_args(plan, path, hidden=False, operands=operands)))
    for path in ("row", "skinny"):
        if plan.hidden is not None:
            found.append(Kernel("hidden", path, _forward_args(plan, path, hidden=True, operands=())))
        found.append(Kernel("output", path, _forward_args(plan, path, hidden=False, operands=operands)))
    if narrow.printed(plan):
        found.append(Kernel("network", "", _network_args(plan, operands)))
    found.append(Kernel("epilogue_grad", "", _epilogue_grad_args(plan, operands)))
    for path in paths:
        if plan.hidden is not None:
            found.append(Kernel("hidden_grad", path, _hidden_grad_args(plan, path)))
        found.append(Kernel("input_grad", path, _input_grad_args(plan, path)))
        found.append(Kernel("weight_grad", path, _weight_grad_args(plan, path)))
    found.append(Kernel("sum_rows", "", _SUM_ROWS_ARGS))
    if plan.copies:
        found.append(Kernel("copy_rows", "", _copy_rows_args(plan)))
    if plan.hidden is not None:
        found.append(Kernel("activate_rows", "", _activate_rows_args(plan)))
        found.append(Kernel("activate_grad_rows", "", _activate_grad_rows_args(plan)))
    found.append(Kernel("finish_rows", "", _finish_rows_args(plan, operands)))
    return tuple(found)


def _tensor(plan: Plan, path: str, name: str, block: tuple[str, ...], strides: Sequence[str], passed: str = "") -> list[Arg]:
    """A matrix argument: one descriptor, or a pointer with its strides in elements."""
    passed = passed or name
    if path == "tma":
        describe = "describe_planes" if len(block) == 3 else "describe"
        sizes = ", ".join("1" if b == "1" else f"config.{b.lower()}" if "//" not in b else _quarter(b) for b in block[-2:])
        return [Arg(f"{name}_desc", f"launch.{describe}({passed}, {sizes})", "descriptor", plan.dtype, block)]
    return [
        Arg(f"{name}_ptr", passed, "pointer", plan.dtype),
        *(Arg(f"stride_{name}_{s}", f"{passed}.stride({i - len(strides)})", "stride") for i, s in enumerate(strides)),
    ]


def _quarter(block: str) -> str:
    name, _, divisor = block.partition(" // ")
    return f"config.{name.lower()} // {divisor}"


def _pointer(plan: Plan, name: str, dtype: str = "", passed: str = "") -> Arg:
    return Arg(f"{name}_ptr", passed or name, "pointer", dtype or plan.dtype)


def _constexprs(*names: str) -> tuple[Arg, ...]:
    return tuple(Arg(n, n, "constexpr") for n in names)


_ROWS = Arg("M", "M", "rows")
_TILE = tuple(Arg(n, f"config.{n.lower()}", "constexpr") for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"))
_SPLITS = Arg("SPLITS", "config.splits", "constexpr")
_STAGES = Arg("STAGES", "config.num_stages", "constexpr")


def _weights(plan: Plan, path: str, planes: int, reduce_rows: bool) -> list[Arg]:
    """The weights of one stage. `reduce_rows`: the product sums over the weight's rows (backward), not its columns."""
    block = ("BLOCK_K", "BLOCK_N") if reduce_rows else ("BLOCK_N", "BLOCK_K")
    if planes == 1:
        return _tensor(plan, path, "weight", block, ("out", "in"), "weights[0]")
    if path == "tma":
        rows, columns = (f"config.{b.lower()}" for b in block)
        count = "1" if reduce_rows else "2"
        return [
            Arg(
                "weight_desc",
                f"launch.describe_pair(*weights, {count}, {rows}, {columns})",
                "descriptor",
                plan.dtype,
                (count, *block),
            ),
            Arg("up_first", "launch.second_first(*weights)", "flag"),
        ]
    return [
        Arg("gate_weight_ptr", "weights[0]", "pointer", plan.dtype),
        Arg("up_distance", "launch.distance(*weights)", "stride"),
        Arg("stride_weight_out", "weights[0].stride(0)", "stride"),
        Arg("stride_weight_in", "weights[0].stride(1)", "stride"),
    ]


def _biases(plan: Plan, planes: int) -> list[Arg]:
    if not plan.bias:
        return []
    if planes == 1:
        return [_pointer(plan, "bias", passed="biases[0]")]
    return [_pointer(plan, "gate_bias", passed="biases[0]"), _pointer(plan, "up_bias", passed="biases[1]")]


def strips(plan: Plan, role: str) -> int:
    """Strips of the accumulator's columns, finished one after the other: 1 for bare products by descriptors alone in 16 bits, 2
    where gate and up, each half as wide as the accumulator, are finished together, else 4. With fewer, registers or shared memory
    do not hold a second program, or a whole tile of 32 bits."""
    if role == "output" and not (plan.bias or plan.epilogue.entries or by_pointer(plan, role) or plan.dtype == "float32"):
        return 1
    return 2 if role == "hidden" and plan.gated else 4


def by_pointer(plan: Plan, role: str) -> bool:
    """Whether what a role gives to the caller, the result or the gradient of x, has rows of no whole 16 bytes: no descriptor fits
    it, so that kernels on descriptors write it by a pointer."""
    size = granule(plan.dtype)
    return (role == "output" and plan.linears[-1].width_out % size > 0) or (
        role == "input_grad" and plan.linears[0].width_in % size > 0
    )


_GRAD_STRIPS = 8
"""In how many strips of columns the gradient of an activation is finished: with 4, gated and mish gradients spill."""


def _forward_args(plan: Plan, path: str, hidden: bool, operands: Sequence[OperandView]) -> tuple[Arg, ...]:
    planes = plan.linears[0].planes if hidden else 1
    count = strips(plan, "hidden" if hidden else "output")
    out = ("BLOCK_M", f"BLOCK_N // {count}" if count > 1 else "BLOCK_N")
    args = _tensor(plan, path, "x", ("BLOCK_M", "BLOCK_K"), "mk") + _weights(plan, path, planes, reduce_rows=False)
    args += _biases(plan, planes)
    for o in operands:
        args += _tensor(plan, path, o.ident, out, "mn") if o.kind == "tile" else [_pointer(plan, o.ident, "")]
    dense = path == "tma" and not hidden and by_pointer(plan, "output")
    args += [_pointer(plan, "out")] if dense else _tensor(plan, path, "out", out, "mn")
    save = hidden or plan.epilogue.tile_needed
    if save:
        name = "preact" if hidden else "tile"
        args += _tensor(plan, path, name, ("1", *out), "pmn")
    splits = () if plan.dtype == "float32" else (_SPLITS,)
    sizes = {"row": (*_TILE[1:3], _STAGES), "skinny": (*_TILE[:3], *splits)}.get(path)
    flags = _constexprs("N", "K", *(("SAVE",) if save else ()), *(() if sizes is None else ("OVERLAPS", "FOLLOWS", "PERIOD")))
    return (*args, _ROWS, *flags, *(_TILE if sizes is None else sizes))


def _network_args(plan: Plan, operands: Sequence[OperandView]) -> tuple[Arg, ...]:
    args = _tensor(plan, "masked", "x", (), "mk")
    for stage in stages(plan):
        for weight, at in zip(stage.weights, stage.linear.weights, strict=True):
            args += _tensor(plan, "masked", weight, (), ("out", "in"), f"parameters[{at}]")
        for bias, at in zip(stage.biases, stage.linear.biases, strict=True):
            args.append(_pointer(plan, bias, passed=f"parameters[{at}]"))
    for o in operands:
        args += _tensor(plan, "masked", o.ident, (), "mn") if o.kind == "tile" else [_pointer(plan, o.ident, "")]
    args += _tensor(plan, "masked", "out", (), "mn")
    args += [_pointer(plan, f"preact{i}") for i in range(len(plan.linears) - 1)]
    if plan.epilogue.tile_needed:
        args += _tensor(plan, "masked", "tile", (), "pmn")
    return (*args, _ROWS, *_constexprs("N", "SAVE"), _TILE[0], _STAGES)


def _epilogue_grad_args(plan: Plan, operands: Sequence[OperandView]) -> tuple[Arg, ...]:
    args = _tensor(plan, "masked", "grad", (), "mn")
    if plan.epilogue.tile_needed:
        args.append(_pointer(plan, "tile"))
    for o in operands:
        args += _tensor(plan, "masked", o.ident, (), "mn") if o.kind == "tile" else [_pointer(plan, o.ident)]
    if not plan.epilogue.passes_grad_through:
        args.append(_pointer(plan, "tile_grad"))
    if plan.bias:
        args.append(_pointer(plan, "bias_rows", "float32"))
    for o in operands:
        if o.grad == "own":
            args.append(_pointer(plan, f"{o.ident}_grad") if o.kind == "tile" else _pointer(plan, f"{o.ident}_rows", "float32"))
    sizes = (Arg("BLOCK_M", "64", "constexpr"), Arg("BLOCK_N", "64", "constexpr"))
    return (*args, _ROWS, *_constexprs("N"), *sizes)


def _hidden_grad_args(plan: Plan, path: str) -> tuple[Arg, ...]:
    out = ("BLOCK_M", f"BLOCK_N // {_GRAD_STRIPS}")
    args = _tensor(plan, path, "grad", ("BLOCK_M", "BLOCK_K"), "mk") + _weights(plan, path, 1, reduce_rows=True)
    args += _tensor(plan, path, "preact", ("1", *out), "pmn")
    args += _tensor(plan, path, "preact_grad", ("1", *out), "pmn")
    args += _tensor(plan, path, "hidden", out, "mn")
    if plan.bias:
        args.append(_pointer(plan, "bias_rows", "float32"))
    flags = _constexprs("N", "K", "EMIT_HIDDEN", *(("SUM_BIAS",) if plan.bias else ()))
    return (*args, _ROWS, *flags, *_TILE)


def _input_grad_args(plan: Plan, path: str) -> tuple[Arg, ...]:
    planes = plan.linears[0].planes
    grad = _tensor(plan, path, "preact_grad", ("1", "BLOCK_M", "BLOCK_K"), "pmk")
    args = grad + _weights(plan, path, planes, reduce_rows=True)
    dense = path == "tma" and by_pointer(plan, "input_grad")
    args += [_pointer(plan, "x_grad")] if dense else _tensor(plan, path, "x_grad", ("BLOCK_M", "BLOCK_N"), "mn")
    return (*args, _ROWS, *_constexprs("N", "K"), *_TILE)


def _weight_grad_args(plan: Plan, path: str) -> tuple[Arg, ...]:
    args = _tensor(plan, path, "grad", ("1", "BLOCK_K", "BLOCK_M"), "pmn") + _tensor(plan, path, "x", ("BLOCK_K", "BLOCK_N"), "mk")
    args += [_pointer(plan, "first", passed="outs[0]"), _pointer(plan, "second", passed="outs[-1]")]
    partial = _pointer(plan, "partial", "float32")
    depth = Arg("rows_per_split", "rows_per_split", "rows")
    return (*args, partial, _ROWS, depth, *_constexprs("N", "K", "PLANES", "PARTIAL"), *_TILE)


_BLOCK = _TILE[:2]


def _activate_rows_args(plan: Plan) -> tuple[Arg, ...]:
    if not plan.gated:
        args = [_pointer(plan, "preact"), *(_biases(plan, 1) if plan.bias_pass else []), _pointer(plan, "hidden"), _ROWS]
        return *args, *_constexprs("N", "FOLLOWS", *(("ADD_BIAS", "REWRITE") if plan.bias_pass else ())), *_BLOCK
    preact = [_pointer(plan, "preact", passed="preact[gate]"), Arg("stride_preact_p", "to_up", "stride"), *_biases(plan, 2)]
    flags = _constexprs("N", "FOLLOWS", *(("ADD_BIAS",) if plan.bias else ()), "REWRITE")
    return *preact, _pointer(plan, "saved", passed="preact"), _pointer(plan, "hidden"), _ROWS, *flags, *_BLOCK


def _activate_grad_rows_args(plan: Plan) -> tuple[Arg, ...]:
    args = [_pointer(plan, "grad", passed="hidden_grad"), *(_pointer(plan, name) for name in ("preact", "preact_grad", "hidden"))]
    if plan.bias:
        args.append(_pointer(plan, "bias_rows", "float32"))
    return (*args, _ROWS, *_constexprs("N", "FOLLOWS", "EMIT_HIDDEN", *(("SUM_BIAS",) if plan.bias else ())), *_BLOCK)


def _finish_rows_args(plan: Plan, operands: Sequence[OperandView]) -> tuple[Arg, ...]:
    args = [_pointer(plan, "tile"), *(_biases(plan, 1) if plan.bias_pass else [])]
    for o in operands:
        args += _tensor(plan, "masked", o.ident, (), "mn") if o.kind == "tile" else [_pointer(plan, o.ident, "")]
    flags: tuple[str, ...] = ()
    if plan.bias_pass and plan.epilogue.entries:
        flags = ("ADD_BIAS", "REWRITE") if plan.epilogue.tile_needed else ("ADD_BIAS",)
    return (*args, _pointer(plan, "out"), _ROWS, *_constexprs("N", "FOLLOWS", *flags), *_BLOCK)


def _copy_rows_args(plan: Plan) -> tuple[Arg, ...]:
    sizes = (Arg("BLOCK_M", "16", "constexpr"), Arg("BLOCK_N", "256", "constexpr"))
    src, distance = _tensor(plan, "masked", "src", (), "mn"), Arg("distance", "distance", "stride")
    return (*src, distance, _pointer(plan, "dst"), _ROWS, *_constexprs("N", "WIDTH", "FOLLOWS"), *sizes)


_SUM_ROWS_ARGS = (
    Arg("rows_ptr", "rows", "pointer", "float32"),
    Arg("out_ptr", "out", "pointer", ""),
    Arg("row_stride", "rows.stride(0)", "stride"),
    Arg("count", "rows.shape[0]", "rows"),
    Arg("length", "out.numel()", "rows"),
    Arg("BLOCK_R", "16", "constexpr"),
    Arg("BLOCK_N", "launch.SUM_COLUMNS", "constexpr"),
)
