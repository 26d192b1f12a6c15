"""`mlpdsl cache info`, `ls` and `show`: what they say about a cache, usable or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import cli_cache
from mlpdsl.cache import SourceCache, digest
from mlpdsl.cache_info import info
from tests.unit.cache_tools.tools import OTHER, ROOT, Run, made, rewrite, tree

# info


def test_info(run: Run, root: Path) -> None:
    made()
    half = made(OTHER)
    (half / "manifest.json").unlink()
    rewrite(made(OTHER, "sm_80"), mlpdsl="0.0.9")
    (root / "v1" / "notes").write_text("x")
    status, out, err = run("info", "--json")
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != "notes")
    assert (status, err) == (0, "")
    assert out.endswith("}\n")
    assert json.loads(out) == {
        **{"root": str(root), "origin": "MLPDSL_CACHE_DIR", "exists": True, "writable": True, "usable": True, "reason": None},
        **{"entries": 3, "bytes": size, "incomplete": 1, "foreign": 1},
        "versions": {"0.0.9": 1, mlpdsl.__version__: 1, "unknown": 1},
    }
    status, out, _ = run("info")
    assert status == 0
    for words in (
        f"root        {root} (from MLPDSL_CACHE_DIR)",
        "usable      yes",
        "entries     3, ",
        "0.0.9 (1)",
        "foreign     1",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("environment", "origin", "where"),
    [
        ({"MLPDSL_CACHE_DIR": "{}/a", "XDG_CACHE_HOME": "{}/b", "HOME": "{}/c"}, "MLPDSL_CACHE_DIR", "{}/a"),
        ({"XDG_CACHE_HOME": "{}/b", "HOME": "{}/c"}, "XDG_CACHE_HOME", "{}/b/mlpdsl"),
        ({"HOME": "{}/c"}, "home", "{}/c/.cache/mlpdsl"),
        ({"HOME": "/"}, "none", None),
    ],
)
def test_where_the_root_comes_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], origin: str, where: str | None
) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    said = json.loads(run("info", "--json")[1])
    expected = None if where is None else where.format(tmp_path)
    assert (said["root"], said["origin"], said["exists"], said["usable"]) == (expected, origin, False, where is not None)
    assert list(tmp_path.iterdir()) == []


def test_no_home(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    assert "no: no home directory was found" in run("info")[1]
    assert run("ls") == (0, "", "mlpdsl: there is no cache: no home directory was found\n")
    assert run("verify")[0] == 0
    assert run("clear", "--yes") == (0, "", "mlpdsl: there is nothing to remove\n")


def _not_a_directory(root: Path) -> None:
    root.write_text("x")


def _below_a_file(root: Path) -> None:
    made()
    shutil.rmtree(root / "v1")
    (root / "v1").write_text("x")


def _linked(root: Path) -> None:
    made()
    (root / "v1").rename(root.parent / "elsewhere")
    (root / "v1").symlink_to(root.parent / "elsewhere")


def _open_to_all(root: Path) -> None:
    made()
    (root / "v1").chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (_not_a_directory, "is not a directory"),
        (_below_a_file, "'v1' is not a directory"),
        (_linked, "is a symbolic link"),
        (_open_to_all, "run chmod go-w on it"),
    ],
)
def test_a_cache_that_must_not_be_used(run: Run, root: Path, damage: Callable[[Path], None], because: str) -> None:
    damage(root)
    before = tree(root.parent)
    said = json.loads(run("info", "--json")[1])
    assert (said["usable"], said["exists"], said["entries"]) == (False, True, 0)
    assert because in said["reason"]
    for command in (["ls"], ["verify"], ["show", "x"], ["clear", "--yes"]):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert because in err
        assert "MLPDSL_CACHE_DIR" in err
    assert tree(root.parent) == before


def test_a_read_only_file_system(run: Run, root: Path) -> None:
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", str(root)]
    if shutil.which("mount") is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        entry = made()
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        said = json.loads(run("info", "--json")[1])
        assert (said["exists"], said["writable"], said["usable"], said["entries"]) == (True, False, False, 1)
        assert said["reason"].startswith("Read-only file system: ")
        assert run("verify")[0] == 0
        status, out, err = run("clear", "--yes")
        assert (status, out) == (1, "")
        assert f"{entry.name} could not be removed: Read-only file system" in err
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(run: Run, root: Path) -> None:
    entry = made()
    for path in (entry, root / "v1", root):
        path.chmod(0o500)
    try:
        said = json.loads(run("info", "--json")[1])
        assert (said["writable"], said["usable"], said["entries"]) == (False, False, 1)
        assert "Permission denied" in said["reason"]
        assert run("clear", "--yes")[0] == 1
    finally:
        for path in (root, root / "v1", entry):
            path.chmod(0o700)


def test_a_root_with_nothing_in_it(run: Run, root: Path) -> None:
    root.mkdir(mode=0o700)
    said = json.loads(run("info", "--json")[1])
    assert (said["exists"], said["usable"], said["entries"]) == (True, True, 0)
    root.chmod(0o777)
    said = json.loads(run("info", "--json")[1])
    assert (said["exists"], said["usable"]) == (True, False)
    assert "chmod go-w" in said["reason"]


def test_no_access_is_said_in_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    monkeypatch.setattr(os, "access", lambda *_args, **_more: False)
    found = info()
    assert (found.exists, found.writable, found.usable, found.entries) == (True, False, False, 1)
    assert found.reason is not None
    assert str(root) in found.reason
    assert info(root.parent / "new" / "root").usable is False


# ls and show


def test_ls(run: Run, root: Path) -> None:
    assert run("ls") == (0, "", f"mlpdsl: the cache in {root} is empty\n")
    assert json.loads(run("ls", "--json")[1]) == {"root": str(root), "entries": []}
    first, second = made(OTHER), made()
    os.utime(first / "kernel.py", (time.time() - 3 * 86400,) * 2)
    os.utime(first / "manifest.json", (time.time() - 3 * 86400,) * 2)
    (second / "manifest.json").write_text("{")
    status, out, err = run("ls")
    lines = [line.split() for line in out.splitlines()]
    assert (status, err, lines[0]) == (0, "", ["name", "key", "backend", "target", "size", "age"])
    assert lines[1] == [second.name[:-17], second.name[-16:], "-", "-", *lines[1][4:]]
    assert lines[2][:4] == [first.name[:-17], first.name[-16:], "triton", "sm_90"]
    assert lines[2][-2:] == ["3", "d"]
    entries = json.loads(run("ls", "--json")[1])["entries"]
    assert [e["directory"] for e in entries] == [second.name, first.name]
    assert [e["size"] for e in entries] == [sum(p.stat().st_size for p in e.iterdir()) for e in (second, first)]
    assert [(e["backend"], e["complete"]) for e in entries] == [(None, True), ("triton", True)]


def test_a_manifest_that_talks_to_the_terminal_is_not_repeated(run: Run) -> None:
    entry = rewrite(made(), target="sm_90\x1b[2J")
    (entry.parent / "evil\x1b[2J-0123456789abcdef").mkdir()
    for command in ("ls", "info", "verify"):
        assert "\x1b" not in "".join(run(command)[1:])


def test_show_prints_the_file_byte_for_byte(run: Run) -> None:
    entry, _ = made(), made(OTHER)
    text, manifest = (entry / "kernel.py").read_text(), (entry / "manifest.json").read_text()
    name, key = entry.name[:-17], entry.name[-16:]
    whole = json.loads(manifest)["key"]
    for query in (name, name[:8], entry.name, key, key[:10], whole, whole[:20]):
        assert run("show", query) == (0, text, "")
        assert run("show", query, "--manifest") == (0, manifest, "")


def test_show_of_a_name_that_begins_another(run: Run, root: Path) -> None:
    cache = SourceCache(root)
    for name in ("mlp", "mlp-2"):
        cache.publish(name, digest(name), name, {})
    assert run("show", "mlp-2")[1] == "mlp-2"
    assert run("show", "mlp")[1] == "mlp"


def test_show_of_none_or_of_several(run: Run) -> None:
    entries = [made(), made(target="sm_80"), made(OTHER)]
    status, out, err = run("show", "gated")
    assert (status, out) == (2, "")
    assert entries[0].name in err
    assert entries[1].name in err
    assert entries[2].name not in err
    status, out, err = run("show", "gaetd-silu-64x128x64-bf16-sm_90")
    assert (status, out) == (2, "")
    assert repr(entries[0].name[:-17]) in err
    assert run("show", "")[0] == 2
    assert run("show", "x" * 100_000)[0] == 2
    shutil.rmtree(entries[0].parent)
    assert "The cache is empty." in run("show", "gated")[2]


def test_show_warns_of_what_was_changed(run: Run) -> None:
    entry = made()
    (entry / "kernel.py").write_bytes(b"changed\xff\n")
    status, out, err = run_bytes(run, entry)
    assert (status, out) == (0, b"changed\xff\n")
    assert "warning" in err
    assert "sha256" in err
    (entry / "manifest.json").unlink()
    assert "manifest.json is missing" in run_bytes(run, entry)[2]


def run_bytes(run: Run, entry: Path) -> tuple[int, bytes, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mlpdsl", "cache", "show", entry.name],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_a_terminal_is_not_sent_control_characters(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made()
    (entry / "kernel.py").write_text("a\x1b[2Jb\n\nλ\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("show", entry.name)[1] == "a\\x1b[2Jb\n\nλ\n"


def test_no_descriptor_is_leaked(run: Run) -> None:
    def uses() -> None:
        entry, _ = made(), made(OTHER)
        (entry / "kernel.py").unlink()
        os.mkfifo(entry / "kernel.py")
        for command in (["info"], ["ls"], ["verify"], ["show", entry.name], ["clear", "--yes"]):
            run(*command)

    uses()
    before = len(os.listdir("/dev/fd"))
    uses()
    assert len(os.listdir("/dev/fd")) == before


def test_numbers_for_people() -> None:
    sizes = (0, 999, 1000, 54_700, 999_949, 999_950, 10**12, 10**16)
    assert [cli_cache.size_text(n) for n in sizes] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "54.7 KB",
        "999.9 KB",
        "1.0 MB",
        "1.0 TB",
        "10000.0 TB",
    ]
    ages = (-5, 0.4, 59, 60, 3600, 86399, 86400 * 40)
    assert [cli_cache.age_text(s) for s in ages] == ["0 s", "0 s", "59 s", "1 min", "1 h", "23 h", "40 d"]
