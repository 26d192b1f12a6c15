"""What tuning asks of a GPU. `mlpdsl.tuning.children.Children` answers it; tests answer it without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlpdsl.codegen.plan import Config
from mlpdsl.errors import MLPError
from mlpdsl.tuning.job import Job

__all__ = ["Device", "Facts", "LostError", "Times"]


class LostError(MLPError):
    """A candidate that crashed or hung whoever tried it, or that could not be run; the message is the reason, in one line."""


@dataclass(frozen=True)
class Facts:
    """A kernel as compiled: what stands against timing it, else ""."""

    reason: str = ""


@dataclass(frozen=True)
class Times:
    """Microseconds a launch, round by round, of the default and of a candidate that took turns with it."""

    default: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def gains(self) -> list[float]:
        """default/candidate of each round: above 1 where the candidate is faster."""
        return [a / b for a, b in zip(self.default, self.candidate, strict=True)]


class Device(Protocol):
    """A GPU, as far as tuning needs it."""

    def now(self) -> float:
        """Seconds, from anywhere, that only grow."""

    def describe(self) -> dict[str, Any]:
        """`gpu` (the driver's name), `target` (a name of `TARGETS`), `versions` (texts by name).

        Raises `UnsupportedError` where there is none."""

    def compile(self, job: Job, configs: Sequence[Config]) -> list[Facts]:
        """Each config compiled for a job, several at a time. A crash or a hang is one config's reason, and no error here."""

    def time(self, job: Job, default: Config, candidate: Config, rounds: int, floor: float) -> Times:
        """So many paired rounds; fewer where after the first few the gain stays below `floor`. Raises `LostError`."""

    def check(self, job: Job, config: Config) -> str:
        """What the oracle has against the results with this config, else "". Raises `LostError`."""

    def close(self) -> None:
        """End what was started."""
