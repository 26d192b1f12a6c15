"""What a small call costs the host: mlpdsl and eager PyTorch beside one F.linear of one row, on one GPU.

    python benchmarks/host.py --train --out benchmarks/results/host-h200.json
    python benchmarks/host.py --m 256 --train --out benchmarks/results/host-256-h200.json    # the library multiplies some
    python benchmarks/host.py --profile    # where a call's time goes

Times are from one call's start to the next one's, so many in a row that no queue of launches fills up, and the GPU is waited for
between such stretches, not in them. Candidates take turns; figures are medians of the stretches, spreads their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from header import header
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.tape import Product, Tape

SPECS: dict[str, MLPSpec] = {
    "one-1024x1024": MLPSpec(dims=(1024, 1024), activation="identity", dtype="bfloat16"),
    "gelu-1024x4096-bias": MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, dtype="bfloat16"),
    "swiglu-1024x2816": MLPSpec(dims=(1024, 2816, 1024), activation="silu", gated=True, dtype="bfloat16"),
    "gelu-384x1536-bias-fp32": MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True),
}

Call = Callable[[], Any]


def stretch(call: Call, calls: int, wait: Call) -> float:
    """Microseconds of the host's time a call."""
    wait()
    begin = time.perf_counter_ns()
    for _ in range(calls):
        call()
    took = time.perf_counter_ns() - begin
    wait()
    return took / calls / 1e3


def figures(times: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_us": round(middle, 2), "quartiles_us": [round(low, 2), round(high, 2)]}


def interleaved(calls: dict[str, Call], options: argparse.Namespace, wait: Call) -> dict[str, list[float]]:
    for call in calls.values():
        for _ in range(3):  # decided, recorded, repeated
            stretch(call, options.calls, wait)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            times[name].append(stretch(calls[name], options.calls, wait))
    return times


def tensors(spec: MLPSpec, m: int, device: str) -> tuple[Tensor, list[Tensor]]:
    dtype = getattr(torch, spec.dtype)
    params = [(torch.randn(s, device=device) / s[-1] ** 0.5).to(dtype) for s in spec.parameter_shapes().values()]
    return torch.randn(m, spec.d_in, device=device).to(dtype), params


def measure(spec: MLPSpec, options: argparse.Namespace, wait: Call) -> dict[str, Any]:
    x, params = tensors(spec, options.m, options.device)
    row_1024, weight = (torch.randn(n, 1024, device=options.device).bfloat16() for n in (1, 1024))
    ours, eager = mlpdsl.compile(spec, backend="triton"), mlpdsl.reference(spec)
    calls: dict[str, Call] = {
        "linear": lambda: torch.nn.functional.linear(row_1024, weight),
        "mlpdsl": lambda: ours(x, *params),
        "eager": lambda: eager(x, *params),
    }
    times = interleaved(calls, options, wait)
    row: dict[str, Any] = {"spec": json.loads(spec.to_json()), **{name: figures(each) for name, each in times.items()}}
    for name in ("mlpdsl", "eager"):
        row[f"{name}_to_linear"] = round(statistics.median(times[name]) / statistics.median(times["linear"]), 3)
    kind = next((kind for kinds in ours._shortcut._kinds.values() for kind in kinds), None)
    row["m"], row["launches"] = options.m, None if kind is None else len(kind.tape.steps)
    row["products"] = None if kind is None else sum(isinstance(step, Product) for step in kind.tape.steps)
    row["by_c_launcher"] = kind is not None and kind.tape.direct
    if options.profile and row["by_c_launcher"]:
        row["profile_us"] = profile(kind, calls["mlpdsl"], x, params, options, wait)
    if options.train:
        row["train"] = train(ours, eager, x, params, row["linear"]["median_us"], options, wait)
    return row


@torch.enable_grad()
def train(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    x: Tensor,
    params: list[Tensor],
    linear: float,
    options: argparse.Namespace,
    wait: Call,
) -> dict[str, Any]:
    """A call with every gradient: the host's time, and the time with the GPU's."""
    leaves = [t.detach().requires_grad_() for t in (x, *params)]
    found: dict[str, Any] = {}
    steps: dict[str, Call] = {}
    for name, function in (("mlpdsl", ours), ("eager", eager)):
        grad = torch.randn_like(function(*leaves))
        steps[name] = lambda f=function, g=grad: torch.autograd.grad(f(*leaves), leaves, g)
    for name, times in interleaved(steps, options, wait).items():
        found[name] = figures(times)
    for name, step in steps.items():
        begin = time.perf_counter_ns()
        for _ in range(options.calls):
            step()
        wait()
        found[name]["with_gpu_us"] = round((time.perf_counter_ns() - begin) / options.calls / 1e3, 2)
    found["to_linear"] = {name: round(found[name]["median_us"] / linear, 3) for name in steps}
    found["replays"] = replays(steps["mlpdsl"], options, wait)
    return found


def replays(step: Call, options: argparse.Namespace, wait: Call) -> list[dict[str, Any]]:
    """The recordings that a training step repeats, forward's first: their launches, and what repeating one costs the host."""
    seen: list[tuple[Tape, tuple[Any, ...]]] = []
    real = Tape.replay

    def listening(tape: Tape, *arguments: Any) -> Any:
        seen.append((tape, arguments))
        return real(tape, *arguments)

    Tape.replay = listening  # type: ignore[method-assign]
    try:
        step()
    finally:
        Tape.replay = real  # type: ignore[method-assign]
    found = []
    for tape, arguments in seen:
        with torch.no_grad():
            times = interleaved({"": lambda t=tape, a=arguments: real(t, *a)}, options, wait)[""]
        products = sum(isinstance(each, Product) for each in tape.steps)
        found.append({"launches": len(tape.steps), "products": products, "by_c_launcher": tape.direct, **figures(times)})
    return found


def profile(kind: Any, call: Call, x: Tensor, params: list[Tensor], options: argparse.Namespace, wait: Call) -> dict[str, Any]:
    """Where a call's time goes: each part by what a call costs without it, or by itself."""
    from mlpdsl import straight, tape
    from mlpdsl.tape import Step

    recording, inputs = kind.tape, [x, *params]
    addresses = [t.data_ptr() for t in inputs]
    silent = []
    for step in recording.steps:
        if not isinstance(step, Product):
            step, told = Step(step.kernel, step.grid, step.options, step.compiled, step.args), step
            step.allocations, step.frees, step.flat = told.allocations, told.frees, told.flat
            step.starter = told.starter._replace(function=_nothing)
        silent.append(step)
    without_launches = straight.straight(len(inputs), silent, recording.results, recording.device)
    without_steps = straight.straight(len(inputs), [], [], recording.device)
    assert without_launches is not None and without_steps is not None
    allocate = straight._allocator(recording.device)
    made = [(s, straight._contiguous(s), dtype) for step in recording.steps for _, s, dtype in step.allocations]
    y = call()

    def allocations() -> None:
        for shape, strides, dtype in made:
            allocate(shape, strides, dtype)

    parts: dict[str, list[float]] = interleaved(
        {
            "call": call,
            "replay": lambda: recording.replay(inputs, addresses),
            "without launches": lambda: without_launches(inputs, addresses),
            "nothing": lambda: without_steps(inputs, addresses),
            "allocations": allocations,
        },
        options,
        wait,
    )
    real, tape.Tape.replay = tape.Tape.replay, lambda *_: [y]
    try:
        parts["without replay"] = interleaved({"": call}, options, wait)[""]
    finally:
        tape.Tape.replay = real
    took = {name: statistics.median(each) for name, each in parts.items()}
    encoded = [a for step in recording.steps if not isinstance(step, Product) for a in step.flat if isinstance(a, straight.Encoded)]
    found = {
        "call": took["call"],
        "checks": took["without replay"],
        "allocations": took["allocations"],
        "arguments": took["without launches"] - took["nothing"] - took["allocations"],
        "launches": took["replay"] - took["without launches"],
    }
    if encoded:  # of an address that is met for the first time; else they are kept
        found["descriptor"] = statistics.median(interleaved({"": lambda: encoded[0].maps.encode(addresses[0])}, options, wait)[""])
    return {**{name: round(value, 2) for name, value in found.items()}, "descriptors": len(encoded), "allocated": len(made)}


def _nothing(*_: Any) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="*", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--calls", type=int, default=200, help="calls of one stretch; launches beyond 1024 would wait for the GPU")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--m", type=int, default=1, help="rows of x")
    parser.add_argument("--profile", action="store_true", help="where a call's time goes")
    parser.add_argument("--train", action="store_true", help="forward and backward as well")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(options.device))
    wait: Call = torch.cuda.synchronize if on_gpu else _nothing
    result: dict[str, Any] = {**header(torch.cuda.get_device_name() if on_gpu else None), "rows": {}}
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.rows:
            row = result["rows"][name] = measure(SPECS[name], options, wait)
            print(f"{name:<22} linear {row['linear']['median_us']:>6.2f} us  mlpdsl {row['mlpdsl']['median_us']:>6.2f} us "
                  f"({row['mlpdsl_to_linear']:.2f}x)  eager {row['eager']['median_us']:>6.2f} us ({row['eager_to_linear']:.2f}x)  "
                  f"launches {row['launches']}, by the C launcher: {row['by_c_launcher']}", flush=True)  # fmt: skip
            if "train" in row:
                told = {name: each["median_us"] for name, each in row["train"].items() if name in row["train"]["to_linear"]}
                print(f"    with gradients: {told}, in linears: {row['train']['to_linear']}", flush=True)
            if "profile_us" in row:
                print("    " + "  ".join(f"{part} {took}" for part, took in row["profile_us"].items()), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
