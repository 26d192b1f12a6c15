"""Products by torch's library (cuBLAS), as exact as the spec says whatever torch's global flags say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlpdsl.tape import recorder

__all__ = ["multiply", "product"]

_lock = threading.Lock()
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
    else:
        multiply(a, b, out, addend)


def multiply(a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
    """The same on a GPU, where no call is being recorded."""
    with _exact(out.dtype):
        if addend is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(addend, a, b, out=out)


class _Flag(NamedTuple):
    """One of torch.backends.cuda.matmul's flags: how it is read and written, by torch's own functions, and from what it says to
    what it has to say, which is the same where that is exact."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Callable[[Any], Any]


def _flag(name: str) -> _Flag:
    """A flag that is exact where it is False. Some are pairs in newer versions of torch, the second of which says whether sums
    may be split, and is the user's."""
    read, write = (getattr(torch._C, f"_{verb}_cublas_{name}", None) for verb in ("get", "set"))
    if read is None or write is None:
        matmul = torch.backends.cuda.matmul
        return _Flag(lambda: getattr(matmul, name), lambda value: setattr(matmul, name, value), lambda _: False)
    if type(read()) is tuple:
        return _Flag(read, lambda pair: write(*pair), lambda pair: (False, pair[1]))
    return _Flag(read, write, lambda _: False)


@cache
def _flags_of(dtype: torch.dtype) -> tuple[_Flag, ...]:
    """What has to be exact for products of a dtype to be summed in float32 of every bit."""
    if dtype == torch.float32:
        return (_precision(),)
    if dtype == torch.bfloat16:
        return (_flag("allow_bf16_reduced_precision_reduction"),)
    return _flag("allow_fp16_reduced_precision_reduction"), _flag("allow_fp16_accumulation")


def _precision() -> _Flag:
    """How float32 is multiplied. "none": as a wider setting says, which reading it takes into account, so nobody said anything."""
    matmul, exact = torch.backends.cuda.matmul, lambda said: said if said == "none" else "ieee"
    get, put = (getattr(torch._C, f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))
    if get is None or put is None:
        return _inherited(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), exact)
    return _inherited(lambda: get("cuda", "matmul"), lambda value: put("cuda", "matmul", value), exact)


def _inherited(read: Callable[[], str], write: Callable[[str], None], exact: Callable[[str], str]) -> _Flag:
    """The flag, put back to "none" where a wider setting alone says as much, or it would go on saying so after that has changed."""

    def back(value: str) -> None:
        if value != "ieee":
            write("none")
            if read() == value:
                return
        write(value)

    return _Flag(read, back, exact)


class _exact:
    """Meanwhile the flags say so; afterwards what they said. One thread at a time, also where nothing is to be changed: another
    takes back what it has set for its own product."""

    __slots__ = ("before", "flags")

    def __init__(self, dtype: torch.dtype) -> None:
        self.flags = _flags_of(dtype)
        self.before: list[tuple[_Flag, Any]] = []

    def __enter__(self) -> None:
        _lock.acquire()
        try:
            for flag in self.flags:
                found = flag.read()
                wanted = flag.exact(found)
                if wanted != found:
                    self.before.append((flag, found))
                    flag.write(wanted)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            for flag, value in self.before:
                flag.write(value)
        finally:
            _lock.release()
