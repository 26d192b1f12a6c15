"""Measured tables: what is read and refused, which config a launch gets by them, and how they are merged."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlpdsl
from mlpdsl import MLPSpec, dispatch, tables
from mlpdsl.codegen import config as rule
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, Plan, products
from mlpdsl.tables import Point, Product, Row
from mlpdsl.target import TARGETS

H200 = TARGETS["sm_90"]
GATED = MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
PLAIN = MLPSpec(dims=(64, 128, 64), activation="relu", dtype="float32")
RAGGED = MLPSpec(dims=(67, 131, 72), activation="relu", dtype="bfloat16")
TILE = Config(16, 32, 64, num_warps=4, num_stages=5)
LIBRARY = Config(16, 128, 16, num_stages=1, strategy="library")
VERSIONS = {"torch": "2.13", "triton": "3.7"}


def plan_of(spec: MLPSpec) -> Plan:
    return lower(spec, H200)


def sizes(spec: MLPSpec, role: str, rows: int, stage: int | None = None) -> tuple[int, int, int]:
    return next((m, n, k) for name, i, m, n, k in products(plan_of(spec), rows) if name == role and stage in (None, i))


def row(spec: MLPSpec, role: str, points: dict[int, Config | None], stage: int | None = None, **fields: Any) -> Row:
    product, _ = Product.of(plan_of(spec), role, *sizes(spec, role, 1, stage))
    made = tuple(Point(m, config, 1.0 if config else 2.0, 2.0) for m, config in points.items())
    return Row(product, **{"gpu": "NVIDIA H200", "versions": VERSIONS, "date": "2026-01-01", "points": made, **fields})


def path_of(spec: MLPSpec, role: str) -> str:
    """That of aligned tensors."""
    return Product.of(plan_of(spec), role, *sizes(spec, role, 1))[0].path


def decided(spec: MLPSpec, role: str, rows: int, path: str | None = None, **words: bool) -> Config:
    return tables.decide(plan_of(spec), role, path or path_of(spec, role), *sizes(spec, role, rows), **words).config


def by_rule(spec: MLPSpec, role: str, rows: int, path: str | None = None, ours: bool = False) -> Config:
    plan = plan_of(spec)
    planes = 2 if plan.gated and role == "hidden" else 1
    words = {"dtype": plan.dtype, "precision": plan.precision, "planes": planes, "target": H200}
    return (rule.choose if ours else rule.usual)(role, path or path_of(spec, role), *sizes(spec, role, rows), **words)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    tables.forget()
    dispatch._tell_of_tuning.cache_clear()
    yield
    tables.forget()
    dispatch.forget()


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the user's table."""

    def write(*rows: Row, target: str = "sm_90") -> Path:
        path = tmp_path / "mine.json"
        path.write_text(tables.write(target, rows))
        monkeypatch.setenv(tables.VARIABLE, str(path))
        tables.forget()
        return path

    return write


def test_the_tables_of_the_package_are_canonical() -> None:
    folder = Path(tables.__file__).parent
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        target, rows = tables.read(path.read_text())
        assert target == path.stem and target in TARGETS
        assert tables.write(target, rows) == path.read_text()


def test_written_and_read_back() -> None:
    rows = [row(GATED, "hidden", {1: TILE, 16: None, 64: LIBRARY}), row(PLAIN, "weight_grad", {256: replace(TILE, splits=4)}, 0)]
    text = tables.write("sm_90", rows)
    assert tables.read(text) == ("sm_90", sorted(rows, key=lambda r: r.product))
    assert tables.write("sm_90", reversed(rows)) == text
    assert json.loads(text)["rows"][0]["points"][0] == {
        "m": 1, "us": 1.0, "default_us": 2.0, "config": {"block_m": 16, "block_n": 32, "block_k": 64, "num_stages": 5},
    }  # fmt: skip
    assert tables.write("sm_90", [row(GATED, "hidden", {1: None})]) == tables.write("sm_90", [])


def broken(change: Any) -> str:
    data = json.loads(tables.write("sm_90", [row(GATED, "hidden", {1: TILE, 16: LIBRARY})]))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"schema": 2, "target": "sm_90", "rows": []}',
        '{"schema": 1, "target": "sm_90", "rows": [], "more": 1}',
        broken(lambda d: d["rows"].append(d["rows"][0])),
        broken(lambda d: d["rows"][0].pop("gpu")),
        broken(lambda d: d["rows"][0].update(n=0)),
        broken(lambda d: d["rows"][0].update(n="64")),
        broken(lambda d: d["rows"][0].update(planes=True)),
        broken(lambda d: d["rows"][0].update(points=[])),
        broken(lambda d: d["rows"][0]["points"].reverse()),
        broken(lambda d: d["rows"][0]["points"][0].update(m=0)),
        broken(lambda d: d["rows"][0]["points"][0].update(us=1.99)),
        broken(lambda d: d["rows"][0]["points"][0].update(default_us=float("nan"))),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(block_m=24)),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(num_warps=0)),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(splits=2.0)),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(unknown=2)),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(strategy="magic")),
        broken(lambda d: d["rows"][0]["points"][0]["config"].update(batched=True)),
        broken(lambda d: d["rows"][0]["points"][1]["config"].update(batched=1)),
        broken(lambda d: (d["rows"][0].update(planes=1), d["rows"][0]["points"][1]["config"].update(batched=True))),
        broken(lambda d: (d["rows"][0].update(role="hidden_grad"), d["rows"][0]["points"][1]["config"].update(batched=True))),
        broken(lambda d: d["rows"][0]["points"][0].update(config=[])),
    ],
)
def test_a_broken_file_is_one_warning_and_the_rule(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(tables.TableError):
        tables.read(text)
    path = tmp_path / "broken.json"
    path.write_text(text)
    monkeypatch.setenv(tables.VARIABLE, str(path))
    with caplog.at_level(logging.WARNING, "mlpdsl"):
        for _ in range(3):
            assert decided(GATED, "hidden", 1) == by_rule(GATED, "hidden", 1)
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_a_file_that_is_not_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "none.json"))
    assert decided(GATED, "hidden", 1) == by_rule(GATED, "hidden", 1)
    assert len(caplog.records) == 1 and "none.json" in caplog.text


def test_m_is_searched_in_log_space_inside_the_range_alone(user: Any) -> None:
    other = replace(TILE, num_stages=2)
    user(row(GATED, "hidden", {4: TILE, 64: None, 1024: other}))
    found = {m: decided(GATED, "hidden", m) for m in (1, 3, 4, 15, 16, 17, 64, 255, 352, 1024, 1025, 4096)}
    default = {m: by_rule(GATED, "hidden", m) for m in found}
    assert [m for m in found if found[m] == TILE] == [4, 15, 16]  # the tie at 16 goes down
    assert [m for m in found if found[m] == other] == [352, 1024]
    assert all(found[m] == default[m] for m in (1, 3, 17, 64, 255, 1025, 4096))


def test_a_config_holds_where_its_waves_are_as_full(user: Any) -> None:
    """At 256 rows two rows of tiles are a full wave; a third, or half of them empty, takes as long again for little. And what was
    timed at up to 64 rows, which other kernels take, says nothing of more."""
    spec = MLPSpec(dims=(512, 8192, 512), activation="silu", dtype="bfloat16")
    tile = Config(128, 128, 64, num_warps=8, num_stages=5)
    user(row(spec, "hidden", {64: tile, 256: tile, 4096: tile}, 0), row(spec, "output", {128: LIBRARY, 256: LIBRARY}, 1))
    found = [m for m in (64, 65, 90, 129, 192, 220, 228, 256, 257, 300, 1100, 3800, 4096) if decided(spec, "hidden", m) == tile]
    assert found == [64, 228, 256, 3800, 4096]
    assert all(decided(spec, "output", m) == LIBRARY for m in (128, 181, 182, 256))  # which has tiles of its own
    # A weight gradient sums over the batch: its tiles are the same for every number of rows.
    user(row(GATED, "weight_grad", {256: replace(TILE, splits=2), 4096: TILE}, 1))
    assert decided(GATED, "weight_grad", 900) == replace(TILE, splits=2)


def test_on_copies_too_waves_count(user: Any) -> None:
    """Those kernels are persistent on either path: 132 tiles of 128 x 128 are a wave, and a 133rd another."""
    spec = MLPSpec(dims=(513, 8448, 512), activation="silu", dtype="bfloat16")
    tile = Config(128, 128, 64, num_warps=8, num_stages=3, strategy="padded")
    user(row(spec, "hidden", {240: tile, 4096: tile}, 0))
    found = [m for m in (200, 240, 256, 257, 384, 3800, 4096) if decided(spec, "hidden", m, "masked") == tile]
    assert found == [240, 256, 3800, 4096]


def test_one_on_copies_in_tf32_is_for_what_has_room(user: Any) -> None:
    """A row is of MLPs with biases and without, and of every epilogue: what one of them has no shared memory for, none gets."""
    spec = MLPSpec(dims=(1024, 4096, 1024), activation="silu", gated=True, bias=True, precision="tf32")
    fits = Config(128, 256, 32, group_m=4, num_warps=8, num_stages=3, strategy="padded")  # a group that no rule takes
    for tile, stands in ((fits, True), (replace(fits, num_stages=4), False)):
        user(row(spec, "output", {256: tile, 4096: tile}))
        for each in (spec, replace(spec, bias=False)):
            assert (decided(each, "output", 4096) == tile) == stands
        assert decided(replace(spec, epilogue=("scale",)), "output", 4096) != tile  # a row of its own


def test_only_the_very_product(user: Any) -> None:
    user(row(GATED, "hidden", {1: TILE, 4096: TILE}))
    assert decided(GATED, "hidden", 16) == TILE
    for spec in (replace(GATED, dtype="float16"), replace(GATED, dims=(72, 128, 64)), replace(GATED, dims=(64, 136, 64)), PLAIN):
        assert decided(spec, "hidden", 16) == by_rule(spec, "hidden", 16)
    assert decided(GATED, "output", 16) == by_rule(GATED, "output", 16)
    assert decided(replace(GATED, activation="gelu", bias=True), "hidden", 16) == TILE


def test_an_epilogue_is_another_product(user: Any) -> None:
    user(row(GATED, "output", {1: LIBRARY, 64: LIBRARY}))
    assert decided(GATED, "output", 16) == LIBRARY
    assert decided(replace(GATED, epilogue=("residual",)), "output", 16).strategy == "skinny"


def test_weight_gradients_are_looked_up_by_the_rows_they_sum_over(user: Any) -> None:
    user(row(GATED, "weight_grad", {64: replace(TILE, splits=4), 4096: TILE}, stage=1))
    assert decided(GATED, "weight_grad", 100).splits == 4 and decided(GATED, "weight_grad", 4000) == TILE
    assert decided(GATED, "weight_grad", 63) == by_rule(GATED, "weight_grad", 63)


def test_the_other_path_follows_the_rule_but_the_library_takes_both(user: Any) -> None:
    user(row(GATED, "hidden", {1: TILE, 64: LIBRARY}))
    assert decided(GATED, "hidden", 1) == TILE and decided(GATED, "hidden", 1, "masked") == by_rule(GATED, "hidden", 1, "masked")
    assert decided(GATED, "hidden", 64) == LIBRARY and decided(GATED, "hidden", 64, "masked") == LIBRARY


def test_what_the_library_must_not_do_no_table_makes_it_do(user: Any) -> None:
    user(row(GATED, "input_grad", {16: LIBRARY}), row(PLAIN, "input_grad", {16: LIBRARY}))
    assert decided(GATED, "input_grad", 16) == by_rule(GATED, "input_grad", 16)
    assert decided(PLAIN, "input_grad", 16) == LIBRARY


def test_batch_invariant(user: Any) -> None:
    user(row(GATED, "hidden", {128: None, 192: TILE}), row(GATED, "output", {128: LIBRARY, 256: LIBRARY}),
         row(GATED, "hidden_grad", {1: TILE, 64: TILE}), row(GATED, "weight_grad", {16: LIBRARY}, 1))  # fmt: skip
    assert {decided(GATED, "hidden", m, batch_invariant=True) for m in (1, 16, 192, 9999)} == {TILE}
    for role in ("output", "hidden_grad"):
        wanted = {by_rule(GATED, role, rule.INVARIANT_ROWS, ours=True)}
        assert {decided(GATED, role, m, batch_invariant=True) for m in (1, 16, 192, 9999)} == wanted
    assert decided(GATED, "weight_grad", 16, batch_invariant=True) == LIBRARY


def test_the_users_rows_come_first_and_the_packages_are_behind_them(
    user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = replace(TILE, num_stages=2)
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "sm_90.json").write_text(tables.write("sm_90", [row(GATED, "hidden", {1: shipped, 4096: shipped})]))
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "shipped" / "__init__.py"))
    path = user(row(GATED, "hidden", {16: TILE, 64: None}))
    assert [decided(GATED, "hidden", m) for m in (1, 16, 4096)] == [shipped, TILE, shipped]
    assert decided(GATED, "hidden", 64) == by_rule(GATED, "hidden", 64)
    path.rename(tmp_path / "sm_90.json")
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))  # a folder
    assert decided(GATED, "hidden", 16) == TILE
    monkeypatch.setenv(tables.VARIABLE, "off")
    assert decided(GATED, "hidden", 16) == by_rule(GATED, "hidden", 16) and not tables.has_rows("sm_90")


def test_a_table_of_another_target_is_silent(user: Any, caplog: pytest.LogCaptureFixture) -> None:
    user(row(GATED, "hidden", {16: TILE}), target="sm_80")
    assert decided(GATED, "hidden", 16) == by_rule(GATED, "hidden", 16) and not caplog.records


def test_explain_says_where_a_config_comes_from(user: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.VARIABLE, "off")
    before = mlpdsl.explain(GATED, 16, "sm_90")
    assert before.source == "heuristic" and before.strategy == "skinny"
    assert before.rejected["library"] == ("the rule takes it for no product of forward here",)
    user(row(GATED, "hidden", {1: LIBRARY, 64: LIBRARY}), row(GATED, "weight_grad", {16: TILE}, 1, gpu="NVIDIA GH200"))
    found = mlpdsl.explain(GATED, 16, "sm_90")
    assert found.config["hidden[0]"] == LIBRARY and found.config["output[1]"] == before.config["output[1]"]
    assert found.strategy == "library, skinny" and "library" not in found.rejected
    tables_say = "table measured on NVIDIA H200 for hidden[0]; table measured on NVIDIA GH200 for weight_grad[1]; else heuristic"
    assert found.source == tables_say
    assert "hidden[0]          torch's product, then blocks of 16x128" in str(found)
    monkeypatch.setattr("mlpdsl.explanation._this_gpu", lambda: "NVIDIA GH200")
    assert "table measured on NVIDIA H200, not on this NVIDIA GH200 for hidden[0]" in mlpdsl.explain(GATED, 16, "sm_90").source
    assert mlpdsl.explain(GATED, 4096, "sm_90").source == "heuristic"
    every = {role: {16: LIBRARY} for role in ("hidden", "output")}
    user(*(row(GATED, role, points) for role, points in every.items()))
    assert mlpdsl.explain(GATED, 16, "sm_90").rejected["two_stage"] == ("slower where the table was measured",)


def test_what_runs_is_what_explain_says(user: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    user(row(GATED, "hidden", {1: TILE, 64: LIBRARY}), row(GATED, "output", {1: TILE, 64: TILE}))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    for invariant in (False, True):
        pick = dispatch._picker(plan_of(GATED), invariant)
        for m in (1, 16, 64, 192):
            wanted = mlpdsl.explain(GATED, m, "sm_90", batch_invariant=invariant).config
            for role, stage, *shape in products(plan_of(GATED), m):
                launch, config = pick(role, "tma", *shape), wanted[f"{role}[{stage}]"]
                assert (launch.block_m, launch.block_n, launch.splits) == (config.block_m, config.block_n, config.splits)
                assert launch.strategy == config.strategy and launch.options["num_stages"] == config.num_stages
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    interpreted = dispatch._picker(plan_of(GATED), False)("hidden", "tma", 1, 128, 64)
    assert interpreted.options["num_stages"] == 1 and interpreted.block_n == 32


def test_one_config_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = dispatch._picker(plan_of(GATED), False)
    before = pick("hidden", "tma", 16, 128, 64)
    with dispatch.forcing_config("hidden", 16, 128, 64, TILE) as paths:
        assert pick("hidden", "tma", 16, 128, 64).options["num_stages"] == 5
        assert pick("hidden", "tma", 17, 128, 64).options["num_stages"] != 5
        assert pick("output", "tma", 16, 128, 64).options["num_stages"] != 5
        with dispatch.forcing_config("hidden", 16, 128, 64, LIBRARY):
            assert pick("hidden", "masked", 16, 128, 64).strategy == "library"
        assert pick("hidden", "tma", 16, 128, 64).options["num_stages"] == 5
    assert set(paths) == {"tma"}
    assert pick("hidden", "tma", 16, 128, 64) == before


def test_an_architecture_without_a_table_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with caplog.at_level(logging.INFO, "mlpdsl"):
        for spec in (GATED, PLAIN):
            pick = dispatch._picker(lower(spec, TARGETS["sm_86"]), False)
            pick("hidden", "masked", 1, 128, 64)
            pick("hidden", "masked", 2, 128, 64)
    assert [r.message for r in caplog.records] == [
        "mlpdsl: no table for sm_86: configs follow the rule; `mlpdsl tune SPEC` measures them on this GPU"
    ]


def test_merge() -> None:
    old = row(GATED, "hidden", {1: TILE, 16: TILE, 64: None})
    new = row(GATED, "hidden", {4: LIBRARY, 16: LIBRARY, 64: LIBRARY}, date="2026-02-01")
    other = row(GATED, "output", {1: TILE})
    (merged, kept) = tables.merge([other, old], [new])
    assert kept == other and merged.date == "2026-02-01"
    # At 16 both took 1 us: no difference beyond noise, and the old one stays. At 64 the new one is faster than the default was.
    assert {p.m: p.config for p in merged.points} == {1: TILE, 4: LIBRARY, 16: TILE, 64: LIBRARY}
    assert tables.merge([old], []) == [old] and tables.merge([], [old]) == [old] == tables.merge([old], [old])
    faster = replace(new, points=(Point(16, LIBRARY, 0.9, 2.0),))
    assert {p.m: p.config for p in tables.merge([old], [faster])[0].points}[16] == LIBRARY
    # Times on another GPU, or with other versions, do not compare: the later row stays.
    for fields in ({"gpu": "NVIDIA GH200"}, {"versions": {"torch": "2.14"}}):
        assert tables.merge([old], [replace(new, **fields)]) == [replace(new, **fields)]
        assert tables.merge([new], [replace(old, **fields)]) == [new]


def test_where_biases_are_added_is_the_rules_to_say(user: Any) -> None:
    """Of specs that have some, whoever chose the library; a product's row is of MLPs with biases and without."""
    plain = MLPSpec(dims=(768, 3072, 768), activation="gelu", dtype="float32")
    for rows in ((), (row(plain, "output", {64: LIBRARY, 512: LIBRARY}),)):
        user(*rows)
        found = {m: decided(replace(plain, bias=True), "output", m) for m in (64, 256, 512)}
        assert all(c.strategy == "library" and c.bias_pass for c in found.values())
        assert all(decided(plain, "output", m) == replace(c, bias_pass=False) for m, c in found.items())
    assert decided(replace(plain, bias=True), "output", 256).block_m == LIBRARY.block_m
    assert not decided(replace(plain, bias=True), "output", 8).bias_pass
    half = replace(plain, bias=True, dtype="float16")
    user(row(half, "output", {64: LIBRARY, 512: LIBRARY}))
    assert decided(half, "output", 256) == LIBRARY
    text = tables.write("sm_90", [row(plain, "output", {64: replace(LIBRARY, bias_pass=True)})])
    assert "bias_pass" not in text
    with pytest.raises(tables.TableError, match="bias_pass is the rule's to say"):
        tables.read(text.replace('"block_k"', '"bias_pass": true, "block_k"'))


def test_importing_tables_imports_no_torch() -> None:
    code = "import sys, mlpdsl.tables; print([n for n in ('torch', 'triton', 'jinja2') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


SKINNY = Config(16, 64, 128, strategy="skinny")
WIDE = replace(SKINNY, block_m=64)
ONE_ROW = Config(1, 4, 64, num_stages=1, strategy="skinny")


@pytest.mark.parametrize(("rows", "config"), [(2, SKINNY), (16, SKINNY), (17, WIDE), (64, WIDE)])
def test_a_tile_of_few_rows_holds_all_of_them(user: Any, rows: int, config: Config) -> None:
    """Its program looks at no second tile, so one timed at 16 rows, though it is the nearest, is not for 17."""
    user(row(GATED, "hidden", {2: SKINNY, 16: SKINNY, 64: WIDE}))
    assert decided(GATED, "hidden", rows) == (by_rule(GATED, "hidden", 17) if rows == 17 else config)


@pytest.mark.parametrize(("rows", "config"), [(65, WIDE), (17, SKINNY), (16, WIDE), (1, SKINNY), (2, ONE_ROW), (65, ONE_ROW)])
def test_no_kernel_for_few_rows_gets_others(user: Any, rows: int, config: Config) -> None:
    user(row(GATED, "hidden", {1: config, 2: config, 256: config}))
    assert decided(GATED, "hidden", rows) == by_rule(GATED, "hidden", rows)


def test_float32_has_one_for_one_row_alone(user: Any) -> None:
    user(row(PLAIN, "hidden", {1: ONE_ROW, 2: SKINNY, 64: SKINNY}))
    assert decided(PLAIN, "hidden", 1) == ONE_ROW
    assert decided(PLAIN, "hidden", 5) == by_rule(PLAIN, "hidden", 5)


def test_one_beyond_shared_memory_is_not_used(user: Any) -> None:
    large = replace(WIDE, block_k=256, num_stages=6)
    user(row(GATED, "hidden", {17: large, 64: large}))
    assert decided(GATED, "hidden", 64) == by_rule(GATED, "hidden", 64)


PADDED = Config(64, 128, 64, num_warps=4, num_stages=3, strategy="padded")


def test_one_on_copies_is_for_rows_of_no_whole_16_bytes(user: Any) -> None:
    """On the path that aligned tensors take there, and on no other."""
    everywhere = {1: PADDED, 100: PADDED, 4096: PADDED}
    ragged = [row(RAGGED, role, everywhere) for role in ("hidden", "output", "hidden_grad")]
    user(*ragged, row(GATED, "hidden", everywhere), row(PLAIN, "hidden", everywhere))
    for m in (1, 100, 4096):
        assert {decided(RAGGED, role, m) for role in ("hidden", "output", "hidden_grad")} == {PADDED}
        assert decided(RAGGED, "hidden", m, "tma") == by_rule(RAGGED, "hidden", m, "tma") != PADDED
        for spec in (GATED, PLAIN, RAGGED.replace(dtype="float16"), RAGGED.replace(dims=(67, 132, 72))):
            assert decided(spec, "hidden", m) == by_rule(spec, "hidden", m) != PADDED
    assert decided(RAGGED, "input_grad", 100) == by_rule(RAGGED, "input_grad", 100)
    other = [{"dtype": "bfloat16", "precision": "ieee", "planes": 1, "target": TARGETS[name]} for name in ("sm_90", "sm_80")]
    assert [rule.padded("hidden", 100, 131, 67, **words) is None for words in other] == [False, True]


def test_weight_gradients_on_copies_are_told_by_their_widths(user: Any) -> None:
    """The number of rows, which they sum over, may be any."""
    user(*(row(spec, "weight_grad", {1: PADDED, 4096: PADDED}) for spec in (RAGGED, GATED)))
    for m in (100, 101):
        assert decided(RAGGED, "weight_grad", m) == PADDED and decided(GATED, "weight_grad", m) == by_rule(GATED, "weight_grad", m)
    assert decided(RAGGED, "weight_grad", 100, batch_invariant=True) == PADDED


def test_batch_invariant_takes_none_on_copies(user: Any) -> None:
    everywhere = {1: PADDED, 4096: PADDED}
    user(row(RAGGED, "hidden", everywhere), row(RAGGED, "output", everywhere), row(RAGGED, "hidden_grad", everywhere))
    for role, m in ((role, m) for role in ("hidden", "output", "hidden_grad") for m in (1, 192, 4096)):
        assert decided(RAGGED, role, m, batch_invariant=True) == by_rule(RAGGED, role, rule.INVARIANT_ROWS, ours=True)


def test_batch_invariant_never_takes_one(user: Any) -> None:
    user(row(GATED, "hidden", {1: SKINNY, 4096: SKINNY}))
    assert decided(GATED, "hidden", 8, batch_invariant=True).strategy == "two_stage"
