"""A root of its own for each test, the command run on it, and a hang that is a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from mlpdsl import cache_tools
from tests.unit.cache_tools.tools import Done, Run


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Turn a hang (an open that waits on a FIFO) into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("hung for 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setattr(cache_tools, "_YOUNG", 0.0)  # nobody else is at work here, and waiting for them takes time
    return tmp_path / "root"


@pytest.fixture
def run(root: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    from mlpdsl import cli  # needs click

    def run(*args: str) -> Done:
        status = cli.main(["cache", *args])
        out, err = capsysbinary.readouterr()
        assert b"Traceback" not in err
        return status, out.decode(), err.decode()

    return run
