"""What is said of a set of measured times: median, quartiles, ratio, interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["RESAMPLES", "TORCH", "best_of_torch", "interval", "median", "quartiles", "ratios", "verdict"]

TORCH = ("eager", "compile", "max-autotune")
"""What "the best of torch" is the fastest of, in the same launch mode."""

RESAMPLES = 2000
"""Samples drawn for an interval."""


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle. Raises `statistics.StatisticsError` where there is none."""
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile, by linear interpolation between the values; of one value, itself twice."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def best_of_torch(times: Mapping[str, Sequence[float]]) -> str | None:
    """The candidate of `TORCH` with the least median time; None where none was timed."""
    timed = [name for name in TORCH if times.get(name)]
    return min(timed, key=lambda name: median(times[name]), default=None)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow/fast, round by round: above 1 where the second is faster. Raises `ValueError` where the numbers of rounds differ."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """A bootstrap interval of the median: quantiles of the medians of `RESAMPLES` samples drawn from `values` with replacement.

    Equal values and seeds give equal intervals.
    """
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = round(RESAMPLES * (1 - level) / 2)
    return medians[tail], medians[-1 - tail]


def verdict(low: float, high: float) -> str:
    """In one word, what an interval of the ratio says of mlpdsl: "faster", "slower", or "even" where 1 lies in it."""
    return "faster" if low > 1 else "slower" if high < 1 else "even"
