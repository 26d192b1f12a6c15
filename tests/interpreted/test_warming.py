"""`mlpdsl.warmup`: the calls it makes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec, ShapeError, SpecError, UnsupportedError, autograd, warming
from tests.support import INTERPRETING, NO_INTERPRETER

pytestmark = pytest.mark.skipif(not INTERPRETING, reason=NO_INTERPRETER)

SPEC = MLPSpec(dims=(8, 16, 8), activation="silu", gated=True, bias=True, epilogue=("residual", "layer_scale"))
Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The operators' calls: "forward" with rows and whether it saves, "backward" with rows, and the thread of each."""
    made: Calls = []
    forward, backward = autograd.ops.forward, autograd.ops.backward

    def seen(tensors: Any) -> None:
        assert not torch.autograd.is_multithreading_enabled()  # on a GPU, backward has another thread
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 and t.dtype == torch.float32 for t in tensors)

    def ahead(x: Any, params: Any, operands: Any, spec: str, save: bool, batch_invariant: bool) -> Any:
        seen([x, *params, *operands])
        made.append(("forward", x.shape[0], save, batch_invariant, threading.get_ident()))
        return forward(x, params, operands, spec, save, batch_invariant)

    def back(grad: Any, x: Any, params: Any, operands: Any, saved: Any, needs: Any, *rest: Any) -> Any:
        seen([grad, x, *params, *operands, *saved])
        assert all(needs) and len(needs) == 1 + len(params) + len(operands)
        made.append(("backward", x.shape[0], rest[-1], threading.get_ident()))
        return backward(grad, x, params, operands, saved, needs, *rest)

    monkeypatch.setattr(autograd, "ops", SimpleNamespace(forward=ahead, backward=back))
    return made


def test_the_calls_of_each_number_of_rows(calls: Calls) -> None:
    here = threading.get_ident()
    mlpdsl.warmup(SPEC, m=(5, 1, 5))
    assert calls == [("forward", rows, False, False, here) for rows in (5, 1)]
    calls.clear()
    mlpdsl.warmup(SPEC, numpy.int64(3), backward=True, batch_invariant=True)
    assert calls == [("forward", 3, False, True, here), ("forward", 3, True, True, here), ("backward", 3, True, here)]


def test_every_number_of_rows_of_the_contract(calls: Calls) -> None:
    mlpdsl.warmup(MLPSpec(dims=(2, 3), activation="identity"))
    assert [call[1] for call in calls] == [1, 16, 4096]


def test_whatever_surrounds_it(calls: Calls) -> None:
    state = torch.get_rng_state()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            mlpdsl.warmup(SPEC, 2, backward=True)
            assert len(calls) == 3
            calls.clear()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and torch.autograd.is_multithreading_enabled()


def test_no_rows_run_nothing(calls: Calls) -> None:
    mlpdsl.warmup(SPEC, (0,), backward=True)
    assert all(call[1] == 0 for call in calls)


@pytest.mark.parametrize("m", [-1, (1, -1), "16", b"1", 1.5, (1, 2.5), None, True, (), [[1]], ("x",)])
def test_what_is_no_number_of_rows(calls: Calls, m: Any) -> None:
    with pytest.raises(ShapeError, match=r"^m: got "):
        mlpdsl.warmup(SPEC, m)
    assert calls == []


def test_other_mistakes(calls: Calls) -> None:
    for words in (
        {"backward": 16},
        {"backward": None},
        {"batch_invariant": 1},
        {"device": "gpu:0"},
        {"device": 1.5},
        {"device": []},
    ):
        with pytest.raises(SpecError, match=next(iter(words))):
            mlpdsl.warmup(SPEC, 1, **words)
    with pytest.raises(SpecError):
        mlpdsl.warmup("spec")  # type: ignore[arg-type]
    assert calls == []


def test_without_a_gpu_it_says_what_to_do(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in (None, "cpu", "cuda", "cuda:1", 0, torch.device("cuda", 1), "mps"):
        with pytest.raises(UnsupportedError, match="mlpdsl doctor") as caught:
            mlpdsl.warmup(SPEC, 1, device=device)
        assert "torch sees none here" in str(caught.value) and "in the process that will make the calls" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert warming._device(None) == warming._device("cuda") == warming._device(1) == torch.device("cuda:1")
    with pytest.raises(UnsupportedError, match=r"cuda:2 is none of this process's.*\n.*torch sees 2 of them"):
        mlpdsl.warmup(SPEC, 1, device=2)
    assert calls == []


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and only where it took some: the caches of others are emptied too."""
    reserved, emptied = [0], []
    monkeypatch.setattr(warming, "_device", lambda given: torch.device("cuda", 0))
    monkeypatch.setattr(warming.CompiledMLP, "backend_for", lambda self, device: "triton")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(reserved[0]))
    monkeypatch.setattr(warming, "_call_each", lambda *arguments: None)
    mlpdsl.warmup(SPEC, 1)
    assert emptied == []
    monkeypatch.setattr(warming, "_call_each", lambda *arguments: reserved.append(reserved.pop() + 7))
    mlpdsl.warmup(SPEC, 1)
    assert emptied == [7]


def test_no_tensor_outlives_it() -> None:
    import gc

    def living() -> int:
        gc.collect()
        tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        return sum(not t.is_nested and t.shape[-1:] == (23,) for t in tensors)  # a nested one of another test has no shape

    spec = MLPSpec(dims=(23, 23, 23), activation="relu", bias=True, epilogue=("residual",))
    before = living()
    mlpdsl.warmup(spec, (1, 2), backward=True)
    assert living() == before
