"""Naive formulas that break in float32, and where."""

from __future__ import annotations

import torch

from tests.functions.activations import SQRT_2, Activation, bent_identity, gelu_new, golu, squareplus, telu


def naive_swish(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-x): the derivative is inf / inf once e^-x overflows."""
    return x / (1 + torch.exp(-x))


def naive_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """e^x / (1 + e^x): inf / inf."""
    return torch.exp(x) / (1 + torch.exp(x))


def naive_softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x): inf to the right; to the left, 1 + e^x is 1."""
    return torch.log(1 + torch.exp(x))


def naive_tanh(x: torch.Tensor) -> torch.Tensor:
    """(e^x - e^-x) / (e^x + e^-x): inf / inf."""
    return (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x))


def naive_mish(x: torch.Tensor) -> torch.Tensor:
    """x * tanh(log(1 + e^x)): the derivative is 0 * inf."""
    return x * torch.tanh(torch.log(1 + torch.exp(x)))


def rational_mish(x: torch.Tensor) -> torch.Tensor:
    """Mish by one exponential, x * (e^2x + 2e^x) / (e^2x + 2e^x + 2), which overflows from 44.4 on."""
    n = torch.exp(x) * (torch.exp(x) + 2)
    return x * n / (n + 2)


def naive_log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """log(sigmoid(x)): the logarithm of 0."""
    return torch.log(torch.sigmoid(x))


def naive_log_cosh(x: torch.Tensor) -> torch.Tensor:
    """log(cosh(x)): cosh overflows."""
    return torch.log(torch.cosh(x))


def naive_asinh(x: torch.Tensor) -> torch.Tensor:
    """log(x + sqrt(x^2 + 1)): the logarithm of 0 to the left."""
    return torch.log(x + torch.sqrt(x * x + 1))


def naive_elu(x: torch.Tensor) -> torch.Tensor:
    """where(x > 0, x, e^x - 1): the side not taken overflows, and its derivative is 0 * inf."""
    return torch.where(x > 0, x, torch.exp(x) - 1)


def masked_root(x: torch.Tensor) -> torch.Tensor:
    """where(x > 0, sqrt(x), 0): the side not taken is the root of a negative number."""
    return torch.where(x > 0, torch.sqrt(x), 0.0)


def root_of_square(x: torch.Tensor) -> torch.Tensor:
    """sqrt(x * x) for |x|: the square underflows."""
    return torch.sqrt(x * x)


def naive_sinc(x: torch.Tensor) -> torch.Tensor:
    """sin(x) / x at its removable point."""
    return torch.sin(x) / x


def naive_gelu_tail(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + erf(x / sqrt 2)): 1 + erf is 0 to the left."""
    return 0.5 * x * (1 + torch.erf(x / SQRT_2))


def naive_elu_near_zero(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 near 0."""
    return torch.exp(x) - 1


def smooth_sign(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(1 + x^2): 0 for 1 once the square overflows."""
    return x / torch.sqrt(1 + x * x)


# Each input is one at which float32 gives NaN, an infinity or no correct digit, of the value or of the derivative.
UNSTABLE: dict[str, tuple[Activation, float]] = {
    "naive_swish": (naive_swish, -89.0),
    "naive_sigmoid": (naive_sigmoid, 89.0),
    "naive_softplus_right": (naive_softplus, 89.0),
    "naive_softplus_left": (naive_softplus, -20.0),
    "naive_tanh": (naive_tanh, -89.0),
    "naive_mish": (naive_mish, 89.0),
    "rational_mish": (rational_mish, 45.0),
    "naive_log_sigmoid": (naive_log_sigmoid, -120.0),
    "naive_log_cosh": (naive_log_cosh, 100.0),
    "naive_asinh": (naive_asinh, -10000.0),
    "naive_elu_side_not_taken": (naive_elu, 100.0),
    "naive_elu_near_zero": (naive_elu_near_zero, -1e-9),
    "masked_root": (masked_root, -1.0),
    "root_of_square": (root_of_square, 1e-25),
    "naive_sinc": (naive_sinc, 0.0),
    "naive_gelu_tail": (naive_gelu_tail, -8.0),
    "smooth_sign": (smooth_sign, 1e20),
    "bent_identity": (bent_identity, 1e20),
    "squareplus": (squareplus, -10000.0),
    "telu": (telu, 100.0),
    "gelu_new": (gelu_new, 1e20),
    "golu": (golu, -100.0),
}
