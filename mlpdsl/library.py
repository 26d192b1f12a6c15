"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

import torch
from torch import Tensor

from mlpdsl.precision import exactly
from mlpdsl.tape import recorder

__all__ = ["multiply", "product"]


def product(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + addend, summed in float32 and rounded once; in 16 bits the product may be rounded before a
    bias is added to it.

    The addend is a bias (N,), or, in float32 alone, `out` itself: to a tile in 16 bits cuBLAS always adds the rounded product."""
    recording = recorder()
    if recording is not None:
        recording.multiplied(a, b, out, addend)
    multiply(a, b, out, addend)


def multiply(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
    """The same, which no recording is told of."""
    if out.device.type == "cpu":  # where kernels are interpreted: as a GPU does it
        wide = a.float() @ b.float()
        out.copy_(wide if addend is None else wide + addend.float())
    elif addend is None:
        exactly(torch.mm, a, b, out=out, dtype=out.dtype)
    else:
        exactly(torch.addmm, addend, a, b, out=out, dtype=out.dtype)
