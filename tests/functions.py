"""Functions as users write them, from papers and well-known model code: what mlpdsl must print, refuse or warn of.

Written without a look at the code generator, so that it also holds what that does not cover. There are no tests here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]
Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SQRT_2: Final = math.sqrt(2.0)
SQRT_2_OVER_PI: Final = math.sqrt(2.0 / math.pi)
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805
SIREN_OMEGA = 30.0

# ---------------------------------------------------------------------------------------------------------------------
# Activations of one tensor
# ---------------------------------------------------------------------------------------------------------------------


def star_relu(x: torch.Tensor, scale: float = 0.8944271909999159, bias: float = -0.4472135954999579) -> torch.Tensor:
    """StarReLU of MetaFormer baselines (Yu et al. 2022): s * relu(x)^2 + b."""
    return scale * F.relu(x) ** 2 + bias


def squareplus(x: torch.Tensor, b: float = 4.0) -> torch.Tensor:
    """Squareplus (Barron 2021)."""
    return (x + torch.sqrt(x**2 + b)) / 2


def telu(x: torch.Tensor) -> torch.Tensor:
    """TeLU (Fernandez and Mali 2024)."""
    return x * torch.tanh(torch.exp(x))


def tanh_exp(x: torch.Tensor) -> torch.Tensor:
    """TanhExp (Liu and Di 2020), with the cut of its authors' code against overflow."""
    return torch.where(x > 20, x, x * x.clamp(max=20.0).exp().tanh())


def lisht(x: torch.Tensor) -> torch.Tensor:
    """LiSHT (Roy et al. 2019)."""
    return x * x.tanh()


def phish(x: torch.Tensor) -> torch.Tensor:
    """Phish (Naveen 2022): x * tanh(gelu(x))."""
    return x * torch.tanh(F.gelu(x))


def smish(x: torch.Tensor) -> torch.Tensor:
    """Smish (Wang et al. 2022)."""
    return x * torch.tanh(torch.log(1 + torch.sigmoid(x)))


def logish(x: torch.Tensor) -> torch.Tensor:
    """Logish (Zhu et al. 2021)."""
    return x * torch.log1p(x.sigmoid())


def serf(x: torch.Tensor) -> torch.Tensor:
    """Serf (Nag and Bhattacharyya 2021): x * erf(softplus(x))."""
    return x * torch.erf(F.softplus(x))


def softsign(x: torch.Tensor) -> torch.Tensor:
    """Softsign (Bergstra et al. 2009)."""
    return x / (1 + x.abs())


def isru(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """ISRU (Carlile et al. 2017)."""
    return x * torch.rsqrt(1 + alpha * x * x)


def isrlu(x: torch.Tensor, *, alpha: float = 3.0) -> torch.Tensor:
    """ISRLU (Carlile et al. 2017)."""
    return torch.where(x < 0, x / torch.sqrt(1 + alpha * x.square()), x)


def elish(x: torch.Tensor) -> torch.Tensor:
    """ELiSH (Basirat and Roth 2018)."""
    return torch.where(x >= 0, x * x.sigmoid(), (torch.exp(torch.clamp(x, max=0)) - 1) * x.sigmoid())


def _hard_gate(x: torch.Tensor) -> torch.Tensor:
    return torch.max(torch.zeros_like(x), torch.min(torch.ones_like(x), (x + 1) / 2))


def hard_elish(x: torch.Tensor) -> torch.Tensor:
    """HardELiSH (Basirat and Roth 2018), by a helper with torch.max and torch.min of two tensors."""
    return torch.where(x >= 0, x, torch.expm1(x)) * _hard_gate(x)


def bent_identity(x: torch.Tensor) -> torch.Tensor:
    """Bent identity (Wikipedia's table of activation functions)."""
    return (torch.sqrt(x.pow(2) + 1) - 1) / 2 + x


def gcu(x: torch.Tensor) -> torch.Tensor:
    """Growing cosine unit (Noel et al. 2021)."""
    return x * torch.cos(x)


def snake(x: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """Snake (Ziyin et al. 2020; BigVGAN, DAC): x + sin^2(alpha x) / alpha."""
    return x + (1.0 / (alpha + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)


def gaussian(x: torch.Tensor, sigma: float = 1.5) -> torch.Tensor:
    """Gaussian activation of coordinate networks (Ramasinghe and Lucey 2022)."""
    return (-0.5 * x**2 / sigma**2).exp()


def gabor(x: torch.Tensor, omega: float = 10.0, scale: float = 3.0) -> torch.Tensor:
    """The real Gabor wavelet of WIRE (Saragadam et al. 2023)."""
    return torch.cos(omega * x) * torch.exp(-((scale * x) ** 2))


def siren(x: torch.Tensor) -> torch.Tensor:
    """SIREN's sine (Sitzmann et al. 2020), scaled by a module-level constant."""
    return torch.sin(SIREN_OMEGA * x)


def finer(x: torch.Tensor, omega: float = 30.0) -> torch.Tensor:
    """FINER's sine of variable period (Liu et al. 2024), with the scale under no_grad as in the authors' code."""
    with torch.no_grad():
        scale = torch.abs(x) + 1
    return torch.sin(omega * scale * x)


def selu(x: torch.Tensor) -> torch.Tensor:
    """SELU (Klambauer et al. 2017), spelled out with its constants."""
    return SELU_SCALE * torch.where(x > 0, x, SELU_ALPHA * torch.expm1(x))


def celu(x: torch.Tensor, alpha: float = 1.3) -> torch.Tensor:
    """CELU (Barron 2017) as its paper writes it."""
    return torch.clamp(x, min=0) + torch.clamp(alpha * (torch.exp(torch.clamp(x, max=0) / alpha) - 1), max=0)


def sqnl(x: torch.Tensor) -> torch.Tensor:
    """SQNL, the square non-linearity (Wuraola and Patel 2018), by nested torch.where with Python numbers."""
    inner = torch.where(x >= 0, x - x * x / 4, x + x * x / 4)
    return torch.where(x > 2, 1.0, torch.where(x < -2, -1.0, inner))


def soft_exponential(x: torch.Tensor, alpha: float = 0.3) -> torch.Tensor:
    """SoftExponential (Godfrey and Gashler 2015): Python control flow on a constant, which is no data."""
    if alpha == 0.0:
        return x
    if alpha < 0.0:
        return -torch.log(1 - alpha * (x + alpha)) / alpha
    return (torch.exp(alpha * x) - 1) / alpha + alpha


def hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Hard sigmoid as MobileNetV3 has it (Howard et al. 2019)."""
    return F.relu6(x + 3.0) / 6.0


def hard_swish(x: torch.Tensor) -> torch.Tensor:
    """Hard swish of MobileNetV3 (Howard et al. 2019), by clip and true division."""
    return x * (x + 3).clip(0, 6).div(6)


def tanhshrink(x: torch.Tensor) -> torch.Tensor:
    """Tanhshrink (torch's own)."""
    return x - torch.tanh(x)


def arctan(x: torch.Tensor) -> torch.Tensor:
    """The arctan surrogate of spiking networks (Fang et al. 2021)."""
    return torch.atan(math.pi / 2 * x) / math.pi + 0.5


def asinh(x: torch.Tensor) -> torch.Tensor:
    """The inverse hyperbolic sine, symlog's smooth relative (e.g. for value heads)."""
    return torch.asinh(x)


def symlog(x: torch.Tensor) -> torch.Tensor:
    """Symlog of DreamerV3 (Hafner et al. 2023)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def value_rescale(x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """The value rescaling of R2D2 (Kapturowski et al. 2019; Pohlen et al. 2018)."""
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + eps * x


def pelu(x: torch.Tensor, a: float = 1.2, b: float = 0.8) -> torch.Tensor:
    """PELU (Trottier et al. 2016), constants for its parameters."""
    return torch.where(x >= 0, (a / b) * x, a * (torch.exp(torch.clamp(x, max=0.0) / b) - 1))


def xielu(x: torch.Tensor, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> torch.Tensor:
    """xIELU (Huang and Schlag 2024; Apertus), constants for its parameters."""
    return torch.where(x > 0, alpha_p * x * x + beta * x, (torch.expm1(torch.clamp(x, max=eps)) - x) * alpha_n + beta * x)


def relu_squared_capped(x: torch.Tensor, cap: float = 36.0) -> torch.Tensor:
    """Squared ReLU (Primer, So et al. 2021; Nemotron) with a cap against outliers."""
    return torch.square(F.relu(x)).clamp(max=cap)


def softcap(x: torch.Tensor, cap: float = 30.0) -> torch.Tensor:
    """Soft capping (Gemma 2): c * tanh(x / c)."""
    x = x / cap
    x = torch.tanh(x)
    x = x * cap
    return x


def nipuna(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Nipuna (Madhu et al. 2023): max(x * sigmoid(beta x), x)."""
    return torch.maximum(x * torch.sigmoid(beta * x), x)


def swish_beta(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Swish with a fixed beta (Ramachandran et al. 2017; EvoNorm's numerator)."""
    return x * torch.sigmoid(beta * x)


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


def gelu_bert(x: torch.Tensor) -> torch.Tensor:
    """GELU by erf, as in BERT's first code (Hendrycks and Gimpel 2016)."""
    return x * 0.5 * (1.0 + torch.erf(x / SQRT_2))


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh, as in GPT-2 and transformers' NewGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """transformers' FastGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_tensor_constant(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh with a constant tensor made inside the function, as in many copies of GPT-2's code."""
    return 0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2.0 / math.pi)) * (x + 0.044715 * x**3)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """QuickGELU (CLIP)."""
    return x * torch.sigmoid(1.702 * x)


def silu_upcast(x: torch.Tensor) -> torch.Tensor:
    """SiLU computed in float32 and cast back, as transformers' code often has it (so no finer than float32)."""
    y = x.to(torch.float32)
    return (y / (1 + torch.exp(-y.clamp(min=-60.0)))).type_as(x)


def golu(x: torch.Tensor) -> torch.Tensor:
    """GoLU (Das et al. 2025): x * exp(-exp(-x))."""
    return x * torch.exp(-torch.exp(-x))


def log_log(x: torch.Tensor) -> torch.Tensor:
    """The complementary log-log (Gomes and Ludermir 2008)."""
    return 1 - torch.exp(-torch.exp(x))


def xatlu(x: torch.Tensor, alpha: float = 0.2) -> torch.Tensor:
    """xATLU, an expanded arctan gate (Huang 2024)."""
    gate = (torch.arctan(x) + math.pi / 2) / math.pi
    return x * (gate * (1 + 2 * alpha) - alpha)


def sinlu(x: torch.Tensor, a: float = 1.0, b: float = 1.0) -> torch.Tensor:
    """SinLU (Paul et al. 2022)."""
    return (x + a * torch.sin(b * x)) * torch.sigmoid(x)


def lecun_tanh(x: torch.Tensor) -> torch.Tensor:
    """LeCun's scaled tanh (Efficient BackProp 1998)."""
    return 1.7159 * torch.tanh(2 / 3 * x)


def soft_clip(x: torch.Tensor, p: float = 4.0) -> torch.Tensor:
    """Soft clipping (Klimek and Perelstein 2018)."""
    return (F.softplus(p * x) - F.softplus(p * (x - 1))) / p


def softplus_logaddexp(x: torch.Tensor) -> torch.Tensor:
    """Softplus by logaddexp, as JAX has it."""
    return torch.logaddexp(x, torch.zeros_like(x))


def cone(x: torch.Tensor, beta: float = 1.5) -> torch.Tensor:
    """Cone (Noel et al. 2022): 1 - |x - 1|^beta, a power that is no whole number."""
    return 1 - torch.abs(x - 1) ** beta


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


ACTIVATIONS: dict[str, Activation] = {
    "star_relu": star_relu,
    "squareplus": squareplus,
    "telu": telu,
    "tanh_exp": tanh_exp,
    "lisht": lisht,
    "phish": phish,
    "smish": smish,
    "logish": logish,
    "serf": serf,
    "softsign": softsign,
    "isru": isru,
    "isrlu": isrlu,
    "elish": elish,
    "hard_elish": hard_elish,
    "bent_identity": bent_identity,
    "gcu": gcu,
    "snake": snake,
    "gaussian": gaussian,
    "gabor": gabor,
    "siren": siren,
    "finer": finer,
    "selu": selu,
    "celu": celu,
    "sqnl": sqnl,
    "soft_exponential": soft_exponential,
    "hard_sigmoid": hard_sigmoid,
    "hard_swish": hard_swish,
    "tanhshrink": tanhshrink,
    "arctan": arctan,
    "asinh": asinh,
    "symlog": symlog,
    "value_rescale": value_rescale,
    "pelu": pelu,
    "xielu": xielu,
    "relu_squared_capped": relu_squared_capped,
    "softcap": softcap,
    "nipuna": nipuna,
    "swish_beta_partial": partial(swish_beta, beta=1.5),
    "leaky_where": leaky_where,
    "leaky_masked": leaky_masked,
    "relu_to_mask": relu_to_mask,
    "band_pass": band_pass,
    "gelu_bert": gelu_bert,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_tensor_constant": gelu_tensor_constant,
    "quick_gelu": quick_gelu,
    "silu_upcast": silu_upcast,
    "golu": golu,
    "log_log": log_log,
    "xatlu": xatlu,
    "sinlu": sinlu,
    "lecun_tanh": lecun_tanh,
    "soft_clip": soft_clip,
    "softplus_logaddexp": softplus_logaddexp,
    "cone": cone,
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

# ---------------------------------------------------------------------------------------------------------------------
# Activations of (gate, up)
# ---------------------------------------------------------------------------------------------------------------------


def gpt_oss_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    """The clamped SwiGLU of gpt-oss (OpenAI 2025)."""
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    glu = gate * torch.sigmoid(gate * alpha)
    return (up + 1) * glu


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020; Llama)."""
    return F.silu(gate) * up


def geglu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """GEGLU by tanh (Shazeer 2020; Gemma)."""
    return F.gelu(gate, approximate="tanh") * up


def reglu_squared(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Squared ReGLU (Zhang et al. 2024, "ReLU^2 wins"; BitNet b1.58 2B4T)."""
    return F.relu(gate).pow(2) * up


def bilinear_capped(gate: torch.Tensor, up: torch.Tensor, cap: float = 50.0) -> torch.Tensor:
    """The bilinear unit (Dauphin et al. 2017; Shazeer 2020) under a tanh cap."""
    return cap * torch.tanh(gate * up / cap)


def swiglu_up_clamped(gate: torch.Tensor, up: torch.Tensor, limit: float = 10.0) -> torch.Tensor:
    """SwiGLU with both inputs clamped, as late large mixtures of experts have it."""
    return F.silu(torch.clamp(gate, max=limit)) * torch.clamp(up, -limit, limit)


def gated_snake(gate: torch.Tensor, up: torch.Tensor, a: float = 1.5) -> torch.Tensor:
    """Snake (Ziyin et al. 2020) as the gate."""
    return (gate + torch.sin(a * gate).square() / a) * up


def wavenet(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gated unit of WaveNet and PixelCNN (van den Oord et al. 2016)."""
    return gate.sigmoid() * up.tanh()


def maxout(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Maxout of two pieces (Goodfellow et al. 2013)."""
    return torch.max(gate, up)


def max_feature_map_smooth(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A smooth maximum of two, log(e^a + e^b) (after LightCNN's max feature map, Wu et al. 2015)."""
    return torch.logaddexp(gate, up)


def xielu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """xIELU (Huang and Schlag 2024) as the gate: a function of this file inside another."""
    return xielu(gate, alpha_n=0.6) * up


def gated_tensor_mix(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The update of a minimal gated recurrent unit (Feng et al. 2024): a blend by the gate."""
    g = torch.sigmoid(gate)
    return torch.lerp(gate, torch.where(up >= 0, up + 0.5, torch.sigmoid(up)), g)


def swiglu_tanh_capped(gate: torch.Tensor, up: torch.Tensor, beta: float = 8.0, linear_beta: float = 20.0) -> torch.Tensor:
    """SwiGLU with a tanh cap on each side, the smooth relative of gpt-oss's clamps."""
    capped_gate = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
    return capped_gate * (linear_beta * (up / linear_beta).tanh())


def polar_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Amplitude and phase of a complex pair without complex numbers (after modReLU, Arjovsky et al. 2016)."""
    radius = torch.sqrt(gate * gate + up * up + 1e-6)
    return F.relu(radius - 0.1) * torch.cos(torch.atan2(up, gate)) / 2


GATED: dict[str, Gated] = {
    "gpt_oss_swiglu": gpt_oss_swiglu,
    "swiglu": swiglu,
    "geglu_tanh": geglu_tanh,
    "reglu_squared": reglu_squared,
    "bilinear_capped": bilinear_capped,
    "swiglu_up_clamped": swiglu_up_clamped,
    "gated_snake": gated_snake,
    "wavenet": wavenet,
    "maxout": maxout,
    "max_feature_map_smooth": max_feature_map_smooth,
    "xielu_gated": xielu_gated,
    "gated_tensor_mix": gated_tensor_mix,
    "swiglu_tanh_capped": swiglu_tanh_capped,
    "polar_gate": polar_gate,
    "gpt_oss_swiglu_partial": partial(gpt_oss_swiglu, alpha=1.0, limit=5.0),
    "product": torch.mul,
    "geglu_lambda": lambda gate, up: F.gelu(gate) * up,
}

# ---------------------------------------------------------------------------------------------------------------------
# Epilogues
# ---------------------------------------------------------------------------------------------------------------------


def layer_scale_drop_path(
    x: torch.Tensor, gamma: torch.Tensor, residual: torch.Tensor, keep: torch.Tensor, keep_prob: float = 0.9
) -> torch.Tensor:
    """LayerScale (Touvron et al. 2021), stochastic depth (Huang et al. 2016) by a mask of rows, and the residual."""
    return residual + gamma * x * keep.div(keep_prob)


def dynamic_tanh(x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """DyT (Zhu et al. 2025): tanh(alpha x) * gamma + beta."""
    x = torch.tanh(alpha * x)
    return x * gamma + beta


def dynamic_erf(x: torch.Tensor, alpha: torch.Tensor, s: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Derf (Chen et al. 2025): erf(alpha x + s) * gamma + beta."""
    return torch.erf(alpha * x + s) * gamma + beta


def softcap_logits(logits: torch.Tensor, softcapping: float = 30.0) -> torch.Tensor:
    """The logits' soft cap of Gemma 2, with no operand."""
    return softcapping * torch.tanh(logits / softcapping)


def film(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """FiLM (Perez et al. 2018; DiT's modulate): x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def rezero(x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """ReZero (Bachlechner et al. 2020)."""
    return residual + gate * x


def tanh_gated_residual(x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The tanh gate of Flamingo's cross layers (Alayrac et al. 2022; Llama 3.2 Vision)."""
    return residual + gate.tanh() * x


def highway(x: torch.Tensor, gate: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
    """The highway network's mix (Srivastava et al. 2015), the gate's logits a tile."""
    t = torch.sigmoid(gate)
    return t * torch.relu(x) + (1.0 - t) * carry


def squared_error(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared error to a target tile."""
    return (x - target).square()


def smooth_l1_error(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The Huber error to a target tile, weighted by row (the critic's loss of DQN with prioritised replay)."""
    return weight * F.smooth_l1_loss(x, target, reduction="none", beta=0.5)


def binary_cross_entropy(x: torch.Tensor, target: torch.Tensor, pos_weight: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with logits in its stable form, positive weights by column."""
    log_weight = (pos_weight - 1) * target + 1
    return (1 - target) * x + log_weight * (torch.log1p(torch.exp(-torch.abs(x))) + F.relu(-x))


def sigmoid_contrast(x: torch.Tensor, sign: torch.Tensor, temperature: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's pairwise loss (Zhai et al. 2023): -log sigmoid(sign * (x * exp(t) + b))."""
    return -F.logsigmoid(sign * (x * temperature.exp() + bias))


def temperature_log_sigmoid(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """A temperature, then log-sigmoid."""
    return F.logsigmoid(x / temperature)


def clamp_columns(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Limits by column (activation ranges of quantisation-aware training)."""
    return torch.minimum(torch.maximum(x, low), high)


def mask_where(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A tile kept where a mask is set."""
    return torch.where(mask > 0.5, x, 0.0)


def bias_gelu_dropout(x: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Megatron's bias, GELU and dropout, with a mask drawn outside."""
    y = x + bias
    return F.gelu(y, approximate="tanh") * mask / 0.9


def snake_columns(x: torch.Tensor, log_alpha: torch.Tensor, log_beta: torch.Tensor) -> torch.Tensor:
    """SnakeBeta of BigVGAN (Lee et al. 2023), its logarithmic parameters by column."""
    alpha = torch.exp(log_alpha)
    beta = torch.exp(log_beta)
    return x + (1.0 / (beta + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)


def prelu_columns(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """PReLU (He et al. 2015), a slope by column."""
    return torch.where(x >= 0, x, slope * x)


def norm_rows(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """A layer norm whose statistics by row come from elsewhere, with weight and bias by column."""
    return (x - mean) * torch.rsqrt(variance.abs() + 1e-5) * weight + bias


def expert_combine(x: torch.Tensor, router: torch.Tensor, shared: torch.Tensor, shared_gate: torch.Tensor) -> torch.Tensor:
    """An expert's output by its router weight, and the shared expert by its gate's logit (Qwen2-MoE)."""
    return router * x + torch.sigmoid(shared_gate) * shared


def dequantise(x: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor) -> torch.Tensor:
    """The scales of rows and columns of an 8-bit product (LLM.int8, Dettmers et al. 2022)."""
    return x * row_scale * column_scale


def lion_tile(x: torch.Tensor, momentum: torch.Tensor, weight: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Lion's update of a weight tile (Chen et al. 2023), the gradient being the output tile."""
    update = torch.sign(0.9 * momentum + 0.1 * x)
    return weight * (1 - rate * 0.1) - rate * update


Epilogue = tuple[Callable[..., torch.Tensor], dict[str, str]]

EPILOGUES: dict[str, Epilogue] = {
    "layer_scale_drop_path": (layer_scale_drop_path, {"gamma": "column", "residual": "tile", "keep": "row"}),
    "dynamic_tanh": (dynamic_tanh, {"alpha": "scalar", "gamma": "column", "beta": "column"}),
    "dynamic_erf": (dynamic_erf, {"alpha": "scalar", "s": "scalar", "gamma": "column", "beta": "column"}),
    "softcap_logits": (softcap_logits, {}),
    "film": (film, {"scale": "column", "shift": "column"}),
    "rezero": (rezero, {"residual": "tile", "gate": "scalar"}),
    "tanh_gated_residual": (tanh_gated_residual, {"residual": "tile", "gate": "scalar"}),
    "highway": (highway, {"gate": "tile", "carry": "tile"}),
    "squared_error": (squared_error, {"target": "tile"}),
    "smooth_l1_error": (smooth_l1_error, {"target": "tile", "weight": "row"}),
    "binary_cross_entropy": (binary_cross_entropy, {"target": "tile", "pos_weight": "column"}),
    "sigmoid_contrast": (sigmoid_contrast, {"sign": "tile", "temperature": "scalar", "bias": "scalar"}),
    "temperature_log_sigmoid": (temperature_log_sigmoid, {"temperature": "scalar"}),
    "clamp_columns": (clamp_columns, {"low": "column", "high": "column"}),
    "mask_where": (mask_where, {"mask": "tile"}),
    "bias_gelu_dropout": (bias_gelu_dropout, {"bias": "column", "mask": "tile"}),
    "snake_columns": (snake_columns, {"log_alpha": "column", "log_beta": "column"}),
    "prelu_columns": (prelu_columns, {"slope": "column"}),
    "norm_rows": (norm_rows, {"mean": "row", "variance": "row", "weight": "column", "bias": "column"}),
    "expert_combine": (expert_combine, {"router": "row", "shared": "tile", "shared_gate": "row"}),
    "dequantise": (dequantise, {"row_scale": "row", "column_scale": "column"}),
    "lion_tile": (lion_tile, {"momentum": "tile", "weight": "tile", "rate": "scalar"}),
}

# ---------------------------------------------------------------------------------------------------------------------
# What is to be refused
# ---------------------------------------------------------------------------------------------------------------------

CAPTURED = torch.tensor([0.25])


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension."""
    return torch.softmax(x, dim=-1)


def centred(x: torch.Tensor) -> torch.Tensor:
    """x less its mean."""
    return x - x.mean(dim=-1, keepdim=True)


def unit_norm(x: torch.Tensor) -> torch.Tensor:
    """x over its norm."""
    norm: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / norm


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm, by torch's own function."""
    return F.rms_norm(x, (x.shape[-1],))


def max_scaled(x: torch.Tensor) -> torch.Tensor:
    """x over its greatest absolute value, as in dynamic quantisation."""
    return x / x.abs().amax()


def cumulative(x: torch.Tensor) -> torch.Tensor:
    """A cumulative sum."""
    return torch.cumsum(x, dim=-1)


def sorted_columns(x: torch.Tensor) -> torch.Tensor:
    """Sorted values (GroupSort, Anil et al. 2019)."""
    return torch.sort(x, dim=-1).values


def k_winners(x: torch.Tensor) -> torch.Tensor:
    """k winners take all (Xiao et al. 2020)."""
    return x * (x >= torch.topk(x, 2, dim=-1).values[..., -1:])


def packed_glu(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of a packed tensor."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved_glu(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of interleaved columns, as gpt-oss packs them."""
    return F.silu(x[..., ::2]) * x[..., 1::2]


def reshaped(x: torch.Tensor) -> torch.Tensor:
    """A flattened tensor."""
    return torch.tanh(x).reshape(-1)


def one_column(x: torch.Tensor) -> torch.Tensor:
    """The first column alone."""
    return x[:, :1].sigmoid()


def gained_dimension(x: torch.Tensor) -> torch.Tensor:
    """A dimension more."""
    return torch.relu(x).unsqueeze(-1)


def concatenated_relu(x: torch.Tensor) -> torch.Tensor:
    """CReLU (Shang et al. 2016)."""
    return torch.cat((F.relu(x), F.relu(-x)), dim=-1)


def shifted_tokens(x: torch.Tensor) -> torch.Tensor:
    """A shift along the rows (RWKV's token shift): not elementwise, though the shape is the same."""
    return 0.5 * x + 0.5 * torch.roll(x, 1, dims=0)


def doubly_transposed(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A product of matrices between the inputs."""
    return gate @ (up.transpose(-1, -2) @ up)


def branch_on_sum(x: torch.Tensor) -> torch.Tensor:
    """A branch on the data."""
    if x.sum() > 0:
        return torch.relu(x)
    return x


def halve_until_small(x: torch.Tensor) -> torch.Tensor:
    """A loop on the data."""
    while x.abs().max() > 1:
        x = x * 0.5
    return x


def item_of_data(x: torch.Tensor) -> torch.Tensor:
    """A number read from the data."""
    return x * float(x.abs().max().item())


def boolean_indexed(x: torch.Tensor) -> torch.Tensor:
    """The positive entries alone, a shape that depends on the data."""
    return x[x > 0]


def dropped_out(x: torch.Tensor) -> torch.Tensor:
    """Dropout."""
    return F.dropout(F.gelu(x), p=0.1, training=True)


def noisy(x: torch.Tensor) -> torch.Tensor:
    """Uniform noise."""
    return x + 0.01 * torch.rand_like(x)


def gumbel_gate(x: torch.Tensor) -> torch.Tensor:
    """A relaxed Bernoulli gate."""
    return x * torch.sigmoid(x + torch.randn(x.shape, dtype=x.dtype, device=x.device))


def rrelu_training(x: torch.Tensor) -> torch.Tensor:
    """RReLU in training (Xu et al. 2015)."""
    return F.rrelu(x, 0.1, 0.3, training=True)


def python_random(x: torch.Tensor) -> torch.Tensor:
    """A number drawn by Python: not a pure function, though each trace of it is."""
    return x * (1.0 + 0.1 * random.random())


def captured_global(x: torch.Tensor) -> torch.Tensor:
    """PReLU with a tensor of the module."""
    return F.prelu(x, CAPTURED.to(x.dtype))


def _captured_closure() -> Activation:
    beta = torch.tensor(1.5, requires_grad=True)

    def learnable_swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(beta * x)

    return learnable_swish


def through_numpy(x: torch.Tensor) -> torch.Tensor:
    """A call through NumPy."""
    return torch.from_numpy(abs(x.detach().cpu().numpy())).to(x.device)


def integer_cast(x: torch.Tensor) -> torch.Tensor:
    """A parity of whole numbers."""
    return x * (x.int() & 1)


def fast_exp(x: torch.Tensor) -> torch.Tensor:
    """Schraudolph's exponential (1999), through the bits of a float."""
    return (12102203 * x.float() + 1064866805).to(torch.int32).view(torch.float32)


def fast_rsqrt_gate(x: torch.Tensor) -> torch.Tensor:
    """The fast inverse square root of 1 + x^2 (Quake III), through the bits of a float."""
    y = (1 + x * x).float()
    return x * (0x5F3759DF - (y.view(torch.int32) >> 1)).view(torch.float32)


def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors."""
    return torch.sin(x), torch.cos(x)


def python_number(x: torch.Tensor) -> float:
    """A number of Python's."""
    return 0.5 * x.dim()


def complex_phase(x: torch.Tensor) -> torch.Tensor:
    """WIRE's complex wavelet (Saragadam et al. 2023), its real part."""
    return torch.exp(1j * 10.0 * x - (3.0 * x).abs().square()).real


def _mutable_list() -> Activation:
    slopes = [0.1, 1.0]

    def by_list(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, slopes[0] * x, slopes[1] * x)

    return by_list


class _Schedule:
    """An object whose number changes as training goes on."""

    def __init__(self) -> None:
        self.beta = 1.0

    def step(self) -> None:
        self.beta *= 1.1


def _object_attribute() -> Activation:
    schedule = _Schedule()

    def annealed(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(schedule.beta * x)

    return annealed


Refused = tuple[Callable[..., object], int, str]

REFUSED: dict[str, Refused] = {
    "softmax": (softmax, 1, "reduction"),
    "centred": (centred, 1, "reduction"),
    "unit_norm": (unit_norm, 1, "reduction"),
    "rms_norm": (rms_norm, 1, "reduction"),
    "max_scaled": (max_scaled, 1, "reduction"),
    "cumulative": (cumulative, 1, "reduction"),
    "sorted_columns": (sorted_columns, 1, "reduction"),
    "k_winners": (k_winners, 1, "reduction"),
    "packed_glu": (packed_glu, 1, "shape"),
    "interleaved_glu": (interleaved_glu, 1, "shape"),
    "reshaped": (reshaped, 1, "shape"),
    "one_column": (one_column, 1, "shape"),
    "gained_dimension": (gained_dimension, 1, "shape"),
    "concatenated_relu": (concatenated_relu, 1, "shape"),
    "shifted_tokens": (shifted_tokens, 1, "shape"),
    "doubly_transposed": (doubly_transposed, 2, "shape"),
    "branch_on_sum": (branch_on_sum, 1, "control flow"),
    "halve_until_small": (halve_until_small, 1, "control flow"),
    "item_of_data": (item_of_data, 1, "control flow"),
    "boolean_indexed": (boolean_indexed, 1, "shape"),
    "dropped_out": (dropped_out, 1, "random"),
    "noisy": (noisy, 1, "random"),
    "gumbel_gate": (gumbel_gate, 1, "random"),
    "rrelu_training": (rrelu_training, 1, "random"),
    "python_random": (python_random, 1, "random"),
    "captured_global": (captured_global, 1, "captured"),
    "captured_closure": (_captured_closure(), 1, "captured"),
    "captured_parameter": (torch.nn.PReLU(), 1, "captured"),
    "through_numpy": (through_numpy, 1, "numpy"),
    "integer_cast": (integer_cast, 1, "integer"),
    "fast_exp": (fast_exp, 1, "integer"),
    "fast_rsqrt_gate": (fast_rsqrt_gate, 1, "integer"),
    "pair": (pair, 1, "tuple"),
    "python_number": (python_number, 1, "float"),
    "complex_phase": (complex_phase, 1, "complex"),
    "mutable_list": (_mutable_list(), 1, "fingerprint"),
    "object_attribute": (_object_attribute(), 1, "fingerprint"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Naive formulas that break in float32
# ---------------------------------------------------------------------------------------------------------------------


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
