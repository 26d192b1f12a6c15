"""The Pallas kernels for Hopper on the GPU they are for, against the oracle. They need jax with its CUDA plugin.

Each spec in a process of its own, this file run as a program: in processes where JAX had started, torch's captures of CUDA graphs
ended now and then with an error of another thread's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpdsl import MLPSpec

NO_GPU_FOR_JAX = 77
"""The status of a process that found none."""

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
ROWS = (1, 64, 100, 1000)


def main(name: str) -> int:
    # Before jax starts: it would take most of the memory that torch shares with it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    import mlpdsl.jax
    from mlpdsl.testing.calls import make_call
    from tests.pallas.support import check

    if not any(device.platform in ("gpu", "cuda") for device in jax.devices()):
        return NO_GPU_FOR_JAX
    mlp = mlpdsl.jax.compile(SPECS[name], backend="pallas")
    for rows in ROWS:
        check(make_call(SPECS[name], (rows,), seed=rows, device="cuda"), mlp)
        print(f"{name}, {rows} rows: within the bound")
    return 0


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
@pytest.mark.parametrize("name", SPECS)
def test_it_is_what_the_oracle_says(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "tests.gpu.test_pallas", name], cwd=root, capture_output=True, text=True)
    if done.returncode == NO_GPU_FOR_JAX:
        pytest.skip("jax sees no GPU")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("within the bound") == len(ROWS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
