"""What a function of one's own costs: the time to trace it, and its kernels beside those of the registered function.

    python benchmarks/functions.py --out benchmarks/results/functions-h200.json

Tracing is timed in fresh processes (the first trace, which imports torch's tracer) and in this one (later traces). A silu
written by the user, x·sigmoid(x), and a SwiGLU of (gate, up) run beside the registered silu, interleaved, in every order; see
forward.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forward import clocks, stretch
from header import header

import mlpdsl
from mlpdsl import MLPSpec

_FIRST = """
import time, torch, mlpdsl
began = time.perf_counter()
mlpdsl.activation(lambda x: x + torch.sin(1.3 * x) ** 2 / 1.3)
print(time.perf_counter() - began)
"""


def own_silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def own_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(gate) * up


ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "swiglu-4096x14336-m4096": ({"dims": (4096, 14336, 4096), "gated": True}, 4096),
    "swiglu-2048x8192-m2048": ({"dims": (2048, 8192, 2048), "gated": True}, 2048),
    "silu-4096x16384-m4096": ({"dims": (4096, 16384, 4096), "bias": True}, 4096),
    "silu-1024x4096-m8192": ({"dims": (1024, 4096, 1024), "bias": True}, 8192),
}


def tracing() -> dict[str, Any]:
    first = [
        float(subprocess.run([sys.executable, "-c", _FIRST], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    later = []
    for i in range(50):
        scale = 1.0 + i / 64.0  # another number each time, so that nothing is remembered
        began = time.perf_counter()
        mlpdsl.activation(lambda x, scale=scale: x + torch.sin(scale * x) ** 2 / scale)
        later.append(time.perf_counter() - began)
    return {
        "first_s": {"median": round(statistics.median(first), 4), "highest": round(max(first), 4)},
        "later_ms": {"median": round(1e3 * statistics.median(later[1:]), 2), "highest": round(1e3 * max(later[1:]), 2)},
    }


def measure(fields: dict[str, Any], m: int, train: bool, span: float, rounds: int) -> dict[str, Any]:
    gated = fields.get("gated", False)
    functions: dict[str, Any] = {"registered": "silu", "own": own_silu, **({"own (gate, up)": own_swiglu} if gated else {})}
    specs = {name: MLPSpec(activation=act, dtype="bfloat16", **fields) for name, act in functions.items()}
    some = specs["registered"]
    make: Callable[..., torch.Tensor] = lambda *s: torch.randn(*s, device="cuda")  # noqa: E731
    x = make(m, some.d_in).bfloat16().requires_grad_(train)
    params = [(make(*s) / s[-1] ** 0.5).bfloat16().requires_grad_(train) for s in some.parameter_shapes().values()]
    grad = make(m, some.d_out).bfloat16()

    def call(spec: MLPSpec) -> Callable[[], Any]:
        mlp = mlpdsl.compile(spec, backend="triton")
        if train:
            return lambda: torch.autograd.grad(mlp(x, *params), [x, *params], grad)
        return lambda: mlp(x, *params)

    calls = {name: call(spec) for name, spec in specs.items()}
    for run in calls.values():
        run()
        stretch(run, 2 * span)
    times: dict[str, list[float]] = {name: [] for name in calls}
    # Kernels that differ in a few instructions: short stretches, each order equally often, so that none has the warmer neighbour.
    orders = list(itertools.permutations(calls))
    for i in range(rounds * len(orders)):
        for name in orders[i % len(orders)]:
            times[name].append(stretch(calls[name], span))
    row: dict[str, Any] = {"m": m, "train": train, "clocks": clocks()}
    for name, values in times.items():
        row[name] = {"median_us": round(statistics.median(values), 2)}
        ratios = sorted(v / r for v, r in zip(values, times["registered"], strict=True))  # of neighbours in time
        row[name]["over_registered"] = round(statistics.median(ratios), 4)
        half = 0.98 * len(ratios) ** 0.5  # ranks beside the median that hold it with 95%
        ends = (ratios[max(0, int(len(ratios) / 2 - half))], ratios[min(len(ratios) - 1, int(len(ratios) / 2 + half))])
        row[name]["over_registered_95"] = [round(e, 4) for e in ends]
        low, _, high = statistics.quantiles(values, n=4)
        row[name]["quartiles_us"] = [round(low, 2), round(high, 2)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--span", type=float, default=0.03, help="seconds of one stretch")
    parser.add_argument("--rounds", type=int, default=12, help="times each order of the candidates")
    options = parser.parse_args()
    result: dict[str, Any] = {
        **header(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "tracing": tracing(),
        "rows": {},
    }
    print(result["tracing"], flush=True)
    for name, (fields, m) in ROWS.items() if torch.cuda.is_available() else ():
        for train in (False, True):
            row = measure(fields, m, train, options.span, options.rounds)
            result["rows"][f"{name}{'-train' if train else ''}"] = row
            print(name, "train" if train else "forward", {k: v for k, v in row.items() if isinstance(v, dict)}, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
