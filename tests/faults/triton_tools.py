"""Triton's cache and ours in directories of one test, and a kernel that is compiled into them without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver

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


class Driver:
    """A device of architecture sm_90 that is not there: what Triton asks of it up to a launch."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.utils = self
        self.launcher_cls = lambda src, metadata: self.launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append(binary)
        return 1, 2, 32, 0, 1024

    def launch(self, *args: Any) -> None:
        raise AssertionError("it was launched")


def own_driver() -> Iterator[Driver]:
    """The driver that Triton asks in one test."""
    before = dict(vars(triton_driver))
    fake = Driver()
    triton_driver.set_active(fake)
    yield fake
    vars(triton_driver).clear()
    vars(triton_driver).update(before)


def flip(path: Path, at: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
