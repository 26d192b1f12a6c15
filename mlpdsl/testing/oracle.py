"""What an MLP and its gradients are in float64, how far a correct kernel may be from it, and whether a result is.

`forward` and `backward` compute in float64 on the same inputs, and carry through every step a bound on what a kernel
with mlpdsl's declared rounding points may deviate by (`mlpdsl.testing.bounded` has the rules); `check` compares.

Rounding points. Forward: float32 accumulation; bias, activation, gate and epilogue in float32; the hidden tensors and
the output are rounded once to the spec's dtype. Saved for backward: every preactivation z (gate and up), and the tile t
before the epilogue where a gradient needs it, each rounded. Backward: dt, the epilogue's gradient at the rounded t, in
float32, then rounded, or dy itself where the epilogue has no factor; dz = dh·f'(z) at the rounded z with dh = dt·W in
float32 (gated: dgate = dh·up·f'(gate), dup = dh·f(gate)), then rounded; weight gradients from the rounded dz and the
hidden tensor re-emitted from the rounded z; bias gradients sum the float32 gradient before its rounding; dx from the
rounded dz in one accumulator. Each gradient is rounded once to its tensor's dtype.

Where a stage is run by the library (`library`, names as in `mlpdsl.explain(spec, m).config`), its product is rounded too, before
what follows: z before the activation ("hidden[0]"), t before the epilogue ("output[1]"), dh before the derivative
("hidden_grad[1]"). A bias is part of the product; but in 16 bits cuBLAS may round the product before it adds one, for eager
PyTorch as well, so both are right.

By default a rounding between kernels only widens the bound, so that a kernel that keeps more precision there (z
recomputed in float32, say) is accepted as well. That is wide: worst cases add up over a sum, and in bf16 the bound of a
weight gradient can exceed its value. `replay=True` rounds the oracle's own tensors at these points instead, and is 10
to 100 times sharper; use it wherever the kernel under test rounds just there, as `save="preact"` does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlpdsl.function import Function
from mlpdsl.names import LAYER_SCALE, RESIDUAL, SCALE
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import bounded, custom
from mlpdsl.testing.bounded import Bounded

__all__ = ["Bounded", "OracleError", "Report", "backward", "check", "forward"]


@dataclass
class _Network:
    """One call, flattened to M rows, and what the forward pass leaves behind."""

    spec: MLPSpec
    x: Bounded
    layers: list[list[str]]
    """Names of the linears of each layer: two, gate and up, in the first where gated."""
    params: dict[str, Tensor]
    operands: dict[str, Tensor]
    dtype: torch.dtype
    replay: bool
    library: Collection[str] = ()
    preacts: list[list[Bounded]] = field(default_factory=list)

    def weight(self, name: str) -> Bounded:
        return bounded.exact(self.params[f"{name}.weight"])

    def linear(self, h: Bounded, name: str, stage: str) -> Bounded:
        bias = bounded.exact(self.params[f"{name}.bias"]) if self.spec.bias else None
        once = bounded.matmul(h, self.weight(name).T, self.spec.precision, bias)
        if bias is None or stage not in self.library or self.dtype == torch.float32:
            return once
        product = bounded.matmul(h, self.weight(name).T, self.spec.precision)
        return _either(once, bounded.add(bounded.rounded(product, self.dtype), bias))

    def hidden(self, pre: Sequence[Bounded]) -> Bounded:
        """act(z), act(gate)∘up or act(gate, up), rounded."""
        act = self.spec.activation
        if isinstance(act, Function) and len(act.inputs) == 2:
            return self.rounded(custom.value(act, pre))
        activated = _activation(act, pre[0])
        return self.rounded(bounded.mul(activated, pre[1]) if self.spec.gated else activated)

    def rounded(self, b: Bounded) -> Bounded:
        """A tensor between kernels: rounded to the spec's dtype."""
        return bounded.rounded(b, self.dtype, self.replay)

    def operand(self, name: str) -> Bounded:
        """(M, N) of kind tile, (M, 1) row, (N,) column, () scalar."""
        given, kind = self.operands[name], self.spec.operands()[name]
        shape = {"tile": (-1, self.spec.d_out), "row": (-1, 1), "column": (-1,), "scalar": ()}[kind]
        return bounded.exact(given.reshape(shape))

    def inputs_of(self, entry: Function, tile: Bounded) -> list[Bounded]:
        return [tile, *(self.operand(name) for name in entry.operands)]

    def epilogue(self, t: Bounded) -> list[Bounded]:
        """The output tile before every epilogue entry, and after the last."""
        steps = [t]
        for entry in self.spec.epilogue:
            if isinstance(entry, Function):
                steps.append(custom.value(entry, self.inputs_of(entry, steps[-1])))
            elif entry == RESIDUAL:
                steps.append(bounded.add(steps[-1], self.operand(RESIDUAL)))
            elif entry in (LAYER_SCALE, SCALE):
                steps.append(bounded.mul(steps[-1], self.operand(str(entry))))
            else:
                steps.append(_activation(entry, steps[-1]))
        return steps

    def run(self) -> Bounded:
        """The tile before the epilogue, in float32; fills `preacts`."""
        h = self.x
        for stage, names in enumerate(self.layers[:-1]):
            word = f"hidden[{stage}]"
            self.preacts.append([self.product(self.linear(h, name, word), word) for name in names])
            h = self.hidden(self.preacts[-1])
        word = f"output[{len(self.layers) - 1}]"
        tile = self.linear(h, self.layers[-1][0], word)
        return tile if not self.spec.epilogue else self.product(tile, word)

    def product(self, b: Bounded, stage: str) -> Bounded:
        """What a stage's product leaves for what follows it."""
        return self.rounded(b) if stage in self.library else b


def _network(
    spec: MLPSpec,
    x: Tensor,
    params: Sequence[Tensor] | Mapping[str, Tensor],
    operands: Mapping[str, Tensor | float],
    replay: bool,
    library: Collection[str],
) -> _Network:
    shapes = spec.parameter_shapes()
    named = dict(params) if isinstance(params, Mapping) else dict(zip(shapes, params, strict=True))
    assert {name: tuple(p.shape) for name, p in named.items()} == shapes, f"parameters do not fit {spec}"
    assert set(operands) == set(spec.operands()), f"operands {sorted(operands)} do not fit {spec}"
    linears = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    layers = [linears[:2], linears[2:]] if spec.gated else [[name] for name in linears]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    tensors = {
        name: given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64, device=x.device)
        for name, given in operands.items()
    }
    return _Network(spec, bounded.exact(x.reshape(-1, spec.d_in)), layers, named, tensors, dtype, replay, library)


def forward(
    spec: MLPSpec,
    x: Tensor,
    params: Sequence[Tensor] | Mapping[str, Tensor],
    operands: Mapping[str, Tensor | float] | None = None,
    *,
    replay: bool = False,
    library: Collection[str] = (),
) -> Bounded:
    """y of shape (…, d_out) for x of shape (…, d_in), in float64 on x's device.

    `params` are in the order, or under the names, of `spec.parameter_shapes()`; `operands` by name. The value is the
    true one, unrounded. With `replay`, tensors between kernels are rounded in the value as well, and bounds are far
    sharper where a sum over many of them follows; a kernel must then round exactly at the declared points.
    """
    net = _network(spec, x, params, operands or {}, replay, library)
    y = bounded.rounded(net.epilogue(net.run())[-1], net.dtype)
    shape = (*x.shape[:-1], spec.d_out)
    return Bounded(y.value.reshape(shape), y.bound.reshape(shape), net.dtype)


def backward(
    spec: MLPSpec,
    x: Tensor,
    params: Sequence[Tensor] | Mapping[str, Tensor],
    operands: Mapping[str, Tensor | float] | None,
    dy: Tensor,
    *,
    replay: bool = False,
    library: Collection[str] = (),
) -> dict[str, Bounded]:
    """Gradients of Σ y∘dy by "x", every parameter's name and every operand's name, each in its tensor's shape.

    Arguments as for `forward`; dy has the shape of y.
    """
    net = _network(spec, x, params, operands or {}, replay, library)
    tile = net.rounded(net.run())
    saved = [[net.rounded(z) for z in pre] for pre in net.preacts]
    inputs = [net.x, *(net.hidden(pre) for pre in saved)]
    found: dict[str, Bounded] = {}
    unrounded = [_epilogue_backward(net, tile, bounded.exact(dy.reshape(-1, spec.d_out)), found)]
    for layer in reversed(range(len(net.layers))):
        names = net.layers[layer]
        rounded = [each if each.is_exact else net.rounded(each) for each in unrounded]
        for name, dz, wide in zip(names, rounded, unrounded, strict=True):
            found[f"{name}.weight"] = bounded.matmul(dz.T, inputs[layer], spec.precision)
            if spec.bias:
                found[f"{name}.bias"] = bounded.total(wide, [0])
        weights = torch.cat([net.weight(name).value for name in names])
        dz = rounded[0]
        if len(rounded) > 1:
            dz = Bounded(torch.cat([each.value for each in rounded], 1), torch.cat([each.bound for each in rounded], 1))
        dh = bounded.matmul(dz, bounded.exact(weights), spec.precision)
        if layer == 0:
            found["x"] = dh
            break
        dh = net.product(dh, f"hidden_grad[{layer}]")
        if spec.gated:
            unrounded = [bounded.chained(dh, *by) for by in _gate_partials(spec, *saved[0])]
        else:
            unrounded = [bounded.chained(dh, _slope(spec.activation, saved[layer - 1][0]))]
    tensors = {"x": x, **net.params, **net.operands}
    order = ["x", *spec.parameter_shapes(), *spec.operands()]
    return {name: _as_gradient(found[name], tensors[name], net.dtype) for name in order}


def _either(one: Bounded, other: Bounded) -> Bounded:
    """What is within one or the other; where one is infinite and the other is not, anything."""
    same = one.value == other.value
    apart = torch.where(same, 0.0, (one.value - other.value).abs()).nan_to_num(nan=torch.inf)
    apart = apart.masked_fill(one.value.isnan() & other.value.isnan(), 0.0)
    return Bounded(one.value, torch.maximum(one.bound, apart + other.bound), one.dtype)


def _epilogue_backward(net: _Network, tile: Bounded, gradient: Bounded, found: dict[str, Bounded]) -> Bounded:
    """The gradient by the tile before the epilogue, in float32; those by the operands go into `found`."""
    steps = net.epilogue(tile)
    for entry, before in zip(reversed(net.spec.epilogue), reversed(steps[:-1]), strict=True):
        if isinstance(entry, Function):
            by_tile, *by_operands = custom.partials(entry, net.inputs_of(entry, before))
            for (name, kind), by in zip(entry.operands.items(), by_operands, strict=True):
                found[name] = _summed(bounded.chained(gradient, by), kind)
            gradient = bounded.chained(gradient, by_tile)
        elif entry == RESIDUAL:
            found[RESIDUAL] = gradient
        elif entry in (LAYER_SCALE, SCALE):
            name = str(entry)
            found[name] = _summed(bounded.chained(gradient, before), net.spec.operands()[name])
            gradient = bounded.chained(gradient, net.operand(name))
        else:
            gradient = bounded.chained(gradient, _slope(entry, before))
    return gradient


def _summed(b: Bounded, kind: str) -> Bounded:
    """A gradient of the whole tile, (M, N), summed to the shape of an operand of that kind."""
    if kind == "tile":
        return b
    total = bounded.total(b, {"column": [0], "row": [1], "scalar": [0, 1]}[kind])
    if kind != "row":
        return total
    return Bounded(total.value.unsqueeze(1), total.bound.expand(total.value.shape).unsqueeze(1))


def _activation(declared: object, p: Bounded) -> Bounded:
    return custom.value(declared, [p]) if isinstance(declared, Function) else bounded.activation(str(declared), p)


def _slope(declared: object, p: Bounded) -> Bounded:
    return custom.partials(declared, [p])[0] if isinstance(declared, Function) else bounded.slope(str(declared), p)


def _gate_partials(spec: MLPSpec, gate: Bounded, up: Bounded) -> list[list[Bounded]]:
    """The factors of the derivatives of the hidden value by gate and by up."""
    act = spec.activation
    if isinstance(act, Function) and len(act.inputs) == 2:
        return [[by] for by in custom.partials(act, [gate, up])]
    return [[up, _slope(act, gate)], [_activation(act, gate)]]


def _as_gradient(found: Bounded, tensor: Tensor, dtype: torch.dtype) -> Bounded:
    """Rounded once to the dtype of the tensor it belongs to, and in its shape; exact gradients are just copied."""
    dtype = tensor.dtype if tensor.dtype in bounded.UNIT else dtype
    b = found if found.is_exact else bounded.rounded(found, dtype)
    return Bounded(b.value.reshape(tensor.shape), b.bound.expand(found.value.shape).reshape(tensor.shape), dtype)


class OracleError(AssertionError):
    """A result is not what the spec says, within the bounds of its declared rounding points."""


@dataclass(frozen=True)
class Report:
    """How close a result came: `ratio` is the largest error as a fraction of its bound, 1 being the limit."""

    what: str
    ratio: float
    index: tuple[int, ...]
    """Where the largest ratio is."""
    elements: int
    unbounded: int
    """Elements of which nothing was asked."""
    rmse: float
    eager_rmse: float | None = None


def check(actual: Tensor, expected: Bounded, what: str, eager: Tensor | None = None) -> Report:
    """Raises `OracleError`, saying where and by how much, unless `actual` is within every bound of `expected`.

    Shape and dtype must agree. NaN must meet NaN and inf the same inf. With `eager`, the same result from eager PyTorch
    in the spec's dtype, the root mean square error must also be at most 2 times (3 times below 1,000 elements) eager's
    own, + 1e-5 of the root mean square of the values.
    """
    value, bound = expected.value, expected.bound
    if actual.shape != value.shape:
        raise OracleError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(value.shape)}")
    if expected.dtype is not None and actual.dtype != expected.dtype:
        raise OracleError(f"{what}: dtype {actual.dtype}, expected {expected.dtype}")
    if value.numel() == 0:
        return Report(what, 0.0, (), 0, 0, 0.0, None if eager is None else 0.0)
    got = actual.detach().to(value.device, torch.float64)
    finite, unbounded = value.isfinite(), bound.isinf()
    same = (got == value) | (got.isnan() & value.isnan())
    ratio = ((got - value).abs() / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
    ratio = torch.where(finite, ratio, torch.inf).masked_fill(same | unbounded, 0.0)
    flat = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape))
    worst, failed = float(ratio.reshape(-1)[flat]), int((ratio > 1).sum())
    if failed:
        here = {name: float(each.reshape(-1)[flat]) for name, each in (("is", got), ("o", value), ("b", bound))}
        raise OracleError(
            f"{what}: {failed} of {value.numel()} elements are out of bounds; the worst, at {index}, is "
            f"{here['is']!r} where {here['o']!r} ± {here['b']:.3g} is expected: {worst:.3g} bounds away"
        )
    counted = finite & ~unbounded
    rmse = _rms((got - value)[counted])
    if eager is None:
        return Report(what, worst, index, value.numel(), int(unbounded.sum()), rmse)
    other = eager.detach().to(value.device, torch.float64)
    counted = counted & other.isfinite()
    rmse, eager_rmse = _rms((got - value)[counted]), _rms((other - value)[counted])
    factor = 2 if int(counted.sum()) >= 1000 else 3
    limit = factor * eager_rmse + 1e-5 * _rms(value[counted])
    if rmse > limit:
        raise OracleError(
            f"{what}: every element is within its bound, but the root mean square error {rmse:.3g} exceeds "
            f"{limit:.3g}, {factor} times that of eager PyTorch ({eager_rmse:.3g}) + 1e-5 of the values"
        )
    return Report(what, worst, index, value.numel(), int(unbounded.sum()), rmse, eager_rmse)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
