"""The file of `mlpdsl bench`: gone on with, refused, whole at every moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.bench import timing
from mlpdsl.bench.results import ResultError, Results, failed
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import Row
from tests.unit.test_bench import ONE, SPEC, Fake, ask


def rows_of(*ms: int) -> list[Row]:
    return [Row("one", SPEC, m) for m in ms]


def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    device, out, built = Fake(), tmp_path / "deep" / "bench.json", []
    events: list[str] = []

    def interrupted(event: str, row: Row, what: Any) -> None:
        events.append(f"{event} {row.m}")
        if (event, row.m) == ("begin", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(device, rows_of(1, 2, 3), out=out, tell=interrupted, command="first")
    assert events[0] == "begin 1" and "done 2" in events and "step 1" in events
    assert [row["m"] for row in json.loads(out.read_text())["rows"]] == [1, 2]

    def counting(spec: MLPSpec) -> Callable[..., Tensor]:
        built.append(spec)
        return mlpdsl.reference(spec)

    candidates = {"mlpdsl": device.candidate("mlpdsl", counting), "eager": device.candidate("eager")}
    results = ask(device, rows_of(1, 2, 3, 4), out=out, resume=True, candidates=candidates, command="second")
    assert len(built) == 2 and [row["m"] for row in results.data["rows"]] == [1, 2, 3, 4]
    assert json.loads(out.read_text()) == results.data == Results.load(out).data
    assert results.data["command"] == "first" and [r["command"] for r in results.data["resumed"]] == ["second"]
    assert results.data["ceilings"]["flop_per_s"] == {"float32 ieee": 1e14} and [p.name for p in out.parent.iterdir()] == [out.name]
    assert ask(Fake(), rows_of(9), out=tmp_path / "new.json", resume=True).data["rows"][0]["m"] == 9


def test_another_run_s_file_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    ask(Fake(), ONE, out=out)
    kept = out.read_bytes()

    def refused(said: str, device: Fake | None = None, **words: Any) -> None:
        with pytest.raises(ResultError, match=said):
            ask(device or Fake(), ONE, out=out, **{"resume": True, **words})
        assert out.read_bytes() == kept

    refused("--resume goes on with it", resume=False)
    another = Fake()
    another.name = "NVIDIA H100"
    refused("gpu.name is NVIDIA H200 there and NVIDIA H100 here.*Name another file with --out", another)
    newer = Fake()
    newer.versions = lambda: {**Fake().versions(), "torch": "9.9"}  # type: ignore[method-assign]
    refused("versions.torch is .* there and 9.9 here", newer)
    refused(
        "settings.launches is .'eager'. there and .'graph'. here", settings=Settings(regimes=("sustained",), launches=("graph",))
    )
    for text, said in (("{", "cannot be read"), ("[]", "no file of"), ('{"schema": 9}', "its schema is 9"),
                       ('{"schema": 1, "rows": 3}', "without gpu")):  # fmt: skip
        out.write_text(text)
        kept = out.read_bytes()
        refused(said)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bench.json"
    results = ask(Fake(), ONE, out=out)
    kept = out.read_bytes()

    def full(*arguments: Any, **words: Any) -> None:
        arguments[1].write('{"half')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(ResultError, match="No space left on device"):
        results.add({"key": "x"})
    assert out.read_bytes() == kept
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.save()
    assert out.read_bytes() == kept
    with pytest.raises(ResultError, match="cannot be written"):
        Results.begin({}, out / "below" / "a-file")


def test_the_time_is_up() -> None:
    device = Fake()
    device.us = lambda name, m, launch: 20e3
    results = ask(device, rows_of(*range(1, 9)), seconds=6.0)
    assert 1 < len(results.data["rows"]) < 8
    assert results.data["rows"][-1]["measured"][0]["times"]["mlpdsl"]["calls"] == 5
    device = Fake()
    device.us = lambda name, m, launch: 20.0
    few, many = (ask(device, ONE, seconds_a_row=s).data["rows"][0]["measured"][0]["times"]["eager"] for s in (0.1, 1.0))
    assert len(few["rounds_us"]) == 6 and len(many["rounds_us"]) == 24


def test_a_gpu_that_no_longer_answers_ends_the_run(tmp_path: Path) -> None:
    device, out = Fake(), tmp_path / "bench.json"

    def crashing(spec: MLPSpec) -> Callable[..., Tensor]:
        device.alive = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ResultError, match="no longer answers"):
        ask(device, rows_of(1, 2), out=out, candidates={"mlpdsl": crashing, "eager": device.candidate("eager")})
    (row,) = json.loads(out.read_text())["rows"]
    assert "illegal memory access" in str(failed(row))


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(timing, "summarised", wrong)
    with pytest.raises(ZeroDivisionError):
        ask(Fake(), ONE)
    device = Fake()
    device.alive = False
    with pytest.raises(ResultError):
        ask(device, ONE)
