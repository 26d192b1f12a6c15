"""`mlpdsl cache clear` removes nothing but the cache's own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

from mlpdsl import cache_tools
from mlpdsl.cache import SourceCache, digest
from tests.unit.cache_tools.tools import OTHER, ROOT, Run, made, rewrite, tree


def test_clear_all(run: Run, root: Path) -> None:
    entries = sorted([made().name, made(OTHER).name])
    (root / "v1" / "notes").write_text("x")
    (root / "notes").write_text("x")
    assert run("clear", "--dry-run") == (0, "".join(f"would remove {name}\n" for name in entries), "")
    assert len(tree(root)) == 9
    assert run("clear", "--yes") == (0, "".join(f"removed {name}\n" for name in entries), "")
    assert tree(root) == ["notes", "v1", "v1/notes"]
    assert run("clear", "--yes") == (0, "", "mlpdsl: there is nothing to remove\n")


def test_clear_of_some(run: Run, root: Path) -> None:
    fine, stale, damaged, named = made(), made(target="sm_80"), made(OTHER), made(OTHER, "sm_80")
    rewrite(stale, mlpdsl="0.0.9")
    rewrite(named, mlpdsl="0.0.9")
    (damaged / "kernel.py").unlink()
    assert run("clear", "--damaged", "--yes", "gated")[1] == ""
    assert run("clear", "--damaged", "--yes")[1] == f"removed {damaged.name}\n"
    assert run("clear", "--stale", "--yes", "gated")[1] == f"removed {stale.name}\n"
    assert sorted(os.listdir(root / "v1")) == sorted([fine.name, named.name])
    status, _, err = run("clear", "--yes", "gated", "no-such-name")
    assert status == 2
    assert "'no-such-name'" in err
    assert fine.is_dir()
    assert run("clear", "--stale", "--damaged", "--yes")[1] == f"removed {named.name}\n"
    assert run("clear", "--yes", fine.name[-16:])[1] == f"removed {fine.name}\n"


def test_clear_asks_and_refuses_where_there_is_nobody_to_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    status, out, err = run("clear")
    assert (status, out) == (2, "")
    assert "--yes" in err
    assert len(tree(entry)) == 2


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1), ("", 1)])
def test_the_answer_on_a_terminal(root: Path, answer: str, status: int) -> None:
    entry = made()
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "mlpdsl", "cache", "clear"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=child,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.write(parent, f"{answer}\n".encode())
        out, err = process.communicate(timeout=60)
    os.close(parent)
    os.close(child)
    assert process.returncode == status
    assert b"Remove 1 entry" in err
    assert entry.name.encode() in err
    assert entry.exists() == (status == 1)
    assert out == (b"" if status else f"removed {entry.name}\n".encode())


def test_clear_leaves_what_is_not_the_caches(run: Run, tmp_path: Path) -> None:
    entry = made()
    (entry / f".kernel.py.1-{'a' * 16}.tmp").write_text("a stage file")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "kernel.py").write_text("mine")
    (entry / "notes").symlink_to(tmp_path / "work")
    (entry / ".kernel.py.tmp").write_text("not of that form")
    status, out, err = run("clear", "--yes")
    assert (status, out) == (0, "")
    assert f"mlpdsl: {entry.name} is emptied, but stays" in err
    assert "'notes'" in err
    assert tree(entry) == [".kernel.py.tmp", "notes"]
    assert (tmp_path / "work" / "kernel.py").read_text() == "mine"


def test_what_cannot_be_removed_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, other = made(), made(OTHER)
    unlink = os.unlink

    def refuse(name: str, *, dir_fd: int) -> None:
        if os.fstat(dir_fd).st_ino == entry.stat().st_ino:
            raise PermissionError(13, "Permission denied", name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    status, out, err = run("clear", "--yes")
    assert (status, out) == (1, f"removed {other.name}\n")
    assert f"{entry.name} could not be removed: Permission denied" in err


def test_an_entry_written_again_while_it_is_removed_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, rmdir = made(), os.rmdir

    def late(name: str, *, dir_fd: int) -> None:
        made()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", late)
    status, out, err = run("clear", "--yes")
    assert (status, out) == (0, "")
    assert "is there again" in err
    assert len(tree(entry)) == 2


def test_clear_against_processes_that_publish(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, stop, raised = "x = 1\n" * 1000, threading.Event(), []
    keys = [digest(str(i)) for i in range(3)]

    def publish() -> None:
        try:
            while not stop.is_set():
                for key in keys:
                    SourceCache(root).publish("mlp", key, text, {})
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            entries, foreign = cache_tools.listing(root)
            assert foreign == []
            outcomes = list(cache_tools.remove(root, [e.directory for e in entries]))
            assert "failed" not in {o.status for o in outcomes}, outcomes
            assert "kept" not in {o.status for o in outcomes}, outcomes
            seen |= {o.status for o in outcomes}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert raised == []
    assert "removed" in seen
    for key in keys:
        assert SourceCache(root).publish("mlp", key, text, {}).read_text() == text
    run("clear", "--yes")
    assert tree(root) == ["v1"]
