"""Triton has a launcher before its binary is loaded, and hooks of the whole process: threads and forks meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.tools import warnings_in
from tests.support import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("needs Triton's compile mode", allow_module_level=True)

from triton import knobs

from mlpdsl import launch, triton_cache
from tests.faults.triton_tools import Cache, Driver, flip


@pytest.fixture
def functions(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each launch is given for the loaded function."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launch, "_compiled", {})
    found: list[Any] = []
    driver.launcher_cls = lambda src, metadata: lambda *args: found.append(args[4])
    return found


def launched(cache: Cache) -> None:
    launch.run(cache.module.add, (2,), {"num_warps": 4}, torch.zeros(256), torch.zeros(256), 256, 128)


def forget(cache: Cache) -> None:
    """As in a new process."""
    cache.module.add.device_caches.clear()
    launch._compiled.clear()


def in_two_threads(call: Callable[[], object], second: threading.Event, leave: threading.Event) -> list[BaseException]:
    """One calls; the other when `second` is set; `leave` is set once that one has had the time to do harm."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    first, other = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    second.wait(60)
    other.start()
    other.join(0.5)
    leave.set()
    first.join()
    other.join()
    return raised


def test_a_thread_launches_while_another_loads(
    cache: Cache, driver: Driver, functions: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver loads without the interpreter's lock."""
    loading, leave, load = threading.Event(), threading.Event(), driver.load_binary

    def slowly(*args: Any) -> Any:
        loading.set()
        leave.wait(60)
        return load(*args)

    monkeypatch.setattr(driver, "load_binary", slowly)
    assert in_two_threads(lambda: launched(cache), loading, leave) == []
    assert functions == [2, 2]


def test_a_thread_meets_what_another_fails_to_load(
    cache: Cache, driver: Driver, functions: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody records a binary that was not loaded, and either thread gets the cure."""
    launched(cache)
    (right,) = driver.loaded
    shutil.rmtree(cache.root)
    forget(cache)
    flip(cache.entry / "add.cubin", 2000)
    loading, leave, load = threading.Event(), threading.Event(), driver.load_binary

    def refuse(name: str, binary: bytes, *rest: Any) -> Any:
        if binary != right:
            loading.set()
            leave.wait(60)
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        return load(name, binary, *rest)

    monkeypatch.setattr(driver, "load_binary", refuse)
    assert in_two_threads(lambda: launched(cache), loading, leave) == []
    assert functions == [2, 2, 2]
    assert len(cache.records()) == 1
    assert len(warnings_in(caplog)) == 1


def test_a_load_that_failed_for_a_passing_reason_is_made_up_for(
    cache: Cache, driver: Driver, functions: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(cache)
    forget(cache)
    load, failures = driver.load_binary, [RuntimeError("Triton Error [CUDA]: out of memory")]

    def once(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return load(*args)

    monkeypatch.setattr(driver, "load_binary", once)
    with pytest.raises(RuntimeError, match="out of memory"):
        launched(cache)
    launched(cache)
    assert functions == [2, 2]


def test_a_hook_that_somebody_puts_back(cache: Cache, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who saved Triton's hooks while we asked puts ours back when it is done, and it refuses nobody then."""
    kernel = cache.module.add
    asking, saved, done = threading.Event(), threading.Event(), threading.Event()
    run, main = type(kernel).run, threading.current_thread()

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is main and not asking.is_set():
            asking.set()
            saved.wait(60)
        return run(self, *args, **kwargs)

    def user() -> None:
        asking.wait(60)
        with knobs.runtime.scope():
            saved.set()
            done.wait(60)

    monkeypatch.setattr(type(kernel), "run", slowly)
    thread = threading.Thread(target=user)
    thread.start()
    args = (torch.zeros(256), torch.zeros(256), 256, 128)
    try:
        assert triton_cache._is_new(kernel, (2,), {}, args)
        done.set()
        thread.join()
        assert triton_cache.compiled(kernel, (2,), {}, args) is not None
    finally:
        done.set()
        knobs.runtime.jit_cache_hook = None
        del knobs.runtime.jit_cache_hook


def test_a_process_forked_meanwhile_leaves_the_directory_alone(cache: Cache) -> None:
    with triton_cache._private_directory() as place:
        child = os.fork()
        if child == 0:
            try:
                weakref.finalize._exitfunc()  # what the end of a process calls
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert Path(place).is_dir()
    assert not Path(place).exists()
