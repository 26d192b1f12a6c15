"""The backends, a dict of small objects: what they can do, the text they write, the module they load."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from mlpdsl.errors import SpecError, UnsupportedError, describe
from mlpdsl.names import did_you_mean, listed

if TYPE_CHECKING:
    from mlpdsl.codegen.plan import Plan
    from mlpdsl.target import Target

__all__ = ["BACKENDS", "VARIABLE", "backend_named", "choose_backend", "interpreter_lock", "interpreting"]

VARIABLE = "MLPDSL_BACKEND"
"""The environment variable that names the backend where `compile` was given none."""

_log = logging.getLogger("mlpdsl")


class Backend(Protocol):
    """What a backend is."""

    name: str

    def supports(self, plan: Plan, target: Target) -> list[str]:
        """Every reason why it cannot do the plan on the target; empty where it can."""

    def runs_on(self, device: str) -> list[str]:
        """Every reason why this process cannot run its kernels on the device; empty where it can."""

    def emit(self, plan: Plan, key: str) -> str:
        """The source text."""

    def load(self, path: Path, text: str, key: str) -> ModuleType:
        """The module of the text, with `forward` and `backward`. Import errors come through as they are."""


def interpreting() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


_interpreter = threading.RLock()


def interpreter_lock() -> Any:
    """What is held while kernels are interpreted: threads take turns, as Triton's interpreter patches its language and keeps the
    position in the grid in globals. A forked child, which has no other threads, starts anew."""
    return _interpreter


def _new_lock() -> None:
    global _interpreter
    _interpreter = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _rendered(template: str, view: Any, key: str) -> str:
    import jinja2

    from mlpdsl.codegen.render import render
    from mlpdsl.version import __version__

    return render(template, view, key=key, version=__version__, jinja2_version=jinja2.__version__)


class TritonBackend:
    """Generated Triton kernels: on a GPU, or on a CPU under TRITON_INTERPRET=1."""

    name = "triton"

    def supports(self, plan: Plan, target: Target) -> list[str]:
        if target.kind not in ("cuda", "hip"):
            return [f"Triton writes kernels for GPUs, and {target.name} is none; backend='pallas' is for it"]
        reasons = []
        if plan.dtype != "float32" and target.name == "sm_75":
            reasons.append(f"Triton writes no {plan.dtype} matrix instruction for sm_75")
        if plan.precision == "tf32" and target.name.startswith("gfx11"):
            reasons.append(f"Triton does not compile tf32 for {target.name}; precision='ieee' does")
        if plan.precision == "tf32x3" and target.kind == "hip":
            reasons.append("Triton does not compile tf32x3 for AMD GPUs; precision='ieee' does")
        return reasons

    def runs_on(self, device: str) -> list[str]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed: pip install triton")
        if interpreting():
            return reasons
        if device != "cuda":
            step = "set TRITON_INTERPRET=1 before importing triton to interpret them" if device == "cpu" else "move them to one"
            reasons.append(f"the tensors are on {device}, and the kernels run on a GPU; {step}")
        return reasons

    def emit(self, plan: Plan, key: str) -> str:
        from mlpdsl.codegen.emit import triton

        return _rendered(triton.TEMPLATE, triton.emit(plan), key)

    def load(self, path: Path, text: str, key: str) -> ModuleType:
        from mlpdsl.loader import load

        if interpreting():
            from mlpdsl import interpreter

            interpreter.install()  # Triton's own has 16-bit floats wrong
        return load(path, text, key)


class PallasBackend:
    """Generated Pallas kernels, in JAX: compiled by Mosaic for a TPU or Hopper, or interpreted. `mlpdsl.jax.compile` runs them."""

    name = "pallas"

    def supports(self, plan: Plan, target: Target) -> list[str]:
        if target.kind == "cpu":
            return []
        if target.name == "sm_90":
            return self._supports_hopper(plan)
        if target.kind != "tpu":
            return [f"no Pallas kernels are written for {target.name}; backend='triton' has kernels for GPUs"]
        reasons = []
        if plan.dtype == "float16":
            reasons.append(f"Mosaic loads no float16 on a TPU ({target.name}); bfloat16 does")
        if plan.precision != "ieee":
            reasons.append(f"a TPU has no tf32, which precision={plan.precision!r} asks for; precision='ieee' does")
        return reasons

    def _supports_hopper(self, plan: Plan) -> list[str]:
        from mlpdsl.codegen.expr.graph import walk
        from mlpdsl.codegen.expr.stable import expand

        reasons = ["wgmma multiplies float32 as tf32 alone"] if plan.dtype == "float32" else []
        widths = sorted({w for linear in plan.linears for w in (linear.width_in, linear.width_out) if w % 64})
        if widths:
            reasons.append(f"its tiles take widths that are multiples of 64, not {', '.join(map(str, widths[:8]))}")
        values = (*((plan.hidden.value,) if plan.hidden else ()), plan.epilogue.value)
        missing = sorted({node.op for node in walk(*map(expand, values)) if node.op in ("sqrt", "floor")})
        return reasons + [f"Mosaic has no {op} on a GPU" for op in missing]

    def runs_on(self, device: str) -> list[str]:
        reasons = ["Pallas kernels are called from JAX, not with torch's tensors: mlpdsl.jax.compile(spec)"]
        if importlib.util.find_spec("jax") is None:
            reasons.append("jax is not installed: pip install 'mlpdsl[jax]'")
        return reasons

    def emit(self, plan: Plan, key: str) -> str:
        from mlpdsl.codegen.emit import pallas

        return _rendered(pallas.TEMPLATE, pallas.emit(plan), key)

    def load(self, path: Path, text: str, key: str) -> ModuleType:
        from mlpdsl.loader import load

        return load(path, text, key)


class EagerBackend:
    """The reference itself: plain PyTorch operations, on any device. It writes no source."""

    name = "eager"

    def supports(self, plan: Plan, target: Target) -> list[str]:
        return ["the eager backend runs PyTorch's operations and has no source to write; backend='triton' has"]

    def runs_on(self, device: str) -> list[str]:
        return []

    def emit(self, plan: Plan, key: str) -> str:
        raise UnsupportedError("backend 'eager' has no source", self.supports(plan, plan.target))

    def load(self, path: Path, text: str, key: str) -> ModuleType:
        raise UnsupportedError("backend 'eager' has no source to load")


BACKENDS: dict[str, Backend] = {b.name: b for b in (TritonBackend(), PallasBackend(), EagerBackend())}
"""Every backend by name."""


def backend_named(name: object, where: str = "backend") -> Backend:
    """The backend of that name. Raises `SpecError` naming the valid ones."""
    if type(name) is not str or name not in BACKENDS:
        word = name if type(name) is str and len(name) < 64 else ""
        step = did_you_mean(word, BACKENDS) or "Leave it out to choose by device."
        raise SpecError(describe(where, name, listed(BACKENDS), step))
    return BACKENDS[name]


def requested_backend(argument: str | None) -> str | None:
    """The backend chosen by hand: by `compile(backend=…)`, else by MLPDSL_BACKEND, else None."""
    if argument is not None:
        return backend_named(argument).name
    variable = os.environ.get(VARIABLE, "").strip()
    return backend_named(variable, f"environment variable {VARIABLE}").name if variable else None


def _triton_reasons(device: str, spec_json: str) -> list[str]:
    """Why the Triton backend cannot run a spec on a type of device: what is missing here, then what the architecture lacks."""
    from mlpdsl.codegen.lower import lower
    from mlpdsl.dispatch import target_of
    from mlpdsl.spec import MLPSpec

    reasons = BACKENDS["triton"].runs_on(device)
    if reasons:
        return reasons
    import torch

    try:
        target = target_of(torch.device(device))
    except UnsupportedError as error:
        return list(error.reasons)
    plan = lower(MLPSpec.from_json(spec_json), target)
    if interpreting() and plan.uses_libdevice:
        reasons.append("Triton's interpreter has no libdevice, which this spec's hand-written text calls")
    return reasons + BACKENDS["triton"].supports(plan, target)


@functools.lru_cache(maxsize=4096)
def _choose(requested: str | None, device: str, spec_json: str, interpreted: bool) -> str:
    if requested == "eager":
        return requested
    reasons = BACKENDS["pallas"].runs_on(device) if requested == "pallas" else _triton_reasons(device, spec_json)
    if requested is not None and reasons:
        raise UnsupportedError(f"backend {requested!r} cannot run on {device}", reasons)
    if not reasons:
        return "triton"
    level = logging.WARNING if device == "cuda" else logging.INFO
    _log.log(level, "mlpdsl: PyTorch's own operations run on %s: %s", device, "; ".join(reasons))
    return "eager"


def choose_backend(requested: str | None, device: str, spec_json: str) -> str:
    """The backend for a spec on a type of device. One chosen by hand runs or raises `UnsupportedError`; else Triton if it can.

    Falling back from a GPU is logged as a warning, from a CPU (where nobody expects kernels) as information, once each.
    """
    return _choose(requested, device, spec_json, interpreting())


# What torch.compiler.assume_constant_result sets, without the import of all of dynamo that it begins with.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
