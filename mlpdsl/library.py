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
    """The same in TF32, of copies of what has no whole rows: zeros are added to every width along which something is dense."""
    m, n = out.shape
    k = a.shape[1]
    rows, sums = (_whole(m) if _transposed(a) else m), (k if _transposed(a) and not _transposed(b) else _whole(k))
    a, b = with_zeros(a, rows, sums), with_zeros(b, sums, _whole(n))
    wide = out if out.shape == (rows, _whole(n)) and has_whole_rows(out) else out.new_empty(rows, _whole(n))
    if wide is out and addend is not None:
        exactly(torch.addmm, addend, a, b, out=out, dtype=out.dtype, tf32=True)
        return
    exactly(torch.mm, a, b, out=wide, dtype=out.dtype, tf32=True)  # `out` is what autocast leaves alone
    if addend is not None:
        torch.add(wide[:m, :n], addend, out=out)
    elif wide is not out:
        out.copy_(wide[:m, :n])


def with_zeros(t: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix of so many rows and columns, zeros behind those of t: t itself, or a copy that lies likewise."""
    if t.shape == (rows, columns) and has_whole_rows(t):
        return t
    if _transposed(t):
        return with_zeros(t.t(), columns, rows).t()
    return torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0])).contiguous()


def _transposed(t: Tensor) -> bool:
    return t.stride(0) == 1 and t.stride(1) != 1


def _whole(size: int) -> int:
    """The next multiple of 16 bytes, in elements of float32."""
    return -(-size * 4 // GRANULE) * GRANULE // 4


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
