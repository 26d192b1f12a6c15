"""Results for people: a table of every row, in columns or in Markdown, losing rows included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlpdsl.bench.summary import TORCH, verdict

__all__ = ["TITLES", "cells", "host_cells", "lines", "markdown", "notes", "text"]

CANDIDATES = ("mlpdsl", "eager", "compile", "max-autotune", "liger")
TITLES = ("MLP", "M", "pass", "launch", "L2", "clocks", "floor")
"""The titles before the candidates': `clocks` is sustained or burst."""


@dataclass(frozen=True)
class Line:
    """One measurement of a row: microseconds a call by candidate, and best of torch / mlpdsl with its interval."""

    name: str
    m: int
    passes: str
    launch: str
    cache: str
    regime: str
    floor_us: float
    times: dict[str, float]
    ratio: float | None
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "even" for mlpdsl; "" where there is nothing to compare."""
        return verdict(*self.interval) if self.interval else ""


def lines(data: dict[str, Any]) -> list[Line]:
    """Every measurement of a file, in its order."""
    found = []
    for row in data["rows"]:
        for part in row["measured"]:
            times = {name: float(each["median_us"]) for name, each in part["times"].items()}
            bounds = part["interval"]
            found.append(
                Line(
                    row["name"],
                    row["m"],
                    row["passes"],
                    part["launch"],
                    part["cache"],
                    part["regime"],
                    float(row["floor_us"]),
                    times,
                    part["ratio"],
                    None if bounds is None else (bounds[0], bounds[1]),
                )
            )
    return found


def candidates_of(data: dict[str, Any]) -> list[str]:
    """Every candidate that was timed somewhere, ours first, then the known peers in their order, then others."""
    seen = {name for row in data["rows"] for part in row["measured"] for name in part["times"]}
    seen |= {name for row in data["rows"] for name, said in row["candidates"].items() if "host_us" in said}
    return [*(name for name in CANDIDATES if name in seen), *sorted(seen - set(CANDIDATES))]


def microseconds(value: float | None) -> str:
    """Three figures and no more decimals than two: "0.85", "12.4", "105", "6584"."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def cells(data: dict[str, Any]) -> list[list[str]]:
    """The table: a line of titles, then one for each measurement; times in µs."""
    names = candidates_of(data)
    table = [[*TITLES, *names, "ratio", "interval", ""]]
    for line in lines(data):
        ratio = "-" if line.ratio is None else f"{line.ratio:.2f}"
        bounds = "-" if line.interval is None else f"{line.interval[0]:.2f} to {line.interval[1]:.2f}"
        what = [line.name, str(line.m), line.passes, line.launch, line.cache, line.regime, microseconds(line.floor_us)]
        table.append([*what, *(microseconds(line.times.get(name)) for name in names), ratio, bounds, line.verdict])
    return table


def host_cells(data: dict[str, Any]) -> list[list[str]]:
    """Host time of a call, by row: µs, and in brackets how many calls of F.linear that is."""
    names = candidates_of(data)
    table = [["MLP", "M", "pass", "F.linear", *names]]
    for row in data["rows"]:
        if "host_linear_us" not in row:
            continue
        times = []
        for name in names:
            said = row["candidates"].get(name, {})
            times.append(f"{said['host_us']:.1f} ({said['host_in_linears']:.1f})" if "host_us" in said else "-")
        table.append([row["name"], str(row["m"]), row["passes"], f"{row['host_linear_us']:.1f}", *times])
    return table


def notes(data: dict[str, Any]) -> list[str]:
    """What was not timed, and why: rows left out, candidates that failed; what is absent everywhere is said once."""
    found: dict[str, int] = {}
    for row in data["rows"]:
        where = f"{row['name']}, M = {row['m']}, {row['passes']}"
        if "skipped" in row:
            found[f"{where}: not timed: {row['skipped']}"] = 1
        for name, said in row["candidates"].items():
            if "absent" in said:
                key = f"{name}: {said['absent']}"
                found[key] = found.get(key, 0) + 1
            if "failed" in said:
                found[f"{where}: {name} failed: {said['failed']}"] = 1
        for part in row["measured"]:
            for name, reason in part.get("failed", {}).items():
                found[f"{where}, {part['launch']}, {part['cache']}, {part['regime']}: {name} failed: {reason}"] = 1
    return [f"{text} ({count} rows)" if count > 1 else text for text, count in found.items()]


def heading(data: dict[str, Any]) -> str:
    """One line on where this was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    return f"{data['gpu']['name']}; {versions}; {str(data['date'])[:10]}"


def about(data: dict[str, Any]) -> str:
    """What the columns are; of torch's ways only those that were timed are named."""
    timed = {name for row in data["rows"] for part in row["measured"] for name in part["times"]}
    ways = [name for name in TORCH if name in timed] or ["eager"]
    best = ways[0] if len(ways) == 1 else f"the fastest of {', '.join(ways[:-1])} and {ways[-1]}"
    return f"Medians in µs a call. Ratio: {best} in the same launch mode, over mlpdsl, with its 95% interval."


HOST = "Host time of a call, µs, and in brackets in calls of F.linear:"


def text(data: dict[str, Any]) -> str:
    """All of it in plain columns."""
    parts = [heading(data), about(data), columns(cells(data))]
    host = host_cells(data)
    if len(host) > 1:
        parts += [HOST, columns(host)]
    parts += ["\n".join(notes(data))]
    return "\n\n".join(part for part in parts if part) + "\n"


def columns(table: Sequence[Sequence[str]]) -> str:
    """Lines with aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [is_numbers([line[at] for line in table[1:]]) for at in range(len(widths))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in table
    )


def is_numbers(column: Iterable[str]) -> bool:
    return all(cell[:1].isdigit() or cell == "-" for cell in column)


def markdown(data: dict[str, Any]) -> str:
    """All of it in Markdown, for a page that is generated from files."""
    parts = [f"{heading(data)}. {about(data)}", _markdown(cells(data))]
    host = host_cells(data)
    if len(host) > 1:
        parts += [HOST, _markdown(host)]
    told = notes(data)
    if told:
        parts.append("\n".join(f"* {note}" for note in told))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    right = [is_numbers([line[at] for line in table[1:]]) for at in range(len(table[0]))]
    rule = "|".join("---:" if r else "---" for r in right)
    titles, *rest = (f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in table)
    return "\n".join([titles, f"|{rule}|", *rest])
