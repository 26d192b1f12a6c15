"""The Pallas kernels for Hopper on the GPU they are for, against the oracle. They need jax with its CUDA plugin."""

from __future__ import annotations

import os

import pytest

# Before jax starts: it would take most of the memory that torch shares with it.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

pytest.importorskip("jax")

import jax

import mlpdsl.jax
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import make_call
from tests.pallas.support import check

if not any(device.platform in ("gpu", "cuda") for device in jax.devices()):
    pytest.skip("jax sees no GPU", allow_module_level=True)

SPECS = {
    "swiglu": MLPSpec(dims=(512, 1024, 512), activation="silu", gated=True, dtype="bfloat16"),
    "gelu-residual": MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    "everything": MLPSpec(
        dims=(256, 448, 192), activation="gelu_tanh", gated=True, bias=True, dtype="bfloat16",
        epilogue=("layer_scale", "residual", "scale"),
    ),
    "deep": MLPSpec(dims=(64, 128, 64, 64), activation="relu2", dtype="float16"),
    "single": MLPSpec(dims=(256, 512), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "residual")),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 64, 100, 1000])
@pytest.mark.parametrize("name", SPECS)
def test_it_is_what_the_oracle_says(name: str, rows: int) -> None:
    spec = SPECS[name]
    check(make_call(spec, (rows,), seed=rows, device="cuda"), mlpdsl.jax.compile(spec, backend="pallas"))
