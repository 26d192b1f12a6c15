"""Torch's flags for products on CUDA, which are the whole process's: what they have to say meanwhile, the user's word afterwards.

One lock for all that change them, held from reading a flag to putting it back. It is re-entrant: a signal handler may multiply too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["exactly", "lock", "said_again"]

lock = threading.RLock()


def exactly(function: Callable[..., Any], *args: Any, dtype: torch.dtype, tf32: bool = False, **words: Any) -> Any:
    """`function(*args, **words)`, with products of `dtype` summed in float32 of every bit; with `tf32` those of float32 are of
    operands in TF32.

    One thread at a time, also where no flag has to change: another takes back what it has set for its own product.
    """
    with lock:
        changed: list[tuple[_Flag, Any]] = []
        try:
            for flag in _flags_of(dtype, tf32):
                found = flag.read()
                wanted = flag.exact(found)
                if wanted != found:
                    changed.append((flag, found))
                    flag.write(wanted)
            return function(*args, **words)
        finally:
            for flag, value in changed:
                flag.put_back(value)


def said_again(read: Callable[[], str], write: Callable[[str], None], value: str) -> None:
    """Put back what was read of the flag for float32: "none" where a wider setting alone says as much, or this one would go on
    saying so after that has changed."""
    write("none")
    if read() != value:
        write(value)


class _Flag(NamedTuple):
    """One of torch.backends.cuda.matmul's flags: how it is read, written and put back, by torch's own functions, and from what it
    says to what it has to say, which is the same where that is exact."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    put_back: Callable[[Any], None]
    exact: Callable[[Any], Any]


def _flag(name: str) -> _Flag:
    """A flag that is exact where it is False. Some are pairs in newer versions of torch, the second of which says whether sums
    may be split, and is the user's."""
    read, write = (getattr(torch._C, f"_{verb}_cublas_{name}", None) for verb in ("get", "set"))
    if read is None or write is None:
        matmul = torch.backends.cuda.matmul

        def say(value: bool) -> None:
            setattr(matmul, name, value)

        return _Flag(lambda: getattr(matmul, name), say, say, lambda _: False)
    if type(read()) is tuple:

        def say_both(pair: tuple[bool, bool]) -> None:
            write(*pair)

        return _Flag(read, say_both, say_both, lambda pair: (False, pair[1]))
    return _Flag(read, write, write, lambda _: False)


@cache
def _flags_of(dtype: torch.dtype, tf32: bool) -> tuple[_Flag, ...]:
    """What has to be exact for products of a dtype to be summed in float32 of every bit."""
    if dtype == torch.float32:
        return (_precision(tf32),)
    if dtype == torch.bfloat16:
        return (_flag("allow_bf16_reduced_precision_reduction"),)
    return _flag("allow_fp16_reduced_precision_reduction"), _flag("allow_fp16_accumulation")


def _precision(tf32: bool = False) -> _Flag:
    """How float32 is multiplied. "none": as a wider setting says, which reading it takes into account, so nobody said anything."""
    matmul = torch.backends.cuda.matmul

    def exact(said: str) -> str:
        return "tf32" if tf32 else said if said == "none" else "ieee"

    get, put = (getattr(torch._C, f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))
    if get is None or put is None:
        return _inherited(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), exact)
    return _inherited(lambda: get("cuda", "matmul"), lambda value: put("cuda", "matmul", value), exact)


def _inherited(read: Callable[[], str], write: Callable[[str], None], exact: Callable[[str], str]) -> _Flag:
    return _Flag(read, write, lambda value: said_again(read, write, value), exact)


def _new_lock() -> None:
    global lock
    lock = threading.RLock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
