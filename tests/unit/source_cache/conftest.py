"""A root of its own for each test, no warning given yet, and a hang that is a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from mlpdsl import cache as cache_module


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_warned", {})


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Turn a hang (an open that waits on a FIFO) into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("hung for 10 s")  # no OSError (as TimeoutError is): the cache would take it for the disk's

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"
