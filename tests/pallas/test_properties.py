"""Random specs, shapes and values through the interpreted Pallas kernels, against the oracle."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import jax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpdsl import MLPSpec
from mlpdsl.codegen import blocks
from mlpdsl.codegen.lower import lower
from mlpdsl.names import ACTIVATIONS
from mlpdsl.target import TARGETS
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import VALUES, Call, make_call, same_bits
from mlpdsl.testing.strategies import SEEDS, calls, leads, specs
from tests.pallas.support import check, drawing, interpreted, run, small_blocks, to_jax, to_torch

SPECIALS = (torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, 3e38, -1.0)


def drawn(spec: MLPSpec | st.SearchStrategy[MLPSpec], most: int = 150, least: int = 0, **fixed: Any) -> st.SearchStrategy[Call]:
    """Calls made once, for all gradients, with `least` to `most` rows, in any number of leading dimensions."""
    some = leads().filter(lambda lead: least <= math.prod(lead) <= most)
    return some.flatmap(lambda lead: calls(spec, **{"lead": lead, "requires_grad": None, "pattern": "once", **fixed}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_bit_survives_the_way_there_and_back(dtype: str) -> None:
    """Of NaN, of zeros and of subnormals; of no elements and no dimensions; of any layout."""
    values = torch.tensor(SPECIALS).to(getattr(torch, dtype))
    for tensor in (values, values.reshape(2, 4).T, values[::3], values[1:].expand(2, 7), values[0], values[:0].reshape(0, 3)):
        assert same_bits(to_torch(to_jax(tensor)), tensor)


@drawing(max_examples=16)
@given(data=st.data())
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_any_spec_any_shape_any_values(gated: bool, data: st.DataObject) -> None:
    check(data.draw(drawn(specs(max_epilogues=4, gated=gated))))


@drawing(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_many_small_blocks(gated: bool, data: st.DataObject) -> None:
    """With blocks of 16 by 16 M, N and K have several each, and a remainder: the interpreter fills what is beyond with NaN."""
    call = data.draw(drawn(specs(max_depth=3, max_epilogues=3, gated=gated), least=17))
    with small_blocks(16, 16, 16):
        plan = lower(call.spec, TARGETS["cpu"], "pallas")
        assert max(blocks.block(plan, "weight_grad", 71, 71, 150)) <= 16
        check(call)


@pytest.mark.parametrize(("gated", "dtype"), [(False, "float32"), (True, "bfloat16")], ids=["plain", "gated"])
def test_several_blocks_as_they_are(gated: bool, dtype: str) -> None:
    """At their own sizes: more than one block of rows, of columns, and of depth in two of the products, with remainders."""
    spec = MLPSpec(dims=(1030, 520, 515), activation="gelu", gated=gated, bias=True, dtype=dtype, epilogue=("residual", "silu"))
    plan = lower(spec, TARGETS["cpu"], "pallas")
    for role, sizes in {"hidden": (1027, 520, 1030), "weight_grad": (515, 520, 1027)}.items():
        for size, part in zip(sizes, blocks.block(plan, role, *sizes), strict=True):
            assert part < size and size % part, (role, size, part)
    check(make_call(spec, (1027,), 3))


@drawing(max_examples=12)
@given(data=st.data(), seed=SEEDS)
def test_gradients_say_something(data: st.DataObject, seed: int) -> None:
    """On calm values every gradient is far larger somewhere than what the oracle tolerates: these tests can fail."""
    dims = data.draw(st.tuples(*[st.sampled_from((16, 24, 33, 40))] * 3))
    spec = data.draw(specs(dims=dims, epilogue=data.draw(st.sampled_from(((), ("residual",), ("layer_scale",))))))
    verdict = check(make_call(spec, (data.draw(st.sampled_from((24, 33))),), seed))
    assert min(verdict.strength.values()) > (4 if spec.precision == "tf32" else 30), verdict


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    """Between layers and on the output; every second one gated, in 16 bits, where what is saved is rounded."""
    gated = list(ACTIVATIONS).index(activation) % 2 == 1
    dtype = "bfloat16" if gated else "float32"
    spec = MLPSpec(dims=(13, 33, 9), activation=activation, gated=gated, bias=True, dtype=dtype, epilogue=(activation,))
    check(make_call(spec, (17,), 7))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("values", VALUES)
def test_every_kind_of_values(values: str, dtype: str) -> None:
    spec = MLPSpec(dims=(20, 40, 20), activation="silu", gated=True, bias=True, dtype=dtype, epilogue=("layer_scale", "residual"))
    check(make_call(spec, (21,), 5, values=values, wide_operands=values == "huge"))


@drawing(max_examples=4)
@given(call=drawn(specs(max_depth=3), most=40, least=1))
def test_same_bits_every_time(call: Call) -> None:
    """Two runs, each compiled anew, give the same bits."""
    (y, grads), (again, grads_again) = run(call), run(call)
    assert same_bits(y, again)
    for name, grad in grads.items():
        assert same_bits(grad, grads_again[name]), name


@drawing(max_examples=4)
@given(call=drawn(specs(max_depth=2, max_epilogues=2), most=40))
def test_without_jit(call: Call) -> None:
    """Operation by operation, nothing is fused: other bits perhaps, within the same bounds."""
    check(call, jit=False)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_rows(gated: bool, lead: tuple[int, ...]) -> None:
    """An empty batch has an empty result, and zero for the gradient of every parameter."""
    epilogue = ("residual", "layer_scale", "scale")
    spec = MLPSpec(dims=(16, 24, 8), activation="silu", gated=gated, bias=True, dtype="bfloat16", epilogue=epilogue)
    call = make_call(spec, lead, 0)
    y, grads = run(call)
    assert y.shape == (*lead, 8) and y.dtype == torch.bfloat16
    for name, t in call.named().items():
        assert grads[name].shape == t.shape and grads[name].dtype == t.dtype, name
        assert not grads[name].any(), name


def test_a_nan_row_stays_in_its_row() -> None:
    """NaN and inf in one row of x make no other row of the result NaN."""
    spec = MLPSpec(dims=(24, 40, 16), activation="silu", gated=True, dtype="bfloat16")
    call = make_call(spec, (20,), 1)
    params = [to_jax(p) for p in call.params]
    x = call.x.clone()
    x[3], x[7, 0], x[11, 5] = torch.nan, torch.inf, -torch.inf
    with small_blocks(16, 16, 16):
        mlp = jax.jit(interpreted(spec))
        y, before = to_torch(mlp(to_jax(x), *params)), to_torch(mlp(to_jax(call.x), *params))
    clean = torch.ones(20, dtype=torch.bool)
    clean[[3, 7, 11]] = False
    assert y[3].isnan().all()
    assert same_bits(y[clean], before[clean])
    oracle.check(y, oracle.forward(spec, x, call.params, replay=True), "y")


def test_x_as_its_own_residual() -> None:
    """x given twice, as input and as residual, gets both gradients."""
    spec = MLPSpec(dims=(16, 24, 16), activation="gelu", bias=True, epilogue=("residual",))
    call = make_call(spec, (9,), 0)
    mlp, params = interpreted(spec), [to_jax(p) for p in call.params]
    _, back = jax.vjp(lambda x: mlp(x, *params, residual=x), to_jax(call.x))
    expected = oracle.backward(spec, call.x, call.params, {"residual": call.x}, call.dy, replay=True)["x"]
    slack = 1e-6 * (expected.value.abs() + call.dy.abs())
    total = oracle.Bounded(expected.value + call.dy, expected.bound + slack, torch.float32)
    oracle.check(to_torch(back(to_jax(call.dy))[0]), total, "gradient of x")


def test_small_blocks_are_small_only_inside() -> None:
    plan = lower(MLPSpec(dims=(64, 64), activation="identity"), TARGETS["cpu"], "pallas")
    before = blocks.block(plan, "output", 64, 64, 64)
    with small_blocks(16, 16, 16):
        assert blocks.block(plan, "output", 64, 64, 64) == (16, 16, 16)
    with mock.patch.dict(blocks._LARGEST):
        assert blocks.block(plan, "output", 64, 64, 64) == before == (64, 64, 64)
