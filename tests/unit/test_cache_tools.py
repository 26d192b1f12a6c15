"""`mlpdsl cache`: what it says about a cache, whatever somebody put there, and that it removes nothing but the cache's own."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import MLPSpec, cache_tools, cli, cli_cache
from mlpdsl.cache import SourceCache, digest
from mlpdsl.cache_info import info

ROOT = Path(__file__).resolve().parents[2]
SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
OTHER = MLPSpec(dims=(32, 64, 32), activation="gelu")
SECRET = "the secret of somebody else"

Done = tuple[int, str, str]
Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Turn a hang (an open that waits on a FIFO) into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail("hung for 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setattr(cache_tools, "_YOUNG", 0.0)  # nobody else is at work here, and waiting for them takes time
    return tmp_path / "root"


@pytest.fixture
def run(root: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def run(*args: str) -> Done:
        status = cli.main(["cache", *args])
        out, err = capsysbinary.readouterr()
        assert b"Traceback" not in err
        return status, out.decode(), err.decode()

    return run


def made(spec: MLPSpec = SPEC, target: str = "sm_90") -> Path:
    """The directory of a new entry."""
    return mlpdsl.generate(spec, target=target).path.parent


def rewrite(entry: Path, **changes: object) -> Path:
    """Change fields of a manifest; where the name or key changes, the directory follows."""
    manifest = json.loads((entry / "manifest.json").read_text()) | changes
    (entry / "manifest.json").write_text(json.dumps(manifest))
    return (
        entry.rename(entry.with_name(f"{manifest['name']}-{str(manifest['key'])[:16]}"))
        if {"name", "key"} & set(changes)
        else entry
    )


def forged(entry: Path, text: str) -> Path:
    """An entry with another text, whose manifest agrees."""
    (entry / "kernel.py").write_text(text)
    return rewrite(entry, sha256=hashlib.sha256(text.encode()).hexdigest())


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


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


# what stands in a file's place


def _secret(path: Path) -> Path:
    secret = path.parents[3] / "secret"
    secret.write_text(SECRET)
    return secret


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda p: None, "is missing"),
    "a link": (lambda p: p.symlink_to(_secret(p)), "is a symbolic link"),
    "a FIFO": (lambda p: os.mkfifo(p), "is a FIFO"),
    "a directory": (lambda p: p.mkdir(), "is a directory"),
    "an endless device": (lambda p: p.symlink_to("/dev/zero"), "is a symbolic link"),
    "a huge file": (lambda p: (p.touch(), os.truncate(p, 10**12)), "has 1000000000000 bytes"),
}


@pytest.mark.parametrize("file", ["kernel.py", "manifest.json"])
@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_stands_in_a_files_place(run: Run, what: str, file: str) -> None:
    fine, entry = made(OTHER), made()
    put, because = IN_ITS_PLACE[what]
    (entry / file).unlink()
    put(entry / file)
    status, out, err = run("verify")
    assert status == 1
    assert [line.split()[:2] for line in out.splitlines()] == [["damaged", entry.name], ["ok", fine.name]]
    assert f"{file} {because}" in out
    assert "1 of 2 entries damaged" in err
    assert SECRET not in out + err
    assert run("ls")[0] == run("info")[0] == 0
    status, out, err = run("show", entry.name, *(["--manifest"] if file == "manifest.json" else []))
    assert (status, out) == (2, "")
    assert because in err
    secret = entry.parents[2] / "secret"
    status, out, err = run("clear", "--damaged", "--yes")
    assert fine.is_dir()
    assert not secret.exists() or secret.read_text() == SECRET
    if what == "a directory":
        assert (status, out) == (0, "")
        assert f"'{file}'" in err
        assert tree(entry) == [file]
    else:
        assert (status, out, err) == (0, f"removed {entry.name}\n", "")
        assert not entry.exists()


def test_an_entry_that_is_a_link_is_neither_read_nor_removed(run: Run, tmp_path: Path) -> None:
    entry = made()
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    status, out, _ = run("verify")
    assert status == 1
    assert "is a symbolic link" in out
    assert run("show", entry.name)[:2] == (2, "")
    status, out, err = run("clear", "--yes")
    assert (status, out) == (1, "")
    assert "could not be removed" in err
    assert tree(tmp_path / "elsewhere") == ["kernel.py", "manifest.json"]


@pytest.mark.parametrize("what", ["", "kernel.py", "manifest.json"])
def test_what_belongs_to_another_user(run: Run, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made()
    foreign, fstat = (entry / what).stat(), os.fstat

    def lie(fd: int) -> os.stat_result:
        status = fstat(fd)
        if (status.st_dev, status.st_ino) != (foreign.st_dev, foreign.st_ino):
            return status
        return os.stat_result([*status[:4], 4242, *status[5:10]])

    monkeypatch.setattr(os, "fstat", lie)
    status, out, _ = run("verify")
    assert status == 1
    assert "belongs to another user (uid 4242)" in out
    if what == "":
        assert run("clear", "--yes")[0] == 1
        assert tree(entry) == ["kernel.py", "manifest.json"]


# verify


def test_verify(run: Run, root: Path) -> None:
    assert run("verify")[0] == 0
    fine, old, dev, bad = made(), made(target="sm_80"), made(OTHER), made(OTHER, "sm_80")
    rewrite(old, mlpdsl="0.0.9")
    dev = rewrite(dev, key=digest("another generator"))
    (bad / "kernel.py").write_text("changed")
    status, out, _ = run("verify", "--json")
    said = json.loads(out)
    assert status == 1
    assert said["root"] == str(root)
    assert said["counts"] == {"ok": 1, "stale": 2, "damaged": 1}
    found = {e["directory"]: (e["status"], e["reason"]) for e in said["entries"]}
    assert found[fine.name] == ("ok", "")
    assert found[old.name] == ("stale", "mlpdsl 0.0.9 wrote it")
    assert found[dev.name][0] == "stale"
    assert "another generator" in found[dev.name][1]
    assert found[bad.name][0] == "damaged"
    assert "sha256" in found[bad.name][1]
    shutil.rmtree(bad)
    status, out, err = run("verify")
    assert (status, err, len(out.splitlines())) == (0, "", 3)


def test_a_forgery_is_found_by_writing_the_text_again_and_never_runs(run: Run, tmp_path: Path) -> None:
    evil = f"open({str(tmp_path / 'pwned')!r}, 'w')\n"
    entry = forged(made(), evil)
    status, out, _ = run("verify")
    assert (status, out.split()[0]) == (1, "damaged")
    assert "another text" in out
    assert run("show", entry.name) == (0, evil, "")  # it agrees with its manifest
    assert not (tmp_path / "pwned").exists()


def test_an_old_entry_is_held_against_its_manifest_too(run: Run) -> None:
    entry = rewrite(made(), mlpdsl="0.0.9")
    (entry / "kernel.py").write_text("changed")
    assert run("verify")[1].split()[0] == "damaged"


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda e: (e / "manifest.json").write_text(""), "not JSON"),
    "no JSON": (lambda e: (e / "manifest.json").write_text("import os"), "not JSON"),
    "not text": (lambda e: (e / "manifest.json").write_bytes(b"\xff\xfe{\0}\0"), "not JSON"),
    "deep": (lambda e: (e / "manifest.json").write_text("[" * 1_000_000), "not JSON"),
    "long integer": (lambda e: (e / "manifest.json").write_text('{"a": ' + "9" * 3_000_000 + "}"), "not JSON"),
    "an integer of 31 digits": (lambda e: rewrite(e, extra=10**30), "not JSON"),
    "a list": (lambda e: (e / "manifest.json").write_text("[1]"), "not a JSON object"),
    "too long": (lambda e: (e / "manifest.json").write_text(" " * 4_000_001), "the limit is"),
    "no spec": (lambda e: (e / "manifest.json").write_text('{"name": "a"}'), "does not say"),
    "name of a path": (lambda e: unnamed(e, name="../../x"), "no sensible 'name'"),
    "key no string": (lambda e: unnamed(e, key=7), "no sensible 'key'"),
    "key no digits": (lambda e: unnamed(e, key="z" * 64), "no sensible 'key'"),
    "sha256 null": (lambda e: rewrite(e, sha256=None), "no sensible 'sha256'"),
    "spec an object": (lambda e: rewrite(e, spec={"dims": [1, 2]}), "no sensible 'spec'"),
    "spec no JSON": (lambda e: rewrite(e, spec="x"), "cannot be rendered"),
    "spec of another": (lambda e: rewrite(e, spec='{"dims": [64, 128], "activation": "nope"}'), "cannot be rendered"),
    "spec too long": (lambda e: rewrite(e, spec="[" * 1_500_000), "cannot be rendered"),
    "spec with spaces": (lambda e: rewrite(e, spec=f" {SPEC.to_json()}"), "not written as mlpdsl writes it"),
    "target unknown": (lambda e: rewrite(e, target="sm_1"), "cannot be rendered"),
    "target in slang": (lambda e: rewrite(e, target="90"), "not written as mlpdsl writes it"),
    "backend unknown": (lambda e: rewrite(e, backend="os.system"), "cannot be rendered"),
    "backend a list": (lambda e: rewrite(e, backend=["triton"]), "no sensible 'backend'"),
    "another directory": (lambda e: e.rename(e.with_name("silu-1x1x1-0123456789abcdef")), "is another entry's"),
    "another's name": (lambda e: rewrite(e, name="silu-1x1x1"), "another spec's name"),
}


def unnamed(entry: Path, **changes: object) -> None:
    """Change a name or key, and leave the directory where it is."""
    manifest = json.loads((entry / "manifest.json").read_text()) | changes
    (entry / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_one_damaged_line(run: Run, what: str) -> None:
    put, because = HOSTILE[what]
    put(made())
    status, out, err = run("verify")
    assert status == 1
    assert out.startswith("damaged  ")
    assert because in out
    assert (out.count("\n"), err.count("\n")) == (1, 1)
    assert len(out) < 600
    for command in (["ls"], ["ls", "--json"], ["info"], ["clear", "--damaged", "--dry-run"]):
        assert run(*command)[0] == 0


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), ValueError("bad\nnews\x1b"), ZeroDivisionError()])
def test_whatever_rendering_raises_is_one_damaged_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    made()

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(mlpdsl.source, "source_text", fails)
    status, out, _ = run("verify")
    assert (status, out.count("\n")) == (1, 1)
    assert type(error).__name__ in out
    assert "\x1b" not in out


def test_verify_without_jinja2_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made()

    def fails(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

    monkeypatch.setattr(mlpdsl.source, "source_key", fails)
    status, out, err = run("verify")
    assert (status, out) == (2, "")
    assert "pip install jinja2" in err


def test_verify_waits_for_a_writer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_tools, "_YOUNG", 10.0)
    entry = made()
    manifest = (entry / "manifest.json").read_bytes()
    (entry / "manifest.json").unlink()
    slept: list[float] = []

    def write(seconds: float) -> None:
        slept.append(seconds)
        (entry / "manifest.json").write_bytes(manifest)

    monkeypatch.setattr(cache_tools.time, "sleep", write)
    assert (run("verify")[0], len(slept)) == (0, 1)


def test_what_vanishes_is_left_out(root: Path) -> None:
    gone = made().name
    shutil.rmtree(root / "v1" / gone)
    made(OTHER)
    assert list(cache_tools.verify(root, [gone])) == []
    assert [o.status for o in cache_tools.remove(root, [gone])] == ["gone"]
    with pytest.raises(cache_tools.DamagedError, match="another process removed it"):
        cache_tools.read(root, gone, "kernel.py")


def test_without_a_root_nothing_is_looked_for_where_one_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made().name
    monkeypatch.chdir(root / "v1")
    nowhere = root.parent / "nowhere"
    assert list(cache_tools.verify(nowhere, [entry])) == list(cache_tools.remove(nowhere, [entry])) == []
    with pytest.raises(cache_tools.DamagedError, match="removed it"):
        cache_tools.read(nowhere, entry, "kernel.py")


# clear


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
