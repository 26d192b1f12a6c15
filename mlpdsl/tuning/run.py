"""A run: every product that is not in the state yet, one after the other; state and table written after each."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpdsl import tables
from mlpdsl.bench.suites import Row
from mlpdsl.codegen.plan import Config
from mlpdsl.target import parse_target
from mlpdsl.tuning.device import Device
from mlpdsl.tuning.job import Job, jobs
from mlpdsl.tuning.search import search
from mlpdsl.tuning.state import State, StateError, alone, write_whole

__all__ = ["Found", "Tell", "rows_of", "run", "state_path"]

Tell = Callable[[str, Job, int, dict[str, Any] | None], None]
"""Told of events: "begin" and "done", the job, its position among those left, and what was found."""


@dataclass(frozen=True)
class Found:
    """The jobs that were asked for, the state with what was found of them, and the table's rows, merged with earlier ones."""

    jobs: list[Job]
    state: State
    rows: list[tables.Row]

    @property
    def left(self) -> int:
        """How many jobs there was no time for."""
        return sum(job.key not in self.state.jobs for job in self.jobs)


def state_path(out: Path) -> Path:
    """Where the state of a run lies that writes this table."""
    return out.with_name(f"{out.stem}.state.json")


def run(
    rows: Sequence[Row],
    *,
    out: str | Path | None = None,
    budget: float | None = None,
    resume: bool = False,
    device: Device | None = None,
    tell: Tell = lambda event, job, at, found: None,
) -> Found:
    """Tune every product of `rows`; with `out`, into that table, beside which the state of the run lies.

    A table that is there keeps its rows, as `tables.merge` says. `budget` is in seconds: the product under way when they end is
    left for `resume`. `device` is torch's current GPU, unless given. Raises `UnsupportedError` where there is none, `StateError`
    for a file that cannot be gone on with.
    """
    ours = device is None
    if device is None:
        from mlpdsl.tuning.children import Children

        device = Children()
    try:
        return _run(rows, Path(out) if out is not None else None, budget, resume, device, tell)
    finally:
        if ours:
            device.close()


def _run(rows: Sequence[Row], out: Path | None, budget: float | None, resume: bool, device: Device, tell: Tell) -> Found:
    began = device.now()
    end = began + budget if budget is not None else float("inf")
    header = device.describe()
    with alone(None if out is None else state_path(out)):
        return _run_alone(rows, out, end, resume, device, tell, header)


def _run_alone(
    rows: Sequence[Row], out: Path | None, end: float, resume: bool, device: Device, tell: Tell, header: dict[str, Any]
) -> Found:
    target = parse_target(header["target"])
    before = _table(out, target.name)
    state = State.begin(header, None if out is None else state_path(out), resume)
    asked = jobs(rows, target)
    merged = tables.merge(before, rows_of(state))
    left = [job for job in asked if job.key not in state.jobs]
    for at, job in enumerate(left):
        if device.now() >= end:
            break
        tell("begin", job, at, None)
        found = search(device, job, end)
        if found is None:
            break
        found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        state.add(job.key, found)
        merged = tables.merge(before, rows_of(state))
        if out is not None:
            write_whole(out, tables.write(target.name, merged))
        tell("done", job, at, found)
    return Found(asked, state, merged)


def _table(out: Path | None, target: str) -> list[tables.Row]:
    if out is None or not out.exists():
        return []
    try:
        name, rows = tables.read(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{out} is no table, and stays as it is: {error}. Name another with --out") from error
    if name != target:
        raise StateError(f"{out} is a table of {name}, and this GPU is {target}: name another with --out")
    return rows


def rows_of(state: State) -> list[tables.Row]:
    """The rows of what a state holds, those without a gain too: `tables.write` leaves them out."""
    found: dict[tables.Product, list[tuple[tables.Point, str]]] = {}
    for result in state.jobs.values():
        point = result["point"]
        if point is not None:
            config = None if point["config"] is None else Config(**point["config"])
            made = tables.Point(point["m"], config, point["us"], point["default_us"])
            found.setdefault(tables.Product(**result["product"]), []).append((made, result["date"]))
    rows = []
    for product, points in found.items():
        ordered = tuple(sorted((point for point, _ in points), key=lambda point: point.m))
        date = max(date for _, date in points)
        rows.append(tables.Row(product, state.data["gpu"], state.data["versions"], date, ordered))
    return sorted(rows, key=lambda row: row.product)
