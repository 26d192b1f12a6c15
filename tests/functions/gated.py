"""Activations of (gate, up)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from tests.functions.activations import xielu

Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
