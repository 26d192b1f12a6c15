"""When a call is done as an earlier one was: for tensors that are like its, where they were, with torch in the state it was in."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import triton  # noqa: F401 (launches there were, so somebody may listen to them)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlpdsl import shortcut
from mlpdsl.straight import places

Alike = Callable[..., bool]


@pytest.fixture(params=["guarded", "one by one"])
def likeness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Alike]:
    """By torch's guards, and where there are none."""
    if request.param == "one by one":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    return lambda *tensors: shortcut._likeness(tensors)


def _negative(t: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([torch.zeros_like(t), t], -1)).conj().imag


class _Subclass(Tensor):
    pass


def _fake(t: Tensor) -> FakeTensor:
    return FakeTensorMode().from_tensor(t)


def _in_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


UNLIKE: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda t: t.to(torch.float16),
    "integers": lambda t: t.view(torch.int32),
    "meta": lambda t: t.to("meta"),
    "shape": lambda t: torch.randn(5, 8),
    "dimensions": lambda t: t[None],
    "transposed": lambda t: torch.randn(8, 4).t(),
    "expanded": lambda t: t[:1].expand(4, 8),
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "subclass": lambda t: t.as_subclass(_Subclass),
    "fake": _fake,
    "negative": _negative,
    "inference": _in_inference,
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "functional": lambda t: torch._to_functional_tensor(t),
    "none": lambda t: None,
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "number": lambda t: 0.5,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", UNLIKE)
def test_tensors_that_are_unlike(name: str, likeness: Callable[..., Alike]) -> None:
    """Each of a call's tensors in turn, against others of equal shape, dtype, device and strides."""
    if name in ("inference", "functional") and likeness(torch.ones(1)).__name__ == "one_by_one":
        pytest.skip("the one is repeated as any other, the other has no memory")
    tensors = [torch.randn(4, 8) for _ in range(3)]
    alike = likeness(*tensors)
    assert alike(*tensors) and alike(*(torch.randn(4, 8) for _ in range(3)))
    for i in range(3):
        other = UNLIKE[name](tensors[i])
        assert not alike(*tensors[:i], other, *tensors[i + 1 :])
    assert alike(*tensors)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["functional", "subclass", "fake", "none", "number", "nested"])
def test_a_call_with_one_of_another_kind_has_no_place(name: str, likeness: Callable[..., Alike]) -> None:
    """Also of those that torch's guards must not be asked of."""
    tensors = [torch.randn(4, 8) for _ in range(3)]
    found = places(tensors, 2, likeness(*tensors))
    assert found(tensors) == tuple(t.data_ptr() for t in tensors[:2])
    make = {**UNLIKE, "nested": lambda t: torch.nested.nested_tensor([t, t])}[name]
    for i in (1, 2):
        assert found([*tensors[:i], make(tensors[i]), *tensors[i + 1 :]]) is None


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "mode": TorchDispatchMode,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_torch_that_are_unlike(name: str) -> None:
    """A call that was learnt in one is not repeated outside, nor the other way round."""
    x, w = torch.randn(4, 8), nn.Parameter(torch.randn(8, 8))
    outside = shortcut._likeness([x, w])
    with STATES[name]():
        assert not outside(x, w)
    assert outside(x, w)
    with torch.no_grad():
        assert outside(x, w), "whether gradients are recorded is asked by itself"
    with torch.autocast("cpu", enabled=False):
        assert outside(x, w)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_and_traces_are_unlike(likeness: Callable[..., Alike]) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    alike, seen = likeness(x, w), []

    def look(t: Tensor) -> Tensor:
        seen.append(alike(x, w))
        return t + 1

    torch.func.vmap(look)(torch.zeros(3))
    torch.func.grad(lambda t: look(t).sum())(torch.zeros(3))
    torch.func.jvp(look, (torch.zeros(3),), (torch.zeros(3),))
    torch.func.functionalize(look)(torch.zeros(3))
    torch.jit.trace(look, (torch.zeros(3),), check_trace=False)
    assert len(seen) == 5 and not any(seen)
    assert alike(x, w)


def test_one_tensor_twice(likeness: Callable[..., Alike]) -> None:
    """Which torch's guards do not take: x is the residual, gate and up are tied."""
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    alike = likeness(x, x, w)
    assert alike(x, x, w) and alike(torch.randn(4, 8), x, w)
    assert not alike(x, x.double(), w) and not alike(x, x.t(), w) and not alike(x, None, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not alike(x, x, w)


def test_nothing_is_kept_alive(likeness: Callable[..., Alike]) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    found = places([x, w], 1, likeness(x, w))
    held = [weakref.ref(t) for t in (x, w)]
    assert found([x, w]) == (x.data_ptr(),)
    del x, w
    assert [ref() for ref in held] == [None, None]


# Places


def _yes(*_: Tensor) -> bool:
    return True


def test_weights_that_moved() -> None:
    x, w, b = torch.randn(4, 8), nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    with torch.no_grad():
        found = places([x, w, b], 1, _yes)
        assert found([x, w, b]) == (x.data_ptr(),)
        assert found([y := x.clone(), w, b]) == (y.data_ptr(),)
        assert found([x, w, nn.Parameter(b.clone())]) is None
        before, w.data = w.data, w.data.clone()
        assert found([x, w, b]) is None
        w.data = before
        assert found([x, w, b]) == (x.data_ptr(),)
        assert found([x, w]) is None and found([x, w, b, b]) is None
    assert found([x, w, b]) is None, "a gradient would be recorded"


def test_memory_that_was_given_back() -> None:
    """As by those who shard parameters and gather them: shape and strides stay, the memory does not."""
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    found = places([x, w], 1, shortcut._likeness([x, w]))
    for t in (x, w):
        other = t.clone()
        other.untyped_storage().resize_(0)
        assert other.data_ptr() == 0
        assert found([other, w] if t is x else [x, other]) is None
    assert found([x, w]) == (x.data_ptr(),)


def test_alignment_and_twins() -> None:
    memory = torch.randn(200)
    x, other = memory[:32].view(4, 8), memory[32:64].view(4, 8)
    shifted, shifted_more = memory[1:33].view(4, 8), memory[101:133].view(4, 8)
    apart, one = places([x, other], 2, _yes), places([x, x], 2, _yes)
    assert apart([x, other]) and apart([other, x]) and not apart([x, x])
    assert one([x, x]) and one([other, other]) and not one([x, other])
    assert not apart([x, shifted]) and not apart([shifted, other]) and not one([shifted, shifted])
    off = places([shifted], 1, _yes)
    assert off([shifted_more]) and not off([x])
    assert places([x, x, other], 3, _yes)([other, other, x]) and not places([x, x, other], 3, _yes)([x, other, other])


def test_torch_dynamo_is_not_imported() -> None:
    """Its guards are torch's own C; the rest of it is slow to import, and changes what the operators do."""
    code = """
import sys, torch, triton
from mlpdsl import shortcut
x = torch.randn(4, 8)
assert shortcut._likeness([x])(x)
assert "torch._dynamo" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
