"""What the tests of recorded calls compare with: the same call, made in the ordinary way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.tape import Tapes
from mlpdsl.testing.calls import Call, make_call, same_bits

GATED = MLPSpec(dims=(8, 16, 8), activation="silu", gated=True, bias=True)
PLAIN = MLPSpec(dims=(13, 9, 5), activation="gelu")
DEEP = MLPSpec(dims=(8, 16, 8, 8), activation="relu2", bias=True)
SINGLE = MLPSpec(dims=(8, 16), activation="identity", epilogue=("gelu",))
EPILOGUE = MLPSpec(dims=(12, 16, 12), activation="gelu", bias=True, epilogue=("residual", "layer_scale", "scale"))
OPERANDS = MLPSpec(dims=(12, 12), activation="identity", bias=True, epilogue=EPILOGUE.epilogue)
"""The same with one layer, for tests of many calls."""
SPECS = {"gated": GATED, "plain": PLAIN, "deep": DEEP, "single": SINGLE, "epilogue": EPILOGUE}
DTYPES = ("float32", "float16", "bfloat16")
LEADS = ((4,), (2, 3), ())
LAYOUTS = ("dense", "strided", "offset", "transposed", "expanded")
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def compiled(spec: MLPSpec, **options: Any) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton", **options)


def unrecorded() -> AbstractContextManager[Any]:
    """Inside, every call of a new `CompiledMLP` is made in the ordinary way, and none is recorded."""
    return mock.patch.object(Tapes, "call", lambda self, word, varying, fixed, make: make())


def plainly(call: Call, **options: Any) -> Tensor:
    with unrecorded():
        return call.run(compiled(call.spec, **options))


def plain_gradients(call: Call, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with unrecorded():
        return call.gradients(compiled(call.spec, **options))


def assert_same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert same_bits(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert same_bits(found[1][name], grad), name


def anew(call: Call, seed: int) -> Call:
    """Other values in other memory that lies alike, with the same parameters."""
    other = make_call(call.spec, **{**call.recipe, "seed": seed})
    return replace(other, params=call.params, buffers=[*call.buffers, *other.buffers], recipe={})


def outcome(run: Callable[[], Any]) -> tuple[Any, ...]:
    """Everything that can be told of what a call gives: the error, or the result and its bits."""
    try:
        y = run()
    except Exception as error:
        return type(error), str(error)
    about = (type(y), y.shape, y.dtype, y.device, y.stride(), y.requires_grad, y.is_leaf, y.is_inference(), y._is_view())
    if y.device.type == "meta" or type(y).__name__ == "FakeTensor":
        return about
    grad = type(y.grad_fn).__name__
    return *about, grad, bytes(y.detach().contiguous().as_subclass(Tensor).view(torch.uint8).numpy())


def negative(t: Tensor) -> Tensor:
    """A view that means -t: its memory holds t."""
    pairs = torch.stack([torch.zeros_like(t), t], -1)
    found = torch.view_as_complex(pairs).conj().imag
    assert found.is_neg()
    return found


class Seen(TorchDispatchMode):
    """Hears of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))
