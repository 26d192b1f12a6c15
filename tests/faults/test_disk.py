"""The cache when the disk does not work.

What can be had from the kernel itself (a full file system, a read-only one, limits, another user) is; the rest is simulated by
making a system call fail. What needs the process to itself runs as a script in a fresh interpreter.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpdsl import generate, source
from mlpdsl.cache import SourceCache, digest
from mlpdsl.target import parse_target
from tests.faults import workers
from tests.faults.figures import Figures
from tests.faults.tools import EVIL, KEY, TEXT, degraded, litter, publish, run_script, warnings_in

# a system call fails


def fail(error: int) -> Callable[..., object]:
    def failing(*_args: object, **_kwargs: object) -> object:
        raise OSError(error, os.strerror(error))

    return failing


def half_a_write(error: int) -> Callable[[int, memoryview], int]:
    """What a disk that fills up does: the first write is short, the second fails."""
    real, calls = os.write, iter([False, True])

    def writing(file: int, data: memoryview) -> int:
        if next(calls, True):
            raise OSError(error, os.strerror(error))
        return real(file, data[: len(data) // 2])

    return writing


def no_new_files(error: int) -> Callable[..., int]:
    real = os.open

    def opening(path: str, flags: int, *args: int, **kwargs: int | None) -> int:
        if flags & os.O_CREAT:
            raise OSError(error, os.strerror(error))
        return real(path, flags, *args, **kwargs)

    return opening


STEPS: dict[str, tuple[str, Callable[[int], Callable[..., object]]]] = {
    "make the root": ("makedirs", fail),
    "make a directory": ("mkdir", fail),
    "open anything": ("open", fail),
    "create a file": ("open", no_new_files),
    "look at a file": ("fstat", fail),
    "write": ("write", fail),
    "write the rest": ("write", half_a_write),
    "sync": ("fsync", fail),
    "move": ("replace", fail),
}


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO", "EMFILE", "ENOENT", "ESTALE"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_fails(root: Path, step: str, error: str, caplog: pytest.LogCaptureFixture) -> None:
    number = getattr(errno, error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, STEPS[step][0], STEPS[step][1](number))
        path = degraded(root, caplog, os.strerror(number))
        assert not SourceCache(root).present("mlp", KEY)
    assert not path.exists()
    assert litter(root) == []
    publish(root)  # the disk is back
    assert path.read_text() == TEXT


@pytest.mark.parametrize("step", ["create a file", "write", "write the rest", "sync", "move"])
def test_a_file_that_cannot_be_repaired_is_not_run(root: Path, step: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(root).write_text(EVIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, STEPS[step][0], STEPS[step][1](errno.ENOSPC))
        path = degraded(root, caplog, "No space left")
    assert path.read_text() == EVIL  # or the test says nothing


def test_reading_fails_and_writing_does_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(root)
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "read", fail(errno.EIO))
    publish(root)
    monkeypatch.undo()
    assert path.read_text() == TEXT
    assert path.stat().st_ino != inode


def test_an_entry_evicted_while_it_is_written_is_written_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, evictions = os.fsync, iter(range(3))

    def evict(file: int) -> None:
        real(file)
        if next(evictions, None) is not None:
            shutil.rmtree(root)

    monkeypatch.setattr(os, "fsync", evict)
    path = publish(root)
    assert path.read_text() == TEXT
    assert SourceCache(root).present("mlp", KEY)
    assert next(evictions, None) is None
    assert warnings_in(caplog) == []


def test_an_interrupt_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(root)
    assert [p for p in root.rglob("*") if not p.is_dir()] == []


# roots that cannot be


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    path = degraded(None, caplog, "no home directory was found")
    assert path.is_absolute()
    assert not any(p.exists() for p in list(path.parents)[:-1])


def impossible_roots() -> dict[str, Callable[[Path], tuple[Path, str]]]:
    def file(base: Path) -> tuple[Path, str]:
        (base / "file").write_text("x")
        return base / "file", "not a directory"

    def below_a_file(base: Path) -> tuple[Path, str]:
        return file(base)[0] / "root", "Not a directory"

    def loop(base: Path) -> tuple[Path, str]:
        (base / "loop").symlink_to("loop")
        return base / "loop", "symbolic link"

    return {
        "a file": file,
        "below a file": below_a_file,
        "a loop": loop,
        "a name too long": lambda base: (base / ("x" * 300), "name too long"),
        "a path too long": lambda base: (base.joinpath(*["x" * 200] * 30), "name too long"),
        "a NUL": lambda base: (base / "a\0b", "NUL"),
        "not UTF-8": lambda base: (base / "a\udcffb", "UTF-8"),
        "a FIFO": lambda base: (os.mkfifo(base / "fifo"), (base / "fifo", "not a directory"))[1],
        "in /proc": lambda base: (Path("/proc/self/mlpdsl"), "/proc/self/mlpdsl"),
        "a device": lambda base: (Path("/dev/null"), "not a directory"),
    }


@pytest.mark.parametrize("what", impossible_roots())
def test_an_impossible_root(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    root, because = impossible_roots()[what](tmp_path)
    assert not SourceCache(root).present("mlp", KEY)
    path = degraded(root, caplog, because)
    str(path).encode()  # Triton needs it to be text


def test_one_warning_a_root(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("x")
    for _ in range(3):
        publish(tmp_path / "a")
        publish(tmp_path / "b")
    assert len(warnings_in(caplog)) == 2


def test_one_warning_among_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda _: publish(tmp_path / "file"), range(64)))
    assert len(warnings_in(caplog)) == 1


def test_the_warning_is_seen_without_any_configuration_and_warnings_as_errors_do_not_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    _, stderr = run_script("publish(1); publish(2)", tmp_path / "file")
    assert stderr.count("mlpdsl cannot keep generated source") == 1
    assert len(stderr.splitlines()) == 1


# what the kernel itself refuses


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=64k,mode=0755", "tmpfs", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system(tmpfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.suppress(OSError), open(tmpfs / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(b"x" * 4096)
    path = degraded(tmpfs / "root", caplog, "No space left")
    assert litter(tmpfs) == []
    (tmpfs / "ballast").unlink()
    publish(tmpfs / "root")
    assert path.read_text() == TEXT


def test_a_file_system_that_fills_up(
    tmpfs: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """64 KB hold a file or two of the specs that are generated; all of them run."""
    specs = workers.specs(8)
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmpfs / "root"))
    made = [generate(spec, target="sm_90") for spec in specs]
    kept = [m for m in made if m.path.exists()]
    assert 0 < len(kept) < len(made)
    assert all(m.path.read_text("utf-8") == m.text for m in kept)
    assert [source.source_text.__wrapped__(spec, parse_target("sm_90"), "triton")[1] for spec in specs] == [m.text for m in made]
    assert len(warnings_in(caplog)) == 1
    assert "No space left" in warnings_in(caplog)[0]
    assert litter(tmpfs) == []
    figures.note("full disk", size_kb=64, texts=len(made), kept=len(kept), warnings=1, differences=0)


def test_a_read_only_file_system(tmpfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = publish(tmpfs / "root")
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    publish(tmpfs / "root")
    assert SourceCache(tmpfs / "root").present("mlp", KEY)
    assert warnings_in(caplog) == []  # what is there serves
    SourceCache(tmpfs / "root").publish("mlp", digest("other"), TEXT, {})
    assert "Read-only file system" in warnings_in(caplog)[0]
    assert path.read_text() == TEXT


def test_a_write_that_stops_in_the_middle(root: Path) -> None:
    stdout, stderr = run_script(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        path = publish(1)
        assert len(text_of(1)) > 10_000 and not path.exists()
        print(sorted(os.listdir(path.parent)))
        """,
        root,
    )
    assert stdout == "[]\n"
    assert "File too large" in stderr


def test_no_descriptors_left(root: Path) -> None:
    _, stderr = run_script(
        """
        logging.lastResort.emit(logging.makeLogRecord({"msg": "warmed up"}))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")), 20))
        while True:
            try: os.dup(1)
            except OSError: break
        publish(1)
        """,
        root,
    )
    assert "Too many open files" in stderr


AS_NOBODY = """
import encodings.idna, encodings.ascii, linecache, traceback
def as_nobody():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_root_of_another_user_and_one_that_may_not_be_entered(open_root: Path) -> None:
    open_root.mkdir(mode=0o755)
    os.chown(open_root, 4242, 4242)
    _, stderr = run_script(AS_NOBODY + "as_nobody(); publish(1)", open_root)
    assert "belongs to another user (uid 4242)" in stderr
    os.chown(open_root, 0, 0)
    open_root.chmod(0o700)
    _, stderr = run_script(AS_NOBODY + "as_nobody(); publish(1)", open_root)
    assert "Permission denied" in stderr
    assert list(open_root.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_an_administrators_cache_is_read_and_not_written(open_root: Path) -> None:
    script = """
    old = os.umask(0o022)
    publish(1)
    for p in [root, *root.rglob("*")]:
        p.chmod(0o755 if p.is_dir() else 0o644)
    as_nobody()
    assert SourceCache(root).present("mlp", digest("1"))
    publish(1)
    print("so far so good", file=sys.stderr)
    publish(2)
    """
    _, stderr = run_script(AS_NOBODY + textwrap.dedent(script), open_root)
    before, after = stderr.split("so far so good\n")
    assert before == ""
    assert "Permission denied" in after
    assert len(list(open_root.rglob("kernel.py"))) == 1
