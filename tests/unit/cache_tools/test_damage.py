"""Whatever somebody put into a cache: what `mlpdsl cache` says of it, `verify` first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import cache_tools
from mlpdsl.cache import digest
from tests.unit.cache_tools.tools import OTHER, SECRET, SPEC, Run, forged, made, rewrite, tree

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
