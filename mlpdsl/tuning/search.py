"""The search for one product's config: compiled, gated, timed beside the default, checked, timed again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mlpdsl.bench.summary import median
from mlpdsl.codegen.plan import Config
from mlpdsl.tables import NOISE
from mlpdsl.tuning.device import Device, LostError, Times
from mlpdsl.tuning.job import Job
from mlpdsl.tuning.paired import gained

__all__ = ["PRUNE", "search"]

ROUNDS, FINAL_ROUNDS = 6, 16
PRUNE = 1.3
"""A candidate that after its first rounds takes this many times as long as the best is timed no further."""
FINALISTS = 3
"""How many candidates are checked and timed again, at most: the best of many looks better than it is."""


def search(device: Device, job: Job, end: float) -> dict[str, Any] | None:
    """What the state holds of a job; None where the time was up before it was done.

    `tried` has every candidate with its fate, `default_us` the default's median in microseconds (None where nothing could be timed
    beside it; `failed` then has the last reason, if any was tried), `point` what a table's row gets: a config that gained and is
    right, or None, where the default stands.
    """
    began = device.now()
    default, *others = job.candidates()
    tried: list[dict[str, Any]] = []
    defaults: list[float] = []
    timed: list[tuple[float, Config, dict[str, Any]]] = []
    best, lost = 1.0, ""
    for config, facts in zip(others, device.compile(job, others), strict=True):
        if device.now() >= end:
            return None
        entry: dict[str, Any] = {"config": config.to_dict(), "fate": facts.reason}
        tried.append(entry)
        if facts.reason:
            continue
        try:
            times = device.time(job, default, config, ROUNDS, best / PRUNE)
        except LostError as error:
            entry["fate"] = lost = str(error)
            continue
        defaults += times.default
        gain = _told(entry, times)
        entry["fate"] = "timed" if len(times.candidate) == ROUNDS else "pruned"
        best = max(best, gain)
        timed.append((gain, config, entry))
    point: dict[str, Any] | None = None
    default_us = _short(median(defaults)) if defaults else None
    finalists = [each for each in sorted(timed, key=lambda each: -each[0]) if each[0] >= NOISE]
    for _, config, entry in finalists[:FINALISTS]:
        if device.now() >= end:
            return None
        point = _won(device, job, default, config, entry)
        if point is not None:
            break
    if point is None and default_us is not None:
        point = {"m": job.rows, "config": None, "us": default_us, "default_us": default_us}
    return {
        "name": job.name,
        "product": asdict(job.product),
        "rows": job.rows,
        "default": default.to_dict(),
        "default_us": default_us,
        "point": point,
        "failed": lost if default_us is None else "",
        "seconds": round(device.now() - began, 2),
        "tried": tried,
    }


def _won(device: Device, job: Job, default: Config, config: Config, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The point of a candidate that the oracle finds right and that gains when it is timed again."""
    try:
        reason = device.check(job, config)
        times = None if reason else device.time(job, default, config, FINAL_ROUNDS, 0.0)
    except LostError as error:
        reason, times = str(error), None
    if times is None:
        entry["fate"] = reason
        return None
    _told(entry, times)
    if not gained(times):
        entry["fate"] = "no gain when timed again"
        return None
    entry["fate"] = "won"
    us, default_us = _short(median(times.candidate)), _short(median(times.default))
    return {"m": job.rows, "config": config.to_dict(), "us": us, "default_us": default_us}


def _told(entry: dict[str, Any], times: Times) -> float:
    gain = median(times.gains)
    entry["us"], entry["gain"] = _short(median(times.candidate)), round(gain, 4)
    return gain


def _short(us: float) -> float:
    return float(f"{us:.6g}")
