"""What `mlpdsl bench` makes of times; floors; suites; NVML."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlpdsl import MLPSpec, ShapeError, SpecError, bench
from mlpdsl.bench import floors, summary
from mlpdsl.bench.clocks import Clocks
from mlpdsl.bench.suites import SUITES, Row
from tests.unit.test_bench import OTHER, SPEC

# What is made of times


def test_median_quartiles_and_ratios() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert summary.median(values) == 3.0 and summary.quartiles(values) == (2.0, 4.0) and summary.quartiles([7.0]) == (7.0, 7.0)
    assert summary.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        summary.ratios([1.0], [1.0, 2.0])


def test_the_interval_of_a_median() -> None:
    assert summary.interval([1.5] * 9) == (1.5, 1.5)
    values = [1.0 + i / 100 for i in range(41)]
    low, high = summary.interval(values)
    # The order statistics that bound a median of 41 at 95% are the 14th and 28th (binomial): 1.13 and 1.27.
    assert low == pytest.approx(1.13, abs=0.021) and high == pytest.approx(1.27, abs=0.021)
    assert summary.interval(values) == (low, high)
    uneven = torch.randn(20, generator=torch.Generator().manual_seed(1)).tolist()
    assert summary.interval(uneven) == summary.interval(uneven, seed=0)
    assert len({summary.interval(uneven, seed=seed) for seed in range(12)}) > 1
    assert summary.interval([*values, 1000.0])[1] < 1.3  # one stretch that something disturbed does not move it
    narrow, wide = (summary.interval(values, level=level) for level in (0.5, 0.99))
    assert wide[0] < low <= narrow[0] < narrow[1] <= high < wide[1]


def test_an_interval_covers_as_often_as_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    samples = torch.randn(150, 20, generator=draw).tolist()
    covered = sum(low <= 0 <= high for low, high in (summary.interval(sample) for sample in samples))
    assert 0.88 <= covered / 150 <= 0.99


def test_the_best_of_torch() -> None:
    times = {"mlpdsl": [1.0], "eager": [5.0, 5.0, 1.0], "compile": [4.0, 4.0, 9.0], "liger": [2.0], "max-autotune": [6.0]}
    assert summary.best_of_torch(times) == "compile"
    assert summary.best_of_torch({"mlpdsl": [1.0], "liger": [2.0]}) is None
    assert [summary.verdict(*pair) for pair in ((1.01, 1.2), (0.8, 0.99), (0.9, 1.1))] == ["faster", "slower", "even"]


# Floors


H200 = floors.Ceilings(4.37e12, {"bfloat16": 790e12, "float32 ieee": 50e12}, {})


@pytest.mark.parametrize(
    ("name", "m", "us", "by"),
    [
        ("swiglu-4096x14336", 1, 80.6, "memory"),  # 3·4096·14336 weights of two bytes, over 4.37 TB/s
        ("swiglu-4096x14336", 256, 114.2, "arithmetic"),  # 2·256·3·4096·14336 FLOP, over 790 TFLOP/s
        ("swiglu-8192x28672", 4096, 7307.0, "arithmetic"),
        ("gelu-4096x4096-bias", 1, 15.4, "memory"),
        ("gelu-1024x4096-bias", 4096, 87.0, "arithmetic"),
        ("geglu_tanh-2048x16384", 1, 46.1, "memory"),
    ],
)
def test_the_floor_of_a_forward(name: str, m: int, us: float, by: str) -> None:
    (spec,) = (entry.spec for entry in SUITES["seeds"].entries if entry.name == name)
    floor = floors.floor_of(Row(name, spec, m), H200)
    assert floor.us == pytest.approx(us, rel=0.005) and floor.by == by


def test_the_floor_of_a_training_step() -> None:
    eight = MLPSpec(dims=(128,) * 9, activation="gelu", dtype="bfloat16")
    floor = floors.floor_of(Row("8", eight, 2**18, "train"), H200)
    assert (floor.flops, floor.by) == (3 * 2 * 2**18 * 8 * 128 * 128, "arithmetic")
    assert floor.us == pytest.approx(261, rel=0.005)
    # x three times (read, read, its gradient), y twice, weights three times.
    four = MLPSpec(dims=(64,) * 5, activation="relu", dtype="bfloat16")
    floor = floors.floor_of(Row("4", four, 2**20, "train"), H200)
    assert floor.bytes == 2 * (5 * 64 * 2**20 + 3 * 4 * 64 * 64) and floor.by == "memory"
    assert floors.floor_of(Row("4", four, 2**20), H200).bytes == 2 * (2 * 64 * 2**20 + 4 * 64 * 64)
    assert floors.traffic(OTHER, 3, True) == 2 * (2 * 36 + 2 * 36 + 36 + 3 * 96 + 24 + 0)  # 3·x, 2·y, 2·residual, 3·weights


def test_ceilings_from_the_table_from_the_gpu_and_from_the_file() -> None:
    asked: list[str] = []

    def product(numbers: str) -> float:
        asked.append(numbers)
        return 3e14

    found = floors.ceilings("NVIDIA H200", ("bfloat16", "float32 tf32x3"), lambda: 1e12, product)
    assert asked == ["float32 tf32"] and found.bandwidth == 4.37e12
    assert found.products == {"bfloat16": 790e12, "float32 tf32x3": 1e14}
    assert found.sources == {"bandwidth": "table", "bfloat16": "table", "float32 tf32x3": "measured"}
    again = floors.ceilings("NVIDIA H200", ("float32 tf32x3", "float16"), lambda: 1e12, product, found)
    assert asked == ["float32 tf32"] and set(again.products) == {"bfloat16", "float32 tf32x3", "float16"}
    other = floors.ceilings("another", ("bfloat16",), lambda: 1e12, product)
    assert (other.bandwidth, other.sources) == (1e12, {"bandwidth": "measured", "bfloat16": "measured"})
    assert floors.Ceilings.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_a_row_touches_and_holds() -> None:
    row = Row("one", SPEC.replace(bias=False), 4)
    assert floors.footprint(row) == 4 * (3 * 8 * 16 + 4 * 8 * 2 + 4 * 32)
    train = Row("one", row.spec, 4, "train")
    assert floors.footprint(train) == 2 * floors.footprint(row)
    assert floors.held_bytes(row, 5) > floors.held_bytes(row, 0) > floors.footprint(row)
    assert floors.held_bytes(train, 0) > floors.held_bytes(row, 0)


# Suites


def test_every_suite_is_sound() -> None:
    assert list(SUITES) == ["seeds", "llm", "vision", "small", "odd", "float32"]
    names = [(suite.name, entry.name) for suite in SUITES.values() for entry in suite.entries]
    assert len(set(names)) == len(names)
    for suite in SUITES.values():
        assert len({entry.spec for entry in suite.entries}) == len(suite.entries) > 3 and suite.about
        for entry in suite.entries:
            assert entry.ms and len(set(entry.ms)) == len(entry.ms) and min(entry.ms) >= 1
            assert MLPSpec.from_json(entry.spec.to_json()) == entry.spec
    seeds = {entry.name: entry for entry in SUITES["seeds"].entries}
    assert all(entry.ms == (1, 16, 64, 128, 256, 512, 4096, 16384) for entry in seeds.values())
    assert {e.spec.dims[:2] for e in seeds.values()} == {
        (1024, 4096), (4096, 4096), (768, 3072), (4096, 14336), (8192, 28672), (2048, 16384)
    }  # fmt: skip
    assert all(width % 2 or width % 8 for e in SUITES["odd"].entries for width in e.spec.dims)
    assert {e.spec.dtype for e in SUITES["odd"].entries} == {"bfloat16", "float16", "float32"}


def test_rows() -> None:
    found = bench.rows(["seeds"])
    assert len(found) == 48 and [row.m for row in found[:8]] == [1, 16, 64, 128, 256, 512, 4096, 16384]
    found = bench.rows(["seeds", "llm", OTHER], ms=(1, 5), passes=("forward", "train"))
    assert len({row.key for row in found}) == len(found) == 4 * (6 + 9 + 1)  # four of the MLPs of llm are among the seeds
    by_name = {row.name: row.spec for row in found}
    assert len(by_name) == len(set(by_name.values())) == 16 and "llama-3-8b" not in by_name and OTHER.short_name in by_name
    first = bench.Entry("same", SPEC, (3,))
    assert [row.name for row in bench.rows([first, bench.Entry("same", OTHER, (3,))])] == ["same", "same-2"]
    assert [row.name for row in bench.rows([first, bench.Entry("again", SPEC, (3, 4))])] == ["same", "same"]
    assert [row.m for row in bench.rows([SPEC])] == [1, 16, 256, 4096]
    assert str(found[0]) == "gelu-1024x4096-bias, M = 1, forward"


def test_rows_that_are_none() -> None:
    for wrong, error in (((["seed"],), SpecError), (([SPEC], (0,)), ShapeError), (([SPEC], (1,), ("backward",)), SpecError)):
        with pytest.raises(error, match="got"):
            bench.rows(*wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="Did you mean 'seeds'"):
        bench.rows(["seed"])


# NVML


class Nvml:
    """Answers as the driver's library does."""

    broken = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        values = {"nvmlDeviceGetPowerUsage": 650_500, "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetEnforcedPowerLimit": 700_000}

        def answer(*arguments: Any) -> int:
            if name == self.broken:
                return 3
            if name == "nvmlDeviceGetHandleByUUID":
                assert arguments[0] == b"GPU-1"
                arguments[1]._obj.value = 42
            elif name == "nvmlSystemGetDriverVersion":
                arguments[0].value = b"580.1"
            elif name == "nvmlDeviceGetClockInfo":
                arguments[2]._obj.value = {1: 1455, 2: 3201}[arguments[1].value]
            elif name in values:
                arguments[-1]._obj.value = values[name]
            return 0

        return answer


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr("mlpdsl.bench.clocks._load_nvml", lambda: nvml)
    clocks = Clocks("GPU-1")
    assert clocks.sample() == {"sm_mhz": 1455.0, "memory_mhz": 3201.0, "power_w": 650.5, "temperature_c": 61.0}
    assert clocks.driver() == "580.1" and clocks.power_limit_w() == 700.0
    nvml.broken = "nvmlDeviceGetPowerUsage"
    assert clocks.sample() is None
    nvml.broken = "nvmlDeviceGetHandleByUUID"
    assert Clocks("GPU-1").sample() is None and Clocks("GPU-1").driver() == "580.1"

    def missing() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr("mlpdsl.bench.clocks._load_nvml", missing)
    clocks = Clocks("GPU-1")
    assert clocks.sample() is None and clocks.driver() is None and clocks.power_limit_w() is None
