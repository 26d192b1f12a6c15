"""What mlpdsl knows of the binaries in Triton's cache, when many meet a damaged one at once, and what the first launch does."""

from __future__ import annotations

import copy
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlpdsl import loader
from mlpdsl.cache import digest
from tests.faults.tools import warnings_in
from tests.support import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("needs Triton's compile mode", allow_module_level=True)

from mlpdsl import triton_cache
from tests.faults.triton_tools import KERNEL, Cache, Driver, flip


def test_a_binary_met_before_any_record_is_taken_on_trust_unless_it_does_not_load(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    right = cache.compile()
    flip(cache.entry / "add.cubin", 2000)

    def load(made: Any) -> None:
        if made.kernel != right.kernel:
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    assert cache.obtain(load).kernel == right.kernel
    assert (cache.calls, cache.loads, cache.forgotten) == (2, 2, 1)
    assert "device kernel image is invalid" in warnings_in(caplog)[0]
    assert len(cache.records()) == 1, "what did not load was recorded"
    shutil.rmtree(cache.root)
    flip(cache.entry / "add.cubin", 2000)
    flipped = cache.obtain()
    assert flipped.kernel != right.kernel
    assert len(cache.records()) == 1
    cache.entry.joinpath("add.cubin").write_bytes(right.kernel)
    cache.obtain()
    assert cache.calls == 2  # from now on it cannot change unseen


def test_one_kernel_under_two_paths_is_no_damage(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """Triton's hash leaves out the path of the source, which the line table holds."""
    other = loader.load(cache.base / "a" / "longer" / "path.py", KERNEL, digest("triton cache"))
    first = cache.obtain()
    shutil.rmtree(cache.triton)
    second = cache.obtain(module=other)
    assert first.hash == second.hash and first.kernel != second.kernel  # or the test says nothing
    assert len(cache.records()) == 2
    for module in (cache.module, other):
        assert cache.obtain(module=module).kernel == second.kernel
        assert cache.calls == 1
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("root", ["", "open", "file"])
def test_without_records_what_raises_is_still_cured(
    cache: Cache, root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if root:
        monkeypatch.setenv("MLPDSL_CACHE_DIR", str(cache.base / root))
        (cache.base / "open").mkdir()
        (cache.base / "open").chmod(0o777)
        (cache.base / "file").write_text("in the way")
    else:
        for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/")
    right = cache.obtain()
    assert cache.obtain().kernel == right.kernel and cache.calls == 1
    (cache.entry / "add.json").write_text("{}")
    assert cache.obtain().kernel == right.kernel
    assert len(warnings_in(caplog)) == 1
    assert not list(cache.base.rglob("binaries-v1"))


def test_a_record_is_a_name_and_nothing_else(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    (name,) = cache.records()
    assert (cache.root / "binaries-v1" / name).stat().st_size == 0
    assert name.endswith(triton_cache.fingerprint(right))
    (cache.root / "binaries-v1" / name).rename(cache.root / "binaries-v1" / (name[:65] + "0" * 64))  # a damaged record
    assert cache.obtain().kernel == right.kernel
    assert (cache.calls, len(cache.records()), warnings_in(caplog)) == (2, 2, [])


# many at once


def test_threads_meet_damage_together(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    right = cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    barrier, found = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        found.append(triton_cache.obtain(cache.compile, lambda made: None, lambda made: None).kernel)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [right.kernel] * 8
    assert len(warnings_in(caplog)) == 1


def test_another_thread_does_not_compile_in_the_private_directory(cache: Cache) -> None:
    cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    elsewhere: list[str] = []

    def step() -> Any:
        if triton_cache._private is not None and not elsewhere:
            thread = threading.Thread(target=lambda: elsewhere.extend(cache.compile(block=512).metadata_group.values()))
            thread.start()
            thread.join()
        return cache.compile()

    triton_cache.obtain(step, lambda made: None, lambda made: None)
    assert elsewhere and all(Path(p).is_relative_to(cache.triton) for p in elsewhere)


def test_a_fork_in_the_middle(cache: Cache) -> None:
    right = cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    statuses = []

    def step() -> Any:
        if triton_cache._private is not None and not statuses:
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    status = 0 if cache.obtain().kernel == right.kernel else 2
                finally:
                    os._exit(status)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return cache.compile()

    assert triton_cache.obtain(step, lambda made: None, lambda made: None).kernel == right.kernel
    assert statuses == [0]


# a launch


def test_the_variant_of_a_launch(cache: Cache, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    x, y = torch.zeros(256), torch.zeros(256)

    def first_launch() -> Any:
        kernel = loader.load(cache.base / f"{os.urandom(8).hex()}.py", KERNEL, digest("triton cache")).add
        return kernel, triton_cache.compiled(kernel, (2,), {"num_warps": 2}, (x, y, 256, 128))

    kernel, right = first_launch()
    assert right.metadata.num_warps == 2
    assert right.metadata_group["add.cubin"].startswith(str(cache.triton))
    assert triton_cache.compiled(kernel, (2,), {"num_warps": 2}, (x, y, 256, 128)) is right
    assert driver.loaded == [right.kernel]
    flip(cache.entry / "add.cubin", 2000)
    kernel, made = first_launch()
    assert len(warnings_in(caplog)) == 1
    assert driver.loaded == [right.kernel, made.kernel], "the flipped binary was loaded"
    assert [v for tables in kernel.device_caches.values() for v in tables[0].values()] == [made]
    assert triton_cache.compiled(kernel, (2,), {"num_warps": 2}, (x, y, 256, 128)) is made


def test_threads_launch_one_kernel_whose_binary_is_damaged(cache: Cache, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    """They share what Triton remembers in memory, and one of them compiles while the others wait."""
    x, y = torch.zeros(256), torch.zeros(256)
    kernel = cache.module.add
    right = triton_cache.compiled(kernel, (2,), {}, (x, y, 256, 128)).kernel
    for _ in range(5):
        for file in cache.triton.glob("*/add.cubin"):
            flip(file, 2000)
        kernel.device_caches.clear()
        kernel.device_caches[0]
        driver.loaded.clear()
        barrier, found, raised = threading.Barrier(8), [], []

        def work(barrier: threading.Barrier = barrier, found: list = found, raised: list = raised) -> None:
            barrier.wait()
            try:
                found.append(triton_cache.compiled(kernel, (2,), {}, (x, y, 256, 128)).kernel)
            except BaseException as error:
                raised.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert raised == []
        assert set(found) == set(driver.loaded) == {right}
    assert len(warnings_in(caplog)) == 1


def test_another_thread_leaves_a_damaged_binary_in_memory_meanwhile(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """It read the file when this thread did, and Triton remembers it only after this thread's was forgotten."""
    right = cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    mine, others = cache.compile(), [cache.compile(), cache.compile()]
    assert len({id(made) for made in (mine, *others)}) == 3 and mine.kernel != right.kernel
    remembered, loaded, forgotten = [mine, *others], [], []
    again = triton_cache.obtain(lambda: remembered.pop(0) if remembered else cache.compile(), loaded.append, forgotten.append)
    assert again.kernel == right.kernel
    assert loaded == [again] and forgotten == [mine, *others]
    assert len(cache.records()) == 1, "what was damaged was recorded"
    assert cache.entry.joinpath("add.cubin").read_bytes() == right.kernel
    assert len(warnings_in(caplog)) == 1


def test_somebody_keeps_triton_from_compiling_anew(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.obtain()
    flip(cache.entry / "add.cubin", 2000)
    damaged, loaded = cache.compile(), []
    with pytest.raises(RuntimeError, match="Triton did not compile the kernel add anew"):
        triton_cache.obtain(lambda: copy.copy(damaged), loaded.append, lambda made: None)
    assert loaded == [] and len(cache.records()) == 1
    assert warnings_in(caplog) == []


def test_a_hook_that_keeps_triton_from_compiling(cache: Cache) -> None:
    kernel = SimpleNamespace(run=lambda *args, **kwargs: None, device_caches={})
    assert triton_cache.compiled(kernel, (1,), {}, ()) is None
    answers = iter([RuntimeError("damaged"), None])

    def step() -> Any:
        answer = next(answers)
        if answer is not None:
            raise answer

    assert triton_cache.obtain(step, lambda made: None, lambda made: None) is None


def test_a_kernel_that_is_compiled_in_the_background(cache: Cache, driver: Driver) -> None:
    made = cache.compile()
    kernel = SimpleNamespace(run=lambda *args, **kwargs: SimpleNamespace(result=lambda: made), device_caches={})
    assert triton_cache.compiled(kernel, (1,), {}, ()) is made


def test_launch_run_loads_no_flipped_binary(
    cache: Cache, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two variants of one kernel, launched by what generated code calls, before and after both were damaged."""
    from mlpdsl import launch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launch, "_compiled", {})
    launched: list[tuple[Any, ...]] = []
    driver.launcher_cls = lambda src, metadata: lambda *args: launched.append(args[:4])
    x, y, kernel = torch.zeros(256), torch.zeros(256), cache.module.add

    def launches() -> None:
        for n in (256, 256, 255, 256):
            launch.run(kernel, (2,), {"num_warps": 2}, x, y, n, 128)

    launches()
    assert launched == [(2, 1, 1, 7)] * 4
    assert len(driver.loaded) == 2  # 16 divides the one number and not the other
    for file in cache.triton.glob("*/add.cubin"):
        flip(file, 2000)
    launch._compiled.clear()
    kernel.device_caches.clear()  # as in a new process
    launches()
    assert launched == [(2, 1, 1, 7)] * 8
    assert driver.loaded[2:] == driver.loaded[:2], "a flipped binary was loaded"
    assert len(warnings_in(caplog)) == 1
