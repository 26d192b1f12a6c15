"""The oracle's own activations, held against 50 digits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.functions import FUNCTIONS

mpf = mpmath.mpf


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
