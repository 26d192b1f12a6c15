"""A generated file that was damaged, exchanged or forged: what runs is the text, and the file is put right.

Through what a call goes through: render, compare with the file, load. `tests/unit/source_cache` holds the cache alone to the same.
"""

from __future__ import annotations

import linecache
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from mlpdsl import MLPSpec, loader, source
from mlpdsl.backends import BACKENDS
from mlpdsl.target import parse_target
from tests.faults.figures import Figures, rounds
from tests.support import INTERPRETING

triton = pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("needs Triton's compile mode", allow_module_level=True)

SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",))
TARGET = parse_target("sm_90")
EVIL = "import sys\nsys.modules['mlpdsl_test_pwned'] = sys\n"


@pytest.fixture(autouse=True)
def _own_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(root))
    sys.modules.pop("mlpdsl_test_pwned", None)
    yield
    assert "mlpdsl_test_pwned" not in sys.modules, "a foreign byte was executed"


def first_call() -> tuple[Path, str, ModuleType]:
    """The module that the first call of a new process gets, with its path and text."""
    loader._loaded.clear()
    linecache.clearcache()
    source.source_text.cache_clear()
    key, text, path = source.publish(SPEC, TARGET, "triton")
    return path, text, BACKENDS["triton"].load(path, text, key)


def constants(code: CodeType) -> tuple[object, ...]:
    return tuple(constants(c) if isinstance(c, CodeType) else c for c in (code.co_code, code.co_names, *code.co_consts))


def what_runs(module: ModuleType) -> dict[str, object]:
    """What decides a result: the text of every kernel as Triton has it, and the bytes of every launcher."""
    seen: dict[str, object] = {}
    for name, value in vars(module).items():
        if isinstance(value, triton.JITFunction):
            seen[name] = value.cache_key, value.src
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            seen[name] = constants(value.__code__)
    assert sum(isinstance(v[0], str) for v in seen.values()) > 5 and {"forward", "backward"} < set(seen)
    return seen


def flipped(data: bytes, i: int) -> bytes:
    at, bit = divmod(i * 7919 % (len(data) * 8), 8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def damaged_files(figures: Figures, item: str, damages: list[Callable[[bytes], bytes]]) -> None:
    path, text, module = first_call()
    right, manifest = what_runs(module), path.with_name("manifest.json").read_bytes()
    status = path.stat()
    for damage in damages:
        for file, content in ((path, text.encode()), (path.with_name("manifest.json"), manifest)):
            assert damage(content) != content
            file.write_bytes(damage(content))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # a changed time must not be what is noticed
        assert what_runs(first_call()[2]) == right
        assert (path.read_bytes(), path.with_name("manifest.json").read_bytes()) == (text.encode(), manifest)
    figures.note(item, files=2 * len(damages), differences=0, executed=0)


def test_files_cut_short(figures: Figures) -> None:
    cuts = rounds(20, 50)
    damaged_files(figures, "truncations", [lambda data, i=i: data[: i * len(data) // cuts] for i in range(cuts)])


def test_bit_flips(figures: Figures) -> None:
    damaged_files(figures, "bit flips", [lambda data, i=i: flipped(data, i) for i in range(rounds(25, 100))])


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda p: None,
    "an empty file": lambda p: p.write_bytes(b""),
    "the wrong file": lambda p: p.write_text(EVIL),
    "the text, and more": lambda p: p.write_text(source.source_text(SPEC, TARGET, "triton")[1] + EVIL),
    "a link to a file": lambda p: (p.with_name("elsewhere.py").write_text(EVIL), p.symlink_to("elsewhere.py")),
    "a link to nothing": lambda p: p.symlink_to("nowhere"),
    "a FIFO": lambda p: os.mkfifo(p),
    "a directory": lambda p: (p.mkdir(), (p / "__init__.py").write_text(EVIL)),
}


@pytest.mark.parametrize("file", ["kernel.py", "manifest.json"])
@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_something_else_in_its_place(what: str, file: str) -> None:
    path, _, module = first_call()
    right = path.with_name(file).read_bytes()
    path.with_name(file).unlink()
    IN_ITS_PLACE[what](path.with_name(file))
    assert what_runs(first_call()[2]) == what_runs(module)
    assert stat.S_ISREG(path.with_name(file).lstat().st_mode)
    assert path.with_name(file).read_bytes() == right
    if path.with_name("elsewhere.py").exists():
        assert path.with_name("elsewhere.py").read_text() == EVIL, "the write went through the link"


def forge(path: Path) -> None:
    """Another kernel in the file, of equal size and modification time; and compiled beside it, as Python would look for it."""
    status, text = path.stat(), path.read_text()
    forged = text.replace("tl.exp(", "tl.abs(", 1) if "tl.exp(" in text else text[:-2] + "#\n"
    assert forged != text and len(forged) == len(text)
    path.write_text(forged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cached = path.parent / "__pycache__"
    cached.mkdir(exist_ok=True)
    (cached / f"kernel.{sys.implementation.cache_tag}.pyc").write_bytes(b"not a .pyc")


AFTERWARDS: dict[str, Callable[[Path], object]] = {
    "at once": lambda path: None,
    "checked": lambda path: linecache.checkcache(),
    "read by somebody": lambda path: linecache.getlines(str(path)),
}


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_module_forged_at_equal_size_and_time(when: str, afterwards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is rendered, between render and load, and after it was loaded but before Triton compiles."""
    path, text, module = first_call()
    right, real = what_runs(module), source.publish

    def forging(*args: Any) -> tuple[str, str, Path]:
        if when == "before":
            forge(path)
            AFTERWARDS[afterwards](path)
        made = real(*args)
        assert made[2].read_text() == text
        if when == "between":
            forge(path)
            AFTERWARDS[afterwards](path)
        return made

    monkeypatch.setattr(source, "publish", forging)
    _, _, module = first_call()
    if when == "after":
        forge(path)
        AFTERWARDS[afterwards](path)
    assert what_runs(module) == right
    assert all(v[1] in text for v in what_runs(module).values() if isinstance(v[0], str))


def test_the_forgery_would_run_if_the_file_were_read() -> None:
    """The control."""
    path, _, module = first_call()
    forge(path)
    forged = loader.load(path.with_name("forged.py"), path.read_text(), "f" * 64)
    assert what_runs(forged) != what_runs(module)
