"""What the cache refuses to write to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlpdsl.cache import SourceCache
from tests.unit.source_cache.tools import KEY, publish, tree, warnings_in


def refused(root: Path, caplog: pytest.LogCaptureFixture, because: str) -> None:
    """Check that nothing is written, nothing is raised, and one warning says why and what to do."""
    before = tree(root)
    paths = {publish(root) for _ in range(3)}
    assert paths == {SourceCache(root).path("mlp", KEY)}
    assert tree(root) == before
    assert not SourceCache(root).present("mlp", KEY)
    messages = warnings_in(caplog)
    assert len(messages) == 1, messages
    for words in (because, repr(str(root)), "results are unaffected", "MLPDSL_CACHE_DIR"):
        assert words in messages[0]


LEVELS = {"root": "", "v1": "v1", "entry": f"v1/mlp-{KEY[:16]}"}


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
@pytest.mark.parametrize("level", LEVELS)
def test_a_directory_that_others_can_write_to(root: Path, level: str, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    publish(root).unlink()
    (root / LEVELS[level]).chmod(mode)
    refused(root, caplog, f"mode {mode:04o}); run chmod go-w")


@pytest.mark.parametrize("level", LEVELS)
def test_a_directory_of_another_user(
    root: Path, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(root).unlink()
    foreign = (root / LEVELS[level]).stat()
    fstat = os.fstat

    def lie(fd: int) -> os.stat_result:
        status = fstat(fd)
        if (status.st_dev, status.st_ino) != (foreign.st_dev, foreign.st_ino):
            return status
        return os.stat_result([*status[:4], 4242, *status[5:10]])

    monkeypatch.setattr(os, "fstat", lie)
    refused(root, caplog, "belongs to another user (uid 4242)")


@pytest.mark.parametrize("level", ["v1", "entry"])
def test_a_link_below_the_root(root: Path, level: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(root).unlink()
    directory = root / LEVELS[level]
    directory.rename(root.parent / "elsewhere")
    directory.symlink_to(root.parent / "elsewhere")
    refused(root, caplog, "is a symbolic link")
    assert not list((root.parent / "elsewhere").rglob("kernel.py"))


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_where_a_directory_should_be(root: Path, level: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(root).unlink()
    shutil.rmtree(root / LEVELS[level])
    (root / LEVELS[level]).write_text("not a directory")
    refused(root, caplog, "is not a directory")


def test_a_root_that_is_a_link_is_resolved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "mine")  # which is yet to be made
    path = publish(tmp_path / "link")
    assert path.is_relative_to(tmp_path / "link")
    assert path.resolve().is_relative_to(tmp_path / "scratch" / "mine")
    assert warnings_in(caplog) == []
    (tmp_path / "scratch" / "mine").chmod(0o777)
    path.unlink()
    refused(tmp_path / "link", caplog, "mode 0777")
