"""Functions that cannot be fused: how many inputs each has, and a word of the reason."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.functions.activations import Activation

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
