"""Fixtures of the tests of recorded calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mlpdsl.tape import Tape


@pytest.fixture
def no_recordings() -> None:
    """Nothing was called before."""
    from mlpdsl import dispatch

    dispatch.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every kernel that is launched."""
    from mlpdsl import launch

    heard: list[str] = []
    inner = launch.run

    def run(kernel: Any, *rest: Any) -> None:
        heard.append(kernel.__name__)
        inner(kernel, *rest)

    monkeypatch.setattr(launch, "run", run)
    return heard


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every recording that is repeated, as often as it is."""
    from mlpdsl.tape import Tape

    seen: list[Tape] = []
    real = Tape.replay

    def counting(self: Tape, *args: Any) -> list[Any]:
        seen.append(self)
        return real(self, *args)

    monkeypatch.setattr(Tape, "replay", counting)
    return seen
