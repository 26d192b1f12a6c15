"""MLPDSL_ON_JIT: a call that has to compile says so, or raises before it does; warmup never does; nobody pays for asking.

Without a GPU: kernels are compiled for sm_90 through the whole call path, and their launches are a stand-in.
"""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec, NotCompiledError, SpecError, on_jit
from tests.faults.tools import warnings_in
from tests.support import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("needs Triton's compile mode", allow_module_level=True)

from triton import knobs

from mlpdsl import backends, dispatch, launch, loader, triton_cache, warming
from mlpdsl.cache import digest
from mlpdsl.codegen.plan import Config
from tests.faults.triton_tools import KERNEL, Cache, Driver

Launched = list[tuple[Any, ...]]


@pytest.fixture
def gpu(cache: Cache, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """A GPU on which tensors of the CPU lie: kernels are compiled for it and loaded, and launches are only counted."""
    launched: Launched = []
    driver.launcher_cls = lambda src, metadata: lambda *args: launched.append(args)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(backends, "_triton_reasons", lambda device, spec: [])
    monkeypatch.setattr(warming, "_device", lambda given: torch.device("cpu"))
    # Generated kernels throughout, whatever the rule prefers.
    monkeypatch.setattr(dispatch, "_decided", lambda *product: Config(16, 32, 32, num_stages=1))
    dispatch.forget()
    backends._choose.cache_clear()
    before = dict(vars(knobs.runtime))
    yield launched
    assert vars(knobs.runtime) == before, "the hook was not put back"
    backends._choose.cache_clear()
    dispatch.forget()


def spec(width: int, **fields: Any) -> MLPSpec:
    """A width is of one test, because a module is loaded once a process."""
    return MLPSpec(**{"dims": (16, width, 16), "activation": "relu", **fields})


def tensors(of: MLPSpec, rows: int, grad: bool = False) -> list[torch.Tensor]:
    return [torch.ones(shape, requires_grad=grad) for shape in ((rows, 16), *of.parameter_shapes().values())]


def line(text: str) -> str:
    """The call of warmup that a message ends with."""
    found = re.search(r"mlpdsl\.warmup\(mlpdsl\..*\)$", text)
    assert found is not None, text
    return found[0]


def test_error_raises_before_anything_is_compiled_and_its_line_cures_it(
    gpu: Launched, cache: Cache, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    of = spec(41)
    mlp = mlpdsl.compile(of)
    with pytest.raises(NotCompiledError) as caught:
        mlp(*tensors(of, 3))
    text = str(caught.value)
    assert of.short_name in text and "the kernel hidden_masked" in text and "m=3 " in text
    assert line(text) == "mlpdsl.warmup(mlpdsl.MLPSpec(dims=(16, 41, 16), activation='relu'), m=3)"
    assert (gpu, driver.loaded, list(cache.triton.glob("*/*.cubin"))) == ([], [], [])
    eval(line(text), {"mlpdsl": mlpdsl})
    assert len(driver.loaded) == 2
    gpu.clear()
    mlp(*tensors(of, 3))
    assert len(gpu) == 2 and len(driver.loaded) == 2
    # Triton's variants know nothing of M: where a config is the same, another number of rows is no new kernel.
    mlp(*tensors(of, 5))
    assert len(gpu) == 4 and len(driver.loaded) == 2


def test_training_needs_its_own_line(gpu: Launched, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    of = spec(42, gated=True, bias=True)
    mlp = mlpdsl.compile(of, batch_invariant=True)
    mlpdsl.warmup(of, 3, batch_invariant=True)
    mlp(*tensors(of, 3))
    with pytest.raises(NotCompiledError) as caught:
        mlp(*tensors(of, 3, grad=True))
    assert line(str(caught.value)) == (
        "mlpdsl.warmup(mlpdsl.MLPSpec(dims=(16, 42, 16), activation='relu', gated=True, bias=True), m=3, backward=True, "
        "batch_invariant=True)"
    )
    # Forward compiled somewhere, backward nowhere: it runs on a thread of autograd's on a GPU, on this one here.
    monkeypatch.delenv(on_jit.VARIABLE)
    y = mlp(*tensors(of, 3, grad=True))
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    with pytest.raises(NotCompiledError, match=r"needs the kernel \w+grad\w*,") as caught:
        y.sum().backward()
    eval(line(str(caught.value)), {"mlpdsl": mlpdsl})
    loaded = len(driver.loaded)
    mlp(*tensors(of, 3, grad=True)).backward(torch.ones(3, 16))
    assert len(driver.loaded) == loaded


def test_warn_says_it_once_a_kernel_and_compiles(
    gpu: Launched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, "warn")
    of = spec(43, epilogue=(lambda tile: tile * 2 + 1,))
    mlp = mlpdsl.compile(of)
    for _ in range(3):
        mlp(*tensors(of, 3))
    assert len(gpu) == 6
    said = warnings_in(caplog)
    assert [name in text for text, name in zip(said, ("hidden_masked", "output_masked"), strict=True)] == [True, True]
    assert all(of.short_name in text and "m=3 " in text for text in said)
    held: list[MLPSpec] = []
    monkeypatch.setattr(mlpdsl, "warmup", lambda spec, m: held.append(spec))
    eval(line(said[0]), {"mlpdsl": mlpdsl})
    assert held == [of]


def test_tensors_that_warmup_does_not_make(
    gpu: Launched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    of = spec(44)
    mlpdsl.warmup(of, 3)
    x, *params = tensors(of, 3)
    with pytest.raises(NotCompiledError, match="makes no call like this one"):
        mlpdsl.compile(of)(torch.ones(3, 18)[:, 1:17], *params)
    mlpdsl.compile(of)(x, *params)


def test_unset_says_nothing_and_is_asked_for_new_variants_alone(
    gpu: Launched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    right = on_jit.policy
    monkeypatch.setattr(on_jit, "policy", lambda: asked.append("") or right())
    monkeypatch.setattr(on_jit, "_call", lambda: pytest.fail("a call was looked for"))
    of = spec(45)
    mlp = mlpdsl.compile(of)
    mlp(*tensors(of, 3))
    assert len(asked) == 2 and warnings_in(caplog) == []
    for _ in range(5):
        mlp(*tensors(of, 3))
    assert len(asked) == 2


@pytest.mark.parametrize("value", ["eror", "1", "WARN"])
def test_anything_else_is_refused(gpu: Launched, driver: Driver, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, value)
    of = spec(46)
    for call in (lambda: mlpdsl.compile(of)(*tensors(of, 3)), lambda: mlpdsl.warmup(of, 3)):
        with pytest.raises(SpecError, match=f"environment variable MLPDSL_ON_JIT: got '{value}'; allowed: 'warn', 'error'"):
            call()
    assert driver.loaded == []
    monkeypatch.setenv(on_jit.VARIABLE, " ")
    assert on_jit.policy() is None
    mlpdsl.warmup(of, 3)
    monkeypatch.setenv(on_jit.VARIABLE, value)
    with pytest.raises(SpecError):  # though nothing is left to compile
        mlpdsl.warmup(of, 3)


def test_kernels_that_no_call_of_ours_wants_are_free(
    gpu: Launched, cache: Cache, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe of the pair descriptor, which takes an error for an answer; what tuning and measuring launch."""
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    launch.run(cache.module.add, (2,), {"num_warps": 2}, torch.zeros(256), torch.zeros(256), 256, 128)
    assert len(gpu) == 1
    assert on_jit.watched(SimpleNamespace(module="mlpdsl_generated_0")) is None  # no call is under way
    monkeypatch.setattr(on_jit, "_call", lambda: "a call")
    assert on_jit.watched(SimpleNamespace(module="mlpdsl_generated_0")) == "a call"
    assert on_jit.watched(SimpleNamespace(module="mlpdsl.probe")) is None


def test_only_the_thread_that_warms_up_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    monkeypatch.setattr(on_jit, "_call", lambda: "a call")
    kernel = SimpleNamespace(module="mlpdsl_generated_0")
    found: list[Any] = []
    with on_jit.allowing(), on_jit.allowing():
        assert on_jit.watched(kernel) is None
        thread = threading.Thread(target=lambda: found.append(on_jit.watched(kernel)))
        thread.start()
        thread.join()
    assert found == ["a call"] and on_jit.watched(kernel) == "a call"


def test_whether_a_variant_is_new_is_asked_without_compiling(cache: Cache, driver: Driver) -> None:
    x, y = torch.zeros(256), torch.zeros(256)
    kernel = loader.load(cache.base / f"{os.urandom(8).hex()}.py", KERNEL, digest("triton cache")).add
    call = (kernel, (2,), {"num_warps": 2}, (x, y, 256, 128))
    heard: list[str] = []
    elsewhere: list[Any] = []

    def hook(**what: Any) -> None:
        heard.append(what["fn"].name)

    before = dict(vars(knobs.runtime))
    knobs.runtime.jit_cache_hook = hook
    try:
        assert triton_cache._is_new(*call) and triton_cache._is_new(*call)
        assert heard == [] and not list(Path(cache.triton).glob("*/*.cubin"))
        assert knobs.runtime.jit_cache_hook is hook
        made = triton_cache.compiled(*call)
        assert heard and not triton_cache._is_new(*call) and triton_cache.compiled(*call) is made
        assert triton_cache._is_new(kernel, (2,), {"num_warps": 4}, (x, y, 256, 128))

        # Meanwhile others compile, and their hook is heard.
        right = kernel.run

        def run(*args: Any, **words: Any) -> Any:
            thread = threading.Thread(target=lambda: elsewhere.append(cache.module.add.run(x, y, 256, 64, grid=(1,), warmup=True)))
            thread.start()
            thread.join()
            return right(*args, **words)

        heard.clear()
        asking = SimpleNamespace(run=run)
        assert triton_cache._is_new(asking, (2,), {"num_warps": 8}, (x, y, 256, 128))
        assert len(elsewhere) == 1 and elsewhere[0] is not None and len(heard) == 1
    finally:
        vars(knobs.runtime).clear()
        vars(knobs.runtime).update(before)


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(NotCompiledError("what")))
    assert type(error) is NotCompiledError is mlpdsl.NotCompiledError
    assert isinstance(error, mlpdsl.MLPError) and str(error) == "what"
