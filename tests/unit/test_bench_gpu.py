"""`mlpdsl.bench.gpu`: what is asked of CUDA, in which order. Stand-ins for torch.cuda note it; nothing runs on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlpdsl import UnsupportedError
from mlpdsl.bench import gpu
from mlpdsl.bench.results import ResultError

Log = list[str]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is asked of CUDA: events, streams, graphs. An event's time is the number of entries before it."""
    log: Log = []
    current = ["main"]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at = len([entry for entry in log if entry.startswith("call")])

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, current[0] = current[0], chosen.name
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(made: Graph, stream: Stream) -> Iterator[None]:
        log.append(f"capture on {stream.name}")
        yield
        log.append("captured")

    found = SimpleNamespace(
        name="NVIDIA Fake", L2_cache_size=60, total_memory=1000, multi_processor_count=132, major=9, minor=0, uuid="1-2"
    )
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: found,
        "synchronize": lambda: log.append("synchronize"),
        "mem_get_info": lambda: (700, 1000),
        "current_stream": lambda: Stream(current[0]),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return log


def call(log: Log, result: Any = 7) -> Any:
    def run() -> Any:
        log.append(f"call on {torch.cuda.current_stream().name}")  # type: ignore[attr-defined]
        return result

    return run


def test_a_stretch_counts_no_call_before_the_first_event(log: Log) -> None:
    assert gpu.Gpu().stretch(call(log), 4) == 1e3
    assert log == [*["call on main"] * gpu.LEAD, "record", *["call on main"] * 4, "record", "wait"]


def test_host_time_waits_for_nothing(log: Log) -> None:
    assert gpu.Gpu().host(call(log), 3) > 0
    assert log == ["synchronize", *["call on main"] * 3, "synchronize"]


def test_a_capture_is_warmed_up_on_its_own_stream(log: Log) -> None:
    replay, result = gpu.Gpu().capture(call(log))
    assert result == 7
    captured = ["capture on side", "call on side", "captured"]
    assert log == ["side waits for main", *["call on side"] * 3, *captured, "main waits for side"]
    log.clear()
    replay()
    assert log == ["replay"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(log: Log) -> None:
    device = gpu.Gpu()

    def fails() -> None:
        if "capture on side" in log:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError):
        device.capture(fails)
    assert torch.cuda.current_stream().name == "main"  # type: ignore[attr-defined]


def test_what_it_says_of_itself(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu.Gpu()
    assert (device.name, device.torch_device, device.l2_bytes, device.free_bytes()) == ("NVIDIA Fake", "cuda:0", 60, 700)
    said = device.describe()
    assert said["architecture"] == "9.0" and said["multiprocessors"] == 132 and said["memory_bytes"] == 1000
    versions = device.versions()
    assert versions["torch"] == torch.__version__ and versions["liger-kernel"] is None and versions["triton"]
    device.check()

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(ResultError, match=r"no longer answers .*illegal memory access.*--resume"):
        device.check()


def test_the_ceilings_are_the_fastest_seen(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu.Gpu()
    device.torch_device = "cpu"
    for name in ("SIDE", "COPY"):
        monkeypatch.setattr(gpu, name, 16)
    times = iter([9.0, 4.0, 5.0, 6.0, 7.0] * 3)
    monkeypatch.setattr(device, "stretch", lambda call, count: (call(), next(times))[1])
    monkeypatch.setattr(device, "pause", lambda seconds: None)
    assert device.bandwidth() == pytest.approx(32 / 4e-6)
    before = torch.backends.cuda.matmul.fp32_precision
    assert device.product("bfloat16") == device.product("float32 tf32") == pytest.approx(2 * 16**3 / 4e-6)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="torch sees none here"):
        gpu.Gpu()
