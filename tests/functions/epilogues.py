"""Epilogues: functions of the output tile and operands, with the kind of each operand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


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
