"""The table of a result file, in Markdown, as README.md holds it.

python benchmarks/table.py benchmarks/results/forward-h200.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Every row of the file, losing ones included, in the file's order."""
    result = json.loads(path.read_text())
    lines = ["| MLP, rows | mlpdsl, µs | eager PyTorch, µs | ratio (lowest, highest) |", "|---|---|---|---|"]
    for name, row in result["rows"].items():
        low, high = row["speedup_range"]
        times = (f"{row[who]['median_us']:.0f}" for who in ("mlpdsl", "eager"))
        lines.append(f"| {name.replace('-m', ', M = ')} | {' | '.join(times)} | {row['speedup']:.2f} ({low:.2f}, {high:.2f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
