"""What the measuring asks of a GPU. `mlpdsl.bench.gpu.Gpu` answers it; tests answer it with a clock of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Call", "Device", "Timer"]

Call = Callable[[], Any]
"""One call of a candidate on tensors that it holds."""


class Timer(Protocol):
    """Times calls."""

    def now(self) -> float:
        """Seconds, from anywhere, that only grow."""

    def pause(self, seconds: float) -> None:
        """Let the GPU rest."""

    def stretch(self, call: Call, count: int) -> float:
        """Microseconds of GPU time a call, over `count` calls back to back, after a call or two that are not counted."""

    def host(self, call: Call, count: int) -> float:
        """Microseconds of host time a call, over `count` calls that are not waited for; afterwards the GPU is idle."""

    def clocks(self) -> dict[str, float] | None:
        """`sm_mhz`, `memory_mhz`, `power_w`, `temperature_c` now; None where nothing tells."""


class Device(Timer, Protocol):
    """A timer, and the GPU it stands for."""

    name: str
    """As the driver calls it."""
    torch_device: str
    """Where tensors are made: "cuda:0"."""
    l2_bytes: int

    def describe(self) -> dict[str, Any]:
        """Name and sizes, for the file."""

    def versions(self) -> dict[str, str | None]:
        """Of everything that decides how fast a call is, by name."""

    def free_bytes(self) -> int:
        """Device memory that can be had now, in bytes."""

    def clear(self) -> None:
        """Forget what earlier rows left: compiled functions, cached memory."""

    def check(self) -> None:
        """Raise `ResultError` where the GPU no longer answers, as after a kernel that crashed."""

    def capture(self, call: Call) -> tuple[Call, Any]:
        """One call as a CUDA graph: what replays it, and what the call returned."""

    def bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written."""

    def product(self, numbers: str) -> float:
        """FLOP a second of a large product in a number format of `ceilings.numbers_of`."""
