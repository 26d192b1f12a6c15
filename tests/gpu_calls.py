"""Calls on a GPU, and processes of their own, for the tests there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import Call, make_call

ROOT = Path(mlpdsl.__file__).resolve().parents[1]


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def call_on_gpu(spec: MLPSpec, rows: int, seed: int = 0, **layouts: object) -> Call:
    return make_call(spec, (rows,), seed, device="cuda", **layouts)


def gradients(call: Call, mlp: Callable[..., Tensor]) -> list[Tensor]:
    y, grads = call.gradients(mlp)
    return [y, *grads.values()]


def run_python(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
