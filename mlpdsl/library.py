"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mlpdsl.tape import recorder

__all__ = ["product"]

_flags = threading.Lock()
"""Held while a flag is another than the user's, so that two threads do not restore each other's."""


def product(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + addend, which broadcasts, summed in float32 and rounded once. `out` may be the addend."""
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


@contextlib.contextmanager
def _exact(dtype: torch.dtype) -> Iterator[None]:
    """Sums in float32, of products of every bit. Nothing is touched where the flags say so already."""
    flags = torch.backends.cuda.matmul
    name = {
        torch.float32: "allow_tf32",
        torch.bfloat16: "allow_bf16_reduced_precision_reduction",
        torch.float16: "allow_fp16_reduced_precision_reduction",
    }[dtype]
    if not getattr(flags, name):
        yield
        return
    with _flags:
        before = getattr(flags, name)
        setattr(flags, name, False)
        try:
            yield
        finally:
            setattr(flags, name, before)
