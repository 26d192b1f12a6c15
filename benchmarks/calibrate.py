"""How far right kernels come from their bounds, and how small an error the bounds still see.

    python benchmarks/calibrate.py --out benchmarks/results/calibration-interpreter.json

Draws calls of each kind of MLP in each dtype, runs them forward and backward through the generated kernels (on `--device cuda`, or
in Triton's interpreter, which it switches on where there is no GPU), and holds every element against `mlpdsl.testing.oracle`. For
each result (y, x, weights, biases, operands) the file has the distribution of |error|/bound over all elements, which must stay at
or below 1, and the smallest error that the bound sees: a factor of 1 + ε on the whole result, and ε times normal noise on each of
its elements, with the least ε, a power of two, that is refused in half of the calls or more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

EXPONENTS = tuple(range(-26, 1))
KINDS = ("plain", "gated", "deep", "epilogue", "own")
DTYPES = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
Cell = tuple[int, tuple[str, tuple[str, str]]]
"""Its number, which seeds it; kind; dtype and precision."""
SAMPLE = 4096
"""Ratios kept of one result of one call, for the quantiles; the largest is kept of all."""


def drawn_spec(kind: str, dtype: str, precision: str, pick: Callable[..., Any], widest: int) -> Any:
    """A spec of one kind, with widths on both paths: multiples of 8, and not."""
    import torch

    import mlpdsl
    from mlpdsl.names import ACTIVATIONS

    widths = [w for w in pick(((8, 16, 24, 40, 72, 128, 256, 512), (5, 7, 17, 33, 65, 131, 257))) if w <= widest]
    depth = {"deep": pick((3, 4)), "plain": 2}.get(kind, 2)
    fields: dict[str, Any] = {"dims": tuple(pick(widths) for _ in range(depth + 1)), "bias": pick((False, True))}
    fields |= {"dtype": dtype, "precision": precision, "activation": pick(ACTIVATIONS)}
    if kind == "gated":
        fields["gated"] = True
    if kind == "epilogue":
        # Each operand once; activations between them.
        some = [e for e in ("residual", "layer_scale", "scale") if pick((False, True))] or ["residual"]
        fields["epilogue"] = (*some, pick(("silu", "tanh", "gelu")))[:: pick((1, -1))]
    if kind == "own":
        own = pick((lambda x: x + torch.sin(1.3 * x) ** 2 / 1.3, lambda x: x * torch.tanh(torch.exp(x))))
        fields["activation"] = mlpdsl.activation(own)
        if pick((False, True)):
            fields |= {"gated": True, "activation": mlpdsl.activation(lambda gate, up: torch.tanh(gate) * (up + 1.0))}
        entry = mlpdsl.epilogue(lambda y, gamma, keep, t: keep * gamma * torch.tanh(y / (1.0 + t * t)), gamma="column", keep="row",
                                t="scalar")  # fmt: skip
        fields["epilogue"] = (entry,)
    return mlpdsl.MLPSpec(**fields)


def result_of(name: str, spec: Any) -> str:
    """What a gradient is of: one word of the file."""
    return "operands" if name in spec.operands() else "x" if name == "x" else "weights" if name.endswith("weight") else "biases"


class Tally:
    """What was seen of one result of one kind in one dtype."""

    def __init__(self) -> None:
        self.elements = self.unbounded = self.tensors = 0
        self.ratios: list[Any] = []
        self.largest = 0.0
        self.scaled: dict[int, int] = defaultdict(int)
        self.noisy: dict[int, int] = defaultdict(int)

    def add(self, actual: Any, expected: Any, generator: Any) -> None:
        import torch

        value, bound = expected.value.reshape(-1), expected.bound.expand(expected.value.shape).reshape(-1)
        got = actual.detach().double().reshape(-1)
        asked = value.isfinite() & ~bound.isinf()
        self.elements += value.numel()
        self.unbounded += int(bound.isinf().sum())
        value, bound, got = value[asked], bound[asked], got[asked]
        if not value.numel():
            return
        self.tensors += 1
        ratio = ((got - value).abs() / bound).masked_fill(got == value, 0.0)
        self.largest = max(self.largest, float(ratio.max()))
        at = torch.randint(ratio.numel(), (min(SAMPLE, ratio.numel()),), generator=generator, device=ratio.device)
        self.ratios.append((ratio if ratio.numel() <= SAMPLE else ratio[at]).cpu())
        noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
        for count, by in ((self.scaled, torch.ones_like(noise)), (self.noisy, noise)):
            for exponent in EXPONENTS:
                wrong = (got * (1 + 2.0**exponent * by)).to(actual.dtype).double()
                if bool(((wrong - value).abs() > bound).any()):
                    for larger in range(exponent, EXPONENTS[-1] + 1):
                        count[larger] += 1
                    break

    def summary(self) -> dict[str, Any]:
        import torch

        every = torch.cat(self.ratios) if self.ratios else torch.zeros(1)
        quantile = [float(every.kthvalue(max(1, round(q * every.numel()))).values) for q in (0.5, 0.99)]

        def least(count: dict[int, int]) -> float | None:
            return next((2.0**e for e in EXPONENTS if 2 * count[e] >= max(1, self.tensors)), None)

        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "unbounded": self.unbounded,
            "error_over_bound": {"median": round(quantile[0], 4), "p99": round(quantile[1], 4), "max": round(self.largest, 4)},
            "least_error_seen": {"factor": least(self.scaled), "noise": least(self.noisy)},
        }


def calibrate(cells: list[Cell], device: str, cases: int, specs: int, seconds: float) -> dict[str, Any]:
    """The table of each cell: `cases` calls of `specs` different MLPs in turn, or as many as the time allows."""
    import torch

    import mlpdsl
    from mlpdsl.testing import oracle
    from mlpdsl.testing.calls import LAYOUTS, make_call

    torch.set_num_threads(1)
    rows, widest = ((1, 7, 33, 150, 1000), 512) if device == "cuda" else ((1, 7, 33, 150), 72)
    generator = torch.Generator(device).manual_seed(0)
    tallies: dict[str, dict[str, Tally]] = {}
    counts: dict[str, int] = defaultdict(int)
    began = time.monotonic()
    for round_ in range(cases):  # each cell in turn, so that the time limit cuts all of them alike
        for index, (kind, (dtype, precision)) in cells:
            if time.monotonic() - began > seconds and round_:
                break
            spec = drawn_spec(kind, dtype, precision, random.Random((round_ % specs) * 1000 + index).choice, widest)
            pick = random.Random(1_000_000 + round_ * 1000 + index).choice
            values = pick(("normal", "normal", "tiny", "huge", "zeros"))
            lies = {"x": pick(tuple(LAYOUTS)), "dy": pick(("dense", "strided")), "device": device}
            call = make_call(spec, (pick(rows),), round_ * 1000 + index, values=values, **lies)
            y, grads = call.gradients(mlpdsl.compile(spec, backend="triton"))
            arguments = (spec, call.x, call.params, call.operands)
            wanted = {"y": oracle.forward(*arguments, replay=True), **oracle.backward(*arguments, call.dy, replay=True)}
            cell = name_of((index, (kind, (dtype, precision))))
            tally = tallies.setdefault(cell, {})
            counts[cell] += 1
            for name, actual in (("y", y), *grads.items()):
                what = name if name == "y" else result_of(name, spec)
                oracle.check(actual, wanted[name], f"{name} of {call!r}")
                tally.setdefault(what, Tally()).add(actual, wanted[name], generator)
    return {cell: {"calls": counts[cell], **{what: t.summary() for what, t in tally.items()}} for cell, tally in tallies.items()}


def name_of(cell: Cell) -> str:
    """What a cell is called in the file."""
    _, (kind, (dtype, precision)) = cell
    return f"{kind}, {dtype}" if precision == "ieee" else f"{kind}, {dtype} {precision}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else the interpreter on the CPU")
    parser.add_argument("--cases", type=int, help="calls of each kind in each dtype: 400 on a GPU, 24 interpreted")
    parser.add_argument("--specs", type=int, help="MLPs among them: 4 on a GPU, where each is compiled; else as many as calls")
    parser.add_argument("--seconds", type=float, default=45.0, help="no new calls after this time")
    parser.add_argument("--jobs", type=int, help="processes: on a GPU up to 10, else 1")
    options = parser.parse_args()
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = device == "cuda"
    if not large:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import triton

    import mlpdsl

    cases = options.cases or (400 if large else 24)
    specs = options.specs or (4 if large else cases)
    jobs = options.jobs or (min(10, os.cpu_count() or 1) if large else 1)
    cells: list[Cell] = list(enumerate((kind, numbers) for kind in KINDS for numbers in DTYPES))
    began = time.monotonic()
    fixed = (device, cases, specs, options.seconds)
    if jobs == 1:
        tables = calibrate(cells, *fixed)
    else:  # each in a process of its own: compiling takes most of the time
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(calibrate, cells[job::jobs], *fixed) for job in range(jobs)]
            found = {name: table for part in parts for name, table in part.result().items()}
        tables = {name: found[name] for name in map(name_of, cells)}
    worst = max(t["error_over_bound"]["max"] for cell in tables.values() for t in cell.values() if isinstance(t, dict))
    result = {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if large else "Triton's interpreter",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "mlpdsl": mlpdsl.__version__,
        },
        "seconds": round(time.monotonic() - began, 1),
        "calls": sum(cell["calls"] for cell in tables.values()),
        "largest_error_over_bound": worst,
        "cells": tables,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for cell, rows_ in tables.items():
        said = {
            what: (t["error_over_bound"]["max"], t["least_error_seen"]["factor"]) for what, t in rows_.items() if what != "calls"
        }
        print(cell, said)
    print(f"{result['calls']} calls in {result['seconds']} s; the largest error is {worst} of its bound")


if __name__ == "__main__":
    main()
