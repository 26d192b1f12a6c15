"""Forward (and training step) of a few MLPs against eager PyTorch, on one GPU, sustained.

    python benchmarks/forward.py --out benchmarks/results/forward-h200.json

Candidates are interleaved in one process, in both orders, each running for at least `--span` seconds at a stretch, so that all see
the same power-limited clocks; times are medians over the stretches, spreads their quartiles. Inputs are random normal. Forward's
`products` are the library's matrix products alone, no bias, no activation, memory already there: no MLP, but what one costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import captured
from header import header

import mlpdsl
from mlpdsl import MLPSpec

ROWS: dict[str, tuple[MLPSpec, int]] = {
    "swiglu-4096x14336-m4096": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), 4096),
    "swiglu-2048x8192-m16384": (MLPSpec(dims=(2048, 8192, 2048), activation="silu", gated=True, dtype="bfloat16"), 16384),
    "geglu-2048x16384-m4096": (MLPSpec(dims=(2048, 16384, 2048), activation="gelu_tanh", gated=True, dtype="bfloat16"), 4096),
    "gelu-1024x4096-bias-m4096": (MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"), 4096),
    "gelu_tanh-768x3072-bias-m4096": (MLPSpec(dims=(768, 3072, 768), activation="gelu_tanh", bias=True, dtype="bfloat16"), 4096),
    "gelu-384x1536-bias-fp32-m4096": (MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True), 4096),
    "swiglu-4096x14336-m16": (MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"), 16),
}


def clocks() -> dict[str, str]:
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(query.split(","), (v.strip() for v in line.stdout.splitlines()[0].split(",")), strict=False))


def stretch(call: Callable[[], Any], seconds: float) -> float:
    """Microseconds a call, over one stretch of at least so many seconds of GPU time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    count = max(5, int(seconds * 1e3 / max(start.elapsed_time(end) / 3, 1e-3)))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / count


def candidates(spec: MLPSpec, m: int, train: bool) -> dict[str, Callable[[], Any]]:
    dtype = getattr(torch, spec.dtype)
    make: Callable[..., torch.Tensor] = lambda *s: torch.randn(*s, device="cuda").to(dtype).requires_grad_(train)  # noqa: E731
    x = make(m, spec.d_in)
    shapes = spec.parameter_shapes().values()
    params = [(torch.randn(s, device="cuda") / s[-1] ** 0.5).to(dtype).requires_grad_(train) for s in shapes]
    grad = torch.randn(m, spec.d_out, device="cuda").to(dtype)
    calls = {"mlpdsl": mlpdsl.compile(spec, backend="triton"), "eager": mlpdsl.reference(spec)}
    if not train:
        weights = [p for p in params if p.dim() == 2]
        hidden = torch.randn(m, spec.dims[1], device="cuda").to(dtype)
        results = [torch.empty(m, w.shape[0], device="cuda", dtype=dtype) for w in weights]

        def products() -> None:
            for w, result in zip(weights, results, strict=True):
                torch.mm(hidden if w is weights[-1] else x, w.t(), out=result)

        return {"products": products, **{name: (lambda f=f: f(x, *params)) for name, f in calls.items()}}
    return {name: (lambda f=f: torch.autograd.grad(f(x, *params), [x, *params], grad)) for name, f in calls.items()}


def measure(spec: MLPSpec, m: int, train: bool, span: float, rounds: int, graph: bool = False) -> dict[str, Any]:
    calls = candidates(spec, m, train)
    with torch.set_grad_enabled(train):
        calls = {name: captured(call) if graph else call for name, call in calls.items()}
    for call in calls.values():  # compile, then heat up: the first seconds run at clocks that do not last
        call()
        stretch(call, 2 * span)
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            times[name].append(stretch(calls[name], span))
    row: dict[str, Any] = {"m": m, "train": train, "spec": json.loads(spec.to_json()), "clocks": clocks()}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        row[name] = {"median_us": round(statistics.median(values), 2), "quartiles_us": [round(low, 2), round(high, 2)]}
    row["speedup"], row["speedup_range"] = ratio(times["eager"], times["mlpdsl"])
    if "products" in times:
        row["over_products"], row["over_products_range"] = ratio(times["mlpdsl"], times["products"])
    return row


def ratio(above: list[float], below: list[float]) -> tuple[float, list[float]]:
    """The median of the rounds' ratios, the lowest and the highest."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return round(statistics.median(found), 4), [round(min(found), 4), round(max(found), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--span", type=float, default=0.3, help="seconds of one stretch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--train", action="store_true", help="forward and backward, every gradient")
    parser.add_argument("--graph", action="store_true", help="forward replayed from CUDA graphs, not called")
    options = parser.parse_args()
    if options.graph and options.train:
        parser.error("--graph is for forward: leave out --train")
    result: dict[str, Any] = {**header(torch.cuda.get_device_name()), "rows": {}}
    torch.manual_seed(0)
    for name in options.rows:
        spec, m = ROWS[name]
        began = time.time()
        row = result["rows"][name] = measure(spec, m, options.train, options.span, options.rounds, options.graph)
        print(f"{name:<34} mlpdsl {row['mlpdsl']['median_us']:>9.1f} us  eager {row['eager']['median_us']:>9.1f} us  "
              f"{row['speedup']:.3f}x {row['speedup_range']} ({time.time() - began:.0f} s)", flush=True)  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
