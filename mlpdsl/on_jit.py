"""MLPDSL_ON_JIT: what happens where a call has to compile a kernel, for servers that must not compile while they serve.

Unset, it compiles, and says nothing. "warn" logs one warning for each kernel, "error" raises `NotCompiledError` before that kernel
is compiled. Both name the line that compiles it ahead: `mlpdsl.warmup`, which is always free to compile. A kernel that lies in
Triton's cache on disk counts as well, because reading and loading it takes time too. The variable is read where a launch is met for
the first time, and by `warmup`, which refuses a mistake in it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Any, NamedTuple

from mlpdsl.agreement import GRANULE
from mlpdsl.errors import NotCompiledError, SpecError, describe
from mlpdsl.names import did_you_mean, listed
from mlpdsl.spec import MLPSpec

__all__ = ["CHOICES", "VARIABLE", "Call", "allowing", "policy", "tell", "watched"]

VARIABLE = "MLPDSL_ON_JIT"
CHOICES = ("warn", "error")

_GENERATED = "mlpdsl_generated_"
"""How the modules of generated source begin: kernels of other modules are no part of a call."""

_log = logging.getLogger("mlpdsl")
_local = threading.local()


def policy() -> str | None:
    """ "warn", "error", or None where the variable is not set. Raises `SpecError` for anything else."""
    value = os.environ.get(VARIABLE, "").strip()
    if value and value not in CHOICES:
        step = did_you_mean(value, CHOICES) or "Unset it to compile at the first call without a word."
        raise SpecError(describe(f"environment variable {VARIABLE}", value, listed(CHOICES), step))
    return value or None


@contextmanager
def allowing() -> Iterator[None]:
    """Meanwhile this thread compiles whatever it wants."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


class Call(NamedTuple):
    """A call under way: its spec as JSON, rows and device of x, whether it belongs to training, and whether `warmup` makes the
    same: contiguous tensors at multiples of 16 bytes, and every gradient."""

    spec: str
    rows: int
    device: str
    backward: bool
    batch_invariant: bool
    alike: bool

    def warmup(self) -> str:
        """The line that compiles what the call runs."""
        spec = MLPSpec.from_json(self.spec)
        words = f"m={self.rows}"
        words += ", backward=True" if self.backward else ""
        words += f", device={self.device!r}" if self.device not in ("cpu", "cuda:0") else ""
        words += ", batch_invariant=True" if self.batch_invariant else ""
        return f"mlpdsl.warmup({_declaration(spec)}, {words})"


def _declaration(spec: MLPSpec) -> str:
    """Python for the spec, without what has its default; from its JSON where it holds functions."""
    if not all(type(entry) is str for entry in (spec.activation, *spec.epilogue)):
        return f"mlpdsl.MLPSpec.from_json({spec.to_json()!r})"
    given = [f"{f.name}={getattr(spec, f.name)!r}" for f in fields(spec) if getattr(spec, f.name) != f.default]
    return f"mlpdsl.MLPSpec({', '.join(given)})"


def watched(kernel: Any) -> Call | None:
    """The call that wants a variant of `kernel`, where the variable asks for a word about it; else None. Raises `SpecError`."""
    if policy() is None or getattr(_local, "depth", 0) > 0 or not str(getattr(kernel, "module", "")).startswith(_GENERATED):
        return None
    return _call()


def _call() -> Call | None:
    """The operator's call beneath which this runs, read off its frames, so that calls that compile nothing pay nothing for it."""
    from mlpdsl import ops

    codes = (ops._forward.__code__, ops._backward.__code__)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    if frame is None:
        return None
    found = frame.f_locals
    x = found["x"]
    backward = frame.f_code is codes[1]
    tensors = [x, *found["parameters"], *found["operands"], *([found["grad"]] if backward else [])]
    # Without the gradient of x one launch less is made, and no other.
    alike = all(t.is_contiguous() and t.data_ptr() % GRANULE == 0 for t in tensors) and all(found.get("needs", ())[1:])
    return Call(found["spec"], x.numel() // x.shape[-1], str(x.device), backward or found["save"], found["batch_invariant"], alike)


def tell(call: Call, kernel: Any) -> None:
    """Log or raise `NotCompiledError`, as the variable says."""
    name = getattr(kernel, "__name__", "a kernel")
    short = MLPSpec.from_json(call.spec).short_name
    line = f"To compile it ahead of the calls: {call.warmup()}"
    if not call.alike:
        line = (
            "mlpdsl.warmup makes no call like this one: its tensors are contiguous, at multiples of 16 bytes, and it asks for "
            f"every gradient. Make one such call before serving, with {VARIABLE} unset. For all others: {call.warmup()}"
        )
    if policy() == "error":
        raise NotCompiledError(
            f"mlpdsl: {short}: a call with m={call.rows} needs the kernel {name}, which this process has not compiled, "
            f"and {VARIABLE}=error forbids a call to do it. {line}"
        )
    _log.warning("mlpdsl: %s: a call with m=%d compiles the kernel %s (%s=warn). %s", short, call.rows, name, VARIABLE, line)
