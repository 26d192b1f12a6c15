"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

import torch
from torch import Tensor

from mlpdsl.agreement import GRANULE, MAX_STRIDE
from mlpdsl.codegen.float32 import worth_padding
from mlpdsl.precision import exactly
from mlpdsl.straight import REINTERPRET
from mlpdsl.tape import recorder

__all__ = ["fits_batch", "has_whole_rows", "multiply", "multiply_two", "of_copies", "product", "product_of_two", "spanning",
           "with_zeros"]  # fmt: skip


def product(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None, *, tf32: bool = False) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + addend, summed in float32 and rounded once; in 16 bits the product may be rounded before a
    bias is added to it. With `tf32`, operands of float32 are rounded to TF32.

    The addend is a bias (N,), or, in float32 alone, `out` itself: to a tile in 16 bits cuBLAS always adds the rounded product."""
    recording = recorder()
    if recording is not None:
        recording.multiplied(a, b, out, addend, tf32=tf32)
    multiply(a, b, out, addend, tf32=tf32)


def multiply(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None, *, tf32: bool = False) -> None:
    """The same, which no recording is told of."""
    if out.device.type == "cpu":  # where kernels are interpreted: as a GPU does it
        wide = a.float() @ b.float()
        out.copy_(wide if addend is None else wide + addend.float())
    elif tf32 and worth_padding(a.shape[0], b.shape[1], a.shape[1]) and not all(map(has_whole_rows, (a, b, out))):
        of_copies(a, b, out, addend)
    elif addend is None:
        exactly(torch.mm, a, b, out=out, dtype=out.dtype, tf32=tf32)
    else:
        exactly(torch.addmm, addend, a, b, out=out, dtype=out.dtype, tf32=tf32)


def has_whole_rows(t: Tensor) -> bool:
    """Whether every row of a matrix, or every column of one that lies transposed, begins at a multiple of 16 bytes."""
    inner, outer = sorted(t.stride())
    return inner == 1 and outer * t.element_size() % GRANULE == 0 and t.data_ptr() % GRANULE == 0


def of_copies(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None) -> None:
    """The same in TF32 by copies of what has no whole rows, with zeros added to every width."""
    m, n = out.shape
    wide = exactly(torch.mm, with_zeros(a), with_zeros(b), dtype=out.dtype, tf32=True)[:m, :n]
    if addend is None:
        out.copy_(wide)
    else:
        torch.add(wide, addend, out=out)


def with_zeros(t: Tensor) -> Tensor:
    """A matrix with zeros behind its rows and columns, up to a multiple of 16 bytes each: itself, or a copy that lies likewise."""
    if t.stride(0) == 1 and t.stride(1) != 1:
        return with_zeros(t.t()).t()
    granule = GRANULE // t.element_size()
    rows, columns = (-size % granule for size in t.shape)
    if rows == columns == 0 and has_whole_rows(t):
        return t
    return torch.nn.functional.pad(t, (0, columns, 0, rows)).contiguous()


def fits_batch(first: Tensor, second: Tensor) -> bool:
    """Whether one batched product can go over two weights of equal strides, and as fast as over one tensor: a whole number of 16
    bytes from one to the other, and no more than the tensor memory accelerator can step."""
    apart = second.data_ptr() - first.data_ptr()
    return REINTERPRET is not None and apart % GRANULE == 0 and abs(apart) < MAX_STRIDE


def product_of_two(x: Tensor, low: Tensor, high: Tensor, out: Tensor, *, tf32: bool = False) -> None:
    """out (2, M, N) = x (M, K) @ low.t(), and x @ high.t(), as one batched product: cuBLAS then has tiles for both at once.

    `low` and `high`, each (N, K), have equal strides, pass `fits_batch`, and `low` lies at the lower address."""
    recording = recorder()
    if recording is not None:
        recording.multiplied_two(x, low, high, out, tf32=tf32)
    multiply_two(x, low, high, out, tf32=tf32)


def multiply_two(x: Tensor, low: Tensor, high: Tensor, out: Tensor, *, tf32: bool = False) -> None:
    """The same, which no recording is told of."""
    if out.device.type == "cpu":
        for weight, y in zip((low, high), out, strict=True):
            multiply(x, weight.as_strided(low.shape, low.stride()).t(), y)
        return
    exactly(torch.bmm, x.expand(2, *x.shape), spanning(low, high), out=out, dtype=out.dtype, tf32=tf32)


def spanning(low: Tensor, high: Tensor) -> Tensor:
    """(2, K, N): both weights (N, K), transposed; a view that starts in low's memory, and whose first stride leads to high's."""
    assert REINTERPRET is not None
    apart = (high.data_ptr() - low.data_ptr()) // low.element_size()
    return REINTERPRET(low, (2, low.shape[1], low.shape[0]), (apart, low.stride(1), low.stride(0)), 0)
