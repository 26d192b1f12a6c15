"""Fixtures of the unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.launchers import Utils


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Utils:
    """Triton's CUDA driver, active and without a GPU."""
    from tests.launchers import install

    return install(monkeypatch)
