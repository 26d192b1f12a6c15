"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlpdsl.tape import recorder

__all__ = ["product"]

_flags = threading.Lock()
"""Held from reading the flags to restoring them."""


def product(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + addend, summed in float32 and rounded once; in 16 bits the product may be rounded before a
    bias is added to it.

    The addend is a bias (N,), or, in float32 alone, `out` itself: to a tile in 16 bits cuBLAS always adds the rounded product."""
    recording = recorder()
    if recording is not None:
        recording.multiplied(a, b, out, addend)
    if out.device.type == "cpu":  # where kernels are interpreted: as a GPU does it
        wide = a.float() @ b.float()
        out.copy_(wide if addend is None else wide + addend.float())
        return
    with _exact(out.dtype):
        if addend is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(addend, a, b, out=out)


_EXACT: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"fp32_precision": "ieee"},
    torch.bfloat16: {"allow_bf16_reduced_precision_reduction": False},
    torch.float16: {"allow_fp16_reduced_precision_reduction": False, "allow_fp16_accumulation": False},
}
"""What torch.backends.cuda.matmul has to say for sums in float32 of products of every bit."""


@contextlib.contextmanager
def _exact(dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile the flags say so; afterwards what they said. One thread at a time, also where nothing is to be changed: another
    takes back what it has set for its own product."""
    flags = torch.backends.cuda.matmul
    with _flags:
        before = {name: getattr(flags, name) for name, wanted in _EXACT[dtype].items() if getattr(flags, name) != wanted}
        try:
            for name in before:
                setattr(flags, name, _EXACT[dtype][name])
            yield
        finally:
            for name, value in before.items():
                setattr(flags, name, value)
