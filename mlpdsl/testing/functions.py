"""The oracle's own definitions of the activations: value and derivative in float64, closed forms without cancellation.

Written from the mathematics, independently of `mlpdsl.codegen`, and proved against 50-digit arithmetic in
`tests/unit/oracle/test_functions.py`: relative error about 1e-13 at every scale, down to where float64 underflows. With
σ(x) = 1/(1 + e^−x), Φ the normal distribution function and φ its density:

* Φ(x) is ½·erfc(−x/√2), not ½·(1 + erf), nor `torch.special.ndtr`, which is that in disguise; 1 − tanh² is 1/cosh²;
  1 − σ(x) is σ(−x); log(1 + e^x) is max(x, 0) + log1p(e^−|x|); e^x − 1 is expm1.
* At ±inf they are the mathematical limits (silu(−inf) = 0, gelu'(inf) = 1), where eager PyTorch gives NaN from inf·0.
  mlpdsl promises the limits.
* NaN gives NaN in every value. In derivatives, as torch's autograd: NaN for smooth functions, 1 for relu, 0.01 for
  leaky_relu. For relu6, elu and hardswish torch's own kernels disagree (vectorised CPU: 0, NaN, NaN; scalar CPU and
  CUDA: 1); 1 stands here, and `any_at_nan` says not to insist on it.
* At kinks the derivative is autograd's: relu'(0) = 0, relu6'(0) = relu6'(6) = 0, leaky_relu'(0) = 0.01, elu'(0) = 1,
  hardswish'(−3) = 0, hardswish'(3) = 1 (torch 2.13; up to 2.6 it was −0.5 and 1.5).

Formulas apply to float64 tensors of any shape on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "Function"]

Map = Callable[[Tensor], Tensor]

SQRT_TWO_OVER_PI = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
QUICK_GELU_SLOPE = 1.702
LAPLACE_MEAN = 0.707107
LAPLACE_WIDTH = 0.282095 * math.sqrt(2.0)
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Function:
    """An activation f: `value(x)` is f(x), `derivative(x)` is f'(x), elementwise on float64 tensors."""

    value: Map
    derivative: Map
    any_at_nan: bool = False
    """Whether f'(NaN) is anything, because torch's own kernels disagree."""
    center: float = 0.0
    """The μ of a function defined by x − μ: its argument is rounded relative to that, and not to x."""

    def curvature(self, x: Tensor) -> Tensor:
        """f''(x) by autograd, good enough for an error bound: 0 at kinks, in flat parts and where it would be NaN."""
        with torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            slope = self.derivative(at)
            if not slope.requires_grad:
                return torch.zeros_like(x)
            (second,) = torch.autograd.grad(slope.sum(), at)
        return second.nan_to_num(nan=0.0)


def _vanishing(x: Tensor) -> Tensor:
    """x as the factor of something that decays exponentially: clamped so that the product's limit at ±inf is 0."""
    return x.clamp(-1e4, 1e4)


def _normal(x: Tensor) -> Tensor:
    """Φ(x) = ½·erfc(−x/√2)."""
    value: Tensor = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return value


def _density(x: Tensor) -> Tensor:
    """φ(x) = e^(−x²/2)/√(2π)."""
    density: Tensor = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return density


def _zero_at_minus_inf(x: Tensor, value: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, value)


def _gelu(x: Tensor) -> Tensor:
    return _zero_at_minus_inf(x, x * _normal(x))


def _gelu_slope(x: Tensor) -> Tensor:
    """(x·Φ)' = Φ + x·φ."""
    return _normal(x) + _vanishing(x) * _density(x)


def _tanh_argument(x: Tensor) -> Tensor:
    """2u with u = √(2/π)·(x + 0.044715·x³), since ½·(1 + tanh u) = σ(2u)."""
    return 2 * SQRT_TWO_OVER_PI * x * (1 + GELU_CUBIC * x * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return _zero_at_minus_inf(x, x * torch.sigmoid(_tanh_argument(x)))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    """σ(2u) + x·(2u)'·σ(2u)·σ(−2u)."""
    double = _tanh_argument(x)
    near = _vanishing(x)
    inner = 2 * SQRT_TWO_OVER_PI * (1 + 3 * GELU_CUBIC * near * near)
    return torch.sigmoid(double) + near * inner * (torch.sigmoid(double) * torch.sigmoid(-double))


def _gelu_10(x: Tensor) -> Tensor:
    return _gelu(x).clamp(-10.0, 10.0)


def _gelu_10_slope(x: Tensor) -> Tensor:
    """gelu' where gelu(x) ≤ 10 (it is never below −10), else 0."""
    return torch.where(_gelu(x) > 10.0, 0.0, _gelu_slope(x))


def _times_sigmoid(slope: float) -> tuple[Map, Map]:
    """x·σ(a·x), and its derivative σ(a·x)·(1 + a·x·σ(−a·x))."""

    def value(x: Tensor) -> Tensor:
        return _zero_at_minus_inf(x, x * torch.sigmoid(slope * x))

    def derivative(x: Tensor) -> Tensor:
        scaled = slope * x
        return torch.sigmoid(scaled) * (1 + _vanishing(scaled) * torch.sigmoid(-scaled))

    return value, derivative


def _relu_slope(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0.0, torch.ones_like(x))


def _relu6_slope(x: Tensor) -> Tensor:
    return torch.where((x <= 0) | (x >= 6), 0.0, torch.ones_like(x))


def _leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, LEAKY_SLOPE * x)


def _leaky_relu_slope(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, torch.full_like(x, LEAKY_SLOPE))


def _elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.expm1(x.clamp(max=0.0)))


def _elu_slope(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.exp(x.clamp(max=0.0)), 1.0)


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _tanh_slope(x: Tensor) -> Tensor:
    """1/cosh² = (2·e^−|x|/(1 + e^−2|x|))², which underflows and never overflows."""
    decay = torch.exp(-x.abs())
    return (2 * decay / (1 + decay * decay)) ** 2


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0.0) + torch.log1p(torch.exp(-x.abs()))


def _tanh_softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(softplus(x)) and its derivative. With w = e^x they are

        w·(w + 2)/(w² + 2w + 2)    and    4·w·(w + 1)/(w² + 2w + 2)²,

    and with v = e^−x, for x > 0,  (1 + 2v)/(1 + 2v + 2v²)  and  4·v²·(1 + v)/(1 + 2v + 2v²)².
    """
    small = torch.exp(-x.abs())
    low = small * small + 2 * small + 2
    high = 1 + 2 * small + 2 * small * small
    value = torch.where(x > 0, (1 + 2 * small) / high, small * (small + 2) / low)
    slope = torch.where(x > 0, 4 * small**2 * (1 + small) / high**2, 4 * small * (small + 1) / low**2)
    return value, slope


def _mish(x: Tensor) -> Tensor:
    return _zero_at_minus_inf(x, x * _tanh_softplus(x)[0])


def _mish_slope(x: Tensor) -> Tensor:
    value, slope = _tanh_softplus(x)
    return value + _vanishing(x) * slope


def _hardswish(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, x * (x + 3).clamp(max=6.0) / 6)


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, (2 * x + 3) / 6, 1.0))


def _laplace(x: Tensor) -> Tensor:
    """½·(1 + erf(z)) = ½·erfc(−z) with z = (x − 0.707107)/(0.282095·√2)."""
    value: Tensor = 0.5 * torch.special.erfc(-(x - LAPLACE_MEAN) / LAPLACE_WIDTH)
    return value


def _laplace_slope(x: Tensor) -> Tensor:
    z = (x - LAPLACE_MEAN) / LAPLACE_WIDTH
    return torch.exp(-z * z).div(LAPLACE_WIDTH * math.sqrt(math.pi))


FUNCTIONS: dict[str, Function] = {
    "gelu": Function(_gelu, _gelu_slope),
    "gelu_tanh": Function(_gelu_tanh, _gelu_tanh_slope),
    "gelu_10": Function(_gelu_10, _gelu_10_slope),
    "quick_gelu": Function(*_times_sigmoid(QUICK_GELU_SLOPE)),
    "silu": Function(*_times_sigmoid(1.0)),
    "relu": Function(torch.relu, _relu_slope),
    "relu2": Function(lambda x: torch.relu(x) ** 2, lambda x: 2 * torch.relu(x)),
    "relu6": Function(lambda x: x.clamp(0.0, 6.0), _relu6_slope, any_at_nan=True),
    "leaky_relu": Function(_leaky_relu, _leaky_relu_slope),
    "elu": Function(_elu, _elu_slope, any_at_nan=True),
    "sigmoid": Function(torch.sigmoid, _sigmoid_slope),
    "tanh": Function(torch.tanh, _tanh_slope),
    "softplus": Function(_softplus, torch.sigmoid),
    "mish": Function(_mish, _mish_slope),
    "hardswish": Function(_hardswish, _hardswish_slope, any_at_nan=True),
    "laplace": Function(_laplace, _laplace_slope, center=LAPLACE_MEAN),
    "identity": Function(lambda x: x, torch.ones_like),
}
"""Every canonical activation name of `mlpdsl.names.ACTIVATIONS` to its function."""
