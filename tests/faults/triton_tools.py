"""Triton's cache and ours in directories of one test, and a kernel that is compiled into them without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from mlpdsl import loader, triton_cache
from mlpdsl.cache import digest

KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1.0, mask=i < n)


@triton.jit
def wrong(x, y, n, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "this kernel never compiles")
"""
TARGET = GPUTarget("cuda", 90, 32)


class Cache:
    """Triton's cache and ours in directories of one test, and what it takes to compile one kernel into them."""

    def __init__(self, base: Path) -> None:
        self.base, self.triton, self.root = base, base / "triton", base / "root"
        self.module = loader.load(base / "kernel.py", KERNEL, digest("triton cache"))
        self.calls = self.loads = self.forgotten = 0

    def compile(self, name: str = "add", block: int = 128, module: Any = None) -> Any:
        """As Triton does it, for no device."""
        signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
        function = getattr(module or self.module, name)
        return triton.compile(triton.compiler.ASTSource(function, signature, {"BLOCK": block}), target=TARGET)

    def obtain(self, load: Callable[[Any], object] = lambda made: None, **what: Any) -> Any:
        """As the first launch of a new process does it."""
        self.calls = self.loads = self.forgotten = 0

        def step() -> Any:
            self.calls += 1
            return self.compile(**what)

        def counted(made: Any) -> None:
            self.loads += 1
            load(made)

        def forget(_made: Any) -> None:
            self.forgotten += 1

        return triton_cache.obtain(step, counted, forget)

    @property
    def entry(self) -> Path:
        (file,) = self.triton.glob("*/add.cubin")
        return file.parent

    def records(self) -> list[str]:
        return sorted(p.name for p in self.root.glob("binaries-v1/*"))


def own_caches(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """Both caches below `base`, as no process has used them; then a look at whether Triton's settings are as they were."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(base / "triton"))
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(base / "root"))
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(triton_cache, "_warned", {})
    before = dict(vars(triton.knobs.cache))
    yield Cache(base)
    assert vars(triton.knobs.cache) == before, "the knobs were not put back"
    assert os.environ["TRITON_CACHE_DIR"] == str(base / "triton")


def flip(path: Path, at: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
