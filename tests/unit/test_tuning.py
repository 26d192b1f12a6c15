"""`mlpdsl.tuning`: what is tried, what may win, what a run keeps, and what a crash or a hang costs."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpdsl import MLPSpec, UnsupportedError, bench, tables, tuning
from mlpdsl.codegen.plan import Config
from mlpdsl.tables import Point
from mlpdsl.target import TARGETS
from mlpdsl.tuning.children import Children
from mlpdsl.tuning.device import Facts, LostError, Times
from mlpdsl.tuning.job import Job
from mlpdsl.tuning.paired import FIRST, gained, paired
from mlpdsl.tuning.run import state_path
from mlpdsl.tuning.search import FINAL_ROUNDS, ROUNDS, search
from mlpdsl.tuning.state import write_whole
from tests.unit import tuning_questions as answers

H200 = TARGETS["sm_90"]
GATED = MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
PLAIN = MLPSpec(dims=(64, 128, 64), activation="relu", dtype="float32")
VERSIONS = {"torch": "2.13", "triton": "3.7"}
Times_of = Callable[[Job, Config], float]


class Fake:
    """A GPU of the mind: `us` says what a config takes, `compiles`, `times` and `checks` what becomes of it."""

    def __init__(self, us: Times_of | None = None, noise: float = 0.0) -> None:
        self.us: Times_of = us or (lambda job, config: 10.0)
        self.noise, self.draw, self.clock = noise, random.Random(0), 0.0
        self.compiles: Callable[[Config], str] = lambda config: ""
        self.times: Callable[[Config], None] = lambda config: None
        self.checks: Callable[[Config], str] = lambda config: ""
        self.described = {"gpu": "NVIDIA H200", "target": "sm_90", "versions": dict(VERSIONS)}
        self.timed: list[tuple[Config, int]] = []
        self.closed = False

    def now(self) -> float:
        return self.clock

    def describe(self) -> dict[str, Any]:
        return self.described

    def compile(self, job: Job, configs: Sequence[Config]) -> list[Facts]:
        return [Facts(self.compiles(config)) for config in configs]

    def time(self, job: Job, default: Config, candidate: Config, rounds: int, floor: float) -> Times:
        self.times(candidate)
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            self.clock += 0.01
            for values, config in zip(found, (default, candidate), strict=True):
                values.append(self.us(job, config) * (1 + self.noise * self.draw.uniform(-1, 1)))
            if len(found[0]) == FIRST and self.us(job, default) / self.us(job, candidate) < floor:
                break
        self.timed.append((candidate, len(found[0])))
        return Times(tuple(found[0]), tuple(found[1]))

    def check(self, job: Job, config: Config) -> str:
        return self.checks(config)

    def close(self) -> None:
        self.closed = True


def job(spec: MLPSpec = GATED, role: str = "hidden", rows: int = 16) -> Job:
    return next(j for j in tuning.jobs(bench.rows([spec], ms=[rows], passes=["train"]), H200) if j.product.role == role)


def quick(*fast: Config, by: float = 2.0) -> Times_of:
    return lambda job, config: 10.0 / by if config in fast else 10.0


def others(of: Job) -> list[Config]:
    return of.candidates()[1:]


def fates(result: dict[str, Any]) -> dict[Config, str]:
    return {Config(**entry["config"]): entry["fate"] for entry in result["tried"]}


def found(device: Fake, of: Job) -> dict[str, Any]:
    result = search(device, of, float("inf"))
    assert result is not None
    json.dumps(result, allow_nan=False)
    return result


def test_jobs_are_products_each_once() -> None:
    rows = bench.rows([GATED, replace(GATED, activation="gelu"), PLAIN], ms=[1, 16], passes=["forward", "train"])
    jobs = tuning.jobs(rows, H200)
    assert len({j.key for j in jobs}) == len(jobs) == 24
    assert {j.name for j in jobs} == {GATED.short_name, PLAIN.short_name}  # gelu's products are silu's
    assert [(j.product.role, j.m, j.n, j.k) for j in jobs[:2]] == [("hidden", 1, 192, 64), ("output", 1, 64, 192)]
    grads = [j for j in jobs if j.product.role == "weight_grad" and j.rows == 16 and j.spec == GATED]
    assert sorted((j.stage, j.m, j.n, j.k, j.product.n, j.product.k) for j in grads) == [(0, 192, 64, 16, 192, 64), (1, 64, 192, 16, 64, 192)]  # fmt: skip  # noqa: E501
    assert not any(j.train for j in tuning.jobs(bench.rows([GATED], ms=[1]), H200))
    narrow = MLPSpec(dims=(64, 64, 64), activation="relu", dtype="bfloat16")  # one launch, forward
    assert not tuning.jobs(bench.rows([narrow], ms=[1, 4096]), H200)
    assert all(j.train for j in tuning.jobs(bench.rows([narrow], ms=[16], passes=["train"]), H200))


def test_the_fastest_wins() -> None:
    at = job()
    first, second = others(at)[2:4]
    device = Fake(lambda j, c: {first: 8.0, second: 5.0}.get(c, 10.0))
    result = found(device, at)
    assert result["point"] == {"m": 16, "config": second.to_dict(), "us": 5.0, "default_us": 10.0}
    assert fates(result)[second] == "won" and fates(result)[first] == "timed" and len(result["tried"]) == len(others(at))
    assert result["failed"] == "" and result["default"] == at.candidates()[0].to_dict()


@pytest.mark.parametrize("noise", [0.005, 0.05, 0.3])
def test_noise_is_no_gain(noise: float) -> None:
    result = found(Fake(noise=noise), job())
    assert result["point"]["config"] is None and result["point"]["us"] == result["point"]["default_us"] == result["default_us"]


def test_a_gain_below_the_noise_is_none_and_one_above_it_stands() -> None:
    at = job()
    fast = others(at)[3]
    for by, stands in ((1.01, False), (1.019, False), (1.05, True)):
        assert (found(Fake(quick(fast, by=by)), at)["point"]["config"] is not None) == stands
        assert (found(Fake(quick(fast, by=by), noise=0.002), at)["point"]["config"] is not None) == stands


def test_what_only_looked_fast_does_not_win() -> None:
    at = job()
    lucky, steady = others(at)[2:4]
    device = Fake(quick(steady, by=1.2))

    def us(of: Job, config: Config) -> float:
        again = sum(config == timed for timed, _ in device.timed)
        return 5.0 if config == lucky and not again else quick(steady, by=1.2)(of, config)

    device.us = us
    result = found(device, at)
    assert fates(result)[lucky] == "no gain when timed again" and result["point"]["config"] == steady.to_dict()


def test_slow_candidates_are_pruned_against_the_best_so_far() -> None:
    at = job()
    first, last = others(at)[0], others(at)[-1]
    device = Fake(lambda j, c: {first: 5.0, last: 6.0}.get(c, 10.0))
    result = found(device, at)
    rounds = dict(reversed(device.timed))
    assert rounds[first] == ROUNDS and rounds[last] == ROUNDS and device.timed[-1] == (first, FINAL_ROUNDS)
    assert {rounds[c] for c in others(at)[1:-1]} == {FIRST} and set(fates(result).values()) == {"won", "pruned", "timed"}


def test_what_spills_crashes_or_hangs_is_left_out() -> None:
    at = job()
    a, b, c, d = others(at)[:4]
    device = Fake(quick(a, b, c, d, by=3.0))
    device.compiles = lambda config: {a: "spills 8 bytes", b: "compiling: ChildError: was ended by SIGABRT"}.get(config, "")

    def times(config: Config) -> None:
        if config == c:
            raise LostError("time: ChildError: no answer in time")

    device.times = times
    result = found(device, at)
    assert result["point"]["config"] == d.to_dict()
    assert [fates(result)[x] for x in (a, b, c)] == [
        "spills 8 bytes", "compiling: ChildError: was ended by SIGABRT", "time: ChildError: no answer in time",
    ]  # fmt: skip
    assert not {a, b} & {config for config, _ in device.timed}


def test_wrong_results_do_not_win() -> None:
    at = job()
    best, next_best, third, fourth = others(at)[:4]
    device = Fake(lambda j, c: {best: 4.0, next_best: 5.0, third: 5.1, fourth: 5.2}.get(c, 10.0))

    def checks(config: Config) -> str:
        if config == next_best:
            raise LostError("check: it crashed")
        return "wrong: OracleError" if config == best else ""

    device.checks = checks
    result = found(device, at)
    assert result["point"]["config"] == third.to_dict()
    assert fates(result)[best] == "wrong: OracleError" and fates(result)[next_best] == "check: it crashed"
    device.checks = lambda config: "wrong"
    result = found(device, at)
    assert result["point"]["config"] is None and list(fates(result).values()).count("wrong") == 3


def test_nothing_could_be_timed() -> None:
    device = Fake()

    def times(config: Config) -> None:
        raise LostError("time: no memory")

    device.times = times
    result = found(device, job())
    assert result["point"] is None and result["default_us"] is None and result["failed"] == "time: no memory"
    device.compiles = lambda config: "spills 8 bytes"
    result = found(device, job())
    assert result["point"] is None and result["failed"] == ""


def rows(*ms: int) -> list[bench.Row]:
    return bench.rows([GATED], ms=ms or (1, 16))


def by_stages(of: Job, config: Config) -> float:
    return 5.0 if config.num_stages == 6 else 10.0


def test_a_run_writes_table_and_state(tmp_path: Path) -> None:
    out = tmp_path / "tables" / "sm_90.json"
    told: list[tuple[str, int]] = []
    device = Fake(by_stages)
    result = tuning.run(rows(), out=out, device=device, tell=lambda event, job, at, found: told.append((event, at)))
    assert told == [(event, at) for at in range(4) for event in ("begin", "done")] and result.left == 0 and not device.closed
    target, table = tables.read(out.read_text())
    assert target == "sm_90" and table == result.rows
    assert [(r.product.role, r.gpu, r.versions, [p.m for p in r.points]) for r in table] == [
        (role, "NVIDIA H200", VERSIONS, [1, 16]) for role in ("hidden", "output")
    ]
    assert all(p.config is not None and (p.us, p.default_us) == (5.0, 10.0) for r in table for p in r.points)
    state = json.loads(state_path(out).read_text())
    assert len(state["jobs"]) == 4 and all(len(j["tried"]) > 5 for j in state["jobs"].values())
    timed = [entry for j in state["jobs"].values() for entry in j["tried"] if "us" in entry]
    assert {entry["us"] for entry in timed} == {5.0, 10.0}
    assert sorted(path.name for path in out.parent.iterdir()) == ["sm_90.json", "sm_90.state.json"]


def test_without_gains_the_table_is_empty(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    result = tuning.run(rows(), out=out, device=Fake())
    assert tables.read(out.read_text()) == ("sm_90", []) and len(result.rows) == 2
    assert tuning.run(rows(), device=Fake()).state.path is None


def test_the_budget_ends_a_run_and_resume_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    device = Fake(by_stages)
    first = tuning.run(rows(1, 16, 64, 256), out=out, device=device, budget=1.0)
    assert 0 < first.left < 8 and device.clock < 2.5
    done = json.loads(state_path(out).read_text())["jobs"]
    assert len(done) == 8 - first.left
    with pytest.raises(tuning.StateError, match="is there already: --resume goes on"):
        tuning.run(rows(1), out=out, device=device)
    began: list[str] = []
    again = Fake(by_stages)
    second = tuning.run(
        rows(1, 16, 64, 256), out=out, device=again, resume=True, tell=lambda e, job, at, f: began.append(job.key) if f else None
    )
    assert second.left == 0 and len(began) == first.left and not set(began) & set(done)
    state = json.loads(state_path(out).read_text())["jobs"]
    assert {key: state[key] for key in done} == done and len(state) == 8
    whole = tuning.run(rows(1, 16, 64, 256), device=Fake(by_stages))
    assert [r.points for r in whole.rows] == [r.points for r in second.rows]


def test_interrupted_in_the_midst(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    device = Fake(by_stages)

    def times(config: Config) -> None:
        if len(device.timed) == 40:
            raise KeyboardInterrupt

    device.times = times
    with pytest.raises(KeyboardInterrupt):
        tuning.run(rows(1, 16, 64, 256), out=out, device=device)
    before = len(json.loads(state_path(out).read_text())["jobs"])
    assert 0 < before < 8 and tables.read(out.read_text())[1]
    device.times = lambda config: None
    assert tuning.run(rows(1, 16, 64, 256), out=out, device=device, resume=True).left == 0


def test_two_runs_of_one_table(tmp_path: Path) -> None:
    """The second one is told so before it writes anything, and the first one's files are whole; afterwards the place is free."""
    out = tmp_path / "t.json"
    said: list[str] = []

    def tell(event: str, *_: Any) -> None:
        if event == "done" and not said:
            with pytest.raises(tuning.StateError) as caught:
                tuning.run(rows(1), out=out, device=Fake(by_stages), resume=True)
            said.append(str(caught.value))
            tuning.run(rows(1), out=tmp_path / "other.json", device=Fake(by_stages))

    first = tuning.run(rows(1, 16), out=out, device=Fake(by_stages), tell=tell)
    assert said == [f"another mlpdsl tune is at work on {state_path(out)}: wait for it, or name another table with --out"]
    assert first.left == 0 and len(json.loads(state_path(out).read_text())["jobs"]) == len(first.jobs)
    assert tables.read(out.read_text())[1]
    assert tuning.run(rows(1, 16), out=out, device=Fake(by_stages), resume=True).left == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "other.state.json", "t.json", "t.state.json"]


def test_a_file_is_written_beside_another_process_that_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "t.json", os.replace

    def after_another(source: Any, target: Any) -> None:
        monkeypatch.undo()
        write_whole(path, "another's\n")
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another)
    write_whole(path, "ours\n")
    assert path.read_text() == "ours\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "value"), [("gpu", "NVIDIA GH200"), ("versions", {"torch": "2.14"})]
)  # fmt: skip
def test_another_gpu_or_version_is_another_run(name: str, value: Any, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    tuning.run(rows(1), out=out, device=Fake())
    device = Fake()
    device.described[name] = value
    with pytest.raises(tuning.StateError, match=f"is of another run, and stays as it is: {name} is .* there and .* here"):
        tuning.run(rows(1), out=out, device=device, resume=True)


def test_a_table_that_is_there_is_merged_or_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    tuning.run(rows(1, 4096), out=out, device=Fake(by_stages))
    state_path(out).unlink()
    slower = Fake(lambda job, config: 6.0 if config.num_stages == 5 else 10.0)
    tuning.run(rows(1, 16), out=out, device=slower)
    for row in tables.read(out.read_text())[1]:
        assert {p.m: p.us for p in row.points if p.config} == {1: 5.0, 16: 6.0} | ({4096: 5.0} if row.points[-1].config else {})
    for text in ("{", tables.write("sm_80", [])):
        state_path(out).unlink(missing_ok=True)
        out.write_text(text)
        with pytest.raises(tuning.StateError):
            tuning.run(rows(1), out=out, device=slower)
        assert out.read_text() == text


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "jobs": 3}'])
def test_a_state_that_is_none_is_left_alone(text: str, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    state_path(out).write_text(text)
    with pytest.raises(tuning.StateError, match=r"t\.state\.json"):
        tuning.run(rows(1), out=out, device=Fake(), resume=True)
    assert state_path(out).read_text() == text


class Clockwork:
    """A timer whose calls take what they say, in us."""

    def __init__(self, factor: Callable[[int], float] = lambda at: 1.0) -> None:
        self.order: list[str] = []
        self.factor = factor

    def now(self) -> float:
        return 0.0

    def pause(self, seconds: float) -> None: ...

    def stretch(self, call: Any, count: int) -> float:
        name, us = call()
        self.order.append(name)
        return float(us * self.factor(len(self.order)))

    def host(self, call: Any, count: int) -> float:
        return 0.0

    def clocks(self) -> dict[str, float] | None:
        return None


def test_pairs_take_turns_in_both_orders() -> None:
    timer = Clockwork()
    times = paired(timer, lambda: ("d", 80.0), lambda: ("c", 40.0), 4, 0.9, 8)
    assert times == Times((10.0,) * 4, (5.0,) * 4) and times.gains == [2.0] * 4
    assert "".join(timer.order[2:]) == "dccddccd"
    slow = paired(Clockwork(), lambda: ("d", 80.0), lambda: ("c", 120.0), 6, 0.9, 8)
    assert len(slow.candidate) == len(slow.default) == FIRST


def test_a_drift_of_the_clocks_is_no_gain() -> None:
    times = paired(Clockwork(lambda at: 1.0 + at / 40), lambda: ("d", 80.0), lambda: ("c", 80.0), 16, 0.0, 1)
    assert not gained(times)
    assert gained(paired(Clockwork(lambda at: 1.0 + at / 40), lambda: ("d", 80.0), lambda: ("c", 60.0), 16, 0.0, 1))


def test_children_that_crash_or_hang_cost_one_candidate() -> None:
    at = job()
    base = Config(64, 64, 64)
    fine, spills = replace(base, num_stages=2), replace(base, num_stages=answers.SPILLS)
    aborts, hangs, raises = (replace(base, num_stages=n) for n in (answers.ABORTS, answers.HANGS, answers.RAISES))
    device = Children(2, compile_limit=15.0, time_limit=15.0, check_limit=15.0, module="tests.unit.tuning_questions")
    try:
        assert device.describe() == {"gpu": "NVIDIA H200", "target": "sm_90", "versions": {"torch": "2.13"}}
        began = time.monotonic()
        reasons = [f.reason for f in device.compile(at, [fine, aborts, spills, hangs, raises, fine, fine])]
        assert time.monotonic() - began < 60
        assert [reasons[i] for i in (0, 2, 5, 6)] == ["", "spills 8 bytes", "", ""]
        assert "SIGABRT" in reasons[1] and "no answer in time" in reasons[3]
        assert reasons[4].startswith("compiling: ") and "CUDA error" in reasons[4] and "\n" not in reasons[4]
        assert device.compile(at, [replace(base, strategy="library", num_stages=answers.ABORTS)]) == [Facts()]
        for config, words in ((aborts, "SIGABRT"), (spills, "time: OutOfMemoryError: too large"), (raises, "illegal memory")):
            with pytest.raises(LostError, match=words):
                device.time(at, base, config, 3, 0.5)
            assert device.time(at, base, fine, 3, 0.5) == Times((2.0,) * 3, (1.0,) * 3)
        assert device.check(at, fine) == "" and device.check(at, spills) == "wrong: by far"
        with pytest.raises(LostError, match="SIGABRT"):
            device.check(at, aborts)
    finally:
        device.close()


def test_real_children_compile_and_say_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    at = job()
    device = Children(1)
    try:
        with pytest.raises(UnsupportedError, match="tune times kernels on a GPU, and torch sees none here"):
            device.describe()
        found = device.compile(at, [Config(64, 64, 64), Config(128, 128, 64, num_stages=9)])
    finally:
        device.close()
    assert found[0] == Facts()
    assert "takes 475208 bytes of shared memory, spills " in found[1].reason and "wgmma is serialised" in found[1].reason


def test_points_are_as_tables_read_them() -> None:
    of = job()
    device = Fake(quick(others(of)[3], by=1.0200001))
    assert found(device, of)["point"]["config"] is not None
    run = tuning.run(rows(16), device=device)
    assert tables.read(tables.write("sm_90", run.rows))[1] == [r for r in run.rows if any(p.config for p in r.points)]
    assert isinstance(run.rows[0].points[0], Point)
