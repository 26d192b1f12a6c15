"""What the first call of a new spec takes, on one GPU: with Triton's cache empty, and where the kernels are found there.

    python benchmarks/first_call.py --out benchmarks/results/first-call-h200.json

Timed from `mlpdsl.compile(spec)` to the result of the call, in processes that have imported torch and mlpdsl and multiplied once,
so that CUDA and cuBLAS have started. Each process does this for every spec, one after the other, and begins with another one: the
`first` in a process also pays for the imports of triton and jinja2 and for their own starts, the `next` ones do not. Medians, with
the lowest and the highest.
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
    "gelu_tanh-768x3072-bias-m4096": (MLPSpec(dims=(768, 3072, 768), activation="gelu_tanh", bias=True, dtype="bfloat16"), 4096),
    "swiglu-4096x14336-m16": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), 16),
    "geglu_tanh-2048x16384-m4096": (MLPSpec(dims=(2048, 16384, 2048), activation="gelu_tanh", gated=True, dtype="bfloat16"), 4096),
}

CHILD = """
import sys, time
import torch
import mlpdsl
cases = []
for text, m in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    spec = mlpdsl.MLPSpec.from_json(text)
    dtype = getattr(torch, spec.dtype)
    params = [torch.randn(s, device="cuda").to(dtype) / s[-1] ** 0.5 for s in spec.parameter_shapes().values()]
    cases.append((spec, torch.randn(m, spec.d_in, device="cuda").to(dtype), params))
    torch.mm(cases[-1][1], cases[-1][1].t())
torch.cuda.synchronize()
with torch.no_grad():
    for spec, x, params in cases:
        begin = time.perf_counter()
        mlpdsl.compile(spec, backend="triton")(x, *params)
        torch.cuda.synchronize()
        print(time.perf_counter() - begin)
"""


def once(order: list[str], folder: str) -> dict[str, float]:
    """Seconds of the first call of each spec, by its title, in one process, with the caches in a folder."""
    caches = {"MLPDSL_CACHE_DIR": f"{folder}/mlpdsl", "TRITON_CACHE_DIR": f"{folder}/triton"}
    arguments = [text for title in order for text in (SPECS[title][0].to_json(), str(SPECS[title][1]))]
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True)
    return dict(zip(order, map(float, done.stdout.split()), strict=True))


def figures(seconds: list[float]) -> dict[str, Any]:
    return {"median_s": round(statistics.median(seconds), 3), "range_s": [round(min(seconds), 3), round(max(seconds), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1, help="each is eight processes")
    options = parser.parse_args()
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    gpu = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {**header(gpu), "rows": {}}
    titles = list(SPECS)
    found: dict[str, dict[str, list[float]]] = {title: {} for title in titles}
    for _ in range(options.rounds):
        for at in range(len(titles)):
            order = titles[at:] + titles[:at]
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("cold", "warm"):
                    for place, (title, seconds) in enumerate(once(order, folder).items()):
                        found[title].setdefault(f"{cache}, {'next' if place else 'first'}", []).append(seconds)
    for title, (spec, m) in SPECS.items():
        times = {kind: figures(seconds) for kind, seconds in found[title].items()}
        result["rows"][title] = {"m": m, "spec": json.loads(spec.to_json()), "seconds": times}
        print(f"{title:<28}", "; ".join(f"{kind} {each['median_s']:.3f} s" for kind, each in times.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
