"""Few rows: a forward without gradients, replayed from a CUDA graph, beside eager PyTorch's, on one GPU.

    python benchmarks/decode.py --out benchmarks/results/decode-h200.json

Each candidate is captured once and replayed for `--span` milliseconds three times; the median counts. Nets whose weights fit the L2
run from it. Eager PyTorch first, then mlpdsl: the two do not take turns, so rows that run for long see other clocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from header import header

import mlpdsl
from mlpdsl import MLPSpec

SPECS = {
    "gelu-1024x4096-bias": MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"),
    "gelu_tanh-768x3072-bias": MLPSpec(dims=(768, 3072, 768), activation="gelu_tanh", bias=True, dtype="bfloat16"),
    "gelu-4096x4096-bias": MLPSpec(dims=(4096, 4096, 4096), activation="gelu", bias=True, dtype="bfloat16"),
    "swiglu-4096x14336": MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"),
    "swiglu-8192x28672": MLPSpec(dims=(8192, 28672, 8192), activation="silu", gated=True, dtype="bfloat16"),
    "geglu_tanh-2048x16384": MLPSpec(dims=(2048, 16384, 2048), activation="gelu_tanh", gated=True, dtype="bfloat16"),
    "gelu-384x1536-bias-fp32": MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True),
    "swiglu-1024x2816-fp32": MLPSpec(dims=(1024, 2816, 1024), activation="silu", gated=True),
}
ROWS = (1, 16, 32, 64, 128, 256, 512, 4096)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """A replay of the call, which is made twice before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
        with torch.cuda.graph(graph, stream=side):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def timed(replay: Callable[[], None], span_ms: float) -> float:
    """Microseconds a replay: the median of three stretches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stretch(count: int) -> float:
        start.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    for _ in range(5):
        replay()
    count = max(20, int(span_ms / stretch(20)))
    found = []
    for _ in range(3):
        replay()
        replay()
        found.append(1e3 * stretch(count))
    return statistics.median(found)


def measure(spec: MLPSpec, m: int, span_ms: float) -> dict[str, Any]:
    dtype = getattr(torch, spec.dtype)
    params = [(torch.randn(s, device="cuda") / s[-1] ** 0.5).to(dtype) for s in spec.parameter_shapes().values()]
    x = torch.randn(m, spec.d_in, device="cuda").to(dtype)
    eager, ours = mlpdsl.reference(spec), mlpdsl.compile(spec, backend="triton")
    with torch.no_grad():
        wanted, found = eager(x, *params).float(), ours(x, *params).float()
        times = {name: timed(captured(lambda f=f: f(x, *params)), span_ms) for name, f in (("eager", eager), ("mlpdsl", ours))}
    return {
        "m": m,
        "spec": json.loads(spec.to_json()),
        **{f"{name}_us": round(us, 2) for name, us in times.items()},
        "speedup": round(times["eager"] / times["mlpdsl"], 3),
        "difference": float(f"{float((found - wanted).norm() / wanted.norm()):.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--span", type=float, default=8.0, help="milliseconds of one stretch")
    options = parser.parse_args()
    result: dict[str, Any] = {**header(torch.cuda.get_device_name()), "rows": {}}
    torch.manual_seed(0)
    for name, spec in SPECS.items():
        for m in ROWS:
            row = result["rows"][f"{name}-m{m}"] = measure(spec, m, options.span)
            print(f"{name:<26} {m:>5} mlpdsl {row['mlpdsl_us']:>9.2f} us  eager {row['eager_us']:>9.2f} us  {row['speedup']:.3f}x")
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
