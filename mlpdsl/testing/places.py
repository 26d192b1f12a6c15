"""Where kernels can run: on a GPU, in this process's interpreter, or in the interpreter of a child of it.

Nothing here is asked when tests are collected, and nothing creates a CUDA context.
"""

from __future__ import annotations

from typing import Literal

import torch

from mlpdsl.backends import BACKENDS, interpreting
from mlpdsl.compiled import compile as compile_spec
from mlpdsl.errors import UnsupportedError
from mlpdsl.spec import MLPSpec
from mlpdsl.testing.child import shared

__all__ = ["Place", "place", "reason_here", "skip_reason", "words_here"]

Place = Literal["gpu", "interpreter", "child"]
"""A GPU; Triton's interpreter, in this process (TRITON_INTERPRET=1); the interpreter in a process of its own."""


def place() -> Place:
    """Where the kernels run that this process tests: as TRITON_INTERPRET says, else on a GPU if there is one, else in a child."""
    if interpreting():
        return "interpreter"
    return "gpu" if torch.cuda.is_available() else "child"


def reason_here(spec: MLPSpec | None = None) -> str:
    """Why the kernels (of `spec`, or of any) cannot run in this process; empty where they can."""
    device = "cuda" if place() == "gpu" else "cpu"
    reasons = BACKENDS["triton"].runs_on(device)
    if spec is not None and not reasons:
        try:
            compile_spec(spec, backend="triton").backend_for(device)
        except UnsupportedError as error:
            reasons = list(error.reasons)
    return "; ".join(reasons)


def skip_reason(spec: MLPSpec | None = None) -> str:
    """Why the kernels (of `spec`, or of any) can run neither in this process nor in a child of it; empty where they can."""
    if place() != "child":
        return reason_here(spec)
    return str(shared(interpret=True).ask("reasons", spec=None if spec is None else spec.to_json()))


def words_here() -> str:
    """What runs this process's kernels: "Triton's interpreter", or a GPU's name, for which it is asked through CUDA."""
    if interpreting():
        return "Triton's interpreter"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
