"""What calls agree in, beside shapes and strides, where one can be done as another was. It imports nothing: every spec needs it."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["GRANULE", "hooked", "twins"]

GRANULE = 16
"""Bytes: kernels are compiled for whether addresses are multiples of it, and descriptors want them to be."""


def twins(addresses: list[int]) -> tuple[int, ...]:
    """Which of several tensors begin at one address: for each the first that does."""
    return tuple(addresses.index(at) for at in addresses)


def hooked() -> bool:
    """Whether somebody (a profiler) wants to be told of every launch. Asked only where there were some, so Triton is imported."""
    hooks = sys.modules["triton"].knobs.runtime
    return _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook)


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
