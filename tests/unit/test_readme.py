"""The tables of README.md and docs are those of the committed result files, and README.md's code runs."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "name", "page"),
    [
        ("table", "forward-h200", "README.md"),
        ("table", "training-h200", "README.md"),
        ("table", "calibration-h200", "docs/verification.md"),
        ("floors", "forward-h200", "docs/performance.md"),
        ("floors", "training-h200", "docs/performance.md"),
        ("suite", "bench-seeds-h200", "docs/performance.md"),
        ("suite", "bench-llm-h200", "docs/performance.md"),
        ("suite", "bench-odd-h200", "docs/performance.md"),
        ("suite", "bench-small-h200", "docs/performance.md"),
        ("suite", "bench-float32-h200", "docs/performance.md"),
        ("suite", "bench-vision-h200", "docs/performance.md"),
        ("first", "first-call-h200", "docs/performance.md"),
        ("table", "forward-graph-h200", "docs/performance.md"),
        ("products", "forward-graph-h200", "docs/performance.md"),
        ("host", "host-h200", "docs/performance.md"),
        ("host", "host-256-h200", "docs/performance.md"),
        ("pallas", "pallas-h200", "docs/jax.md"),
    ],
)
def test_tables_are_those_of_the_result_files(kind: str, name: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, kind)(ROOT / "benchmarks" / "results" / f"{name}.json") in (ROOT / page).read_text(encoding="utf-8")


def test_xla_is_as_fast_or_faster_than_the_pallas_kernels_on_an_h200() -> None:
    # What mlpdsl.jax logs where it leaves a GPU to XLA, and what the pages say.
    result = json.loads((ROOT / "benchmarks" / "results" / "pallas-h200.json").read_text())
    for name, row in result["rows"].items():
        slowest, fastest = row["pallas"]["quartiles_us"][1], row["jax.numpy"]["quartiles_us"][0]
        assert slowest > fastest, f"{name}: the kernels are faster beyond the spread"


def gained(name: str, least: int) -> list[float]:
    """How many times as fast as torch's best an MLP of the suite of float32 is, from so many rows on, in a hot L2 and a cold."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "bench-float32-h200.json").read_text())["rows"]
    return [part["ratio"] for row in rows if row["name"] == name and row["m"] >= least for part in row["measured"]]


def test_what_is_said_of_every_row_beside_torch() -> None:
    """How many lose by more than 2% in a hot or a cold L2, and what many rows in 16 bits gain."""
    slower, gains, count = [], [], 0
    for file in (ROOT / "benchmarks" / "results").glob("bench-*-h200.json"):
        for row in json.loads(file.read_text())["rows"]:
            count += 1
            ratios = {part["cache"]: part["ratio"] for part in row["measured"]}
            if min(ratios.values()) < 0.98:
                slower.append(row["name"])
            if row["m"] >= 1568 and row["spec"]["dtype"] != "float32" and "odd" not in file.name:
                gains.append(ratios["hot"])
    low, _, high = statistics.quantiles(gains, n=4)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (count, slower) == (301, [])
    assert "301 rows" in text and "none of them is slower by more than 2%" in text
    biased = gained("gelu-768x3072-bias-fp32", 1)
    thrice = [r for name in ("gelu-768x3072-bias", "swiglu-2048x5632") for r in gained(f"{name}-tf32x3", 256)]
    assert f"(768x3072: {min(biased):.1f} to {max(biased):.1f} times)" in text
    assert f"(from 256 rows on {min(thrice):.1f} to {max(thrice):.1f} times)" in text
    assert f"over many rows in 16 bits half of the time by {100 * low - 100:.0f} to {100 * high - 100:.0f}%" in text


def description(png: bytes) -> str:
    """What a PNG says of itself."""
    at = 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        key, _, text = png[at + 8 : at + 8 + size].partition(b"\0")
        if (kind, key) == (b"tEXt", b"Description"):
            return text.decode("latin-1")
        at += 12 + size
    return ""


def test_plots_are_of_the_files_that_are_there() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    plots = sorted((ROOT / "docs" / "plots").glob("*/*.png"))
    for path in plots:
        result = json.loads((ROOT / "benchmarks" / "results" / f"bench-{path.parent.name}-h200.json").read_text())
        assert description(path.read_bytes()) == f"{result['command']}, {result['date']}", "draw it again"
        assert f"(plots/{path.parent.name}/{path.name})" in page
    assert len(plots) == page.count("](plots/") == 3


def test_the_quickstart_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", text, re.S)
    assert code is not None and len(code[1].strip().splitlines()) <= 9
    exec(compile(code[1], "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
