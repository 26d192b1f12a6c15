"""How calls are timed: interleaved, in both orders, in stretches that are long (sustained) or short after a pause (burst)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlpdsl.bench.quiet import resting
from mlpdsl.bench.summary import best_of_torch, interval, median, quartiles, ratios
from mlpdsl.bench.timer import Call, Timer

__all__ = ["BURST_FLOOR_US", "METHOD", "Times", "burst", "estimate", "first_line", "host_us", "summarised", "sustained"]

LARGE_US = 100.0
SMALL_SPAN, LARGE_SPAN, BURST_SPAN = 0.02, 0.1, 0.003
HEAT = 0.3
PAUSE, BURST_FLOOR_US = 0.2, 50.0
ROUNDS, BURST_ROUNDS = (6, 40), (4, 10)
HOST_BATCHES, HOST_SPAN, LAUNCHES = 7, 0.02, 800

METHOD: dict[str, Any] = {
    "large_us": LARGE_US,
    "span_s": {"small": SMALL_SPAN, "large": LARGE_SPAN, "burst": BURST_SPAN},
    "heat_s": HEAT,
    "pause_s": PAUSE,
    "burst_floor_us": BURST_FLOOR_US,
    "rounds": {"sustained": list(ROUNDS), "burst": list(BURST_ROUNDS)},
    "host": {"batches": HOST_BATCHES, "span_s": HOST_SPAN, "launches": LAUNCHES},
}
"""The constants of the method, which every file carries.

A row is large where its fastest candidate takes `large_us` or more. A stretch lasts `span_s`. Large rows are heated for `heat_s`
before they are timed, small ones for a round. `pause_s` goes before each burst; rows whose floor is below `burst_floor_us` have
no bursts, because no power limit slows them. `rounds`: the least and the most of them. Host time is the median of `batches`, each
short enough to keep the GPU busy for `span_s` at most and to hold `launches` kernels at most.
"""


@dataclass
class Times:
    """Microseconds a call, by candidate and round; calls a stretch; why candidates were dropped; clocks after each round."""

    rounds: dict[str, list[float]]
    calls: dict[str, int]
    failed: dict[str, str] = field(default_factory=dict)
    clocks: list[dict[str, float]] = field(default_factory=list)


def first_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def estimate(timer: Timer, call: Call) -> float:
    """Microseconds a call, roughly."""
    found = timer.stretch(call, 3)
    return timer.stretch(call, 50) if found < 200 else found


def _count(span: float, us: float, least: int) -> int:
    return max(least, math.ceil(1e6 * span / max(us, 0.1)))


def _attempt(times: Times, calls: dict[str, Call], name: str, run: Callable[[], float]) -> float | None:
    """What `run` returns, or None where it raised: then the candidate is dropped, with the reason, and the others go on."""
    try:
        return run()
    except Exception as error:
        times.failed[name] = first_line(error)
        calls.pop(name)
        times.rounds.pop(name, None)
        return None


def _interleave(timer: Timer, calls: dict[str, Call], times: Times, number: int, pause: float, tell: Callable[[str], None]) -> None:
    """`number` rounds of one stretch of each candidate, every other round in the opposite order."""
    for at in range(number):
        order = list(calls) if at % 2 == 0 else list(calls)[::-1]
        for name in order:
            if pause:
                timer.pause(pause)
            with resting():
                found = _attempt(times, calls, name, partial(timer.stretch, calls[name], times.calls[name]))
            if found is not None:
                times.rounds[name].append(found)
        clocks = timer.clocks()
        if clocks is not None:
            times.clocks.append(clocks)
        tell(f"round {at + 1} of {number}")


def _estimates(timer: Timer, calls: dict[str, Call], times: Times) -> dict[str, float]:
    found = {name: _attempt(times, calls, name, partial(estimate, timer, calls[name])) for name in list(calls)}
    return {name: us for name, us in found.items() if us is not None}


def _rounds(seconds: float, a_round: float, least: int, most: int) -> int:
    """An even number, so that both orders come equally often."""
    number = int(seconds / a_round) if a_round else most
    return 2 * (max(least, min(most, number)) // 2)


def sustained(timer: Timer, given: Mapping[str, Call], seconds: float, tell: Callable[[str], None]) -> Times:
    """Long stretches one after the other, for about so many seconds, or for the least number of rounds where that takes longer."""
    calls, times = dict(given), Times({}, {})
    each = _estimates(timer, calls, times)
    if not each:
        return times
    large = min(each.values()) >= LARGE_US
    span = LARGE_SPAN if large else SMALL_SPAN
    times.calls = {name: _count(span, us, 5) for name, us in each.items()}
    a_round = sum(times.calls[name] * us for name, us in each.items()) / 1e6
    heat = Times({name: [] for name in calls}, dict(times.calls))
    _interleave(timer, calls, heat, max(1, math.ceil(HEAT / a_round)) if large else 1, 0.0, lambda text: None)
    times.failed |= heat.failed
    times.rounds = {name: [] for name in calls}
    _interleave(timer, calls, times, _rounds(seconds, a_round, *ROUNDS), 0.0, tell)
    return times


def burst(timer: Timer, given: Mapping[str, Call], seconds: float, tell: Callable[[str], None]) -> Times:
    """Short stretches, each after a pause."""
    calls, times = dict(given), Times({}, {})
    each = _estimates(timer, calls, times)
    if not each:
        return times
    times.calls = {name: _count(BURST_SPAN, us, 3) for name, us in each.items()}
    times.rounds = {name: [] for name in calls}
    a_round = sum(PAUSE + times.calls[name] * us / 1e6 for name, us in each.items())
    _interleave(timer, calls, times, _rounds(seconds, a_round, *BURST_ROUNDS), PAUSE, tell)
    return times


def host_us(timer: Timer, call: Call, launches: int) -> float:
    """Microseconds that the host spends on a call of about `launches` kernels, when it waits for nothing: a median of batches."""
    us = max(timer.stretch(call, 3), 0.1)
    count = max(5, min(100, LAUNCHES // max(1, launches), int(1e6 * HOST_SPAN / us)))
    with resting():
        return median([timer.host(call, count) for _ in range(HOST_BATCHES)])


def summarised(times: Times, seed: int) -> dict[str, Any]:
    """Times as the file holds them: medians, quartiles and every round; the ratio to the best of torch, and its interval."""
    found: dict[str, Any] = {"times": {}}
    for name, values in times.rounds.items():
        low, high = quartiles(values)
        found["times"][name] = {
            "median_us": round(median(values), 3),
            "quartiles_us": [round(low, 3), round(high, 3)],
            "calls": times.calls[name],
            "rounds_us": [round(value, 3) for value in values],
        }
    best = best_of_torch(times.rounds)
    found["best_of_torch"], found["ratio"], found["interval"] = best, None, None
    if best is not None and times.rounds.get("mlpdsl"):
        by_round = ratios(times.rounds[best], times.rounds["mlpdsl"])
        found["ratio"] = round(median(by_round), 4)
        found["interval"] = [round(bound, 4) for bound in interval(by_round, seed)]
    found["clocks"] = None
    if times.clocks:
        middle = {name: median([sample[name] for sample in times.clocks]) for name in times.clocks[0]}
        found["clocks"] = {name: round(value, 1) for name, value in middle.items()}
    if times.failed:
        found["failed"] = dict(times.failed)
    return found
