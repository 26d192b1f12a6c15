"""The GPU behind the measuring: CUDA events, CUDA graphs, clocks."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import sys
import time
from typing import Any

import torch

from mlpdsl.backends import interpreting
from mlpdsl.bench.clocks import Clocks
from mlpdsl.bench.results import ResultError
from mlpdsl.bench.timer import Call
from mlpdsl.checks import torch_dtype
from mlpdsl.errors import UnsupportedError
from mlpdsl.version import __version__

__all__ = ["Gpu"]

LEAD = 2
"""Calls before the first event: the host is then ahead of the GPU, and what its first launch takes is not counted."""

SIDE = 8192
COPY = 2**30


class Gpu:
    """torch's current GPU. Raises `UnsupportedError` where there is none, or Triton interprets."""

    def __init__(self) -> None:
        if interpreting():
            raise UnsupportedError("bench times kernels on a GPU, and TRITON_INTERPRET is set: unset it")
        if not torch.cuda.is_available():
            raise UnsupportedError(
                "bench times kernels on a GPU, and torch sees none here: `mlpdsl doctor` says why. "
                "`mlpdsl bench --report FILE` shows results from elsewhere"
            )
        index = torch.cuda.current_device()
        found = torch.cuda.get_device_properties(index)
        self.name, self.torch_device = found.name, f"cuda:{index}"
        self.l2_bytes = int(found.L2_cache_size)
        self._found = found
        uuid = getattr(found, "uuid", None)
        self._clocks = Clocks(None if uuid is None else f"GPU-{uuid}")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._side = torch.cuda.Stream()

    def now(self) -> float:
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        torch.cuda.synchronize()
        time.sleep(seconds)

    def stretch(self, call: Call, count: int) -> float:
        for _ in range(LEAD):
            call()
        self._start.record()
        for _ in range(count):
            call()
        self._end.record()
        self._end.synchronize()
        elapsed: float = self._start.elapsed_time(self._end)
        return 1e3 * elapsed / count

    def host(self, call: Call, count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        for _ in range(count):
            call()
        took = time.perf_counter_ns() - began
        torch.cuda.synchronize()
        return took / 1e3 / count

    def clocks(self) -> dict[str, float] | None:
        return self._clocks.sample()

    def describe(self) -> dict[str, Any]:
        found = self._found
        return {
            "name": self.name,
            "memory_bytes": int(found.total_memory),
            "l2_bytes": self.l2_bytes,
            "multiprocessors": int(found.multi_processor_count),
            "architecture": f"{found.major}.{found.minor}",
            "power_limit_w": self._clocks.power_limit_w(),
        }

    def versions(self) -> dict[str, str | None]:
        def installed(name: str) -> str | None:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return None

        return {
            "mlpdsl": __version__,
            "torch": torch.__version__,
            "triton": installed("triton"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "driver": self._clocks.driver(),
            "liger-kernel": installed("liger-kernel"),
        }

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def clear(self) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and asking would import it
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def check(self) -> None:
        try:
            torch.cuda.synchronize()
        except Exception as error:  # after a kernel that crashed every call fails, whatever the class torch gives it
            raise ResultError(f"the GPU no longer answers ({error}): start again with --resume; this row is kept") from error

    def capture(self, call: Call) -> tuple[Call, Any]:
        # Warmed up on the stream of the capture: what autograd, cuBLAS and torch.compile keep by stream is then of this one.
        # The outer `with` puts the stream back where the capture fails, which torch.cuda.graph does not.
        self._side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            for _ in range(3):
                call()
            with torch.cuda.graph(graph, stream=self._side):
                result = call()
        torch.cuda.current_stream().wait_stream(self._side)
        return graph.replay, result

    def bandwidth(self) -> float:
        source = torch.empty(COPY, dtype=torch.uint8, device=self.torch_device).random_()
        target = torch.empty_like(source)
        return 2 * COPY / (self._least(lambda: target.copy_(source)) / 1e6)

    def product(self, numbers: str) -> float:
        word, _, precision = numbers.partition(" ")
        flag = torch.backends.cuda.matmul
        before, flag.fp32_precision = flag.fp32_precision, "tf32" if precision == "tf32" else "ieee"
        try:
            a, b = (torch.randn(SIDE, SIDE, dtype=torch_dtype(word), device=self.torch_device) for _ in range(2))
            return 2 * SIDE**3 / (self._least(lambda: torch.mm(a, b)) / 1e6)
        finally:
            flag.fp32_precision = before

    def _least(self, call: Call) -> float:
        """Microseconds a call at its best, rested: a ceiling is the fastest that was seen."""
        times = []
        for _ in range(5):
            self.pause(0.1)
            times.append(self.stretch(call, 3))
        return min(times)
