"""The table of a result file, in Markdown, as README.md or a page of docs holds it.

python benchmarks/table.py benchmarks/results/forward-h200.json
python benchmarks/table.py --floors benchmarks/results/forward-h200.json
python benchmarks/table.py --products benchmarks/results/forward-h200.json
python benchmarks/table.py --first benchmarks/results/first-call-h200.json
python benchmarks/table.py --decode benchmarks/results/decode-h200.json
python benchmarks/table.py --suite benchmarks/results/bench-seeds-h200.json
python benchmarks/table.py --host benchmarks/results/host-h200.json
python benchmarks/table.py --pallas benchmarks/results/pallas-h200.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any


def table(path: Path) -> str:
    """Every row of the file, losing ones included, in the file's order."""
    result = json.loads(path.read_text())
    if "cells" in result:
        return calibration(result)
    lines = ["| MLP, rows | mlpdsl, µs | eager PyTorch, µs | ratio (lowest, highest) |", "|---|---|---|---|"]
    for name, row in result["rows"].items():
        low, high = row["speedup_range"]
        times = (f"{row[who]['median_us']:.0f}" for who in ("mlpdsl", "eager"))
        lines.append(f"| {name.replace('-m', ', M = ')} | {' | '.join(times)} | {row['speedup']:.2f} ({low:.2f}, {high:.2f}) |")
    return "\n".join(lines)


def floors(path: Path) -> str:
    """The same rows beside the least time there is for each; those whose rates nobody measured have none."""
    from mlpdsl import MLPSpec
    from mlpdsl.bench.floors import Ceilings, floor_of
    from mlpdsl.bench.suites import Row
    from mlpdsl.ceilings import KNOWN, numbers_of

    result = json.loads(path.read_text())
    lines = ["| MLP, rows | floor, µs | by | mlpdsl / floor | eager PyTorch / floor |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        spec = MLPSpec.from_json(json.dumps(row["spec"]))
        title = name.replace("-m", ", M = ")
        known = KNOWN[result["gpu"]]
        if numbers_of(spec) not in known.products:
            lines.append(f"| {title} | - | | - | - |")
            continue
        measured = Row(name, spec, row["m"], "train" if row["train"] else "forward")
        floor = floor_of(measured, Ceilings(known.bandwidth, known.products, {}))
        over = (f"{row[who]['median_us'] / floor.us:.2f}" for who in ("mlpdsl", "eager"))
        lines.append(f"| {title} | {floor.us:.0f} | {floor.by} | {' | '.join(over)} |")
    return "\n".join(lines)


def products(path: Path) -> str:
    """Every row beside the library's bare products of the same matrices."""
    lines = ["| MLP, rows | bare products, µs | mlpdsl / them (lowest, highest) | eager PyTorch / them |", "|---|---|---|---|"]
    for name, row in json.loads(path.read_text())["rows"].items():
        (low, high), bare = row["over_products_range"], row["products"]["median_us"]
        over = f"{row['over_products']:.2f} ({low:.2f}, {high:.2f})"
        lines.append(f"| {name.replace('-m', ', M = ')} | {bare:.0f} | {over} | {row['eager']['median_us'] / bare:.2f} |")
    return "\n".join(lines)


def first(path: Path) -> str:
    """Seconds of a first call: with Triton's cache empty or the kernels in it, of the first spec of a process or of another."""
    kinds = ("cold, first", "cold, next", "warm, first", "warm, next")
    lines = [f"| MLP, rows | {' | '.join(f'{kind}, s' for kind in kinds)} |", "|---" * 5 + "|"]
    for name, row in json.loads(path.read_text())["rows"].items():
        cells = (f"{row['seconds'][kind]['median_s']:.2f}" for kind in kinds)
        lines.append(f"| {name.replace('-m', ', M = ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(title: str, cells: dict[str, dict[int, str]]) -> str:
    """A line an MLP, a column a number of rows; where there are too many of those, they are in the cells."""
    counts = sorted({m for found in cells.values() for m in found})
    if len(counts) > 8:
        lines = [f"| {title} | M: |", "|---|---|"]
        return "\n".join(
            lines + [f"| {name} | {'; '.join(f'{m}: {cell}' for m, cell in found.items())} |" for name, found in cells.items()]
        )
    lines = [f"| {title} | " + " | ".join(f"M = {m}" for m in counts) + " |", "|---" * (1 + len(counts)) + "|"]
    lines += [f"| {name} | " + " | ".join(found.get(m, "") for m in counts) + " |" for name, found in cells.items()]
    return "\n".join(lines)


def decode(path: Path) -> str:
    """A cell: microseconds, and how many times as fast as eager PyTorch."""
    cells: dict[str, dict[int, str]] = {}
    for name, row in json.loads(path.read_text())["rows"].items():
        cells.setdefault(name.rpartition("-m")[0], {})[row["m"]] = f"{row['mlpdsl_us']:.3g} ({row['speedup']:.2f})"
    return grid("µs (eager PyTorch / mlpdsl)", cells)


def suite(path: Path) -> str:
    """A file of `mlpdsl bench`, sustained replays with a hot L2: cells as in `decode`, in italics where mlpdsl is slower."""
    cells: dict[str, dict[int, str]] = {}
    for row in json.loads(path.read_text())["rows"]:
        hot = next(found for found in row["measured"] if (found["launch"], found["cache"]) == ("graph", "hot"))
        text = f"{hot['times']['mlpdsl']['median_us']:.3g} ({hot['ratio']:.2f})"
        cells.setdefault(row["name"], {})[row["m"]] = f"*{text}*" if hot["interval"][1] < 1 else text
    return grid("µs (best of torch / mlpdsl)", cells)


def host(path: Path) -> str:
    """Host time of a call without gradients, and of a step with every gradient, in microseconds and in calls of F.linear."""
    rows = json.loads(path.read_text())["rows"]
    m = next(iter(rows.values())).get("m", 1)
    lines = [f"| MLP, M = {m} | F.linear, µs | mlpdsl, µs | eager PyTorch, µs | step, mlpdsl, µs | step, eager PyTorch, µs |",
             "|---" * 6 + "|"]  # fmt: skip
    for name, row in rows.items():
        linear = row["linear"]["median_us"]
        times = [found[who]["median_us"] for found in (row, row["train"]) for who in ("mlpdsl", "eager")]
        cells = (f"{us:.0f} ({us / linear:.1f})" if us > 100 else f"{us:.1f} ({us / linear:.2f})" for us in times)
        lines.append(f"| {name} | {linear:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pallas(path: Path) -> str:
    """Every row of the file: the Pallas kernels, jax.jit of the reference, and how many times as fast as it the kernels are."""
    lines = ["| MLP, rows | Pallas, µs | jax.numpy, µs | ratio |", "|---|---|---|---|"]
    for name, row in json.loads(path.read_text())["rows"].items():
        times = (f"{row[who]['median_us']:.1f}" for who in ("pallas", "jax.numpy"))
        lines.append(f"| {name.replace('-m', ', M = ')} | {' | '.join(times)} | {row['speedup']:.2f} |")
    return "\n".join(lines)


def calibration(result: dict[str, Any]) -> str:
    """A row a dtype: the largest error over its bound, and over kinds of MLP the least and largest factor 1 + ε that is refused."""
    lines = [
        "| H200 | largest error / bound, y | the same, gradients | ε refused, y | ε refused, gradients |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("bfloat16", "float16", "float32", "float32 tf32"):
        cells = [cell for name, cell in result["cells"].items() if name.split(", ", 1)[1] == dtype]
        ys = [cell["y"] for cell in cells]
        grads = [found for cell in cells for name, found in cell.items() if name not in ("calls", "y")]
        worst = (f"{max(found['error_over_bound']['max'] for found in side):.2f}" for side in (ys, grads))
        seen = (_range([found["least_error_seen"]["factor"] for found in side]) for side in (ys, grads))
        lines.append(f"| {dtype.replace(' ', ', ')} | {' | '.join(worst)} | {' | '.join(seen)} |")
    return "\n".join(lines)


def _range(factors: list[float | None]) -> str:
    powers = sorted(round(math.log2(f)) for f in factors if f)
    low, high = (f"2{str(p).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" for p in (powers[0], powers[-1]))
    return low if low == high else f"{low} to {high}"


KINDS = {
    "floors": floors, "products": products, "first": first, "decode": decode, "suite": suite, "host": host, "pallas": pallas,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    for name in KINDS:
        which.add_argument(f"--{name}", action="store_const", const=KINDS[name], dest="kind")
    parser.add_argument("file", type=Path, help="a file of benchmarks/results")
    options = parser.parse_args()
    try:
        print((options.kind or table)(options.file))
    except OSError as error:
        parser.error(f"{options.file}: {error.strerror}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        parser.error(f"{options.file} is no file of that kind ({type(error).__name__}: {error})")


if __name__ == "__main__":
    main()
