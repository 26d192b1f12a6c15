"""`mlpdsl.bench`: the order of its stretches, what it makes of the times, what it keeps. A clock of ours stands in for a GPU."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, UnsupportedError, bench
from mlpdsl.bench import measure, peers, timing
from mlpdsl.bench.results import ResultError, Results, failed
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import Row
from mlpdsl.bench.timer import Call

SPEC = MLPSpec(dims=(8, 16, 8), activation="silu", gated=True, bias=True)
OTHER = MLPSpec(dims=(12, 8), activation="identity", epilogue=("residual",), dtype="bfloat16")


class Fake:
    """A GPU whose time is a rule: µs of a call by candidate, number of rows and launch mode. Tensors lie on the CPU."""

    name = "NVIDIA H200"
    torch_device = "cpu"
    l2_bytes = 0

    def __init__(self) -> None:
        self.us: Callable[[str, int, str], float] = lambda name, m, launch: 50.0
        self.time = 0.0
        self.free = 2**40
        self.log: list[str] = []
        self.counts: list[tuple[str, int]] = []
        self.last = ("", 0, "eager")
        self.made = 0
        self.alive = True
        self.sampled: dict[str, float] | None = {"sm_mhz": 1500.0, "memory_mhz": 3200.0, "power_w": 650.0, "temperature_c": 60.0}

    def candidate(self, name: str, function: Callable[[MLPSpec], Callable[..., Tensor]] = mlpdsl.reference) -> peers.Factory:
        def factory(spec: MLPSpec) -> Callable[..., Tensor]:
            made = function(spec)

            def run(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
                self.last = (name, x.shape[0], "eager")
                self.made += 1
                return made(x, *params, **operands)

            return run

        return factory

    def candidates(self, *names: str) -> dict[str, peers.Factory]:
        return {name: self.candidate(name) for name in names}

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds
        self.log.append("pause")

    def stretch(self, call: Call, count: int) -> float:
        self.last, self.made = ("something", 0, "eager"), 0
        call()
        us = self.us(*self.last) * max(1, self.made)
        self.time += us * count / 1e6
        self.log.append(self.last[0])
        self.counts.append((self.last[0], count))
        return us

    def host(self, call: Call, count: int) -> float:
        call()
        self.counts.append((f"host {self.last[0]}", count))
        return 30.0 if self.last[0] == "mlpdsl" else 10.0

    def clocks(self) -> dict[str, float] | None:
        return self.sampled

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "l2_bytes": self.l2_bytes}

    def versions(self) -> dict[str, str | None]:
        return {"mlpdsl": "1", "torch": torch.__version__, "liger-kernel": None}

    def free_bytes(self) -> int:
        return self.free

    def clear(self) -> None: ...

    def check(self) -> None:
        if not self.alive:
            raise ResultError("the GPU no longer answers")

    def capture(self, call: Call) -> tuple[Call, Any]:
        self.made = 0
        result = call()
        (name, m, _), made = self.last, self.made

        def replay() -> None:
            self.last = (name, m, "graph")
            self.made += made

        return replay, result

    def bandwidth(self) -> float:
        return 1e12

    def product(self, numbers: str) -> float:
        return 1e14


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads of torch that wait for one another take most of the time where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ask(device: Fake, rows: list[Row], *names: str, **words: Any) -> Results:
    """Run with the named candidates, all of them computing the right thing."""
    candidates = words.pop("candidates", None) or device.candidates(*(names or ("mlpdsl", "eager")))
    settings = words.pop("settings", Settings(regimes=("sustained",), launches=("eager",)))
    with one_thread():
        return bench.run(rows, device=device, candidates=candidates, settings=settings, **words)


def the_row(results: Results) -> dict[str, Any]:
    (row,) = results.data["rows"]
    found: dict[str, Any] = row
    return found


ONE = [Row("one", SPEC, 4)]


# The order of stretches


def stretches(device: Fake, regime: str, us: dict[str, float], seconds: float) -> measure.Times:
    """One measurement of candidates that take so many µs."""

    def call(name: str) -> Call:
        def run() -> None:
            device.last = (name, 0, "eager")

        return run

    device.us = lambda name, m, launch: us[name]
    timed = getattr(measure, regime)(device, {name: call(name) for name in us}, seconds, lambda text: None)
    assert isinstance(timed, measure.Times)
    return timed


def test_both_orders_take_turns() -> None:
    device = Fake()
    times = stretches(device, "sustained", {"a": 50.0, "b": 60.0, "c": 80.0}, 0.5)
    order = [name for name in device.log if name != "pause"]
    assert order[:6] == ["a", "a", "b", "b", "c", "c"]  # estimates
    assert order[6:9] == ["a", "b", "c"]  # small rows are heated for a round, which is not counted
    rounds = ["".join(order[i : i + 3]) for i in range(9, len(order), 3)]
    assert rounds == ["abc", "cba"] * (len(rounds) // 2) and len(rounds) == len(times.rounds["a"]) == 8
    assert times.calls == {"a": 400, "b": 334, "c": 250}  # 20 ms each
    assert times.rounds == {"a": [50.0] * 8, "b": [60.0] * 8, "c": [80.0] * 8}


def test_large_rows_run_longer_and_are_heated() -> None:
    device = Fake()
    times = stretches(device, "sustained", {"a": 400.0, "b": 200.0}, 0.1)
    assert times.calls == {"a": 250, "b": 500} and len(times.rounds["a"]) == 6  # the least number of rounds, whatever the time
    counted = [pair for pair in device.counts if pair[1] >= 100]
    assert len(counted) == 2 * (6 + math.ceil(measure.HEAT / 0.2))
    assert len(stretches(Fake(), "sustained", {"a": 400.0, "b": 200.0}, 1e6).rounds["a"]) == 40
    assert stretches(Fake(), "sustained", {"a": 90e3, "b": 500.0}, 1.0).calls["a"] == 5
    # A row is as large as its fastest candidate.
    assert stretches(Fake(), "sustained", {"a": 400.0, "b": 20.0}, 1.0).calls == {"a": 50, "b": 1000}


def test_bursts_are_short_and_rested() -> None:
    device = Fake()
    times = stretches(device, "burst", {"a": 400.0, "b": 2000.0}, 0.0)
    assert times.calls == {"a": 8, "b": 3} and len(times.rounds["b"]) == 4
    assert device.log[-16:] == ["pause", "a", "pause", "b", "pause", "b", "pause", "a"] * 2


def test_what_raises_is_dropped_and_the_others_go_on() -> None:
    device, ran = Fake(), []

    def bad() -> None:
        ran.append(1)
        if len(ran) == 6:
            raise RuntimeError("CUDA error: something\nmore")

    times = measure.sustained(device, {"good": lambda: None, "bad": bad}, 1.0, lambda text: None)
    assert list(times.rounds) == ["good"] and times.failed == {"bad": "RuntimeError: CUDA error: something"}
    assert len(times.rounds["good"]) >= 6
    nothing = measure.sustained(device, {"bad": lambda: 1 / 0}, 1.0, lambda text: None)  # type: ignore[dict-item]
    assert nothing.rounds == {} and nothing.failed == {"bad": "ZeroDivisionError: division by zero"}
    assert measure.summarised(nothing, 0)["ratio"] is None


def test_no_collection_of_garbage_while_the_clock_runs() -> None:
    device, seen = Fake(), set()
    assert gc.isenabled()
    measure.sustained(device, {"a": lambda: seen.add(gc.isenabled())}, 0.0, lambda text: None)
    assert False in seen and gc.isenabled()
    seen.clear()
    measure.host_us(device, lambda: seen.add(gc.isenabled()), 1)
    assert seen == {True, False}  # the estimate before, the batches


def test_host_batches_hold_few_kernels() -> None:
    for us, launches, count in ((10.0, 3, 100), (10.0, 100, 8), (2000.0, 1, 10), (1e6, 1, 5), (10.0, 10**6, 5)):
        device = Fake()
        device.us = lambda name, m, launch, us=us: us  # type: ignore[misc]
        assert measure.host_us(device, lambda: None, launches) == 10.0
        assert [c for name, c in device.counts if name.startswith("host")] == [count] * measure.HOST_BATCHES


# A row


def test_what_a_row_holds() -> None:
    device = Fake()
    drift = iter(range(10**6))
    base = {"mlpdsl": 40.0, "eager": 60.0, "compile": 50.0, "liger": 45.0, "something": 5.0}
    device.us = lambda name, m, launch: base[name] * (1 + 0.001 * (next(drift) % 7)) / (2 if launch == "graph" else 1)
    settings = Settings(launches=("eager", "graph"))
    row = the_row(ask(device, ONE, "mlpdsl", "eager", "compile", "liger", settings=settings))
    assert [(p["launch"], p["cache"], p["regime"]) for p in row["measured"]] == [
        ("eager", "hot", "sustained"), ("graph", "hot", "sustained")
    ]  # fmt: skip
    for part, fastest in zip(row["measured"], (50.0, 25.0), strict=True):
        assert part["best_of_torch"] == "compile"  # liger is faster, and is not torch's
        assert part["ratio"] == pytest.approx(1.25, rel=0.01) and part["interval"][0] <= part["ratio"] <= part["interval"][1]
        each = part["times"]["compile"]
        assert each["median_us"] == pytest.approx(fastest, rel=0.01) and len(each["rounds_us"]) >= 6
        assert each["median_us"] == pytest.approx(statistics.median(each["rounds_us"]), abs=1e-3)
        assert each["quartiles_us"][0] <= each["median_us"] <= each["quartiles_us"][1]
        assert part["clocks"] == device.sampled
    assert row["candidates"]["mlpdsl"]["host_us"] == 30.0 and row["candidates"]["mlpdsl"]["host_in_linears"] == 3.0
    assert row["host_linear_us"] == 10.0 and row["yardstick"] == "eager"
    assert row["candidates"]["mlpdsl"]["difference"] == 0.0 and row["floor_by"] == "memory"
    assert MLPSpec.from_json(json.dumps(row["spec"])) == SPEC and failed(row) is None
    json.dumps(row, allow_nan=False)


def test_bursts_are_for_rows_that_a_power_limit_slows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Fake()
    device.us, device.sampled = lambda name, m, launch: 300.0, None
    settings = Settings(launches=("graph",))
    assert [p["regime"] for p in the_row(ask(device, ONE, settings=settings))["measured"]] == ["sustained"]  # it waits for the host
    monkeypatch.setattr(timing, "BURST_FLOOR_US", 1e-6)
    device.l2_bytes = 10_000
    parts = the_row(ask(device, ONE, settings=settings))["measured"]
    assert [(p["cache"], p["regime"]) for p in parts] == [("hot", "sustained"), ("hot", "burst"), ("cold", "sustained")]
    assert all(p["clocks"] is None and p["ratio"] == 1.0 for p in parts)
    (part,) = the_row(ask(device, ONE, settings=Settings(launches=("graph",), regimes=("burst",))))["measured"]
    assert part["regime"] == "burst"


@pytest.mark.parametrize("passes", ["forward", "train"])
@pytest.mark.parametrize("spec", [SPEC, OTHER, MLPSpec(dims=(5, 7, 6, 3), activation="tanh", epilogue=("layer_scale", "scale"))])
def test_a_cold_row_goes_round_its_copies(spec: MLPSpec, passes: str) -> None:
    device = Fake()
    inputs = sum(t.numel() * t.element_size() for t in peers.make_tensors(Row("x", spec, 4, passes), "cpu", 0).inputs)
    device.l2_bytes = 10 * inputs
    used: dict[int, float] = {}

    def watched(spec: MLPSpec) -> Callable[..., Tensor]:
        made = mlpdsl.reference(spec)

        def run(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
            used[x.data_ptr()] = float(x.detach().sum())
            device.last = ("mlpdsl", 4, "eager")
            device.made += 1
            return made(x, *params, **operands)

        return run

    candidates = {"mlpdsl": watched, "eager": device.candidate("eager")}
    settings = Settings(launches=("eager", "graph"))
    row = the_row(ask(device, [Row("x", spec, 4, passes)], candidates=candidates, settings=settings))
    assert [(p["launch"], p["cache"]) for p in row["measured"]] == [
        ("eager", "hot"), ("eager", "cold"), ("graph", "hot"), ("graph", "cold")
    ]  # fmt: skip
    assert not any("failed" in p for p in row["measured"])
    assert all(each["median_us"] == 50.0 for p in row["measured"] for each in p["times"].values()), "of a call, not of a round"
    for part in row["measured"]:
        of_a_round = len(used) if part["cache"] == "cold" else 1
        assert all(each["calls"] % of_a_round == 0 for each in part["times"].values())
    assert (
        len(used) == len(set(used.values())) == math.ceil(timing.COLD * 10) + 1
    )  # between two uses of one, 2.5 times the L2 of others


def test_what_is_too_small_or_too_large_to_be_cold() -> None:
    device = Fake()
    device.l2_bytes = 60 * 2**20
    row = the_row(ask(device, ONE))
    assert [p["cache"] for p in row["measured"]] == ["hot"] and "copies would be needed" in row["not_cold"]
    device.l2_bytes = 100
    row = the_row(ask(device, ONE))
    assert [p["cache"] for p in row["measured"]] == ["hot"] and "not_cold" not in row


def test_a_row_that_does_not_fit_is_left_out() -> None:
    device = Fake()
    device.free = 100
    row = the_row(ask(device, ONE))
    assert "GiB are free" in row["skipped"] and row["measured"] == [] and failed(row) is None

    def no_memory(spec: MLPSpec) -> Callable[..., Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    device.free = 2**40
    row = the_row(ask(device, ONE, candidates={"mlpdsl": device.candidate("mlpdsl"), "eager": no_memory}))
    assert row["candidates"]["eager"] == {"failed": "OutOfMemoryError: CUDA out of memory. Tried"}
    assert list(row["measured"][0]["times"]) == ["mlpdsl"] and row["measured"][0]["ratio"] is None
    assert row["yardstick"] == "mlpdsl"


def twice(spec: MLPSpec) -> Callable[..., Tensor]:
    made = mlpdsl.reference(spec)
    return lambda *tensors, **operands: 2 * made(*tensors, **operands)


def nan(spec: MLPSpec) -> Callable[..., Tensor]:
    made = mlpdsl.reference(spec)
    return lambda *tensors, **operands: made(*tensors, **operands) * float("nan")


@pytest.mark.parametrize("passes", ["forward", "train"])
def test_a_candidate_that_computes_something_else_is_not_timed(passes: str) -> None:
    device = Fake()
    candidates = {**device.candidates("mlpdsl", "eager"), "compile": device.candidate("compile", twice)}
    candidates["liger"] = device.candidate("liger", nan)
    row = the_row(ask(device, [Row("one", SPEC, 4, passes)], candidates=candidates))
    assert list(row["measured"][0]["times"]) == ["eager", "mlpdsl"] and failed(row) is None
    assert (
        row["candidates"]["compile"]["difference"] == 1.0
        and "differs from that of eager by 1 " in row["candidates"]["compile"]["failed"]
    )
    assert row["candidates"]["liger"]["difference"] is None and "by inf" in row["candidates"]["liger"]["failed"]
    wrong = {"mlpdsl": device.candidate("mlpdsl", twice), "eager": device.candidate("eager")}
    assert "differs from that of eager" in str(failed(the_row(ask(device, ONE, candidates=wrong))))


def test_a_graph_that_replays_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Fake()
    right = device.capture

    def wrong(call: Call) -> tuple[Call, Any]:
        replay, result = right(call)
        return replay, torch.zeros_like(result) if device.last[0] == "mlpdsl" else result

    monkeypatch.setattr(device, "capture", wrong)
    row = the_row(ask(device, ONE, settings=Settings(launches=("eager", "graph"), regimes=("sustained",))))
    plain, graph = row["measured"]
    assert set(plain["times"]) == {"mlpdsl", "eager"} and list(graph["times"]) == ["eager"]
    assert "replayed, its result differs from that of eager" in str(failed(row)) and "replayed" in graph["failed"]["mlpdsl"]


def test_ours_failing_is_told_and_the_peers_are_timed() -> None:
    device = Fake()

    def broken(spec: MLPSpec) -> Callable[..., Tensor]:
        raise UnsupportedError("no kernel", ("one reason", "another"))

    row = the_row(ask(device, ONE, candidates={"mlpdsl": broken, "eager": device.candidate("eager")}))
    assert failed(row) == "UnsupportedError: no kernel" and list(row["measured"][0]["times"]) == ["eager"]
