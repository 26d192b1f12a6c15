"""`python -m tests.mutation`: the whole gate; see the package."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import repeat
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import tests.conftest  # noqa: F401 - caches of its own
from mlpdsl import __version__
from tests.mutation import gate, table
from tests.mutation.families import FAMILIES
from tests.mutation.registry import SURVIVORS, cases


def main() -> int:
    """Exit status: 0 where every mutant but the known survivors was refused, and no correct case."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Wrong kernels, and what refuses them.")
    parser.add_argument("--only", metavar="TEXT", help="mutants with this text in their name; nothing is written")
    parser.add_argument("--examples", type=int, default=gate.EXAMPLES, help="of each property, at most (default: %(default)s)")
    parser.add_argument("--correct", type=int, default=60, help="correct calls of each family (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only is None or options.only in case[0].name]
    unexpected = 0
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        hunts = pool.map(gate.timed_hunt, *zip(*chosen, strict=True), repeat(options.examples))
        for number, ((mutant, family), (kill, seconds)) in enumerate(zip(chosen, hunts, strict=True), 1):
            unexpected += kill is None and mutant.name not in SURVIVORS
            said = f"{kill.property}: {kill.verdict}, example {kill.example}" if kill else "SURVIVES"
            print(f"{number}/{len(chosen)} {mutant.name} ({family}): {said}, {seconds} s", flush=True)
            killer = asdict(kill) if kill else None
            found.append({"name": mutant.name, "within": mutant.within, "family": family, "killer": killer, "seconds": seconds})
        if options.only is not None:
            return int(unexpected > 0)
        tried, alarms = 0, []
        for family, (count, refused) in zip(FAMILIES, pool.map(gate.alarms, FAMILIES, repeat(options.correct)), strict=True):
            tried, alarms = tried + count, alarms + refused
            print(f"{family}: {count} correct cases, {len(refused)} refused", *refused, sep="\n", flush=True)
    table.write(
        {
            "command": "python -m tests.mutation",
            "date": str(date.today()),
            "versions": {
                "mlpdsl": __version__,
                "torch": version("torch"),
                "triton": version("triton"),
                "hypothesis": version("hypothesis"),
                "Python": platform.python_version(),
            },
            "seconds": round(sum(each["seconds"] for each in found), 1),
            "examples": options.examples,
            "families": {name: spec.to_json() for name, spec in FAMILIES.items()},
            "survivors": SURVIVORS,
            "false alarms": {"alarms": len(alarms), "of": tried, "refused": alarms},
            "mutants": found,
        }
    )
    print(f"{len(found)} cases, {unexpected} unexpected survivors; {len(alarms)} alarms in {tried} correct cases")
    return int(unexpected > 0 or bool(alarms))


if __name__ == "__main__":
    sys.exit(main())
