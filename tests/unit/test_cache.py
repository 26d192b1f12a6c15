"""The cache when the disk works: names, contents, repair, and what it refuses to write to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlpdsl import cache as cache_module
from mlpdsl.cache import SourceCache, default_root, digest

TEXT = "# a kernel, with a letter beyond ASCII: λ\n" + "".join(f"x{i} = {i}\n" for i in range(200))
KEY = digest("spec", "sm_90")
FIELDS: dict[str, object] = {"target": "sm_90", "versions": {"jinja2": "3.1"}}


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_warned", {})


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Turn a hang (an open that waits on a FIFO) into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("hung for 10 s")  # no OSError (as TimeoutError is): the cache would take it for the disk's

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def publish(root: Path | None, name: str = "mlp", key: str = KEY, text: str = TEXT) -> Path:
    return SourceCache(root).publish(name, key, text, FIELDS)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mlpdsl" and r.levelno >= logging.WARNING]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# digest


def test_digest_is_sha256_of_length_prefixed_parts() -> None:
    assert digest("ab", "λ") == hashlib.sha256(b"\0\0\0\0\0\0\0\2ab\0\0\0\0\0\0\0\2\xce\xbb").hexdigest()


def test_digest_keeps_parts_apart() -> None:
    parts = [(), ("",), ("", ""), ("abc",), ("ab", "c"), ("a", "bc"), ("a", "b", "c"), ("c", "ab"), ("\ud800",)]
    assert len({digest(*p) for p in parts}) == len(parts)


# default_root


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MLPDSL_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"MLPDSL_CACHE_DIR": "~/a", "HOME": "/c"}, "/c/a"),
        ({"MLPDSL_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/mlpdsl"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"HOME": "/"}, None),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
    ],
)
def test_default_root(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_root() == (None if expected is None else Path(expected))


@pytest.mark.parametrize("answer", [RuntimeError("no home"), KeyError("uid"), "~"])
def test_default_root_of_a_user_that_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch, answer: Exception | str) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def expanduser(_path: str) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os.path, "expanduser", expanduser)
    assert default_root() is None


def test_default_root_when_the_working_directory_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("MLPDSL_CACHE_DIR", "relative")
    assert default_root() is None


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = SourceCache()
    for name in ("one", "two"):
        monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / name))
        assert not cache.present("mlp", KEY)
        path = cache.publish("mlp", KEY, TEXT, FIELDS)
        assert path.is_relative_to(tmp_path / name)
        assert path.read_text("utf-8") == TEXT
        assert cache.present("mlp", KEY)


# what is on the disk


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


# what is refused


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
