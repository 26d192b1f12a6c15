"""Every spec of the matrix compiled for TPUs by their own compiler, without a TPU: `make test-tpu`.

    pip install libtpu; JAX_PLATFORMS=cpu python -m tests.pallas.tpu

libtpu compiles for a chip that is described and not there: Mosaic refuses what it cannot lay out, and what VMEM does not hold. A
case is a spec on a chip with a number of rows. Specs whose dtype or precision a TPU has not are
compiled in the nearest that it has, and named so.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

# libtpu would ask a metadata server where it is, and wants to be alone on a machine.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import mlpdsl.jax
from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.version import __version__
from tests.compiled.matrix import SPECS

CHIPS = {"tpu_v4": "v4:2x2x1", "tpu_v5e": "v5e:2x2", "tpu_v5p": "v5p:2x2x1", "tpu_v6e": "v6e:2x2"}
"""Targets, and a slice of each as libtpu describes one."""

CALLS = ((1, False), (77, True), (4096, True))
"""Rows, and whether it is a training step or forward alone."""

WIDE = "gated-everything in bfloat16"
"""The spec that is compiled under jax_enable_x64 as well."""


def specs() -> dict[str, MLPSpec]:
    """The matrix in what a TPU has: float16 becomes bfloat16, tf32 ieee."""
    found = {}
    for name, spec in SPECS.items():
        dtype, precision = "bfloat16" if spec.dtype == "float16" else spec.dtype, "ieee"
        changed = (dtype, precision) != (spec.dtype, spec.precision)
        found[f"{name} in {dtype}" if changed else name] = spec.replace(dtype=dtype, precision=precision)
    return found


def arrays(spec: MLPSpec, rows: int, sharding: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """Types of x, the parameters and the operands, on a device."""
    shapes = {"tile": (rows, spec.d_out), "row": (rows, 1), "column": (spec.d_out,), "scalar": ()}

    def like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype), sharding=sharding)  # type: ignore[no-untyped-call]

    params = [like(shape) for shape in spec.parameter_shapes().values()]
    return like((rows, spec.d_in)), params, {name: like(shapes[kind]) for name, kind in spec.operands().items()}


def compiled(spec: MLPSpec, target: str, rows: int, backward: bool, sharding: Any) -> tuple[int, float]:
    """How many kernels were compiled, and in how many seconds."""
    mlp = mlpdsl.jax.compile(spec, backend="pallas", target=target)

    def forward(x: Any, params: list[Any], operands: dict[str, Any]) -> Any:
        return mlp(x, *params, **operands)

    def step(x: Any, params: list[Any], operands: dict[str, Any]) -> Any:
        y, pull = jax.vjp(forward, x, params, operands)
        return y, pull(y)

    start = time.monotonic()
    traced = jax.jit(step if backward else forward).trace(*arrays(spec, rows, sharding))
    lowered = traced.lower(lowering_platforms=("tpu",))
    lowered.compile()
    return lowered.as_text().count("@tpu_custom_call"), time.monotonic() - start


def main(path: Path) -> int:
    """Compile every case, write what came out, and say what is wrong."""
    start, rows, wrong = time.monotonic(), [], []
    for target, described in CHIPS.items():
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=described)
        sharding = jax.sharding.SingleDeviceSharding(slice_.devices[0])
        named = {**specs(), f"{WIDE} under x64": specs()[WIDE]}
        for (name, spec), (m, backward) in product(named.items(), CALLS):
            try:
                with jax.enable_x64(name.endswith("x64")):
                    kernels, seconds = compiled(spec, target, m, backward, sharding)
                rows.append([name, target, m, backward, kernels, round(seconds, 2)])
            except Exception as error:
                rows.append([name, target, m, backward, 0, None])
                case = f"{name}, {target}, m={m}, {'training step' if backward else 'forward'}"
                wrong.append(f"{case}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    refused = {}
    for name, spec in SPECS.items():
        try:
            mlpdsl.jax.compile(spec, backend="pallas", target="tpu_v5e")
        except UnsupportedError as error:
            refused[name] = list(error.reasons)
    head = {
        "command": "make test-tpu", "date": f"{date.today()}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
        | {"mlpdsl": __version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - start), "specs": len(specs()), "chips": len(CHIPS),
        "kernels": sum(row[4] for row in rows), "failed": wrong, "refused_as_declared": refused,
        "columns": ["spec", "target", "m", "backward", "kernels", "seconds"],
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text("{\n" + ",\n".join([*lines, f'  "rows": [\n{body}\n  ]']) + "\n}\n")
    print(*wrong, f"{head['kernels']} kernels of {len(rows)} cases in {head['seconds']} s: {len(wrong)} failed", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[2] / "benchmarks/results/tpu.json"))
