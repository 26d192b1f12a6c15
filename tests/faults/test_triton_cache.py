"""Triton's own cache, damaged: the right binary runs, after one warning; and a compiler's error is still a compiler's error.

Without a GPU: binaries for sm_90 are compiled, read back and compared, and loading them is a stand-in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.figures import Figures, rounds
from tests.faults.tools import warnings_in
from tests.support import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("needs Triton's compile mode", allow_module_level=True)

from triton.errors import TritonError

from mlpdsl import triton_cache
from tests.faults.triton_tools import Cache, flip


def in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def metadata(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    return change


FILES = {"group": "__grp__add.json", "metadata": "add.json", "binary": "add.cubin", "ptx": "add.ptx", "ttir": "add.ttir"}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "garbage": lambda p: p.write_bytes(bytes(range(128, 256))),
    "empty": lambda p: p.write_bytes(b""),
    "half": half,
    "missing": lambda p: p.unlink(),
    "a directory": in_its_place,
    "a bit flipped": lambda p: flip(p, 90),
    "{}": lambda p: p.write_text("{}"),
    "[]": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "a dangling link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file(cache: Cache, file: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    DAMAGE[damage](cache.entry / FILES[file])
    made = cache.obtain()
    assert made.kernel == right.kernel
    assert triton_cache.fingerprint(made) == triton_cache.fingerprint(right)
    assert cache.calls <= 2 and cache.loads == 1
    # What nothing is launched by, or Triton replaces by itself, needs no word.
    assert len(warnings_in(caplog)) == cache.calls - 1
    if file == "binary" or (file == "metadata" and damage not in ("missing", "a dangling link")):
        assert cache.calls == 2 or damage == "a dangling link"
    if cache.calls == 2:
        for words in ("results are unaffected", repr(str(cache.triton)), "the kernel add", "TRITON_CACHE_DIR"):
            assert words in caplog.text
    caplog.clear()
    triton_cache._warned.clear()
    assert cache.obtain().kernel == right.kernel
    if damage != "a directory":  # which nothing can be moved over
        assert (cache.calls, warnings_in(caplog)) == (1, []), "the damage was not repaired"


def test_what_triton_makes_of_a_flipped_binary_by_itself(cache: Cache) -> None:
    """The control: without the digest, the flipped bit would be launched."""
    right = cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    assert cache.compile().kernel != right.kernel


@pytest.mark.parametrize(
    "change", [('"num_warps": 4', '"num_warps": 8'), ('"shared": 0', '"shared": 1'), ('"name": "add"', '"name": "adx"')]
)
def test_metadata_that_a_launch_goes_by(cache: Cache, change: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    metadata(*change)(cache.entry / "add.json")
    assert cache.compile().metadata != right.metadata  # or the test says nothing
    assert cache.obtain().metadata == right.metadata
    assert len(warnings_in(caplog)) == 1


def test_bit_flips_and_truncations_of_the_binary(cache: Cache, figures: Figures, caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    file = cache.entry / "add.cubin"
    size = len(right.kernel)
    flips, cuts = rounds(15, 100), rounds(10, 50)
    damages: list[Callable[[], object]] = [lambda i=i: flip(file, i * 7919, i % 8) for i in range(flips)]
    damages += [lambda i=i: os.truncate(file, i * size // cuts) for i in range(cuts)]
    for damage in damages:
        damage()
        assert file.read_bytes() != right.kernel
        assert cache.obtain().kernel == right.kernel == file.read_bytes()
    assert len(warnings_in(caplog)) == 1
    figures.note("triton cache", flips=flips, truncations=cuts, wrong_binaries=0, warnings=1)


def test_another_kernels_binary(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    right, other = cache.obtain(), cache.compile(block=256)
    files = {Path(p).name: Path(p) for p in other.metadata_group.values()}
    for name in ("add.cubin", "add.json"):
        shutil.copy(files[name], Path(right.metadata_group[name]))
    assert cache.compile().kernel == other.kernel
    assert cache.obtain().kernel == right.kernel
    assert len(warnings_in(caplog)) == 1


UNUSABLE: dict[str, Callable[[Cache], object]] = {
    "the root is a file": lambda c: (shutil.rmtree(c.triton), c.triton.write_text("in the way")),
    "the entry is a file": lambda c: (e := c.entry, shutil.rmtree(e), e.write_text("in the way")),
    "the root is a loop": lambda c: (shutil.rmtree(c.triton), c.triton.symlink_to(c.triton)),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_directory_that_cannot_be_used(cache: Cache, what: str, caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    UNUSABLE[what](cache)
    for _ in range(3):
        assert cache.obtain().kernel == right.kernel
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("function", ["read_text", "read_bytes"])
def test_files_that_cannot_be_read(
    cache: Cache, function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right, real = cache.obtain(), getattr(Path, function)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.is_relative_to(cache.triton):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, function, refuse)
    assert cache.obtain().kernel == right.kernel
    assert "Permission denied" in warnings_in(caplog)[0]


@pytest.mark.parametrize("step", ["makedirs", "replace"])
def test_a_full_disk(cache: Cache, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = getattr(os, step)

    def full(*args: Any, **kwargs: Any) -> Any:
        if str(args[-1] if step == "replace" else args[0]).startswith(str(cache.triton)):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, step, full)
    assert cache.obtain().asm["ptx"]
    assert "No space left" in warnings_in(caplog)[0]


# errors that are not the cache's


def test_a_compilers_error_comes_out_once_as_it_is(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TritonError, match="never compiles"):
        cache.obtain(name="wrong")
    assert (cache.calls, warnings_in(caplog)) == (1, [])


def test_an_error_that_an_empty_cache_does_not_cure_comes_out_as_it_was(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    errors = [RuntimeError("first"), RuntimeError("second")]
    raised = iter(errors)

    def step() -> Any:
        raise next(raised)

    with pytest.raises(RuntimeError) as caught:
        triton_cache.obtain(step, lambda made: None, lambda made: None)
    assert caught.value is errors[0]
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert next(raised, None) is None
    assert warnings_in(caplog) == []


def test_a_right_binary_that_does_not_load_is_not_compiled_again(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_made: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    cache.obtain()
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.obtain(refuse)
    assert (cache.calls, warnings_in(caplog)) == (1, [])


def test_an_interrupt_is_not_held_up(cache: Cache) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        triton_cache.obtain(interrupt, lambda made: None, lambda made: None)
