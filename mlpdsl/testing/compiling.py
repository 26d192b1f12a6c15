"""Compile-only: what a spec's kernels compile to for an architecture that need not be here.

An interpreter runs what a compiler refuses, so kernels that were interpreted are compiled as well, and not run.
"""

from __future__ import annotations

from mlpdsl.errors import UnsupportedError
from mlpdsl.resources import Resources, resources
from mlpdsl.source import DEFAULT_TARGET
from mlpdsl.spec import MLPSpec
from mlpdsl.target import Target, detect, parse_target

__all__ = ["CompileError", "check_compiled", "compile_target"]


class CompileError(AssertionError):
    """A kernel does not compile, does not fit, or was serialised."""


def compile_target() -> Target:
    """What is compiled for: MLPDSL_TARGET where it is set, else this machine's GPU, else sm_90."""
    return detect() or parse_target(DEFAULT_TARGET)


def check_compiled(spec: MLPSpec, target: str | Target | None = None) -> list[Resources]:
    """Compile every kernel that forward and backward of `spec` launch on 4096 rows, for `target` (default: `compile_target()`).

    Needs triton, not interpreting, and no GPU; 0.2 to 2 s a kernel. Raises `CompileError` where a kernel does not compile, needs
    more shared memory than a block of the target may have, or had its wgmma instructions serialised by ptxas.
    """
    chosen = compile_target() if target is None else parse_target(target)
    try:
        found = resources(spec, chosen)
    except UnsupportedError as error:
        raise CompileError(f"compiling {spec!r} for {chosen.name}: {error}") from error
    wrong = [
        f"{r.name} needs {r.shared} bytes of shared memory; a block of {chosen.name} has {chosen.shared_memory}"
        for r in found
        if not r.fits
    ]
    wrong += [f"{r.name}: ptxas serialised its wgmma instructions" for r in found if r.serialised]
    if wrong:
        raise CompileError(f"compiling {spec!r} for {chosen.name}: {'; '.join(wrong)}")
    return found
