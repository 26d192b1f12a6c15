"""What the first call of a new spec takes, on one GPU: with Triton's cache empty, and in a process that finds the kernels there.

    python benchmarks/first_call.py --out benchmarks/results/first-call-h200.json

Each figure is of a process of its own that has imported torch and mlpdsl and multiplied once, so that CUDA and cuBLAS have started:
`mlpdsl.compile(spec)` and the call, until its result is there. Medians of `--rounds` processes, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from header import header

from mlpdsl import MLPSpec

SPECS: dict[str, tuple[MLPSpec, int]] = {
    "gelu-1024x4096-bias-m1": (MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"), 1),
    "gelu-1024x4096-bias-m4096": (MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"), 4096),
    "swiglu-4096x14336-m16": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), 16),
    "swiglu-4096x14336-m4096": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), 4096),
}

CHILD = """
import sys, time
import torch
import mlpdsl
spec, m = mlpdsl.MLPSpec.from_json(sys.argv[1]), int(sys.argv[2])
dtype = getattr(torch, spec.dtype)
params = [torch.randn(s, device="cuda").to(dtype) / s[-1] ** 0.5 for s in spec.parameter_shapes().values()]
x = torch.randn(m, spec.d_in, device="cuda").to(dtype)
torch.mm(x, x.t())
torch.cuda.synchronize()
with torch.no_grad():
    begin = time.perf_counter()
    mlpdsl.compile(spec, backend="triton")(x, *params)
    torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def once(spec: MLPSpec, m: int, folder: str) -> float:
    """Seconds of a first call, with the caches in a folder."""
    caches = {"MLPDSL_CACHE_DIR": f"{folder}/mlpdsl", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, "-c", CHILD, spec.to_json(), str(m)]
    done = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True)
    return float(done.stdout)


def figures(seconds: list[float]) -> dict[str, Any]:
    return {"median_s": round(statistics.median(seconds), 3), "range_s": [round(min(seconds), 3), round(max(seconds), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    gpu = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {**header(gpu), "rows": {}}
    for title, (spec, m) in SPECS.items():
        cold, warm = [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(once(spec, m, folder))
                warm.append(once(spec, m, folder))
        row = result["rows"][title] = {"m": m, "spec": json.loads(spec.to_json()), "cold": figures(cold), "warm": figures(warm)}
        print(f"{title:<28} cold {row['cold']['median_s']:.2f} s, warm {row['warm']['median_s']:.3f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
