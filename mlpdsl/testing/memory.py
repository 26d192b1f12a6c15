"""Where the tensors of a call lie: any strides and alignment, in memory that is NaN everywhere else, and guarded allocations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mlpdsl.agreement import GRANULE

__all__ = ["BITS", "GUARD", "LAYOUTS", "WEIGHT_LAYOUTS", "CallError", "Guards", "bits", "guarded_allocations", "place", "same_bits"]

GUARD = 4096
"""Elements of NaN before and after every tensor; a multiple of 16 bytes, so that it changes no alignment."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LAYOUTS: dict[str, Callable[[int, int], tuple[int, int, int]]] = {
    "dense": lambda rows, cols: (cols, 1, 0),
    "offset": lambda rows, cols: (cols, 1, 1),  # 2 or 4 bytes off every alignment
    "padded": lambda rows, cols: (-(-cols // 8) * 8 + 8, 1, 0),  # fit for TMA, with NaN between rows
    "ragged": lambda rows, cols: (cols + 3, 1, 0),
    "transposed": lambda rows, cols: (1, rows + 5, 0),
    "strided": lambda rows, cols: (2 * cols + 1, 2, 0),
    "expanded": lambda rows, cols: (0, 1, 0),  # one row for all
    "columns": lambda rows, cols: (1, 0, 0),  # one column for all
}
"""How a matrix of (rows, columns) lies, by name: row stride, column stride and first element, in elements; stride 0 is an expanded
dimension."""

WEIGHT_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("expanded", "columns"))


class CallError(AssertionError):
    """A call wrote where it must not, or gave other bits the second time."""


def bits(t: Tensor) -> Tensor:
    """The tensor's bits as integers of its shape, so that NaN equals NaN and 0 is not -0."""
    return t.detach().contiguous().view(BITS[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def place(values: Tensor, layout: str = "dense", swap: bool = False, guard: int = GUARD) -> Tensor:
    """`values` (…, columns), lying as `layout` says in memory that is NaN everywhere else; the same shape, dtype and device.

    With `swap` the leading dimensions lie in the opposite order, so that they cannot be merged into rows. Where a dimension is
    expanded, its first element stands for all.
    """
    shape = tuple(values.shape)
    lead, cols = shape[:-1], shape[-1] if shape else 1
    row, col, start = LAYOUTS[layout](math.prod(lead), cols)
    strides = [0] * len(lead)
    step = row
    for i in range(len(lead)) if swap else reversed(range(len(lead))):
        strides[i] = step
        step *= lead[i]
    if shape:
        strides.append(col)
    extent = 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    granule = GRANULE // values.element_size()  # of which kernels read the rest beside a weight's last element, as one vector
    size = -(-(2 * guard + start + extent) // granule) * granule
    buffer = torch.full((size,), torch.nan, dtype=values.dtype, device=values.device)
    own = [min(n, 1) if s == 0 else n for n, s in zip(shape, strides, strict=True)]
    buffer.as_strided(own, strides, guard + start).copy_(values[tuple(slice(n) for n in own)])
    return buffer.as_strided(shape, strides, guard + start)


class Guards:
    """Tensors that the code under test allocated, each inside NaN."""

    def __init__(self, guard: int) -> None:
        self.guard = guard
        self.count = 0
        self._kept: list[tuple[Tensor, int]] = []

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A dense tensor of NaN, with `guard` elements of NaN on either side."""
        size = tuple(size)
        count = math.prod(size)
        buffer = torch.full((2 * self.guard + count,), torch.nan, dtype=dtype, device=device)
        self._kept.append((buffer, count))
        self.count += 1
        strides = torch.empty(size, device="meta").stride()
        with torch.no_grad():  # a tensor of its own, no view: what is returned may get a gradient function
            return torch.zeros(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), self.guard, size, strides)

    def check(self) -> None:
        """Raises `CallError` where something was written before or after a tensor."""
        for buffer, count in self._kept:
            clean = torch.full((1,), torch.nan, dtype=buffer.dtype, device=buffer.device)
            for zone, where in ((buffer[: self.guard], "before"), (buffer[self.guard + count :], "after")):
                changed = int((bits(zone) != bits(clean)).sum())
                if changed:
                    raise CallError(f"{changed} elements written {where} a tensor of {count} {buffer.dtype} elements")
        self._kept.clear()


@contextmanager
def guarded_allocations(guard: int = GUARD) -> Iterator[Guards]:
    """Inside, what Python code allocates for kernels is NaN, between guard zones of NaN; outside, the zones are checked.

    A tensor of which a kernel leaves an element out then shows it, and one that a kernel writes beyond raises `CallError`. Replaces
    `torch.empty`, `torch.empty_like` and `Tensor.new_empty` meanwhile, in every thread.
    """
    guards = Guards(guard)
    empty, empty_like, plain_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # Triton's interpreter, which looks at our memory through another tensor
            return plain_new_empty(self, *size, dtype=dtype, **rest)
        return guards.allocate(size[0] if size and not isinstance(size[0], int) else size, dtype or self.dtype, self.device)

    def guarded_empty_like(t: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if t.device.type == "meta" or (not t.is_contiguous() and rest.get("memory_format") is not torch.contiguous_format):
            return empty_like(t, dtype=dtype, **rest)
        return guards.allocate(t.shape, dtype or t.dtype, t.device)

    def guarded_empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        place_there = torch.device(device or "cpu")
        if rest or dtype is None or not dtype.is_floating_point or place_there.type == "meta":
            return empty(*size, dtype=dtype, device=device, **rest)
        return guards.allocate(size[0] if size and not isinstance(size[0], int) else size, dtype, place_there)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty, create=True))
        stack.enter_context(mock.patch.object(torch, "empty_like", guarded_empty_like))
        stack.enter_context(mock.patch.object(torch, "empty", guarded_empty))
        yield guards
    guards.check()
