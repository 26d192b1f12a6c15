"""Room for the frames of what calls much: an interpreter under a deep stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["with_room"]


def with_room(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, in a stack of its own of half a megabyte.

    CPython (3.11 and newer) keeps frames in chunks of 16 KB, and maps and unmaps one whenever a call crosses the end of the last.
    A loop that happens to stand there, as an interpreter's often does under pytest and Hypothesis, spends much of its time in
    the kernel. This function's frame asks for much, gets a chunk of 1 MB, and leaves the rest of it to what it calls.
    """
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=70_000)
