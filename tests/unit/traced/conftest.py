"""Every test here starts as a new process does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlpdsl import traced
from mlpdsl.function import REGISTERED


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing traced or registered by another test, so that every declaration traces and warns."""
    monkeypatch.setattr(traced, "_traced", {})
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)
