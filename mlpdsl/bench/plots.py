"""Results as pictures: for each MLP its time over M, and one roofline. Needs matplotlib, and no display."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlpdsl.bench.summary import TORCH
from mlpdsl.bench.table import Line, candidates_of, lines
from mlpdsl.errors import UnsupportedError

__all__ = ["load_matplotlib", "plot"]

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = {"mlpdsl": "#0072B2", "eager": "#E69F00", "compile": "#009E73", "max-autotune": "#CC79A7", "liger": "#D55E00"}
_MARKS = {"mlpdsl": "o", "eager": "s", "compile": "^", "max-autotune": "v", "liger": "D"}
_OTHERS = ("#56B4E9", "#000000", "#F0E442")


def load_matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UnsupportedError("plots need matplotlib, which is not installed: pip install 'mlpdsl[bench]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write a PNG for each MLP and pass, and `roofline.png`, into `folder`, made where it is not there; return their paths.

    Each says in its metadata ("Description") which command it is of, and when that ran.

    Raises `UnsupportedError` where matplotlib is not installed.
    """
    pyplot = load_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    every = lines(data)
    source = {"Description": f"{data['command']}, {data['date']}"}
    made = []
    for name, passes in dict.fromkeys((line.name, line.passes) for line in every):
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{passes}.png"
        figure = _times(pyplot, data, name, passes, [line for line in every if (line.name, line.passes) == (name, passes)])
        figure.savefig(path, dpi=150, metadata=source)
        pyplot.close(figure)
        made.append(path)
    if every:
        figure = _roofline(pyplot, data, every)
        figure.savefig(folder / "roofline.png", dpi=150, metadata=source)
        pyplot.close(figure)
        made.append(folder / "roofline.png")
    return made


def _style(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = candidates_of(data)
    unknown = [name for name in names if name not in _COLOURS]
    return {
        name: {
            "color": _COLOURS.get(name) or _OTHERS[unknown.index(name) % len(_OTHERS)],
            "marker": _MARKS.get(name, "x"),
            "linewidth": 2.2 if name == "mlpdsl" else 1.3,
            "markersize": 6 if name == "mlpdsl" else 5,
            "zorder": 3 if name == "mlpdsl" else 2,
        }
        for name in names
    }


def _times(pyplot: Any, data: dict[str, Any], name: str, passes: str, some: list[Line]) -> Any:
    """Above, time over M beside the floor; below, time over floor. A column a launch mode; sustained, with a hot and a cold L2."""
    launches = [launch for launch in ("eager", "graph") if any(line.launch == launch for line in some)]
    size = (1.0 + 5.2 * len(launches), 7.6)
    figure, panels = pyplot.subplots(2, len(launches), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained")
    style, floors = _style(data), {line.m: line.floor_us for line in some}
    ms = sorted(floors)
    shown: dict[str, Any] = {}
    for launch, upper, lower in zip(launches, *panels, strict=True):
        look = {"color": "0.45", "linestyle": "--", "linewidth": 1.3}
        (shown["floor"],) = upper.plot(ms, [floors[m] for m in ms], **look)
        lower.axhline(1.0, **look)
        for candidate, cache, at, times in _series(some, launch, list(style)):
            look = style[candidate]
            if cache == "cold":
                look = {**look, "linestyle": ":", "markerfacecolor": "white"}
                neutral = {**look, "color": "0.3", "marker": "o"}
                shown.setdefault("with a cold L2", pyplot.Line2D([], [], **neutral))
            (drawn,) = upper.plot(at, times, **look)
            lower.plot(at, [us / floors[m] for m, us in zip(at, times, strict=True)], **look)
            if cache == "hot":
                shown.setdefault(candidate, drawn)
        upper.set_title("plain calls" if launch == "eager" else "replays of a CUDA graph", fontsize=10)
        lower.set_xlabel("M, rows of x")
        for axes in (upper, lower):
            _logarithmic(axes, ms)
    panels[0][0].set_ylabel("µs a call")
    panels[1][0].set_ylabel("times the floor")
    what = "forward" if passes == "forward" else "forward and backward"
    figure.suptitle(f"{name}, {what}, {data['gpu']['name']}", fontsize=11)
    last = ("floor", "with a cold L2")
    order = [*(label for label in shown if label not in last), *(label for label in last if label in shown)]
    figure.legend([shown[label] for label in order], order, loc="outside lower center", ncols=len(order), fontsize=9, frameon=False)
    return figure


def _series(some: list[Line], launch: str, candidates: list[str]) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """Candidate, cache, M and µs of each curve of a panel; cold ones first, so that hot ones lie above them."""
    for cache in ("cold", "hot"):
        for candidate in candidates:
            these = {
                line.m: line.times[candidate]
                for line in some
                if (line.launch, line.cache, line.regime) == (launch, cache, "sustained") and candidate in line.times
            }
            if these:
                yield candidate, cache, sorted(these), [these[m] for m in sorted(these)]


def _logarithmic(axes: Any, ms: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ms))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:.0f}"))
    low, high = axes.get_ylim()
    finest = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8)
    subs = next((subs for most, subs in ((4, finest), (20, (1, 1.5, 2, 3, 5, 7)), (2000, (1, 2, 5))) if high / low < most), (1,))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    _grid(axes)


def _grid(axes: Any) -> None:
    axes.grid(True, which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)


def _roofline(pyplot: Any, data: dict[str, Any], every: list[Line]) -> Any:
    """FLOP/s over FLOP/byte, a panel a pass: mlpdsl filled, the best of torch hollow, under the roofs of memory and products."""
    launch = "graph" if any(line.launch == "graph" for line in every) else "eager"
    chosen = [line for line in every if (line.launch, line.cache, line.regime) == (launch, "hot", "sustained")] or every
    passes = list(dict.fromkeys(line.passes for line in chosen))
    names = list(dict.fromkeys(line.name for line in chosen))
    size = (2.8 + 5.4 * len(passes), 5.6)
    figure, panels = pyplot.subplots(1, len(passes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    palette = pyplot.get_cmap("tab20" if len(names) > 10 else "tab10")
    colours = {name: palette(at % palette.N) for at, name in enumerate(names)}
    rows = {(row["name"], row["m"], row["passes"]): row for row in data["rows"]}
    for axes, word in zip(panels[0], passes, strict=True):
        intensities = []
        for line in (line for line in chosen if line.passes == word):
            row = rows[line.name, line.m, line.passes]
            intensities.append(row["flops"] / row["bytes"])
            look = {"marker": "o", "linestyle": "", "markersize": 6, "color": colours[line.name]}
            best = min((line.times[name] for name in TORCH if name in line.times), default=None)
            if "mlpdsl" in line.times:
                axes.plot(intensities[-1], row["flops"] / line.times["mlpdsl"] / 1e6, **look, markeredgewidth=0, alpha=0.8)
            if best is not None:
                axes.plot(intensities[-1], row["flops"] / best / 1e6, **look, markerfacecolor="none", zorder=3)
        _roofs(axes, data["ceilings"], min(intensities) / 2, max(intensities) * 2)
        axes.set_title("forward" if word == "forward" else "forward and backward", fontsize=10)
        axes.set_xlabel("FLOP a byte that must move")
    panels[0][0].set_ylabel("TFLOP/s")
    how = "replays of a CUDA graph" if launch == "graph" else "plain calls"
    figure.suptitle(f"{data['gpu']['name']}, {how}, sustained\nfilled: mlpdsl; hollow: the best of torch", fontsize=11)
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right center", ncols=1 + len(names) // 25, fontsize=8, frameon=False)
    return figure


def _roofs(axes: Any, ceilings: dict[str, Any], low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter

    slope = ceilings["bytes_per_s"] / 1e12
    formats: dict[float, list[str]] = {}
    for numbers, rate in sorted(ceilings["flop_per_s"].items()):
        formats.setdefault(rate / 1e12, []).append(numbers)
    for roof, names in formats.items():
        right = max(high, 3 * roof / slope)
        axes.plot([low, roof / slope, right], [low * slope, roof, roof], color="0.3", linewidth=1.2, zorder=1)
        axes.plot([low, roof / slope], [roof, roof], color="0.3", linewidth=0.6, linestyle=":", zorder=1)
        axes.annotate(f"{', '.join(names)}, {roof:.0f} TFLOP/s", (low, roof), xytext=(2, 3), textcoords="offset points",
                      fontsize=8, color="0.3")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _grid(axes)
