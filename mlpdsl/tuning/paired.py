"""A candidate timed in turns with the default, and whether it gained."""

from __future__ import annotations

import math

from mlpdsl.bench.quiet import resting
from mlpdsl.bench.summary import interval, median
from mlpdsl.bench.timer import Call, Timer
from mlpdsl.tables import NOISE
from mlpdsl.tuning.device import Times

__all__ = ["gained", "paired"]

SPAN = 0.01
"""Seconds a stretch."""
FIRST = 3
"""Rounds before a slow candidate is given up."""


def paired(timer: Timer, default: Call, candidate: Call, rounds: int, floor: float, launches: int) -> Times:
    """Times of two calls that make so many launches each, in turns, every other round in the opposite order.

    Fewer rounds where after the first `FIRST` the median of default/candidate is below `floor`."""
    counts = [max(2, math.ceil(1e6 * SPAN / max(timer.stretch(call, 2), 0.1))) for call in (default, candidate)]
    found: tuple[list[float], list[float]] = ([], [])
    with resting():
        for at in range(rounds):
            for which in (0, 1) if at % 2 == 0 else (1, 0):
                found[which].append(timer.stretch((default, candidate)[which], counts[which]) / launches)
            if at + 1 == FIRST and median([a / b for a, b in zip(*found, strict=True)]) < floor:
                break
    return Times(tuple(found[0]), tuple(found[1]))


def gained(times: Times) -> bool:
    """Whether the candidate is faster beyond noise: its median gain is `NOISE` or more, and the interval of that is above 1."""
    return (
        median(times.gains) >= NOISE and median(times.default) >= NOISE * median(times.candidate) and interval(times.gains)[0] > 1
    )
