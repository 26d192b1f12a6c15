"""Activations of one tensor, by the formulas of the papers that named them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]

SQRT_2: Final = math.sqrt(2.0)
SQRT_2_OVER_PI: Final = math.sqrt(2.0 / math.pi)
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805
SIREN_OMEGA = 30.0


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


def gelu_bert(x: torch.Tensor) -> torch.Tensor:
    """GELU by erf, as in BERT's first code (Hendrycks and Gimpel 2016)."""
    return x * 0.5 * (1.0 + torch.erf(x / SQRT_2))


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh, as in GPT-2 and transformers' NewGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """transformers' FastGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """QuickGELU (CLIP)."""
    return x * torch.sigmoid(1.702 * x)


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


def cone(x: torch.Tensor, beta: float = 1.5) -> torch.Tensor:
    """Cone (Noel et al. 2022): 1 - |x - 1|^beta, a power that is no whole number."""
    return 1 - torch.abs(x - 1) ** beta


FORMULAS: dict[str, Activation] = {
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
    "gelu_bert": gelu_bert,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "quick_gelu": quick_gelu,
    "golu": golu,
    "log_log": log_log,
    "xatlu": xatlu,
    "sinlu": sinlu,
    "lecun_tanh": lecun_tanh,
    "soft_clip": soft_clip,
    "cone": cone,
}
