"""The committed record of a run, and the page that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "RECORD", "page", "read", "write"]

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"

INTRODUCTION = """\
# The mutation gate

Can the tests fail? Here are {mutants} wrong kernels: a line of generated source each, changed as a slip would change it, in {cases}
cases of {families} specs. The ordinary properties, the same that hold correct kernels, must refuse each within {limit} drawn
examples. They refused {killed} of {cases}. {survivors}Of {tried} correct cases they refused {alarms}.

- **calls**: drawn shapes, layouts, values, subsets of gradients and call patterns, run forward and backward and held against the
  float64 oracle ([numerics.md](numerics.md)); inputs in NaN, results between guard zones, equal bits where a call is repeated.
- **sweep**: an activation's value and derivative from subnormals to infinity.
- **laws**: equal bits for dense copies, fewer gradients, another row of NaN; saved tensors stay as they were.

"Killed by" is the rule that was broken and of what: an element's error bound, the root mean square beside eager PyTorch's, NaN
where a number belongs, a guard zone, or bits that differ. "After" counts that property's examples. "Away" is by how many times
the limit was passed.

`{command}` makes this page again ({date}, {versions}; the mutants took {seconds:.0f} s of one processor). `tests/mutation` says
how to add one.

| specs | |
|---|---|
{specs}

| mutant | in | spec | killed by | after | away |
|---|---|---|---|---|---|
{rows}
"""


def page(record: dict[str, Any]) -> str:
    """docs/mutants.md, from the record of a run."""
    found = record["mutants"]
    killed = [each for each in found if each["killer"]]
    left = [each for each in found if not each["killer"]]
    survivors = "".join(f"Not refused: {each['name']} ({each['family']}), {record['survivors'][each['name']]}. " for each in left)
    rows = "\n".join(_row(each) for each in found)
    specs = "\n".join(f"| {name} | `{spec}` |" for name, spec in record["families"].items())
    return INTRODUCTION.format(
        mutants=len({each["name"] for each in found}), cases=len(found), families=len(record["families"]), killed=len(killed),
        limit=record["examples"], tried=record["false alarms"]["of"], alarms=record["false alarms"]["alarms"], survivors=survivors,
        command=record["command"], date=record["date"], seconds=record["seconds"], specs=specs, rows=rows,
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )  # fmt: skip


def _row(each: dict[str, Any]) -> str:
    where = f"`{each['within']}`" if each["within"] else "all"
    killer = each["killer"]
    if killer is None:
        return f"| {each['name']} | {where} | {each['family']} | **survives** | | |"
    ratio = "" if killer["ratio"] is None else f"{killer['ratio']:.3g}"
    said = f"{killer['property']}: {killer['verdict']}"
    return f"| {each['name']} | {where} | {each['family']} | {said} | {killer['example']} | {ratio} |"


def read() -> dict[str, Any]:
    """The committed record."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def write(record: dict[str, Any]) -> None:
    """The record and its page, in place of the committed ones."""
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
