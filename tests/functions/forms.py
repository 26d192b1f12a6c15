"""Activations of one tensor in every form that Python and torch allow: masks, loops, constants that are tensors, rarer
operations, stop-gradients, modules, closures, and torch's own functions as they are."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from tests.functions.activations import Activation


def leaky_where(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU (Maas et al. 2013), clipped above, by torch.where."""
    y = torch.where(x > 0, x, 0.01 * x)
    return torch.where(y > 6.0, torch.full_like(y, 6.0), y)


def leaky_masked(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU by products with comparisons, as in much NumPy-bred code."""
    return (x > 0) * x + (x <= 0) * (0.2 * x)


def relu_to_mask(x: torch.Tensor) -> torch.Tensor:
    """FATReLU (Kurtz et al. 2020): a mask of the tensor's own type, times the tensor."""
    mask = torch.gt(x, 0.1).to(x.dtype)
    return x * mask


def band_pass(x: torch.Tensor) -> torch.Tensor:
    """A window by joined comparisons (the rectangular surrogate of spiking networks, times x)."""
    inside = (x > -1.5) & ~(x >= 2.5) | torch.logical_and(x > 10, x < 12)
    return x.masked_fill(~inside, 0.0)


def gelu_tensor_constant(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh with a constant tensor made inside the function, as in many copies of GPT-2's code."""
    return 0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2.0 / math.pi)) * (x + 0.044715 * x**3)))


def silu_upcast(x: torch.Tensor) -> torch.Tensor:
    """SiLU computed in float32 and cast back, as transformers' code often has it (so no finer than float32)."""
    y = x.to(torch.float32)
    return (y / (1 + torch.exp(-y.clamp(min=-60.0)))).type_as(x)


def softplus_logaddexp(x: torch.Tensor) -> torch.Tensor:
    """Softplus by logaddexp, as JAX has it."""
    return torch.logaddexp(x, torch.zeros_like(x))


def rational(x: torch.Tensor) -> torch.Tensor:
    """A safe Pade activation unit (Molina et al. 2019) of degrees 3 and 2 with sample coefficients, by Horner's rule."""
    top = torch.zeros_like(x)
    for coefficient in (1.1915, 1.5957, 0.5, 0.0218):
        top = top * x + coefficient
    return top / (1 + torch.abs(x * (0.0 + x * 2.383)))


def chebyshev(x: torch.Tensor, degree: int = 4) -> torch.Tensor:
    """The sum of Chebyshev polynomials of tanh(x) (as ChebyKAN, SS et al. 2024), by a loop over a Python list."""
    t = torch.tanh(x)
    terms = [torch.ones_like(t), t]
    for _ in range(2, degree + 1):
        terms.append(2 * t * terms[-1] - terms[-2])
    return sum(terms[1:], start=terms[0]) / degree


def gaussian_mixture(x: torch.Tensor) -> torch.Tensor:
    """A sum of radial basis functions on a fixed grid (as FastKAN, Li 2024)."""
    out = 0.1 * F.silu(x)
    for i, centre in enumerate((-2.0, -1.0, 0.0, 1.0, 2.0)):
        out = out + (-1.0 if i % 2 else 1.0) * torch.exp(-(((x - centre) / 0.5) ** 2))
    return out


def exp2_swish(x: torch.Tensor) -> torch.Tensor:
    """Swish by powers of two, as kernels write it: 2^x through a Python base and torch.exp2 both."""
    return x * torch.reciprocal(1 + torch.exp2(-1.4426950408889634 * x.clamp(-60, 60))) + 0.0 * 2.0 ** x.clamp(max=1)


def smooth_l1(x: torch.Tensor) -> torch.Tensor:
    """Huber's function as an activation: the two sides of torch.where share |x|."""
    a = x.abs()
    return torch.where(a < 1, 0.5 * a * a, a - 0.5)


def log_cosh(x: torch.Tensor) -> torch.Tensor:
    """log cosh in its stable form."""
    return torch.abs(x) + F.softplus(-2.0 * torch.abs(x)) - math.log(2.0)


def normal_cdf_gate(x: torch.Tensor) -> torch.Tensor:
    """GELU through torch.special: x * ndtr(x)."""
    cdf: torch.Tensor = torch.special.ndtr(x)
    return x * cdf


def sinc_gate(x: torch.Tensor) -> torch.Tensor:
    """A sinc activation (Saratchandran et al. 2024), singular point handled by torch.where on both sides."""
    zero = x.abs() < 1e-3
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, 1 - x * x / 6, torch.sin(safe) / safe)


def hypot_swish(x: torch.Tensor) -> torch.Tensor:
    """An algebraic swish: half of x plus its smooth absolute value, by torch.hypot."""
    return 0.5 * (x + torch.hypot(x, torch.full_like(x, 0.25)))


def lerp_relu(x: torch.Tensor) -> torch.Tensor:
    """A blend of ReLU and SiLU as in activation morphing, by torch.lerp."""
    return torch.lerp(F.relu(x), F.silu(x), 0.25)


def fused_ops(x: torch.Tensor) -> torch.Tensor:
    """A cubic by torch.addcmul and torch.add with alpha (a residual bump), as optimised code writes it."""
    square = torch.mul(x, x)
    return torch.tanh(torch.addcmul(x, square, x, value=0.1)).add(x, alpha=0.05).sub(0.01)


def triangle_wave(x: torch.Tensor) -> torch.Tensor:
    """A triangle wave of period 4 (periodic activations, Meronen et al. 2021), by floor."""
    return 2 * torch.abs(2 * (x / 4 - torch.floor(x / 4 + 0.5))) - 1


def dorefa_ste(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """DoReFa's quantised activation (Zhou et al. 2016): its derivative is the straight-through one, by detach."""
    levels = 2**bits - 1
    y = x.clamp(0, 1)
    error: torch.Tensor = (torch.round(y * levels) / levels - y).detach()
    return y + error


class ClippedGELU(torch.nn.Module):
    """transformers' ClippedGELUActivation: a module of the user's own, with numbers and no parameters."""

    def __init__(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"low should be < high (got low: {low}, high: {high})")
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clip(F.gelu(x), self.low, self.high)


def make_shifted_relu(shift: float) -> Activation:
    """Shifted ReLU (Mirzadeh et al. 2023, "ReLU strikes back"), as a closure over a number."""

    def shifted_relu(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x - shift)

    return shifted_relu


FORMS: dict[str, Activation] = {
    "leaky_where": leaky_where,
    "leaky_masked": leaky_masked,
    "relu_to_mask": relu_to_mask,
    "band_pass": band_pass,
    "gelu_tensor_constant": gelu_tensor_constant,
    "silu_upcast": silu_upcast,
    "softplus_logaddexp": softplus_logaddexp,
    "rational": rational,
    "chebyshev": chebyshev,
    "gaussian_mixture": gaussian_mixture,
    "exp2_swish": exp2_swish,
    "smooth_l1": smooth_l1,
    "log_cosh": log_cosh,
    "normal_cdf_gate": normal_cdf_gate,
    "sinc_gate": sinc_gate,
    "hypot_swish": hypot_swish,
    "lerp_relu": lerp_relu,
    "fused_ops": fused_ops,
    "triangle_wave": triangle_wave,
    "dorefa_ste": dorefa_ste,
    "clipped_gelu_module": ClippedGELU(-10.0, 10.0),
    "shifted_relu_closure": make_shifted_relu(0.75),
    "squared_lambda": lambda x: x.relu().square(),
    # Functions and modules of torch as they are, with and without settings.
    "torch_sigmoid": torch.sigmoid,
    "torch_sin": torch.sin,
    "functional_silu": F.silu,
    "functional_mish": F.mish,
    "functional_logsigmoid": F.logsigmoid,
    "functional_softsign": F.softsign,
    "functional_relu6": F.relu6,
    "functional_hardswish": F.hardswish,
    "functional_gelu_tanh": partial(F.gelu, approximate="tanh"),
    "functional_softplus_beta": partial(F.softplus, beta=2.0, threshold=15.0),
    "functional_leaky_relu": partial(F.leaky_relu, negative_slope=0.1),
    "functional_elu": partial(F.elu, alpha=0.7),
    "functional_threshold": partial(F.threshold, threshold=0.5, value=-0.25),
    "functional_rrelu_evaluated": partial(F.rrelu, lower=0.1, upper=0.3, training=False),
    "module_silu": torch.nn.SiLU(),
    "module_selu": torch.nn.SELU(),
    "module_celu": torch.nn.CELU(0.5),
    "module_hardtanh": torch.nn.Hardtanh(-2.0, 2.0),
    "module_softshrink": torch.nn.Softshrink(0.3),
    "module_hardshrink": torch.nn.Hardshrink(0.4),
    "module_tanhshrink": torch.nn.Tanhshrink(),
    "module_logsigmoid": torch.nn.LogSigmoid(),
    "module_hardsigmoid": torch.nn.Hardsigmoid(),
    "module_sequence": torch.nn.Sequential(torch.nn.Softplus(), torch.nn.Tanh(), torch.nn.Identity()),
}
