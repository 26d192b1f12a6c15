"""What calls agree in, beside shapes and strides, where one can be done as another was. It imports nothing: every spec needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["GRANULE", "MAX_STRIDE", "hooked", "twins"]

GRANULE = 16
"""Bytes: kernels are compiled for whether addresses are multiples of it, and descriptors want them to be."""

MAX_STRIDE = 2**40
"""Bytes: what a descriptor steps is less."""


def twins(addresses: Sequence[int]) -> tuple[int, ...]:
    """Which of several tensors begin at one address: for each the first that does."""
    return tuple(addresses.index(at) for at in addresses)


def hooked() -> bool:
    """Whether somebody (a profiler) wants to be told of every launch. Asked only where there were some, so Triton is imported.

    Triton keeps chains of them; once it kept one, or None."""
    runtime = sys.modules["triton"].knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    try:
        return bool((enter and enter.calls) or (leave and leave.calls))
    except AttributeError:
        return True
