"""A run: every row that is not in the file yet, one after the other, the file written after each."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdsl.bench.floors import Ceilings, ceilings
from mlpdsl.bench.measure import METHOD
from mlpdsl.bench.results import Results
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import Row
from mlpdsl.ceilings import numbers_of

if TYPE_CHECKING:
    from mlpdsl.bench.peers import Factory
    from mlpdsl.bench.timer import Device

__all__ = ["Tell", "run"]

ROW_SECONDS = 5.0
MEASURING = 0.6
"""Of a run's time, for stretches: the rest goes into building and compiling."""

Tell = Callable[[str, Row, Any], None]
"""Told of events: ("begin", row, position from 0), ("step", row, text), ("done", row, the row as the file holds it)."""


def run(
    rows: Sequence[Row],
    *,
    settings: Settings | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seconds_a_row: float | None = None,
    seconds: float | None = None,
    device: Device | None = None,
    candidates: Mapping[str, Factory] | None = None,
    command: str = "",
    tell: Tell = lambda event, row, what: None,
) -> Results:
    """Time `rows`, and return what was found; with `out`, into that JSON file, which is whole after every row.

    `seconds_a_row` is for the stretches of a row (5, or less where `seconds` leaves less); building and compiling come on top, and
    every measurement has its least number of rounds. After `seconds` no row is begun. With `resume`, rows that the file has are
    not timed again. A candidate that fails is told in its row, and the others go on.

    `device` (default: torch's current GPU) and `candidates` (default: mlpdsl and `settings.peers`) are for tests and for peers of
    one's own. Raises `UnsupportedError` where there is no GPU, `ResultError` for a file that is there, or is of another run, or
    where the GPU stopped answering.
    """
    from mlpdsl.bench.peers import CANDIDATES
    from mlpdsl.bench.timing import time_row

    settings = settings or Settings()
    if device is None:
        from mlpdsl.bench.gpu import Gpu

        device = Gpu()
    if candidates is None:
        candidates = {name: CANDIDATES[name] for name in ("mlpdsl", *settings.peers)}
    header = _header(device, settings, command)
    path = Path(out) if out is not None else None
    results = Results.resume(header, path) if resume and path is not None else Results.begin(header, path)
    left = [row for row in rows if row.key not in results.keys]
    began = device.now()
    if left:
        known = Ceilings.from_dict(results.data["ceilings"]) if results.data["ceilings"] else None
        formats = dict.fromkeys(numbers_of(row.spec) for row in left)
        rates = ceilings(device.name, formats, device.bandwidth, device.product, known)
        results.data["ceilings"] = rates.to_dict()
        results.save()
    for at, row in enumerate(left):
        remaining = None if seconds is None else seconds - (device.now() - began)
        if remaining is not None and remaining <= 0:
            break
        share = seconds_a_row or ROW_SECONDS
        if seconds_a_row is None and remaining is not None:
            share = min(ROW_SECONDS, MEASURING * remaining / (len(left) - at))
        tell("begin", row, at)
        measured = time_row(row, device, candidates, rates, settings, share, partial(tell, "step", row))
        results.add(measured)
        tell("done", row, measured)
        device.check()
    return results


def _header(device: Device, settings: Settings, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": device.describe(),
        "versions": device.versions(),
        "settings": settings.to_dict(),
        "method": dict(METHOD),
        "clocks_at_start": device.clocks(),
        "ceilings": {},
    }
