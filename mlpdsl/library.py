"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mlpdsl.agreement import GRANULE, MAX_STRIDE
from mlpdsl.precision import exactly
from mlpdsl.tape import recorder

__all__ = ["fits_batch", "multiply", "multiply_two", "product", "product_of_two"]


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


def fits_batch(first: Tensor, second: Tensor) -> bool:
    """Whether one batched product over two weights of equal strides is as fast as it can be: a whole number of 16 bytes from one
    to the other, and no more than the tensor memory accelerator can step."""
    apart = second.data_ptr() - first.data_ptr()
    return apart % GRANULE == 0 and abs(apart) < MAX_STRIDE


def product_of_two(x: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """out (2, M, N) = x (M, K) @ low.t(), and x @ high.t(), as one batched product: cuBLAS then has tiles for both at once.

    `low` and `high`, each (N, K), have equal strides, pass `fits_batch`, and `low` lies at the lower address."""
    recording = recorder()
    if recording is not None:
        recording.multiplied_two(x, low, high, out)
    multiply_two(x, low, high, out)


def multiply_two(x: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """The same, which no recording is told of."""
    if out.device.type == "cpu":
        for weight, y in zip((low, high), out, strict=True):
            multiply(x, weight.as_strided(low.shape, low.stride()).t(), y)
        return
    both = _both(low.data_ptr(), high.data_ptr(), low.shape, low.stride(), low.dtype, low.device)
    exactly(torch.bmm, x.expand(2, *x.shape), both, out=out, dtype=out.dtype)


@lru_cache(maxsize=4096)
def _both(low: int, high: int, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, K, N): what lies at two addresses, transposed. It owns nothing and keeps nothing alive: whoever reads it holds both."""
    size = dtype.itemsize
    apart = (high - low) // size
    found = torch.as_tensor(_Memory(low, (2, *shape), (apart, *strides), size), device=device)
    if found.data_ptr() != low:
        raise RuntimeError("torch copied memory that it was to look at")
    return found.view(dtype).transpose(1, 2)


class _Memory:
    """Elements of so many bytes at an address, in the protocol by which libraries show each other the memory of a GPU; strides are
    in elements."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": shape,
            "strides": tuple(size * stride for stride in strides),
            "typestr": f"<f{size}",
            "version": 3,
        }
