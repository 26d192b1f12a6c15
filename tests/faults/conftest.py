"""What every fault test starts from: no warning given yet, and a root that is not there yet."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlpdsl import cache as cache_module
from tests.faults.figures import Figures, write

if TYPE_CHECKING:
    from tests.faults.triton_tools import Cache, Driver

_figures = Figures()


@pytest.fixture
def figures() -> Figures:
    _figures.start = time.perf_counter()
    return _figures


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_warned", {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """Triton's cache and ours, both empty, for tests that compile."""
    from tests.faults.triton_tools import own_caches  # needs triton

    yield from own_caches(tmp_path, monkeypatch)


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A GPU that is not there."""
    from tests.faults.triton_tools import own_driver

    yield from own_driver()


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A place that another user can reach, which pytest's own directories are not."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    yield base / "root"
    shutil.rmtree(base)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    said = write(_figures) if exitstatus == 0 else ""
    if said and reporter is not None:
        reporter.write_line(said)
