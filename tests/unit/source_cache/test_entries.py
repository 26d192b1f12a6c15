"""What is on the disk when it works."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path

import pytest

from mlpdsl.cache import SourceCache
from tests.unit.source_cache.tools import FIELDS, KEY, TEXT, publish, tree


def test_layout(root: Path) -> None:
    path = publish(root, "silu-4096x14336")
    assert path == root / "v1" / f"silu-4096x14336-{KEY[:16]}" / "kernel.py"
    assert path == SourceCache(root).path("silu-4096x14336", KEY)
    assert path.read_bytes() == TEXT.encode()
    assert sorted(p.name for p in path.parent.iterdir()) == ["kernel.py", "manifest.json"]
    assert json.loads(path.with_name("manifest.json").read_text()) == {
        "key": KEY,
        "name": "silu-4096x14336",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        **FIELDS,
    }


def test_directories_are_private_and_files_are_not_writable_by_others(root: Path) -> None:
    before = os.umask(0)
    try:
        path = publish(root)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (root, root / "v1", path.parent)] == [0o700] * 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_two_writers_produce_identical_bytes(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    time.sleep(0.01)
    SourceCache(tmp_path / "b").publish("mlp", KEY, TEXT, dict(reversed(FIELDS.items())))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_manifest_says_what_the_cache_knows_whatever_the_caller_says(root: Path) -> None:
    path = SourceCache(root).publish("mlp", KEY, TEXT, {"key": "other", "sha256": "other"})
    assert json.loads(path.with_name("manifest.json").read_text())["key"] == KEY


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "/etc/x", "a/b", "a\0b", "a\nb", "ж" * 500, "x" * 5000, "-"])
def test_a_hostile_name_stays_one_component_below_the_root(root: Path, name: str) -> None:
    path = publish(root, name)
    assert path.parent.parent == root / "v1"
    assert path.read_bytes() == TEXT.encode()
    assert path.parent.name.isascii()
    assert path.parent.name.isprintable()
    assert [p.name for p in root.parent.iterdir()] == ["root"]


@pytest.mark.parametrize("key", ["", "../..", "abc", "G" * 64, KEY.upper(), KEY + "\n", KEY[:15] + "/"])
def test_a_key_that_is_no_digest_is_refused(root: Path, key: str) -> None:
    for use in (lambda: publish(root, key=key), lambda: SourceCache(root).present("mlp", key)):
        with pytest.raises(ValueError, match="key must be"):
            use()
    assert not root.exists()


def test_asking_touches_nothing(root: Path) -> None:
    cache = SourceCache(root)
    assert not cache.present("mlp", KEY)
    cache.path("mlp", KEY)
    assert not root.exists()
    root.mkdir(mode=0o700)
    for below in ("", "v1"):
        (root / below).mkdir(mode=0o700, exist_ok=True)
        before = list(root.rglob("*"))
        assert not cache.present("mlp", KEY)
        assert list(root.rglob("*")) == before


def test_a_file_that_is_right_is_left_alone(root: Path) -> None:
    path = publish(root)
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())]
    publish(root)
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())] == before


def test_the_manifest_is_written_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, list[str]]] = []
    replace = os.replace

    def spy(source: str, target: str, **fds: int) -> None:
        moved.append((target, [n for n in os.listdir(fds["dst_dir_fd"]) if not n.startswith(".")]))
        replace(source, target, **fds)

    monkeypatch.setattr(os, "replace", spy)
    publish(root)
    assert moved == [("kernel.py", []), ("manifest.json", ["kernel.py"])]


@pytest.mark.parametrize("missing", ["kernel.py", "manifest.json"])
def test_half_an_entry_is_not_present(root: Path, missing: str) -> None:
    path = publish(root)
    assert SourceCache(root).present("mlp", KEY)
    path.with_name(missing).unlink()
    assert not SourceCache(root).present("mlp", KEY)
    publish(root)
    assert SourceCache(root).present("mlp", KEY)


def test_no_descriptor_is_leaked(root: Path) -> None:
    def uses() -> None:
        path = publish(root)
        path.write_text("wrong")
        publish(root)
        SourceCache(root).present("mlp", KEY)
        path.parent.chmod(0o777)
        publish(root)
        path.parent.chmod(0o700)

    uses()
    before = len(os.listdir("/dev/fd"))
    uses()
    assert len(os.listdir("/dev/fd")) == before


def test_stage_files_of_dead_writers_are_swept_and_nothing_else(root: Path) -> None:
    path = publish(root)
    old, new, other = (f".kernel.py.1-{'a' * 16}.tmp", f".kernel.py.2-{'b' * 16}.tmp", "notes.tmp")
    for name in (old, new, other):
        path.with_name(name).write_text("x")
    for name in (old, other):
        os.utime(path.with_name(name), (time.time() - 7200,) * 2)
    path.write_text("wrong")
    publish(root)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([new, "kernel.py", "manifest.json", other])
