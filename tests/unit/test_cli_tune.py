"""`mlpdsl tune`: what it prints and keeps, its exit statuses, and what it says of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("click")

from mlpdsl import MLPSpec, UnsupportedError, cli, cli_tune, tables
from mlpdsl.codegen.plan import Config
from mlpdsl.tuning.device import LostError
from tests.unit.test_tuning import Fake, by_stages

SPEC = MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
JSON = SPEC.to_json()
OUT = Path("mlpdsl-tables/sm_90.json")
Tune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    device = Fake(by_stages)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_tune, "_device", lambda compilers: device)
    return device


@pytest.fixture
def run(device: Fake, capsys: pytest.CaptureFixture[str]) -> Tune:
    """Runs the command: exit status, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["tune", *args])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_a_run(run: Tune, device: Fake) -> None:
    device.us = lambda job, config: 5.0 if config.num_stages == 6 and job.product.role == "hidden" else 10.0
    status, out, err = run(JSON, "--m", "1,16", "--passes", "forward")
    assert status == 0 and device.closed, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["product", "M", "default", "µs", "best", "µs", "gain", "config"]
    assert lines[1][:7] == ["hidden", "1x192x64", "bfloat16", "gated", "1", "10.00", "5.00"] and lines[1][7] == "2.00x"
    assert lines[2] == ["output", "1x64x192", "bfloat16", "1", "10.00", "10.00", "-", "the", "default"]
    assert out.splitlines()[-1] == "2 of 4 products gained on NVIDIA H200"
    assert err.count("hidden[0]") == 2 and "10.00 µs to 5.00 µs, 2.00x: " in err and "MLPDSL_TABLES=mlpdsl-tables/sm_90.json" in err
    target, rows = tables.read(OUT.read_text())
    assert target == "sm_90" and [(r.product.role, [p.m for p in r.points]) for r in rows] == [("hidden", [1, 16])]


def test_all_products_by_default_and_suites(run: Tune) -> None:
    status, out, _ = run(JSON, "--m", "1", "--out", "a.json")
    roles = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert status == 0 and roles == ["hidden", "output", "hidden_grad", "weight_grad", "weight_grad", "input_grad"]
    assert run("small", "--m", "2", "--out", "b.json", "--passes", "forward")[0] == 0
    assert Path("b.json").exists() and Path("b.state.json").exists()


def test_the_budget_and_resume(run: Tune, device: Fake) -> None:
    status, out, err = run(JSON, "--m", "1,16", "--budget", "2")
    assert (
        status == 0 and "the time is up: " in err and "of 12 products are left, and the same command with --resume goes on" in err
    )
    status, _, err = run(JSON, "--m", "1,16")
    assert status == 2 and "sm_90.state.json is there already: --resume goes on with it; --out names another table" in err
    status, whole, err = run(JSON, "--m", "1,16", "--resume")
    assert status == 0 and "time is up" not in err and whole.startswith(out.split("\n")[0].rstrip()[:7])
    assert len(whole.splitlines()) == 14


def test_ctrl_c(run: Tune, device: Fake) -> None:
    def interrupted(config: Config) -> None:
        if len(device.timed) == 60:
            raise KeyboardInterrupt

    device.times = interrupted
    status, out, err = run(JSON, "--m", "1,16")
    assert status == 130 and out == "" and "the same command with --resume goes on" in err and device.closed
    assert 0 < len(json.loads(OUT.with_name("sm_90.state.json").read_text())["jobs"]) < 12


def test_what_cannot_be_timed_is_exit_status_1(run: Tune, device: Fake) -> None:
    def lost(config: Config) -> None:
        raise LostError("time: OutOfMemoryError: too large")

    device.times = lost
    status, out, err = run(JSON, "--m", "1", "--passes", "forward")
    assert status == 1 and out.count("could not be timed") == 2 and err.count("too large") == 2


def test_without_a_gpu_nothing_runs(run: Tune, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe() -> dict[str, object]:
        raise UnsupportedError("tune times kernels on a GPU, and torch sees none here")

    monkeypatch.setattr(device, "describe", describe)
    assert run(JSON) == (3, "", "mlpdsl: tune times kernels on a GPU, and torch sees none here\n")
    assert device.closed and not OUT.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument"),
        (("smal",), "'small'"),
        (("small", "--m", "0"), "0 is not in the range"),
        (("small", "--passes", "backward"), "backward"),
        (("small", "--budget", "0"), "--budget"),
        (("small", "--compilers", "0"), "--compilers"),
        (("no/file.json",), "no/file.json"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str, run: Tune, device: Fake) -> None:
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and words in err and not device.timed


def test_a_table_of_another_target_is_left_alone(run: Tune) -> None:
    OUT.parent.mkdir()
    OUT.write_text(tables.write("sm_80", []))
    status, _, err = run(JSON, "--m", "1")
    assert status == 2 and "is a table of sm_80, and this GPU is sm_90" in err and tables.read(OUT.read_text())[0] == "sm_80"


def test_the_cells_of_configs() -> None:
    def cell(**fields: object) -> str:
        config = Config(**{"block_m": 64, "block_n": 128, "block_k": 64, **fields})  # type: ignore[arg-type]
        point = {"m": 1, "config": config.to_dict(), "us": 5.0, "default_us": 10.0}
        return cli_tune._cells({"point": point, "failed": ""})[3]

    assert cell() == "64x128x64, 4 warps, 3 stages" and cell(strategy="library") == "library"
    assert cell(splits=4, residency=2) == "64x128x64, 4 warps, 3 stages, splits 4, residency 2"


def test_one_launch_has_nothing_to_tune(run: Tune) -> None:
    narrow = MLPSpec(dims=(64, 64, 64), activation="relu", dtype="bfloat16").to_json()
    status, out, _ = run(narrow, "--passes", "forward")
    assert status == 0 and out == "nothing to tune: all linears are one launch, whose tiles are the rule's\n"
