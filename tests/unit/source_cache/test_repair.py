"""What is damaged is replaced; any sequence of uses and damages."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlpdsl import cache as cache_module
from mlpdsl.cache import SourceCache, digest
from tests.unit.source_cache.tools import KEY, TEXT, publish, warnings_in

# repair

EVIL = "import os\nos.environ['MLPDSL_TEST_PWNED'] = '1'\n"


def _link(path: Path) -> None:
    path.with_name("victim").write_text(EVIL)
    path.symlink_to("victim")


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is limited to about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda p: None,
    "an empty file": lambda p: p.write_bytes(b""),
    "another file": lambda p: p.write_text(EVIL),
    "a file of equal size": lambda p: p.write_bytes(EVIL.encode().ljust(len(TEXT.encode()), b"#")),
    "a longer file": lambda p: p.write_text(TEXT + EVIL, "utf-8"),
    "a file nobody may read": lambda p: (p.write_text(EVIL), p.chmod(0)),
    "a link to a file": _link,
    "a link to the right text": lambda p: (p.with_name("t").write_text(TEXT, "utf-8"), p.symlink_to("t")),
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a FIFO": lambda p: os.mkfifo(p),
    "a socket": _socket,
    "an empty directory": lambda p: p.mkdir(),
    "a full directory": _full_directory,
}


@pytest.mark.parametrize("file", ["kernel.py", "manifest.json"])
@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_stands_in_a_files_place_is_replaced(root: Path, what: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    path = publish(root)
    right = path.with_name(file).read_bytes()
    path.with_name(file).unlink()
    IN_ITS_PLACE[what](path.with_name(file))
    assert publish(root) == path
    assert stat.S_ISREG(path.with_name(file).lstat().st_mode)
    assert path.with_name(file).read_bytes() == right
    assert path.read_bytes() == TEXT.encode()
    assert SourceCache(root).present("mlp", KEY)
    if path.with_name("victim").exists():
        assert path.with_name("victim").read_text() == EVIL, "the write went through the link"
    assert warnings_in(caplog) == []


def test_two_writers_find_a_directory_in_a_files_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one takes what the first one has put there for the directory that it saw."""
    publish(root)
    (path,) = root.glob("v1/*/kernel.py")
    path.unlink()
    path.mkdir()
    move = cache_module._set_aside

    def after_another(directory: int, name: str) -> None:
        monkeypatch.undo()
        publish(root)
        assert path.read_text() == TEXT
        move(directory, name)

    monkeypatch.setattr(cache_module, "_set_aside", after_another)
    assert publish(root).read_text() == TEXT
    assert sorted(p.name for p in path.parent.iterdir()) == ["kernel.py", "manifest.json"]


def test_a_fifo_does_not_pass_for_an_empty_file(root: Path) -> None:
    path = publish(root, text="")
    path.unlink()
    os.mkfifo(path)
    publish(root, text="")
    assert stat.S_ISREG(path.lstat().st_mode)


def test_every_truncation_and_bit_flip_is_repaired(root: Path) -> None:
    path, right = publish(root), TEXT.encode()
    step = len(right) // 20
    damaged = [right[: i * step] for i in range(20)]
    for i in range(40):
        at, bit = divmod(i * 7919 % (len(right) * 8), 8)
        damaged.append(right[:at] + bytes([right[at] ^ 1 << bit]) + right[at + 1 :])
    status = path.stat()
    for content in damaged:
        assert content != right
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a changed time must not be what is noticed
        publish(root)
        assert path.read_bytes() == right


# every sequence of uses and damages


class CacheMachine(RuleBasedStateMachine):
    """Whatever happened before, ``publish`` makes its file right and leaves the others alone."""

    keys = st.sampled_from([digest(str(i)) for i in range(3)])

    @initialize()
    def start(self) -> None:
        self.base = Path(tempfile.mkdtemp())
        self.root = self.base / "root"
        self.right: set[str] = set()  # the keys whose entries are right
        self.unknown: set[str] = set()  # those whose entries were damaged

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    def path(self, key: str) -> Path:
        return SourceCache(self.root).path("mlp", key)

    @rule(key=keys)
    def publish(self, key: str) -> None:
        publish(self.root, key=key, text=TEXT + key)
        self.right.add(key)
        self.unknown.discard(key)

    @rule(key=keys, what=st.sampled_from(sorted(IN_ITS_PLACE)), file=st.sampled_from(["kernel.py", "manifest.json"]))
    def damage(self, key: str, what: str, file: str) -> None:
        if key in self.right:
            self.path(key).with_name(file).unlink()
            IN_ITS_PLACE[what](self.path(key).with_name(file))
            self.right.discard(key)
            self.unknown.add(key)

    @rule(key=keys)
    def evict(self, key: str) -> None:
        shutil.rmtree(self.path(key).parent, ignore_errors=True)
        self.right.discard(key)
        self.unknown.discard(key)

    @rule()
    def evict_all(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.right.clear()
        self.unknown.clear()

    @rule(key=keys)
    def present(self, key: str) -> None:
        if key not in self.unknown:
            assert SourceCache(self.root).present("mlp", key) == (key in self.right)

    @invariant()
    def right_entries_are_right(self) -> None:
        for key in self.right:
            assert self.path(key).read_text("utf-8") == TEXT + key


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase
