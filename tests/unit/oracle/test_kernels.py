"""The oracle accepts a right kernel, and refuses every wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlpdsl.names import ACTIVATIONS
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.functions import FUNCTIONS
from mlpdsl.testing.oracle import Bounded, OracleError
from tests.unit.oracle.kernel import DTYPES, SHAPES, Kernel, case, other, slope32, value32


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accepts_a_right_kernel(shape: str, dtype: str, replay: bool) -> None:
    spec = MLPSpec(**SHAPES[shape], dtype=dtype)
    for seed, lead in enumerate([(1,), (5, 3), (0,), (150,)]):
        given = case(spec, lead, seed)
        expected, actual = given.expected(replay), Kernel(spec).run(given.x, given.params, given.ops, given.dy)
        assert set(actual) == set(expected)
        for name, want in expected.items():
            report = oracle.check(actual[name], want, name)
            assert report.ratio <= 1 and report.unbounded == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_small_against_the_values(shape: str, dtype: str) -> None:
    """A bound near the values could not fail. Without replay it is: 11 times the values in bf16's deepest bias here."""
    spec = MLPSpec(**SHAPES[shape], dtype=dtype)
    limit = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.15}[dtype]
    for name, want in case(spec, lead=(400,)).expected(replay=True).items():
        assert want.bound.median() <= limit * want.value.abs().median(), name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_bound_is_never_below_the_rounding_of_its_value(name: str) -> None:
    at = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for given in (oracle.bounded.exact(at), Bounded(at, 1e-6 * at.abs())):
        for result in (oracle.bounded.activation(name, given), oracle.bounded.slope(name, given)):
            assert (result.bound >= 4 * 2.0**-24 * result.value.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 30.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accepts_every_activation(name: str, scale: float, dtype: str) -> None:
    spec = MLPSpec(dims=(20, 40, 12), activation=name, bias=scale == 1.0, dtype=dtype)
    given = case(spec, scale=scale)
    actual = Kernel(spec).run(given.x, given.params, given.ops, given.dy)
    for replay in (False, True):
        for key, want in given.expected(replay).items():
            oracle.check(actual[key], want, key)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_reduced_precisions_are_wider(precision: str) -> None:
    kinds = [MLPSpec(dims=(24, 40, 16), activation="gelu", precision=each) for each in ("ieee", precision)]
    narrow, wide = (case(spec).expected()["y"] for spec in kinds)
    assert torch.equal(narrow.value, wide.value) and (wide.bound > narrow.bound).all()


class BiasAfterActivation(Kernel):
    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        acc = value32(self.spec.activation, super().linear(h, w, None))
        return acc + b.float() if b is not None else acc

    def act(self, name: str, z: Tensor) -> Tensor:
        return z


class RoundBeforeBias(Kernel):
    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        acc = self.round(self.product(h, w.T)).float()
        return acc if b is None else acc + b.float()


class RoundBeforeActivation(Kernel):
    def act(self, name: str, z: Tensor) -> Tensor:
        return value32(name, self.round(z).float())


class LowPrecisionAccumulator(Kernel):
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        acc = torch.zeros(a.shape[0], b.shape[1])
        for k in range(0, a.shape[1], 8):
            acc = self.round(acc + a[:, k : k + 8].float() @ b[k : k + 8].float()).float()
        return acc


class LastColumnIgnored(Kernel):
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return super().product(a[:, :-1], b[:-1])


class Tf32(Kernel):
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return super().product(*((t.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)))


class InputsInFp16(Kernel):
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return super().product(a.half(), b.half())


class WeightTransposed(Kernel):
    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return super().linear(h, w.T, b)


class BiasOfBlockZero(Kernel):
    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return super().linear(h, w, None if b is None else b[:8].repeat(len(b) // 8 + 1)[: len(b)])


class TruncatingStore(Kernel):
    def round(self, t: Tensor) -> Tensor:
        nearest = t.to(self.dtype)
        return torch.where(nearest.float().abs() > t.abs(), nearest.nextafter(torch.zeros_like(nearest)), nearest)


class StaleLastRow(Kernel):
    def round(self, t: Tensor) -> Tensor:
        out = super().round(t)
        out[-1:] = out[:1]
        return out


class Saturating(Kernel):
    def round(self, t: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return t.clamp(-largest, largest).to(self.dtype)


class GateUpSwapped(Kernel):
    def hidden(self, pre: list[Tensor]) -> Tensor:
        return super().hidden(pre[::-1])


class DgateWithoutUp(Kernel):
    def gate_gradients(self, dh: Tensor, pre: list[Tensor]) -> list[Tensor]:
        return [dh * self.slope(self.spec.activation, pre[0].float()), super().gate_gradients(dh, pre)[1]]


class DupWithoutActivation(Kernel):
    def gate_gradients(self, dh: Tensor, pre: list[Tensor]) -> list[Tensor]:
        return [super().gate_gradients(dh, pre)[0], dh * pre[0].float()]


class SlopeAtOutput(Kernel):
    def slope(self, name: str, z: Tensor) -> Tensor:
        return slope32(name, value32(name, z))


class SlopeOfTanhGelu(Kernel):
    def slope(self, name: str, z: Tensor) -> Tensor:
        return slope32("gelu_tanh", z)


class ScaledResidual(Kernel):
    def step(self, name: str, t: Tensor, operand: Tensor | None) -> Tensor:
        return super().step(name, t, operand * 0.5 if name == "residual" and operand is not None else operand)


class ResidualFirst(Kernel):
    def __init__(self, spec: MLPSpec) -> None:
        super().__init__(spec.replace(epilogue=spec.epilogue[::-1]))


GELU = {"dims": (32, 24, 16), "activation": "gelu", "bias": True}
GELU_LAST = {"dims": (32, 24), "activation": "identity", "bias": True, "epilogue": ("gelu",)}
LINEAR = {**GELU_LAST, "epilogue": ()}
SQUARE = {"dims": (24, 24, 24), "activation": "silu", "bias": True}
GATED = {"dims": (24, 40, 16), "activation": "silu", "gated": True}
DEEP = {"dims": (16, 24, 8, 24, 16), "activation": "tanh", "epilogue": ("layer_scale", "residual")}
NAIVE_TANH = other(lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1))

# name: wrong kernel, spec, dtypes in which it must be noticed, a tensor in which it must, scale of x
WRONG: dict[str, tuple[type[Kernel], dict[str, Any], tuple[str, ...], str, float]] = {
    "bias after activation": (BiasAfterActivation, GELU, DTYPES, "y", 1.0),
    "tanh-gelu for gelu": (other(FUNCTIONS["gelu_tanh"].value), GELU_LAST, DTYPES, "y", 1.0),
    "quick-gelu for gelu": (other(FUNCTIONS["quick_gelu"].value), GELU, DTYPES, "y", 1.0),
    "erf constant 0.7071": (other(lambda z: 0.5 * z * torch.erfc(-0.7071 * z)), GELU_LAST, DTYPES[:1], "y", 5.0),
    "gelu by 1 + erf": (other(lambda z: 0.5 * z * (1 + torch.erf(0.70710678 * z))), GELU_LAST, DTYPES, "y", 4.0),
    "tanh by exp at 1e-7": (NAIVE_TANH, {**GELU_LAST, "bias": False, "epilogue": ("tanh",)}, DTYPES[:2], "y", 1e-7),
    "rounded before bias": (RoundBeforeBias, GELU_LAST, DTYPES[1:], "y", 1.0),
    "rounded before activation": (RoundBeforeActivation, GELU_LAST, DTYPES[1:], "y", 1.0),
    "low-precision accumulator": (LowPrecisionAccumulator, GELU_LAST, DTYPES[1:], "y", 1.0),
    "low-precision accumulator in dW": (LowPrecisionAccumulator, LINEAR, DTYPES[1:], "layers.0.weight", 1.0),
    "last column ignored": (LastColumnIgnored, GELU, DTYPES, "y", 1.0),
    "last row ignored in dW": (LastColumnIgnored, GELU, DTYPES, "fc2.weight", 1.0),
    "tf32 for ieee": (Tf32, GELU, DTYPES[:1], "y", 1.0),
    "inputs through fp16": (InputsInFp16, GELU, DTYPES[:1], "y", 1.0),
    "weight strides swapped": (WeightTransposed, SQUARE, DTYPES, "y", 1.0),
    "bias of block 0": (BiasOfBlockZero, GELU, DTYPES, "y", 1.0),
    "truncating store": (TruncatingStore, GELU_LAST, DTYPES[1:], "y", 1.0),
    "last row not stored": (StaleLastRow, GELU, DTYPES, "y", 1.0),
    "saturating store": (Saturating, LINEAR, DTYPES[2:], "y", 6e4),
    "gate and up swapped": (GateUpSwapped, GATED, DTYPES, "y", 1.0),
    "dgate without up": (DgateWithoutUp, GATED, DTYPES, "gate_proj.weight", 1.0),
    "dup without activation": (DupWithoutActivation, GATED, DTYPES, "x", 1.0),
    "derivative at the output": (SlopeAtOutput, GATED, DTYPES, "gate_proj.weight", 1.0),
    "derivative at the output, deep": (SlopeAtOutput, DEEP, DTYPES, "x", 1.0),
    "derivative of tanh-gelu": (SlopeOfTanhGelu, GELU, DTYPES[:1], "fc1.weight", 1.0),
    "residual scaled": (ScaledResidual, DEEP, DTYPES, "y", 1.0),
    "epilogue out of order": (ResidualFirst, DEEP, DTYPES, "y", 1.0),
}


REPLAYED: dict[str, tuple[type[Kernel], dict[str, Any], str]] = {
    "low-precision accumulator": (LowPrecisionAccumulator, GELU, "fc1.weight"),
    "rounded before bias": (RoundBeforeBias, GELU, "y"),
    "truncating store": (TruncatingStore, GELU, "fc1.weight"),
}


@pytest.mark.parametrize("mistake", REPLAYED)
def test_replayed_rounding_sees_what_hides_behind_the_rounding_of_hidden_tensors(mistake: str) -> None:
    kernel, fields, where = REPLAYED[mistake]
    given = case(MLPSpec(**fields, dtype="bfloat16"), lead=(256,))
    actual = kernel(given.spec).run(given.x, given.params, given.ops, given.dy)[where]
    oracle.check(actual, given.expected()[where], where)
    with pytest.raises(OracleError, match="out of bounds"):
        oracle.check(actual, given.expected(replay=True)[where], where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", WRONG)
def test_rejects_a_wrong_kernel(mistake: str, dtype: str) -> None:
    kernel, fields, dtypes, where, scale = WRONG[mistake]
    if dtype not in dtypes:
        pytest.skip("within the rounding of this dtype")
    spec = MLPSpec(**fields, dtype=dtype)
    given = case(spec, lead=(64,), scale=scale)
    expected = given.expected()[where]
    oracle.check(Kernel(spec).run(given.x, given.params, given.ops, given.dy)[where], expected, "the right kernel")
    actual = kernel(spec).run(given.x, given.params, given.ops, given.dy)[where]
    with pytest.raises(OracleError, match=rf"^{where}: \d+ of \d+ elements are out of bounds"):
        oracle.check(actual, expected, where)


class TanhOff(Kernel):
    """tanh and its derivative 3% off: of the size of everything that small inputs give, and far below any absolute tolerance."""

    def act(self, name: str, z: Tensor) -> Tensor:
        return 1.03 * super().act(name, z)

    def slope(self, name: str, z: Tensor) -> Tensor:
        return 1.03 * super().slope(name, z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-20])
def test_relative_at_every_scale(scale: float, dtype: str) -> None:
    """A wrong tanh is refused in y and in every gradient that it reaches, however small its argument."""
    if dtype == "float16" and scale < 1e-3:
        scale *= 2.0**-12 / scale  # where float16 still has digits
    spec = MLPSpec(dims=(24, 40, 16), activation="tanh", dtype=dtype)
    given = case(spec, lead=(64,), scale=scale)
    expected = given.expected(replay=True)
    right, wrong = (kind(spec).run(given.x, given.params, given.ops, given.dy) for kind in (Kernel, TanhOff))
    for name in ("y", "x", "fc1.weight", "fc2.weight"):
        oracle.check(right[name], expected[name], name)
        with pytest.raises(OracleError, match="out of bounds"):
            oracle.check(wrong[name], expected[name], name)
