"""The oracle itself: its functions against many digits, what it accepts, and what it must reject."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from mlpdsl.eager import reference
from mlpdsl.names import ACTIVATIONS
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import GPU_PATTERNS, judge, make_call
from mlpdsl.testing.functions import FUNCTIONS
from mlpdsl.testing.oracle import Bounded, OracleError

mpf = mpmath.mpf

# ---------------------------------------------------------------------------------------------------------------------
# Functions


def sigma(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def phi(x: Any) -> Any:
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


EXACT: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: x * phi(x),
    "gelu_tanh": lambda x: x * sigma(2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpf(0.044715) * x**3)),
    "gelu_10": lambda x: min(max(x * phi(x), -10), 10),
    "quick_gelu": lambda x: x * sigma(mpf(1.702) * x),
    "silu": lambda x: x * sigma(x),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "relu6": lambda x: min(max(x, 0), 6),
    "leaky_relu": lambda x: x if x >= 0 else mpf(0.01) * x,
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "sigmoid": sigma,
    "tanh": mpmath.tanh,
    "softplus": lambda x: max(x, 0) + mpmath.log1p(mpmath.exp(-abs(x))),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "laplace": lambda x: mpmath.erfc(-(x - mpf(0.707107)) / (mpf(0.282095) * mpmath.sqrt(2))) / 2,
    "identity": lambda x: x,
}
PIECEWISE = ("relu", "relu2", "relu6", "leaky_relu", "elu", "hardswish")


def points() -> list[float]:
    draw = random.Random(7)
    scales = [1e-30, 1e-15, 1e-7, 1e-3, 0.1, 0.5, 1, 2, 3.1, 5, 6.5, 8.5, 10, 12, 20, 26, 37, 50, 88, 100]
    return [sign * scale for scale in scales for sign in (1, -1)] + [draw.uniform(-12, 12) for _ in range(110)]


def test_every_activation_has_a_function() -> None:
    assert set(FUNCTIONS) == set(ACTIVATIONS) == set(EXACT)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_against_50_digits(name: str) -> None:
    at = points()
    values = FUNCTIONS[name].value(torch.tensor(at, dtype=torch.float64)).tolist()
    with mpmath.workdps(50):
        for x, value in zip(at, values, strict=True):
            exact = EXACT[name](mpf(x))
            assert abs(value - exact) <= 2e-13 * abs(exact) + mpf(10) ** -300, (x, value, exact)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_against_mpmath(name: str) -> None:
    at = points()
    values = FUNCTIONS[name].derivative(torch.tensor(at, dtype=torch.float64)).tolist()
    # mpmath differentiates by differences: where laplace is 1 − 10^−300, those need as many digits as that.
    with mpmath.workdps(400 if name in ("laplace", "tanh", "sigmoid") else 90):
        for x, value in zip(at, values, strict=True):
            step = mpf(10) ** -30 * (abs(mpf(x)) if name in PIECEWISE else max(abs(mpf(x)), 1))
            exact = mpmath.diff(EXACT[name], mpf(x), h=step)
            assert abs(value - exact) <= 2e-13 * abs(exact) + mpf(10) ** -50, (x, value, exact)


LIMITS = {  # f(−inf), f(inf), f'(−inf), f'(inf)
    **dict.fromkeys(("gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "hardswish", "relu"), (0, torch.inf, 0, 1)),
    "gelu_10": (0, 10, 0, 0),
    "relu2": (0, torch.inf, 0, torch.inf),
    "relu6": (0, 6, 0, 0),
    "leaky_relu": (-torch.inf, torch.inf, 0.01, 1),
    "elu": (-1, torch.inf, 0, 1),
    "sigmoid": (0, 1, 0, 0),
    "tanh": (-1, 1, 0, 0),
    "softplus": (0, torch.inf, 0, 1),
    "laplace": (0, 1, 0, 0),
    "identity": (-torch.inf, torch.inf, 1, 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_limits_and_nan(name: str) -> None:
    f, ends = FUNCTIONS[name], torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=torch.float64)
    value, derivative = f.value(ends), f.derivative(ends)
    assert (*value[:2].tolist(), *derivative[:2].tolist()) == LIMITS[name]
    assert value[2].isnan()
    at_nan = {"leaky_relu": 0.01, **dict.fromkeys(("relu", "relu6", "elu", "hardswish", "identity"), 1.0)}.get(name)
    assert derivative[2].isnan() if at_nan is None else derivative[2] == at_nan


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
    "relu6": torch.nn.functional.relu6,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "hardswish": torch.nn.functional.hardswish,
}


@pytest.mark.parametrize("name", TORCH)
def test_kinks_follow_autograd(name: str) -> None:
    x = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(TORCH[name](x).sum(), x)
    assert torch.equal(FUNCTIONS[name].derivative(x.detach()), expected)


# ---------------------------------------------------------------------------------------------------------------------
# A kernel in plain torch, and wrong ones


def value32(name: str, x: Tensor) -> Tensor:
    return FUNCTIONS[name].value(x)


def slope32(name: str, x: Tensor) -> Tensor:
    return FUNCTIONS[name].derivative(x)


class Kernel:
    """mlpdsl's declared rounding points in plain float32 torch. Each wrong kernel below changes one method."""

    def __init__(self, spec: MLPSpec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)

    def round(self, t: Tensor) -> Tensor:
        return t.to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a.float() @ b.float()

    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        acc = self.product(h, w.T)
        return acc if b is None else acc + b.float()

    def act(self, name: str, z: Tensor) -> Tensor:
        return value32(name, z)

    def slope(self, name: str, z: Tensor) -> Tensor:
        return slope32(name, z)

    def hidden(self, pre: list[Tensor]) -> Tensor:
        a = self.act(self.spec.activation, pre[0].float())
        return self.round(a * pre[1].float() if self.spec.gated else a)

    def step(self, name: str, t: Tensor, operand: Tensor | None) -> Tensor:
        if operand is None:
            return self.act(name, t)
        return t + operand.float() if name == "residual" else t * operand.float()

    def gate_gradients(self, dh: Tensor, pre: list[Tensor]) -> list[Tensor]:
        gate, up = (z.float() for z in pre)
        act = self.spec.activation
        return [dh * up * self.slope(act, gate), dh * self.act(act, gate)]

    def run(self, x: Tensor, params: dict[str, Tensor], ops: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
        spec, names = self.spec, [n.removesuffix(".weight") for n in params if n.endswith(".weight")]
        layers = [names[:2], names[2:]] if spec.gated else [[n] for n in names]
        bias = {n: params.get(f"{n}.bias") for n in names}
        h, saved = x.reshape(-1, spec.d_in), []
        hidden = [h]
        for layer in layers[:-1]:
            pre = [self.linear(hidden[-1], params[f"{n}.weight"], bias[n]) for n in layer]
            saved.append([self.round(z) for z in pre])
            hidden.append(self.hidden(pre))
        t = self.linear(hidden[-1], params[f"{layers[-1][0]}.weight"], bias[layers[-1][0]])
        flat = {n: o.reshape(-1, spec.d_out) if n == "residual" else o for n, o in ops.items()}
        tile = self.round(t).float()
        for name in spec.epilogue:
            t = self.step(name, t, flat.get(name))
        out = {"y": self.round(t).reshape(*x.shape[:-1], spec.d_out)}
        # backward
        steps = [tile]
        for name in spec.epilogue:
            steps.append(self.step(name, steps[-1], flat.get(name)))
        g = dy.reshape(-1, spec.d_out).float()
        for name, before in zip(reversed(spec.epilogue), reversed(steps[:-1]), strict=True):
            if name == "residual":
                out[name] = self.round(g).reshape(ops[name].shape)
            elif name in flat:
                out[name] = self.round((g * before).sum(0) if name == "layer_scale" else (g * before).sum())
                g = g * flat[name].float()
            else:
                g = g * self.slope(name, before)
        wide, hidden = [g], [hidden[0], *(self.hidden(pre) for pre in saved)]
        for i in reversed(range(len(layers))):
            rounded = [self.round(each) for each in wide]
            dh = torch.zeros(())
            for n, dz, unrounded in zip(layers[i], rounded, wide, strict=True):
                out[f"{n}.weight"] = self.round(self.product(dz.T, hidden[i]))
                if spec.bias:
                    out[f"{n}.bias"] = self.round(unrounded.sum(0))
                dh = dh + self.product(dz, params[f"{n}.weight"])
            if i == 0:
                out["x"] = self.round(dh).reshape(x.shape)
            elif spec.gated:
                wide = self.gate_gradients(dh, saved[0])
            else:
                wide = [dh * self.slope(spec.activation, saved[i - 1][0].float())]
        return out


@dataclass
class Case:
    spec: MLPSpec
    x: Tensor
    params: dict[str, Tensor]
    ops: dict[str, Tensor]
    dy: Tensor

    def expected(self, replay: bool = False) -> dict[str, Bounded]:
        y = oracle.forward(self.spec, self.x, self.params, self.ops, replay=replay)
        params = list(self.params.values())
        return {"y": y, **oracle.backward(self.spec, self.x, params, self.ops, self.dy, replay=replay)}


def case(spec: MLPSpec, lead: tuple[int, ...] = (37,), seed: int = 0, scale: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (draw(*lead, spec.d_in) * scale).to(dtype)
    params = {
        name: (draw(*shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.5)).to(dtype)
        for name, shape in spec.parameter_shapes().items()
    }
    shapes = {"tile": (*lead, spec.d_out), "column": (spec.d_out,), "scalar": ()}
    ops = {name: (draw(*shapes[kind]) + 0.5).to(dtype) for name, kind in spec.operands().items()}
    return Case(spec, x, params, ops, draw(*lead, spec.d_out).to(dtype))


DTYPES = ("float32", "bfloat16", "float16")
SHAPES: dict[str, dict[str, Any]] = {
    "one linear": {"dims": (33, 20), "activation": "identity"},
    "one linear, gelu": {"dims": (33, 20), "activation": "identity", "bias": True, "epilogue": ("gelu",)},
    "mlp": {"dims": (24, 40, 16), "activation": "gelu", "bias": True},
    "gated": {"dims": (24, 40, 16), "activation": "silu", "gated": True, "bias": True, "epilogue": ("residual",)},
    "deep": {"dims": (16, 24, 8, 24, 16), "activation": "tanh", "bias": True, "epilogue": ("layer_scale", "residual")},
    "epilogues": {"dims": (9, 31, 7), "activation": "mish", "epilogue": ("scale", "silu", "residual", "layer_scale")},
}


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


class OtherFunction(Kernel):
    wrong: Callable[[Tensor], Tensor]

    def act(self, name: str, z: Tensor) -> Tensor:
        return type(self).wrong(z)


def other(f: Callable[[Tensor], Tensor]) -> type[Kernel]:
    return type("Other", (OtherFunction,), {"wrong": staticmethod(f)})


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


# ---------------------------------------------------------------------------------------------------------------------
# check()


def bounded(*values: float, bound: float = 0.5, dtype: torch.dtype | None = None) -> Bounded:
    value = torch.tensor(values, dtype=torch.float64)
    return Bounded(value, torch.full_like(value, bound), dtype)


def test_nan_and_inf_must_meet_their_like() -> None:
    nan, inf = torch.nan, torch.inf
    expected = bounded(1.0, nan, inf, -inf)
    assert oracle.check(torch.tensor([1.25, nan, inf, -inf]), expected, "y").ratio == 0.5
    for wrong in ([nan, nan, inf, -inf], [1.0, 0.0, inf, -inf], [1, nan, 3e38, -inf], [1, nan, inf, inf]):
        with pytest.raises(OracleError, match="1 of 4 elements"):
            oracle.check(torch.tensor(wrong), expected, "y")


def test_nothing_is_asked_where_the_bound_is_inf() -> None:
    report = oracle.check(torch.tensor([torch.nan, 2.0]), bounded(1.0, 2.0, bound=torch.inf), "y")
    assert (report.unbounded, report.ratio) == (2, 0.0)


def test_message_says_where_and_how_far() -> None:
    expected = bounded(0.0, 0.0, 0.0, bound=0.25)
    with pytest.raises(OracleError, match=r"y: 2 of 3 .* at \(2,\), is -2.0 where 0.0 ± 0.25 .*: 8 bounds away"):
        oracle.check(torch.tensor([0.25, 1.0, -2.0]), expected, "y")


def test_shape_and_dtype_are_checked() -> None:
    with pytest.raises(OracleError, match=r"shape \(1,\), expected \(2,\)"):
        oracle.check(torch.zeros(1), bounded(0.0, 0.0), "y")
    with pytest.raises(OracleError, match=r"dtype torch.float32, expected torch.bfloat16"):
        oracle.check(torch.zeros(2), bounded(0.0, 0.0, dtype=torch.bfloat16), "y")


def test_aggregate_rule_compares_with_eager() -> None:
    value = torch.ones(2000, dtype=torch.float64)
    expected = Bounded(value, torch.full_like(value, 0.1))
    eager, fair, poor = value + 0.01, value + 0.019, value + 0.021
    assert oracle.check(fair, expected, "y", eager).eager_rmse == pytest.approx(0.01)
    with pytest.raises(OracleError, match=r"root mean square error 0.021 exceeds 0.02"):
        oracle.check(poor, expected, "y", eager)
    few = Bounded(value[:500], expected.bound[:500])
    oracle.check(poor[:500], few, "y", eager[:500])
    with pytest.raises(OracleError, match="3 times"):
        oracle.check(poor[:500] + 0.02, few, "y", eager[:500])


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "tanh"])
def test_inf_and_nan_in_the_input(name: str) -> None:
    spec = MLPSpec(dims=(8, 12, 4), activation=name)
    given = case(spec, lead=(6,))
    given.x[1, 2], given.x[3, 4], given.x[4, 0] = torch.nan, torch.inf, -torch.inf
    y = given.expected()["y"]
    assert y.value[1].isnan().all() and y.value[[0, 2, 5]].isfinite().all()
    assert y.bound.isfinite().all()
    oracle.check(Kernel(spec).run(given.x, given.params, given.ops, given.dy)["y"], y, "y")
    if name == "relu":
        wrong = other(lambda z: z.fmax(torch.zeros(())))(spec).run(given.x, given.params, given.ops, given.dy)["y"]
        with pytest.raises(OracleError, match="4 of 24 elements"):
            oracle.check(wrong, y, "y")


def test_overflow_of_the_hidden_tensor_is_inf() -> None:
    spec = MLPSpec(dims=(4, 4, 2), activation="relu", dtype="float16")
    x, eye = torch.full((1, 4), 300.0).half(), (torch.eye(4) * 300).half()
    down = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]).half()
    y = oracle.forward(spec, x, [eye, down])
    assert y.value.tolist() == [[torch.inf, -torch.inf]] and y.bound.isfinite().all()
    near = oracle.forward(spec, torch.full((1, 4), 65519.0 / 300).half(), [eye, down / 100])
    assert near.bound.isinf().all() or near.value.isfinite().all()


def test_gradients_agree_with_autograd() -> None:
    spec = MLPSpec(**SHAPES["epilogues"])
    given = case(spec, lead=(5, 3))
    leaves = {"x": given.x, **given.params, **given.ops}
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    h = torch.nn.functional.mish(leaves["x"] @ leaves["fc1.weight"].T)
    t = torch.nn.functional.silu(h @ leaves["fc2.weight"].T * leaves["scale"])
    y = (t + leaves["residual"]) * leaves["layer_scale"]
    expected = torch.autograd.grad(y, list(leaves.values()), given.dy.double())
    found = given.expected()
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[name].value, gradient, rtol=1e-11, atol=1e-13)
        assert found[name].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Infinities, and sums that may overflow


def in_any_order(a: Tensor, b: Tensor, bias: Tensor | None, shuffle: random.Random) -> Tensor:
    """a·b + bias in float32, as some kernel may sum it: terms in any order, in blocks of any length."""
    order = list(range(a.shape[1]))
    shuffle.shuffle(order)
    terms = [a[:, k : k + 1] * b[k] for k in order]
    size = shuffle.choice((1, 2, 3))
    blocks = []
    for first in range(0, len(terms), size):
        block = terms[first]
        for term in terms[first + 1 : first + size]:
            block = block + term
        blocks.append(block)
    acc = torch.zeros(a.shape[0], b.shape[1])
    for block in blocks:
        acc = acc + block
    return acc if bias is None else acc + bias


EXTREME = (0.0, -0.0, 1.0, -2.5, 3e38, -3e38, 1e20, -1e20, 1e-30, 1e-42, torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("seed", range(8))
def test_a_product_accepts_every_order(seed: int) -> None:
    """What no order of float32 additions disagrees on is asked for, and nothing else."""
    shuffle = random.Random(seed)
    a = torch.tensor([[shuffle.choice(EXTREME[:4] * 4 + EXTREME) for _ in range(5)] for _ in range(120)])
    b = torch.tensor([[shuffle.choice((0.5, -1.0, 2.0, 1e-3, 0.0, 1e18)) for _ in range(7)] for _ in range(5)])
    bias = torch.tensor([shuffle.choice((0.0, 1.0, 2e38, -2e38)) for _ in range(7)]) if seed % 2 else None
    exactly = [oracle.bounded.exact(t) for t in (a, b)]
    expected = oracle.bounded.matmul(*exactly, "ieee", None if bias is None else oracle.bounded.exact(bias))
    for _ in range(12):
        oracle.check(in_any_order(a, b, bias, shuffle), expected, "any order")
    asked = ~expected.bound.isinf()
    assert float(asked.double().mean()) > 0.6
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 20


@pytest.mark.parametrize("seed", range(4))
def test_a_sum_accepts_every_order(seed: int) -> None:
    shuffle = random.Random(seed)
    terms = torch.tensor([[shuffle.choice(EXTREME[:4] * 6 + EXTREME) for _ in range(300)] for _ in range(5)])
    expected = oracle.bounded.total(oracle.bounded.exact(terms), [0])
    for _ in range(12):
        oracle.check(in_any_order(torch.ones(1, 5), terms, None, shuffle)[0], expected, "any order")
    asked = ~expected.bound.isinf()
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 5


@pytest.mark.parametrize("count", [2, 3])
def test_a_product_of_uncertain_factors_accepts_all_of_them(count: int) -> None:
    """Factors anywhere within their bounds, multiplied in any order; results below the normal numbers, and subnormals beside an
    infinity, flushed or not."""
    shuffle = random.Random(count)
    draw = (0.0, 1.0, -2.5, 1e-3, 3e38, -3e38, 1e-30, 1e-42, torch.inf, -torch.inf, torch.nan)
    values = [torch.tensor([shuffle.choice(draw[:4] + draw) for _ in range(4000)]) for _ in range(count)]
    errors = [torch.tensor([shuffle.choice((0.0, 1e-6, 2e-3)) for _ in range(4000)]) for _ in range(count)]
    errors = [torch.where(v.isfinite(), e, 0.0) for v, e in zip(values, errors, strict=True)]
    expected = oracle.bounded.mul(*(Bounded(v.double(), e.double()) for v, e in zip(values, errors, strict=True)))
    expected = oracle.bounded.rounded(expected, torch.float32)
    beside = torch.stack(values).isinf().any(0)
    for _ in range(20):
        order = list(range(count))
        shuffle.shuffle(order)
        found = None
        flush = shuffle.random() < 0.5
        for i in order:
            near = (values[i].double() + shuffle.choice((-0.999, 0, 0.999)) * errors[i].double()).float()
            near = torch.where((near.abs() < 2.0**-126) & beside, 0.0, near) if flush else near
            if found is None:
                found = near
                continue
            found = found * near
            found = torch.where(found.abs() < 2.0**-126, 0.0, found) if flush else found
        oracle.check(found, expected, "a product")
    asked = ~expected.bound.isinf()
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 100


def test_an_infinity_asks_for_what_is_certain() -> None:
    inf, nan = torch.inf, torch.nan
    certain, sure, faint = (oracle.bounded.exact(torch.tensor([[v]])) for v in (inf, 2.0, 1e-40))
    open_sign = Bounded(torch.tensor([[0.001]]).double(), torch.tensor([[0.01]]).double())
    settled_sign = Bounded(torch.tensor([[-0.1]]).double(), torch.tensor([[0.01]]).double())
    zero = oracle.bounded.exact(torch.zeros(1, 1))
    cases = ((sure, inf, 0.0), (settled_sign, -inf, 0.0), (open_sign, None, inf), (faint, None, inf), (zero, nan, 0.0))
    for rule in (oracle.bounded.mul, lambda a, b: oracle.bounded.matmul(a, b, "ieee")):
        for by, value, bound in cases:
            for found in (rule(certain, by), rule(by, certain)):
                assert float(found.bound) == bound
                if value is not None:
                    assert torch.equal(found.value.isnan(), torch.tensor([[value != value]]))
                    assert value != value or float(found.value) == value
    # Beside an infinity, sums that may overflow the other way; NaN is NaN beside anything.
    ones = oracle.bounded.exact(torch.ones(3, 1))
    for row, bound in (([inf, 1.0, -2.0], 0.0), ([inf, -3e38, -3e38], inf), ([nan, -3e38, -3e38], 0.0), ([inf, -inf, 1.0], 0.0)):
        assert float(oracle.bounded.matmul(oracle.bounded.exact(torch.tensor([row])), ones, "ieee").bound) == bound, row


def test_a_shut_gate_may_end_what_is_not_finite() -> None:
    inf = torch.inf
    gradient = Bounded(torch.tensor([torch.nan, inf, 2.0, 3e38, inf]).double(), torch.zeros(5).double())
    slope = Bounded(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).double(), torch.zeros(5).double())
    up = Bounded(torch.tensor([1.0, 1.0, 1.0, 10.0, 1.0]).double(), torch.zeros(5).double())
    assert oracle.bounded.chained(gradient, slope).bound.isinf().tolist() == [True, True, False, False, False]
    assert oracle.bounded.chained(gradient, up, slope).bound.isinf().tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_the_largest_numbers_are_infinite_in_tf32(precision: str) -> None:
    largest, small = (oracle.bounded.exact(torch.tensor([[v]])) for v in (torch.finfo(torch.float32).max, 1e-6))
    assert bool(oracle.bounded.matmul(largest, small, precision).bound.isinf()) == (precision != "ieee")
    assert bool(oracle.bounded.matmul(small, largest, precision).bound.isinf()) == (precision != "ieee")


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


def test_a_failure_says_where_by_how_much_and_against_what() -> None:
    """Of a whole call: result or gradient, spec, shape, place, value, expectation with its bound, and the distance in bounds."""
    spec = MLPSpec(dims=(8, 12, 4), activation="silu", bias=True)
    call = make_call(spec, (2, 3), 0)
    y, grads = call.gradients(reference(spec))
    judge(call, y, grads)
    number = r"-?\d+\.\d+(?:e-\d+)?"
    tail = rf" is {number} where {number} ± \d\.\d+e-\d+ is expected: \d\.\d+e\+\d+ bounds away"
    y[1, 2, 3] += 1.0
    with pytest.raises(OracleError) as error:
        judge(call, y, grads)
    assert re.fullmatch(re.escape(f"y of {spec!r} x(2, 3, 8): 1 of 24 elements are out of bounds; the worst, at (1, 2, 3),") + tail,
                        str(error.value))  # fmt: skip
    y[1, 2, 3] -= 1.0
    grads["fc1.bias"][5] *= 2.0
    with pytest.raises(OracleError) as error:
        judge(call, call.run(reference(spec)), grads)
    said = f"gradient of fc1.bias of {spec!r} x(2, 3, 8): 1 of 12 elements are out of bounds; the worst, at (5,),"
    assert re.fullmatch(re.escape(said) + tail, str(error.value))


@pytest.mark.parametrize("pattern", GPU_PATTERNS)
def test_patterns_of_a_gpu_are_refused_elsewhere(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"pattern: got '{pattern}'; allowed: 'once'"):
        make_call(MLPSpec(dims=(4, 4), activation="identity"), (2,), 0, pattern=pattern)
