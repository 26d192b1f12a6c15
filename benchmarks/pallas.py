"""The Pallas kernels of mlpdsl.jax beside jax.jit of their reference in jax.numpy, forward, on JAX's first device.

    python benchmarks/pallas.py --out benchmarks/results/pallas-h200.json

Both are jitted and warm; they take turns, in both orders, for stretches of `--stretch` seconds, each waited for once.
Figures are medians of the stretches, spreads their quartiles. Inputs are random normal, and the two results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from header import header

import mlpdsl.jax
from mlpdsl import MLPSpec

SPECS: dict[str, tuple[MLPSpec, tuple[int, ...]]] = {
    "swiglu-4096x14336": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), (64, 1024, 4096)),
    "gelu-1024x4096-bias": (MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"), (64, 1024, 16384)),
    "geglu-2048x8192": (MLPSpec(dims=(2048, 8192, 2048), activation="gelu_tanh", gated=True, dtype="bfloat16"), (64, 1024, 8192)),
    "relu2-3072x12288-residual": (
        MLPSpec(dims=(3072, 12288, 3072), activation="relu2", dtype="bfloat16", epilogue=("residual",)), (64, 1024, 4096)
    ),
}  # fmt: skip


def stretch(call: Callable[[], Any], calls: int) -> float:
    """Microseconds a call, over so many of them."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls * 1e6


def measure(spec: MLPSpec, m: int, options: argparse.Namespace) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 99))
    dtype = jnp.dtype(spec.dtype)
    x = jax.random.normal(next(keys), (m, spec.d_in), dtype)
    params = [jax.random.normal(next(keys), s, dtype) / s[-1] ** 0.5 for s in spec.parameter_shapes().values()]
    operands = {name: jax.random.normal(next(keys), (m, spec.d_out), dtype) for name in spec.operands()}  # tiles alone, above
    functions = {
        "pallas": jax.jit(mlpdsl.jax.compile(spec, backend=None if options.interpret else "pallas", interpret=options.interpret)),
        "jax.numpy": jax.jit(mlpdsl.jax.reference(spec)),
    }
    calls = {name: lambda f=f: f(x, *params, **operands) for name, f in functions.items()}
    results = {name: call().astype(jnp.float32) for name, call in calls.items()}
    apart = jnp.abs(results["pallas"] - results["jax.numpy"]).max() / jnp.abs(results["jax.numpy"]).max()
    often = {name: max(1, int(options.stretch * 1e6 / stretch(call, 3))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            times[name].append(stretch(calls[name], often[name]))
    row: dict[str, Any] = {"m": m, "spec": json.loads(spec.to_json()), "largest_difference": float(apart)}
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        row[name] = {"median_us": round(middle, 2), "quartiles_us": [round(low, 2), round(high, 2)]}
    row["speedup"] = round(row["jax.numpy"]["median_us"] / row["pallas"]["median_us"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--stretch", type=float, default=0.1, help="seconds of one stretch")
    parser.add_argument("--rows", nargs="*", choices=SPECS, default=list(SPECS))
    parser.add_argument("--m", type=int, nargs="*", help="instead of each spec's own")
    parser.add_argument("--interpret", action="store_true", help="to try this script where there is no GPU")
    options = parser.parse_args()
    result: dict[str, Any] = {**header(jax.devices()[0].device_kind, "jax", "jaxlib"), "rows": {}}
    for name in options.rows:
        spec, rows = SPECS[name]
        for m in options.m or rows:
            row = result["rows"][f"{name}-m{m}"] = measure(spec, m, options)
            ours, plain = (row[which]["median_us"] for which in ("pallas", "jax.numpy"))
            print(f"{name:<26} {m:>6} pallas {ours:>9.1f} us  jax.numpy {plain:>9.1f} us  {row['speedup']:.3f}x", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
