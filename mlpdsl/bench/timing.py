"""One row: candidates built, held against each other, and timed in every launch mode."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from mlpdsl.bench.floors import Ceilings, floor_of, footprint, held_bytes
from mlpdsl.bench.measure import BURST_FLOOR_US, Times, burst, first_line, host_us, summarised, sustained
from mlpdsl.bench.peers import (
    AbsentError,
    Factory,
    Forward,
    Tensors,
    difference,
    launches,
    make_tensors,
    step,
    surroundings,
    tolerance,
)
from mlpdsl.bench.results import ResultError
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import Row
from mlpdsl.bench.timer import Call, Device, Timer

__all__ = ["time_row"]

CACHED = 1.5
"""A row that touches less than this many times the L2 is also timed cold."""
COLD = 2.5
"""Cold: so many times the L2 lie in other copies of parameters and inputs between two uses of one."""
COPIES = 64
"""Copies at most. A row that needs more is not timed cold."""
SHORT = "too short for a burst: time it with --regime sustained"


def time_row(
    row: Row,
    device: Device,
    candidates: Mapping[str, Factory],
    ceilings: Ceilings,
    settings: Settings,
    seconds: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Everything the file holds of a row. `seconds` are those of stretches; building and compiling come on top.

    A candidate that raises is dropped, with the reason in the row; where memory does not suffice, the GPU no longer answers, or
    only bursts are asked for and the row is too short for them, the row is "skipped", with the reason.
    """
    floor = floor_of(row, ceilings)
    found: dict[str, Any] = {
        "key": row.key,
        "name": row.name,
        "spec": json.loads(row.spec.to_json()),
        "m": row.m,
        "passes": row.passes,
        "floor_us": float(f"{floor.us:.5g}"),
        "floor_by": floor.by,
        "flops": floor.flops,
        "bytes": floor.bytes,
        "candidates": {},
        "measured": [],
    }
    if "sustained" not in settings.regimes and not _has_bursts(found):
        found["skipped"] = SHORT
        return found
    began = device.now()
    device.clear()
    graphs = len(candidates) if "graph" in settings.launches else 0
    need, free = held_bytes(row, graphs), device.free_bytes()
    if need > free:
        found["skipped"] = f"it takes about {need / 2**30:.1f} GiB of device memory, and {free / 2**30:.1f} GiB are free"
        return found
    try:
        with surroundings(row):
            _time(_Row(row, device, settings.seed, tell), candidates, found, settings, seconds)
    except torch.OutOfMemoryError as error:
        found["skipped"] = first_line(error)
    except Exception as error:
        try:
            device.check()
        except ResultError:
            found["skipped"] = first_line(error)
        else:
            raise
    found["seconds"] = round(device.now() - began, 2)
    return found


def _has_bursts(found: Mapping[str, Any]) -> bool:
    """Whether the row is one that a power limit slows."""
    return bool(found["floor_us"] >= BURST_FLOOR_US)


class _Row:
    """A row under way: its tensors, the functions of its candidates, and the result that all are held against."""

    def __init__(self, row: Row, device: Device, seed: int, tell: Callable[[str], None]) -> None:
        self.row, self.device, self.seed, self.tell = row, device, seed, tell
        self.tensors = make_tensors(row, device.torch_device, seed)
        self.functions: dict[str, Forward] = {}
        self.expected: Any = None
        self.yardstick: str | None = None

    def build(self, name: str, factory: Factory) -> dict[str, Any]:
        """Build a candidate and make its first call; what the file says of it."""
        self.tell(f"{name}: first call")
        began = self.device.now()
        try:
            function = factory(self.row.spec)
            result = step(function, self.tensors)()
            self.device.stretch(step(function, self.tensors), 1)
            took = self.device.now() - began
            if self.expected is None:
                self.expected, self.yardstick = result, name
            off = difference(result, self.expected)
        except AbsentError as reason:
            return {"absent": str(reason)}
        except Exception as error:
            return {"failed": first_line(error)}
        said = {"setup_s": round(took, 2), "difference": float(f"{off:.3g}") if math.isfinite(off) else None}
        if off > tolerance(self.row):
            return {**said, "failed": self.differs(off)}
        self.functions[name] = function
        return said

    def differs(self, off: float) -> str:
        return f"its result differs from that of {self.yardstick} by {off:.3g} of it; right ones are within {tolerance(self.row)}"

    def copies(self) -> tuple[list[Tensors], str]:
        """Copies of all inputs to go round, so that each is cold when it comes again; or none, and why."""
        row, l2 = self.row, self.device.l2_bytes
        size = sum(t.numel() * t.element_size() for t in self.tensors.inputs)
        number = math.ceil(COLD * l2 / size) + 1
        if number > COPIES:
            return [], f"its inputs are so small that {number} copies would be needed, and {COPIES} are made at most"
        others = [make_tensors(row, self.device.torch_device, self.seed + at) for at in range(1, number)]
        return [self.tensors, *others], ""

    def calls(self, launch: str, tensors: list[Tensors]) -> tuple[dict[str, Call], dict[str, str]]:
        """What is timed, by candidate: plain calls or replays, each on the next of the tensors; and why some cannot be."""
        found: dict[str, Call] = {}
        failed: dict[str, str] = {}
        for name, function in self.functions.items():
            self.tell(f"{name}: {launch}")
            try:
                if launch == "graph":
                    found[name] = self.captured(function, tensors)
                    continue
                each = [step(function, t) for t in tensors]
                for call in each:
                    call()
            except Exception as error:
                failed[name] = first_line(error)
                continue
            found[name] = _round(each)
        return found, failed

    def captured(self, function: Forward, tensors: list[Tensors]) -> Call:
        """A round of all tensors as one graph, like a model's layers. But for the first, whose result is looked at, calls allocate
        where the one before them did."""
        first, *others = (step(function, t.again()) for t in tensors)

        def calls() -> Any:
            result = first()
            for call in others:
                call()
            return result

        replay, result = self.device.capture(calls)
        replay()
        off = difference(result, self.expected)
        if off > tolerance(self.row):
            raise ValueError(f"replayed, {self.differs(off)}")
        return replay


def _round(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]

    def each() -> None:
        for call in calls:
            call()

    return each


class _Rounds:
    """A timer of rounds of so many calls, which counts in calls, and makes as many as whole rounds have."""

    def __init__(self, timer: Timer, calls: int) -> None:
        self._timer, self._calls = timer, calls
        self.now, self.pause, self.clocks = timer.now, timer.pause, timer.clocks

    def whole(self, count: int) -> int:
        return self._calls * max(1, round(count / self._calls))

    def stretch(self, call: Call, count: int) -> float:
        return self._timer.stretch(call, self.whole(count) // self._calls) / self._calls

    def host(self, call: Call, count: int) -> float:
        return self._timer.host(call, self.whole(count) // self._calls) / self._calls


def _time(
    at: _Row,
    candidates: Mapping[str, Factory],
    found: dict[str, Any],
    settings: Settings,
    seconds: float,
) -> None:
    device, row = at.device, at.row
    # Eager PyTorch first: it is the yardstick where it is there.
    order = sorted(candidates, key=lambda name: name != "eager")
    built = {name: at.build(name, candidates[name]) for name in order}
    found["candidates"] = {name: built[name] for name in candidates}
    found["yardstick"] = at.yardstick
    _host(at, found)
    caches: dict[str, list[Tensors]] = {"hot": [at.tensors]}
    if footprint(row) < CACHED * device.l2_bytes:
        copies, reason = at.copies()
        if reason:
            found["not_cold"] = reason
        else:
            caches["cold"] = copies
    bursts = _has_bursts(found)
    sections = [(c, regime) for c in caches for regime in settings.regimes if regime == "sustained" or (bursts and c == "hot")]
    share = seconds / max(1, len(settings.launches) * len(sections))
    for launch in settings.launches:
        for cache, tensors in caches.items():
            calls, failed = at.calls(launch, tensors)
            for regime in (regime for of, regime in sections if of == cache):
                at.tell(f"{launch}, {cache}, {regime}")
                timer = _Rounds(device, len(tensors))
                times = (sustained if regime == "sustained" else burst)(timer, calls, share, at.tell)
                times.calls = {name: timer.whole(count) for name, count in times.calls.items()}
                _add(found, times, failed, at.seed, launch=launch, cache=cache, regime=regime)
            del calls


def _add(found: dict[str, Any], times: Times, failed: dict[str, str], seed: int, **what: str) -> None:
    times.failed = {**failed, **times.failed}
    found["measured"].append({**what, **summarised(times, seed)})


def _host(at: _Row, found: dict[str, Any]) -> None:
    """Host time of each candidate, in microseconds and in calls of F.linear, timed beside it."""
    device = at.device
    x, weight = (torch.ones(n, 1024, dtype=torch.bfloat16, device=device.torch_device) for n in (1, 1024))
    linear = host_us(device, lambda: F.linear(x, weight), 1)
    found["host_linear_us"] = round(linear, 3)
    for name, function in list(at.functions.items()):
        at.tell(f"{name}: host")
        try:
            us = host_us(device, step(function, at.tensors), launches(at.row.spec, at.row.passes == "train"))
        except Exception as error:
            found["candidates"][name]["failed"] = first_line(error)
            del at.functions[name]
            continue
        found["candidates"][name] |= {"host_us": round(us, 3), "host_in_linears": round(us / linear, 2)}
