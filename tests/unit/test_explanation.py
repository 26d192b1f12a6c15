"""`mlpdsl.explain`: a reason for every strategy that does not run, what was measured, and the least time there is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlpdsl
from mlpdsl import MLPSpec, explanation, tables
from mlpdsl.ceilings import KNOWN, floor_us, known_gpu
from mlpdsl.codegen.config import INVARIANT_ROWS, SKINNY_ROWS
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, products
from mlpdsl.tables import Point, Product, Row
from mlpdsl.target import TARGETS, parse_target

GATED = MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
PLAIN = MLPSpec(dims=(64, 128, 64), activation="relu", dtype="float32")
RAGGED = MLPSpec(dims=(333, 1111, 577), activation="gelu", bias=True, dtype="bfloat16")
WIDE = MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16")
TILE = Config(64, 64, 64, num_stages=4)
LIBRARY = Config(16, 128, 16, num_stages=1, strategy="library")
ALL = ("two_stage", "library", "skinny", "padded", "single_launch", "whole_network")

Times = Mapping[int, tuple[Config | None, float, float]]
"""By rows: the config, its time, and the rule's."""
Write = Callable[..., None]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tables.VARIABLE, "off")
    tables.forget()
    yield
    tables.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the user's table: of each role, its times."""

    def write(spec: MLPSpec, gpu: str = "NVIDIA H200", **roles: Times) -> None:
        plan, rows = lower(spec, TARGETS["sm_90"]), []
        for role, times in roles.items():
            shape = next(shape for other, _, *shape in products(plan, 1) if other == role)
            points = tuple(Point(m, *what) for m, what in sorted(times.items()))
            rows.append(Row(Product.of(plan, role, *shape)[0], gpu, {"torch": "2.13"}, "2026-01-01", points))
        path = tmp_path / "mine.json"
        path.write_text(tables.write("sm_90", rows))
        monkeypatch.setenv(tables.VARIABLE, str(path))
        tables.forget()

    return write


# Why not


def why(spec: MLPSpec, m: int, target: str = "sm_90", **words: Any) -> Mapping[str, tuple[str, ...]]:
    found = mlpdsl.explain(spec, m, target, **words)
    used = () if found.strategy == "eager" else tuple(found.strategy.split(", "))
    assert set(found.rejected) == set(ALL) - set(used) and list(found.rejected) == [name for name in ALL if name not in used]
    assert all(reasons and all(reasons) for reasons in found.rejected.values())
    assert all(f"not {name}: {'; '.join(reasons)}" in str(found) for name, reasons in found.rejected.items())
    return found.rejected


@pytest.mark.parametrize("spec", [GATED, PLAIN, WIDE, RAGGED], ids=["gated", "fp32", "wide", "ragged"])
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_strategy_runs_or_has_a_reason(spec: MLPSpec, target: str, batch_invariant: bool) -> None:
    for m in (1, 2, SKINNY_ROWS, SKINNY_ROWS + 1, 4096):
        found = why(spec, m, target, batch_invariant=batch_invariant)
        assert found["single_launch"][0].startswith("not in this release") or target == "sm_75"


def test_reasons_against_skinny() -> None:
    assert mlpdsl.explain(GATED, SKINNY_ROWS, "sm_90").strategy == "skinny"
    assert why(GATED, SKINNY_ROWS + 1)["skinny"] == (f"for {SKINNY_ROWS} rows at most",)
    invariant = f"batch_invariant takes the configs for {INVARIANT_ROWS} rows"
    assert why(GATED, 4, batch_invariant=True)["skinny"] == (invariant,)
    assert why(GATED, 4096, batch_invariant=True)["skinny"] == (f"for {SKINNY_ROWS} rows at most", invariant)
    assert why(PLAIN, 17)["skinny"] == ("none for float32 on sm_90 beyond 16 rows",)
    assert why(PLAIN, 2, "sm_80")["skinny"] == ("none for float32 on sm_80 beyond one row",)
    assert "skinny" not in {*why(PLAIN, 1), *why(PLAIN, 16), *why(PLAIN, 1, "sm_80")}
    tf32 = PLAIN.replace(precision="tf32")
    assert "skinny" not in why(tf32, 4) and why(tf32, 5)["skinny"] == ("the rule takes it for no product of forward here",)
    assert why(GATED, 4, "gfx942")["skinny"] == ("none for bfloat16 on gfx942",)


def test_reasons_against_padded() -> None:
    """Each where it is true, and only there."""
    found = mlpdsl.explain(RAGGED, 4096, "sm_90")
    assert found.strategy == "padded" and {c.strategy for c in found.config.values()} == {"padded"}
    assert "\n  hidden[0]          padded, tile " in str(found)
    assert why(RAGGED, 16)["padded"] == ("the rule takes it for no product of forward here",)
    assert why(GATED, 4096)["padded"] == ("every row of every tensor is of whole 16 bytes",)
    assert why(PLAIN, 4096)["padded"] == ("float32 takes masked loads",)
    assert why(RAGGED, 4096, "sm_80")["padded"] == ("sm_80 has no tensor memory accelerator",)
    invariant = "batch_invariant takes masked loads in its place, at every number of rows"
    tf32 = GATED.replace(dtype="float32", precision="tf32")
    assert [why(spec, 4096, batch_invariant=True)["padded"] for spec in (RAGGED, tf32)] == [(invariant,), (invariant,)]
    note = "note: padded is for tensor descriptors here, and copies nothing that is aligned: every width is a multiple of 4"
    wide, odd = (tf32.replace(dims=dims) for dims in ((1024, 2816, 1024), (1021, 2749, 1021)))
    assert [note in str(mlpdsl.explain(spec, 4096, "sm_90")) for spec in (wide, odd, RAGGED)] == [True, False, False]
    assert why(tf32, 64)["padded"] == ("the rule takes it for no product of forward here",)
    assert why(tf32, 4096, "sm_100")["padded"] == ("float32 takes masked loads",)
    whole = RAGGED.replace(dims=(336, 1112, 576))
    assert "padded" not in {c.strategy for c in mlpdsl.explain(whole, 4096, "sm_90").config.values()}


NARROW = MLPSpec(dims=(48, 64, 32, 24), activation="gelu", dtype="bfloat16")


def test_narrow_mlps_are_one_launch() -> None:
    """Up to widths of 64 at any number of rows, up to 128 at few; and why not elsewhere."""
    found = mlpdsl.explain(NARROW, 4096, "sm_90")
    assert found.strategy == "whole_network" and found.source == "heuristic" and found.predicted_us is None
    assert next(iter(found.config)) == "network" and "hidden[0]" not in found.config
    assert "hidden_grad[2]" in found.config  # backward goes linear by linear
    assert "\n  network            all linears, 16 rows at a time, 4 warps" in str(found)
    assert why(NARROW, 4096)["two_stage"] == why(NARROW, 1)["skinny"] == ("all linears are one launch",)
    assert mlpdsl.explain(NARROW, 10**6, "sm_90", batch_invariant=True).strategy == "whole_network"
    wider = NARROW.replace(dims=(48, 128, 32, 24))
    assert mlpdsl.explain(wider, 4096, "sm_80").strategy == "whole_network"
    assert why(wider, 16385)["whole_network"] == ("where weights find no room in shared memory together, for 2 to 16384 rows",)
    assert why(wider, 1, batch_invariant=True)["whole_network"] == (
        "where weights find no room in shared memory together, not with batch_invariant",
    )
    assert why(NARROW.replace(dims=(50, 129, 20)), 1)["whole_network"] == ("a width of 129, and 128 at most find room",)
    assert why(NARROW.replace(dims=(9,) * 10), 1)["whole_network"] == ("9 linears, and 8 at most are printed",)
    assert why(NARROW.replace(dtype="float32"), 1)["whole_network"] == ("for 16 bits",)
    assert why(NARROW, 1, "gfx942")["whole_network"] == ("for NVIDIA GPUs",)
    ragged = NARROW.replace(dims=(50, 64, 30, 20))
    assert mlpdsl.explain(ragged, 8192, "sm_80").strategy == "whole_network"
    assert why(ragged, 8193)["whole_network"] == ("where rows are of no whole 16 bytes, for 1 to 8192 rows",)
    single = NARROW.replace(dims=(50, 20), activation="identity")
    assert why(single, 100)["whole_network"] == ("a single linear is one launch already",)


def test_reasons_that_a_table_gives(table: Write) -> None:
    none, slower = ("the rule takes it for no product of forward here",), ("slower where the table was measured",)
    built = ("two_stage", "library", "skinny")
    assert {found for name, found in why(GATED, 16).items() if name in built} == {none}
    assert why(GATED, 16, batch_invariant=True)["library"] == ("its sums depend on the number of rows",)
    table(GATED, hidden={16: (TILE, 1.0, 2.0)}, output={16: (TILE, 1.0, 2.0)})
    assert mlpdsl.explain(GATED, 16, "sm_90").strategy == "two_stage"
    assert why(GATED, 16)["skinny"] == why(GATED, 16)["library"] == slower
    table(GATED, hidden={16: (LIBRARY, 1.0, 2.0)}, output={16: (LIBRARY, 1.0, 2.0)})
    assert mlpdsl.explain(GATED, 16, "sm_90").strategy == "library"
    assert why(GATED, 16)["two_stage"] == why(GATED, 16)["skinny"] == slower
    # Nothing beat the rule's config there, so whatever else there is is slower.
    table(GATED, hidden={16: (None, 1.0, 1.0), 64: (TILE, 1.0, 2.0)})
    assert {found for name, found in why(GATED, 16).items() if name in built} == {slower}


# How long


def test_the_floor() -> None:
    assert mlpdsl.explain(WIDE, 1, "sm_90").floor_us == pytest.approx(2 * (3 * 4096 * 14336 + 2 * 4096) / 4.37e12 * 1e6)
    assert mlpdsl.explain(WIDE, 4096, "sm_90").floor_us == pytest.approx(2 * 3 * 4096 * 4096 * 14336 / 790e12 * 1e6)
    assert mlpdsl.explain(WIDE, 4096, "sm_90").gpu == "NVIDIA H200"
    assert "\n  floor of 81 us, on an NVIDIA H200\n" in str(mlpdsl.explain(WIDE, 16, "sm_90"))
    for spec, target in ((PLAIN, "sm_90"), (WIDE, "sm_80"), (WIDE, "gfx942")):  # rates nobody measured
        found = mlpdsl.explain(spec, 16, target)
        assert found.floor_us is None and found.predicted_us is None and "floor" not in str(found) and " us" not in str(found)


def test_the_floor_is_that_of_bench() -> None:
    from mlpdsl.bench import floors
    from mlpdsl.bench.suites import Row as BenchRow

    for m in (1, 64, 4096):
        rates = floors.ceilings("NVIDIA H200", ["bfloat16"], lambda: 0.0, lambda name: 0.0)
        assert floor_us(WIDE, m, "NVIDIA H200") == floors.floor_of(BenchRow("wide", WIDE, m), rates).us
    assert floor_us(WIDE, 1, None) is floor_us(WIDE, 1, "NVIDIA H100 80GB HBM3") is floor_us(PLAIN, 1, "NVIDIA H200") is None


def test_known_gpus() -> None:
    for gpu, rates in KNOWN.items():
        assert parse_target(rates.target).name == rates.target and rates.bandwidth > 0 and min(rates.products.values()) > 0
        assert known_gpu(rates.target) in (gpu, None)
    assert known_gpu("sm_90") == "NVIDIA H200" and known_gpu("sm_80") is None


def test_the_floor_of_two_gpus_of_one_target_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "another", KNOWN["NVIDIA H200"])
    assert mlpdsl.explain(WIDE, 16, "sm_90").floor_us is None


def test_the_floor_is_of_this_processs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "_this_gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(explanation, "detect", lambda: TARGETS["sm_90"])
    found = mlpdsl.explain(WIDE, 16)
    assert (found.gpu, found.floor_us) == ("NVIDIA H100", None) and "NVIDIA" not in str(found)
    monkeypatch.setattr(explanation, "detect", lambda: TARGETS["sm_80"])  # what is asked about is another machine
    assert mlpdsl.explain(WIDE, 16, "sm_90").gpu == "NVIDIA H200"


def test_predicted_against_the_floor(table: Write) -> None:
    points = {16: (TILE, 50.0, 60.0), 64: (TILE, 200.0, 210.0)}
    table(WIDE, hidden=points, output={16: (None, 33.25, 33.25), 64: (LIBRARY, 133.0, 150.0)})
    found = mlpdsl.explain(WIDE, 16, "sm_90")
    assert found.predicted_us == 83.25 and found.gpu == "NVIDIA H200"
    assert "\n  predicted 83 us against a floor of 81 us, on an NVIDIA H200\n" in str(found)
    # Between two points, on the line through both in log M and log time: here time grows as M does.
    assert mlpdsl.explain(WIDE, 32, "sm_90").predicted_us == pytest.approx(2 * 83.25)
    assert mlpdsl.explain(WIDE, 24, "sm_90").predicted_us == pytest.approx(1.5 * 83.25)
    for m in (15, 65):  # nothing was measured there
        assert mlpdsl.explain(WIDE, m, "sm_90").predicted_us is None


def test_nothing_is_predicted_where_a_product_was_not_measured(table: Write) -> None:
    table(GATED, hidden={16: (TILE, 50.0, 60.0)})
    found = mlpdsl.explain(GATED, 16, "sm_90")
    assert found.predicted_us is None and found.floor_us is not None
    table(GATED, hidden={16: (TILE, 50.0, 60.0)}, output={16: (TILE, 5.0, 6.0)})
    assert mlpdsl.explain(GATED, 16, "sm_90").predicted_us == 55.0
    assert mlpdsl.explain(GATED, 16, "sm_90", batch_invariant=True).predicted_us is None
    assert mlpdsl.explain(replace(GATED, dtype="float16"), 16, "sm_90").predicted_us is None


def test_a_config_that_may_not_run_predicts_nothing_of_itself(table: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the rule's runs, and its time was measured as well."""
    table(GATED, hidden={16: (LIBRARY, 50.0, 60.0)}, output={16: (TILE, 5.0, 6.0)})
    assert mlpdsl.explain(GATED, 16, "sm_90").predicted_us == 55.0
    monkeypatch.setattr("mlpdsl.tables.rule.library", lambda *arguments, **words: None)
    assert mlpdsl.explain(GATED, 16, "sm_90").predicted_us == 65.0


def test_times_of_another_gpu_meet_its_floor(table: Write) -> None:
    table(GATED, gpu="NVIDIA GH200", hidden={16: (TILE, 5.0, 6.0)}, output={16: (TILE, 0.25, 6.0)})
    found = mlpdsl.explain(GATED, 16, "sm_90")
    assert (found.gpu, found.floor_us, found.predicted_us) == ("NVIDIA GH200", None, 5.25)
    assert "\n  predicted 5.2 us, on an NVIDIA GH200\n" in str(found)


def test_times_of_two_gpus_have_no_floor(table: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    table(GATED, hidden={16: (TILE, 5.0, 6.0)}, output={16: (TILE, 0.25, 6.0)})
    right = explanation.find

    def find(target: str, product: Product, m: int) -> Any:
        row, point = right(target, product, m)
        return replace(row, gpu=product.role), point

    monkeypatch.setattr(explanation, "find", find)
    found = mlpdsl.explain(GATED, 16, "sm_90")
    assert (found.gpu, found.floor_us, found.predicted_us) == (None, None, 5.25)
    assert "\n  predicted 5.2 us\n" in str(found)


def test_microseconds() -> None:
    assert [explanation._us(us) for us in (0.123, 1.26, 9.96, 83.4, 1827.4)] == [
        "0.12 us", "1.3 us", "10.0 us", "83 us", "1827 us",
    ]  # fmt: skip
    assert math.isclose(explanation._between(Point(1, None, 1, 2), Point(4, None, 4, 8), 2, False), 2)
    assert math.isclose(explanation._between(Point(1, None, 1, 2), Point(4, None, 4, 8), 2, True), 4)


def test_notes_of_what_makes_calls_here_run_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "detect", lambda: None)
    assumed = mlpdsl.explain(PLAIN, 16)
    assert assumed.target == "sm_90" and str(assumed).splitlines()[-1].startswith("  note: sm_90 is assumed")
    assert mlpdsl.explain(PLAIN, 16, "sm_90").notes == ()
    monkeypatch.setattr(explanation, "detect", lambda: TARGETS["sm_80"])
    assert mlpdsl.explain(PLAIN, 16).notes == ()
    monkeypatch.setenv("MLPDSL_BACKEND", "eager")
    (note,) = mlpdsl.explain(PLAIN, 16).notes
    assert note.startswith("MLPDSL_BACKEND=eager")
    monkeypatch.setenv("MLPDSL_BACKEND", "eagr")
    with pytest.raises(mlpdsl.SpecError, match=r"MLPDSL_BACKEND.*Did you mean 'eager'"):
        mlpdsl.explain(PLAIN, 16)


def test_explain_imports_no_torch() -> None:
    code = """
import json, sys, mlpdsl
spec = mlpdsl.MLPSpec(dims=(64, 128, 64), activation="silu", dtype="bfloat16")
text = str(mlpdsl.explain(spec, 16, "sm_90"))
print(json.dumps([text, [n for n in ("torch", "triton", "jinja2", "mlpdsl.bench") if n in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    text, heavy = json.loads(done.stdout)
    assert "floor" in text and heavy == []


def test_it_says_where_biases_are_added_and_what_is_copied() -> None:
    exact = MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float32")
    told = str(mlpdsl.explain(exact, 256, "sm_90"))
    assert told.count("torch's product, then biases, in blocks of") == 2
    assert "biases" not in str(mlpdsl.explain(exact.replace(bias=False), 256, "sm_90"))
    gated = MLPSpec(dims=(512, 1536, 512), activation="silu", gated=True, bias=True, dtype="float32")
    assert "one batched product of torch's, then biases, in blocks" in str(mlpdsl.explain(gated, 4096, "sm_90"))
    odd = MLPSpec(dims=(1021, 2749, 1021), activation="silu", gated=True, dtype="float32", precision="tf32")
    note = "torch multiplies copies, made in each call, because widths are no multiples of 4"
    assert f"note: hidden_grad[1], weight_grad[1], weight_grad[0], input_grad[0]: {note}" in str(mlpdsl.explain(odd, 4093, "sm_90"))
    for spec, rows in ((odd, 64), (odd.replace(precision="ieee"), 4093), (odd.replace(dims=(1024, 2752, 1024)), 4093)):
        assert note not in str(mlpdsl.explain(spec, rows, "sm_90"))
