"""How many rounds the fault tests take, and what they counted.

A few rounds of everything by default, so that they fit into CI; all of them where MLPDSL_TEST_FAULTS=full (make test-faults). Then
what was counted goes into benchmarks/results/faults.json, if every item was there and every test passed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

__all__ = ["FULL", "ITEMS", "Figures", "rounds", "write"]

FULL = os.environ.get("MLPDSL_TEST_FAULTS") == "full"
"""Read here and nowhere else."""

COMMAND = "make test-faults"
FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.json"

ITEMS = (
    "bit flips", "barrier", "fork", "full disk", "hash seeds", "hostile specs", "keys", "kill storm", "kill storm, naive writer",
    "spawn", "threads", "triton cache", "truncations", "warm import",
)  # fmt: skip
"""What a whole run counts."""


def rounds(few: int, all_of_them: int) -> int:
    """The first in CI, the second in a full run."""
    return all_of_them if FULL else few


class Figures:
    """What the tests of this run have counted, by item."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, object]] = {}
        self.start = time.perf_counter()

    def note(self, item: str, **counted: object) -> None:
        """Keep what one item counted; `seconds` since the test began are added."""
        assert item in ITEMS, f"{item!r} is not in ITEMS"
        self.items[item] = {**counted, "seconds": round(time.perf_counter() - self.start, 1)}


def write(figures: Figures) -> str:
    """Write the file, if the run was full and whole; return what to tell the user."""
    missing = [item for item in ITEMS if item not in figures.items]
    if not FULL or missing:
        return f"{FILE.name} is not written: no figures of {', '.join(missing)}" if FULL else ""
    content = {
        "command": COMMAND,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "triton", "jinja2")},
            "mlpdsl": __import__("mlpdsl").__version__,
        },
        "items": dict(sorted(figures.items.items())),
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"figures written to {FILE}"
