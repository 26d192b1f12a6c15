"""What the suites that run kernels share: inputs in poisoned memory, guarded allocations, one check against the oracle.

`draw_spec` and `draw_call` take `pick`, a function that chooses one of a sequence: Hypothesis's `data.draw(sampled_from(…))`, or
`random.Random(seed).choice` where Hypothesis is not installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing import oracle
from mlpdsl.testing.oracle import Bounded

Pick = Callable[[Sequence[Any]], Any]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NO_INTERPRETER = "needs TRITON_INTERPRET=1 set before triton is imported (make test sets it)"
NO_GPU = "needs a CUDA GPU"

GUARD = 4096
"""Elements of NaN before and after every tensor; a multiple of 16 bytes, so that it changes no alignment."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# How a matrix of (rows, columns) lies: row stride, column stride and first element; 0 is an expanded dimension.
LAYOUTS: dict[str, Callable[[int, int], tuple[int, int, int]]] = {
    "dense": lambda rows, cols: (cols, 1, 0),
    "offset": lambda rows, cols: (cols, 1, 1),  # 2 or 4 bytes off every alignment
    "padded": lambda rows, cols: (-(-cols // 8) * 8 + 8, 1, 0),  # fit for TMA, with NaN between rows
    "ragged": lambda rows, cols: (cols + 3, 1, 0),
    "transposed": lambda rows, cols: (1, rows + 5, 0),
    "strided": lambda rows, cols: (2 * cols + 1, 2, 0),
    "expanded": lambda rows, cols: (0, 1, 0),  # one row for all
    "columns": lambda rows, cols: (1, 0, 0),  # one column for all
}
WEIGHT_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("expanded", "columns"))
PAIRS = ("apart", "stacked", "up_first", "unlike", "tied")
"""How gate and up lie to each other: two allocations, halves of one, up before gate, unequal strides, one and the same."""


def bits(t: Tensor) -> Tensor:
    """The tensor's bits, so that NaN equals NaN and 0 is not -0."""
    return t.detach().contiguous().view(BITS[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def place(values: Tensor, layout: str = "dense", swap: bool = False, guard: int = GUARD) -> Tensor:
    """`values` (…, columns), lying as `layout` says in memory that is NaN everywhere else.

    With `swap` the leading dimensions lie in the opposite order, so that they cannot be merged into rows. Where a dimension is
    expanded, its first element stands for all.
    """
    shape = tuple(values.shape)
    lead, cols = shape[:-1], shape[-1] if shape else 1
    row, col, start = LAYOUTS[layout](math.prod(lead), cols)
    strides = [0] * len(lead)
    step = row
    for i in range(len(lead)) if swap else reversed(range(len(lead))):
        strides[i] = step
        step *= lead[i]
    if shape:
        strides.append(col)
    extent = 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    buffer = torch.full((2 * guard + start + extent,), torch.nan, dtype=values.dtype, device=values.device)
    own = [min(n, 1) if s == 0 else n for n, s in zip(shape, strides, strict=True)]
    buffer.as_strided(own, strides, guard + start).copy_(values[tuple(slice(n) for n in own)])
    return buffer.as_strided(shape, strides, guard + start)


class Guards:
    """Tensors that the code under test allocated, each inside NaN."""

    def __init__(self, guard: int) -> None:
        self.guard = guard
        self.count = 0
        self._kept: list[tuple[Tensor, int]] = []

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = tuple(size)
        count = math.prod(size)
        buffer = torch.full((2 * self.guard + count,), torch.nan, dtype=dtype, device=device)
        self._kept.append((buffer, count))
        self.count += 1
        strides = torch.empty(size, device="meta").stride()
        with torch.no_grad():  # a tensor of its own, no view: what is returned may get a gradient function
            return torch.tensor([], dtype=dtype, device=device).set_(buffer.untyped_storage(), self.guard, size, strides)

    def check(self) -> None:
        """Raises `AssertionError` where something was written before or after a tensor."""
        for buffer, count in self._kept:
            clean = torch.full((1,), torch.nan, dtype=buffer.dtype, device=buffer.device)
            for zone, where in ((buffer[: self.guard], "before"), (buffer[self.guard + count :], "after")):
                changed = int((bits(zone) != bits(clean)).sum())
                assert not changed, f"{changed} elements written {where} a tensor of {count} {buffer.dtype} elements"
        self._kept.clear()


@contextmanager
def guarded_allocations(guard: int = GUARD) -> Iterator[Guards]:
    """Inside, what Python code allocates for kernels is NaN, between guard zones of NaN; outside, the zones are checked.

    A tensor of which a kernel leaves an element out then shows it, and so does one that a kernel writes beyond.
    """
    guards = Guards(guard)
    empty, empty_like, plain_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # Triton's interpreter, which looks at our memory through another tensor
            return plain_new_empty(self, *size, dtype=dtype, **rest)
        return guards.allocate(size[0] if size and not isinstance(size[0], int) else size, dtype or self.dtype, self.device)

    def guarded_empty_like(t: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if t.device.type == "meta" or (not t.is_contiguous() and rest.get("memory_format") is not torch.contiguous_format):
            return empty_like(t, dtype=dtype, **rest)
        return guards.allocate(t.shape, dtype or t.dtype, t.device)

    def guarded_empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        place_there = torch.device(device or "cpu")
        if rest or dtype is None or not dtype.is_floating_point or place_there.type == "meta":
            return empty(*size, dtype=dtype, device=device, **rest)
        return guards.allocate(size[0] if size and not isinstance(size[0], int) else size, dtype, place_there)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty, create=True))
        stack.enter_context(mock.patch.object(torch, "empty_like", guarded_empty_like))
        stack.enter_context(mock.patch.object(torch, "empty", guarded_empty))
        yield guards
    guards.check()


@dataclass
class Call:
    """The arguments of one call, and the gradient of its result."""

    spec: MLPSpec
    x: Tensor
    params: list[Tensor]
    operands: dict[str, Tensor]
    dy: Tensor
    buffers: list[Tensor] = field(default_factory=list)
    """All memory that the call may only read."""
    values: str = "normal"

    def named(self) -> dict[str, Tensor]:
        """x, parameters and operands, in the order in which the oracle names their gradients."""
        return {"x": self.x, **dict(zip(self.spec.parameter_shapes(), self.params, strict=True)), **self.operands}

    def needing(self, names: Sequence[str] | None = None) -> Call:
        """The same tensors as leaves of a new graph; all of them, or those named, require grad."""

        def leaf(name: str, t: Tensor) -> Tensor:
            return t.detach().requires_grad_(names is None or name in names)

        leaves = {name: leaf(name, t) for name, t in self.named().items()}
        params = [leaves[name] for name in self.spec.parameter_shapes()]
        return Call(self.spec, leaves["x"], params, {n: leaves[n] for n in self.operands}, self.dy, self.buffers, self.values)

    def run(self, mlp: Callable[..., Tensor]) -> Tensor:
        return mlp(self.x, *self.params, **self.operands)

    def gradients(self, mlp: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and the gradients of everything by name."""
        call = self.needing()
        y = call.run(mlp)
        names, leaves = zip(*call.named().items(), strict=True)
        # A function may read an operand without having a derivative by it: eager PyTorch then has no gradient, and kernels zeros.
        grads = torch.autograd.grad(y, leaves, call.dy, materialize_grads=True)
        return y.detach(), dict(zip(names, grads, strict=True))


def make_call(
    spec: MLPSpec,
    lead: Sequence[int],
    seed: int,
    *,
    x: str = "dense",
    swap: bool = False,
    weights: str = "dense",
    pair: str = "apart",
    operands: str = "dense",
    dy: str = "dense",
    values: str = "normal",
    wide_operands: bool = False,
    device: torch.device | str = "cpu",
    guard: int = GUARD,
) -> Call:
    """A call with x of shape (*lead, d_in): seeded values, and layouts by name.

    `values`: "normal" has preactivations near 1, "tiny" 1e-7 of that, "huge" up to about ±100. With `wide_operands`, column and
    scalar operands are float32 whatever the spec's dtype.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    factor = {"normal": 1.0, "tiny": 1e-7, "huge": 35.0}[values]

    def normal(shape: Sequence[int], scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator, device=device) * scale).to(dtype)

    shapes = spec.parameter_shapes()
    params: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            params[name] = place(normal(shape, shape[1] ** -0.5), weights, guard=guard)
        else:
            params[name] = place(normal(shape, min(factor, 2.0)), "strided" if weights == "strided" else "dense", guard=guard)
    if spec.gated:
        _pair(params, pair, weights, guard)
    lead = tuple(lead)
    operand_shapes = {"tile": (*lead, spec.d_out), "column": (spec.d_out,), "row": (*lead, 1), "scalar": ()}
    named = {}
    for name, kind in spec.operands().items():
        wide = torch.float32 if wide_operands and kind != "tile" else dtype
        lies = operands if kind == "tile" else "strided" if operands == "strided" and kind == "column" else "dense"
        named[name] = place(normal(operand_shapes[kind], dtype=wide), lies, swap and kind == "tile", guard)
    x_tensor = place(normal((*lead, spec.d_in), factor), x, swap, guard)
    dy_tensor = place(normal((*lead, spec.d_out)), dy, swap, guard)
    everything = [x_tensor, *params.values(), *named.values(), dy_tensor]
    buffers = {t.untyped_storage().data_ptr(): t._base for t in everything if t._base is not None}
    return Call(spec, x_tensor, list(params.values()), named, dy_tensor, list(buffers.values()), values)


def _pair(params: dict[str, Tensor], pair: str, weights: str, guard: int) -> None:
    gate, up = params["gate_proj.weight"], params["up_proj.weight"]
    if pair in ("stacked", "up_first"):
        both = place(torch.stack((gate, up) if pair == "stacked" else (up, gate)), "dense", guard=guard)
        gate, up = both.unbind(0) if pair == "stacked" else reversed(both.unbind(0))
    elif pair == "unlike":
        up = place(up.contiguous(), "transposed" if weights != "transposed" else "padded", guard=guard)
    elif pair == "tied":
        up = gate
    params["gate_proj.weight"], params["up_proj.weight"] = gate, up


WIDTHS = (1, 2, 3, 5, 7, 9, 13, 15, 17, 20, 31, 33, 47, 50, 65, 71)
ALIGNED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72)
DTYPES = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 33, 40, 50, 64, 65, 70, 100, 129, 150)


def draw_spec(pick: Pick, **fixed: Any) -> MLPSpec:
    """Any spec of small widths: half of them odd, half multiples of 8 (for TMA); `fixed` are fields not to be drawn."""
    gated = fixed.get("gated", pick((False, True)))
    widths = pick((WIDTHS, ALIGNED_WIDTHS))
    depth = 2 if gated else pick((2, 1, 3, 4))
    dims = tuple(pick(widths) for _ in range(depth + 1))
    dtype, precision = pick(DTYPES)
    drawn = {"dims": dims, "gated": gated, "bias": pick((False, True)), "dtype": dtype, "precision": precision}
    drawn["epilogue"] = draw_epilogue(pick)
    drawn.update(fixed)
    drawn["activation"] = fixed.get("activation", pick(ACTIVATIONS)) if len(drawn["dims"]) > 2 else "identity"
    return MLPSpec(**drawn)


def draw_epilogue(pick: Pick) -> tuple[str, ...]:
    entries: list[str] = []
    for _ in range(pick((0, 1, 2, 3, 4))):
        used = set(entries)
        entries.append(pick([n for n in ("residual", "layer_scale", "scale", *ACTIVATIONS) if n in ACTIVATIONS or n not in used]))
    return tuple(entries)


def draw_lead(pick: Pick, rows: Sequence[int] = ROWS) -> tuple[int, ...]:
    """Leading dimensions of x: none, one, two or three."""
    kind = pick(("rows", "rows", "rows", "batch", "deep", "none"))
    if kind == "none":
        return ()
    if kind == "rows":
        return (pick(rows),)
    if kind == "batch":
        return (pick((1, 2, 3, 5)), pick((1, 2, 7, 16, 21)))
    return (pick((1, 2)), pick((1, 3)), pick((1, 4, 9)))


def draw_call(pick: Pick, spec: MLPSpec, lead: Sequence[int], seed: int, **fixed: Any) -> Call:
    """A call with any layout of x, parameters, operands and gradient."""
    drawn = {
        "x": pick(tuple(LAYOUTS)),
        "swap": pick((False, True)),
        "weights": pick(WEIGHT_LAYOUTS),
        "pair": pick(PAIRS),
        "operands": pick(tuple(LAYOUTS)),
        "dy": pick(tuple(LAYOUTS)),
        "values": pick(("normal", "tiny", "huge")),
        "wide_operands": pick((False, True)),
    }
    return make_call(spec, lead, seed, **{**drawn, **fixed})


@dataclass(frozen=True)
class Verdict:
    """How close a correct call came to its bounds, and how much its gradients say."""

    ratio: float
    """The largest error as a fraction of its bound, over the result and all gradients."""
    strength: Mapping[str, float]
    """For each gradient the largest |value|/bound: 1 or less would let a kernel pass that writes zeros."""


def check_call(
    call: Call, mlp: Callable[..., Tensor] | None = None, *, backward: bool = True, eager: bool = True, guard: int = GUARD
) -> Verdict:
    """Run a call forward and backward and hold everything against the oracle, which replays the declared roundings.

    Also: inputs are not written, nothing is written outside what was allocated, and (`eager`) the root mean square error is no
    larger than that of eager PyTorch. Raises `AssertionError`.
    """
    mlp = mlp or mlpdsl.compile(call.spec, backend="triton")
    before = [bits(b).clone() for b in call.buffers]
    with guarded_allocations(guard):
        y, grads = call.gradients(mlp) if backward else (call.run(mlp), {})
    for buffer, bits_before in zip(call.buffers, before, strict=True):
        assert torch.equal(bits(buffer), bits_before), "an input was written"
    return judge(call, y, grads, eager=eager)


def judge(call: Call, y: Tensor, grads: Mapping[str, Tensor], *, eager: bool = True) -> Verdict:
    """Hold a result, and gradients by name where there are any, against the oracle. Raises `AssertionError`."""
    spec = call.spec
    # Root mean squares want many independent errors: not one row, one column, or subnormals. tf32 is not the CPU's.
    rows = call.dy.numel() // spec.d_out
    compare = eager and spec.precision == "ieee" and rows >= 8 and min(spec.dims) >= 8 and call.values == "normal"
    y_eager, eager_grads = None, {}
    if compare:
        reference = mlpdsl.reference(spec)
        y_eager, eager_grads = call.gradients(reference) if grads else (call.run(reference), {})
    what = f"{spec!r} x{tuple(call.x.shape)}"
    arguments = (spec, call.x, call.params, call.operands)
    report = oracle.check(y, oracle.forward(*arguments, replay=True), f"y of {what}", y_eager)
    ratio, strength = report.ratio, {}
    expected = oracle.backward(*arguments, call.dy, replay=True) if grads else {}
    for name, wanted in expected.items():
        # The inputs are finite. Past an overflow, inf·0 is NaN or not by the order in which factors are multiplied.
        wanted = Bounded(wanted.value, torch.where(wanted.value.isnan(), torch.inf, wanted.bound), wanted.dtype)
        many = wanted.value.numel() >= 8  # the error of one number beside another one's says nothing
        report = oracle.check(grads[name], wanted, f"gradient of {name} of {what}", eager_grads.get(name) if many else None)
        ratio = max(ratio, report.ratio)
        says = (wanted.value.abs() / wanted.bound.clamp(min=1e-300)).nan_to_num(nan=0.0, posinf=0.0)
        strength[name] = float(says.amax()) if says.numel() else 0.0
    return Verdict(ratio, strength)
