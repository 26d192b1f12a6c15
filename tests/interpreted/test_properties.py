"""Random specs, layouts and values through the generated kernels, against the oracle and eager PyTorch."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import Call, check_call, guarded_allocations, make_call, place, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing import oracle
from mlpdsl.testing.strategies import SEEDS, calls, leads, specs

torch.set_num_threads(1)


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def drawn(spec: MLPSpec | st.SearchStrategy[MLPSpec], most: int = 150, **fixed: Any) -> st.SearchStrategy[Call]:
    """Calls made once, for all gradients, with 1 to `most` rows."""
    some = leads().filter(lambda lead: 0 < math.prod(lead) <= most)
    return some.flatmap(lambda lead: calls(spec, **{"lead": lead, "requires_grad": None, "pattern": "once", **fixed}))


@settings(max_examples=60)
@given(call=drawn(specs(max_epilogues=4)))
def test_any_spec_any_layout_any_values(call: Call) -> None:
    check_call(call)


@settings(max_examples=18)
@given(data=st.data(), seed=SEEDS)
def test_gradients_say_something(data: st.DataObject, seed: int) -> None:
    """On calm values every gradient is far larger somewhere than what the oracle tolerates: these tests can fail."""
    dims = data.draw(st.tuples(*[st.sampled_from((16, 24, 33, 40))] * 3))
    spec = data.draw(specs(dims=dims, epilogue=data.draw(st.sampled_from(((), ("residual",), ("layer_scale",))))))
    verdict = check_call(make_call(spec, (data.draw(st.sampled_from((24, 33))),), seed))
    assert min(verdict.strength.values()) > (4 if spec.precision == "tf32" else 30), verdict


@settings(max_examples=15)
@given(data=st.data())
def test_parameters_used_in_place(data: st.DataObject) -> None:
    """Gate and up wherever they lie, in kernels with tensor descriptors and without."""
    widths = data.draw(st.sampled_from(((8, 16, 24, 40, 72), (7, 9, 33, 50))))
    dims = data.draw(st.tuples(*[st.sampled_from(widths)] * 3))
    dtype = data.draw(st.sampled_from(("float16", "bfloat16")))
    spec = data.draw(specs(activations=["silu", "gelu", "identity"], gated=True, dims=dims, dtype=dtype, epilogue=()))
    lead = (data.draw(st.sampled_from((3, 20, 70))),)
    check_call(data.draw(drawn(spec, lead=lead, values="normal", x="dense", dy="dense")))


@settings(max_examples=18)
@given(data=st.data(), call=drawn(specs(), most=20, values="normal"))
def test_requires_grad_subsets(data: st.DataObject, call: Call) -> None:
    """Whatever is asked for comes, and equals what is computed when all is asked for; the rest stays None."""
    mlp = compiled(call.spec)
    names = list(call.named())
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    part = call.needing(wanted)
    with guarded_allocations():
        y = part.run(mlp)
        y.backward(call.dy)
    everything, grads = call.gradients(mlp)
    assert same_bits(y, everything)
    for name, t in part.named().items():
        if name in wanted:
            assert t.grad is not None
            assert same_bits(t.grad, grads[name]), name
        else:
            assert t.grad is None, name


@settings(max_examples=18)
@given(call=drawn(specs(), most=33, values="normal"))
def test_expanded_gradient(call: Call) -> None:
    """y.sum().backward() hands backward a gradient whose strides are all zero."""
    leaves = call.needing()
    seen: list[tuple[int, ...]] = []
    y = leaves.run(compiled(call.spec))
    y.register_hook(lambda grad: seen.append(grad.stride()))
    with guarded_allocations():
        y.sum().backward()
    assert all(s == 0 for s, n in zip(seen[0], y.shape, strict=True) if n > 1)
    expected = oracle.backward(call.spec, call.x, call.params, call.operands, torch.ones_like(y), replay=True)
    for name, t in leaves.named().items():
        oracle.check(t.grad, expected[name], f"gradient of {name} of {call.spec!r}")


@settings(max_examples=12)
@given(call=drawn(specs(), most=100))
def test_same_bits_every_time(call: Call) -> None:
    """Two runs, two backward passes over one retained graph, and a run without gradients give the same bits.

    In between, saved tensors are not written.
    """
    mlp = compiled(call.spec)
    leaves = call.needing()
    with support.kept() as saved:
        y = leaves.run(mlp)
    assert len(saved) > len(leaves.named()) - 1
    inputs = list(leaves.named().values())
    first = torch.autograd.grad(y, inputs, call.dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, call.dy, retain_graph=True)
    assert all(same_bits(t, copy) for t, copy in saved)
    y_again, again = call.gradients(mlp)
    assert same_bits(y, y_again) and same_bits(y, call.run(mlp))
    for name, a, b in zip(call.named(), first, second, strict=True):
        assert same_bits(a, b), name
        assert same_bits(a, again[name]), name


@settings(max_examples=18)
@given(data=st.data())
def test_layouts_with_equal_values_agree(data: st.DataObject) -> None:
    """In float32, where every layout runs the same kernels, a strided view gives the bits of its contiguous copy."""
    lead = (data.draw(st.sampled_from((2, 3))), data.draw(st.sampled_from((1, 7, 20))))
    call = data.draw(drawn(specs(dtype="float32", precision="ieee"), lead=lead, values="normal"))
    plain = Call(call.spec, call.x.contiguous(), [p.contiguous() for p in call.params],
                 {n: t.contiguous() for n, t in call.operands.items()}, call.dy.contiguous())  # fmt: skip
    mlp = compiled(call.spec)
    (y, grads), (y_plain, grads_plain) = call.gradients(mlp), plain.gradients(mlp)
    assert same_bits(y, y_plain)
    for name, grad in grads.items():
        assert same_bits(grad, grads_plain[name]), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, gated: bool, dtype: str) -> None:
    """Between layers and on the output, with bias, at a shape for descriptors and at an odd one."""
    for dims, rows in (((24, 40, 16), 20), ((13, 33, 9), 17)):
        spec = MLPSpec(dims=dims, activation=activation, gated=gated, bias=True, dtype=dtype, epilogue=(activation,))
        check_call(make_call(spec, (rows,), 7, pair="up_first"))


@pytest.mark.parametrize("values", ["normal", "tiny", "huge"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_several_tiles_each_way(dtype: str, values: str) -> None:
    """More tiles than programs, several steps of K, and split sums over the rows."""
    for gated in (False, True):
        spec = MLPSpec(dims=(72, 136, 104), activation="gelu", gated=gated, bias=True, dtype=dtype, epilogue=("residual", "silu"))
        check_call(make_call(spec, (150,), 3, values=values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_rows(gated: bool, lead: tuple[int, ...], dtype: str) -> None:
    """An empty batch has an empty result, and zero for the gradient of every parameter."""
    spec = MLPSpec(
        dims=(16, 24, 8), activation="silu", gated=gated, bias=True, dtype=dtype, epilogue=("residual", "layer_scale", "scale")
    )
    y, grads = make_call(spec, lead, 0).gradients(compiled(spec))
    assert y.shape == (*lead, 8) and y.dtype == getattr(torch, dtype)
    for (name, grad), t in zip(grads.items(), make_call(spec, lead, 0).named().values(), strict=True):
        assert grad.shape == t.shape and grad.dtype == t.dtype, name
        assert not grad.any(), name


def test_second_derivatives_raise() -> None:
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", bias=True)
    call = make_call(spec, (5,), 0).needing()
    y = call.run(compiled(spec))
    (grad,) = torch.autograd.grad(y, call.x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_one_tensor_for_gate_and_up() -> None:
    """The same parameter twice gets the sum of both gradients."""
    spec = MLPSpec(dims=(16, 24, 8), activation="silu", gated=True)
    call = make_call(spec, (9,), 0, pair="tied")
    weight, down = call.params[0].detach().requires_grad_(), call.params[2]
    compiled(spec)(call.x, weight, weight, down).backward(call.dy)
    expected = oracle.backward(spec, call.x, call.params, {}, call.dy, replay=True)
    gate, up = expected["gate_proj.weight"], expected["up_proj.weight"]
    total = oracle.Bounded(gate.value + up.value, gate.bound + up.bound + 1e-6 * (gate.value.abs() + up.value.abs()), torch.float32)
    oracle.check(weight.grad, total, "the sum of both gradients")


def test_input_as_its_own_residual() -> None:
    """x given twice, as input and as residual, gets both gradients."""
    spec = MLPSpec(dims=(16, 24, 16), activation="gelu", bias=True, epilogue=("residual",))
    call = make_call(spec, (9,), 0)
    x = call.x.detach().requires_grad_()
    compiled(spec)(x, *call.params, residual=x).backward(call.dy)
    expected = oracle.backward(spec, call.x, call.params, {"residual": call.x}, call.dy, replay=True)["x"]
    slack = 1e-6 * (expected.value.abs() + call.dy.abs())
    oracle.check(x.grad, oracle.Bounded(expected.value + call.dy, expected.bound + slack, torch.float32), "gradient of x")


def test_gradients_are_not_the_callers_memory() -> None:
    """Writing into a returned gradient changes neither another gradient nor the incoming one."""
    spec = MLPSpec(dims=(16, 24, 16), activation="gelu", bias=True, epilogue=("residual",))
    call = make_call(spec, (9,), 0).needing()
    y = call.run(compiled(spec))
    dy = torch.randn_like(y)
    before = dy.clone()
    y.backward(dy)
    grads = {name: t.grad.clone() for name, t in call.named().items() if t.grad is not None}
    for name, t in call.named().items():
        assert t.grad is not None
        if name != "residual":  # its gradient is dy, handed on as torch's own addition does
            t.grad.zero_()
    assert same_bits(dy, before)
    assert same_bits(call.operands["residual"].grad, grads["residual"])


def test_a_nan_row_stays_in_its_row() -> None:
    """NaN and inf in one row of x make no other row of the result NaN."""
    for dtype in ("float32", "bfloat16"):
        spec = MLPSpec(dims=(24, 40, 16), activation="silu", gated=True, dtype=dtype)
        call = make_call(spec, (20,), 1)
        x = call.x.clone()
        x[3], x[7, 0], x[11, 5] = torch.nan, torch.inf, -torch.inf
        y = compiled(spec)(x, *call.params)
        clean = torch.ones(20, dtype=torch.bool)
        clean[[3, 7, 11]] = False
        assert y[3].isnan().all()
        assert same_bits(y[clean], call.run(compiled(spec))[clean])
        oracle.check(y, oracle.forward(spec, x, call.params, replay=True), "y")


def test_powers_of_two_scale_through() -> None:
    """relu without bias is homogeneous, and scaling by a power of two rounds nothing: the bits follow."""
    for dtype in ("float32", "bfloat16"):
        spec = MLPSpec(dims=(24, 33, 16), activation="relu", dtype=dtype)
        call = make_call(spec, (20,), 2)
        mlp = compiled(spec)
        assert same_bits(mlp(call.x * 1024, *call.params), mlp(call.x, *call.params) * 1024)


def test_deep_net_is_its_layers() -> None:
    """A net of four linears is within the oracle of itself, and its layers one by one are within the same bounds."""
    spec = MLPSpec(dims=(24, 40, 17, 33, 8), activation="gelu", bias=True, dtype="float16")
    call = make_call(spec, (20,), 5)
    check_call(call)
    h = call.x
    for i in range(4):
        dims, last = spec.dims[i : i + 2], i == 3
        layer = MLPSpec(dims=dims, activation="identity", bias=True, dtype="float16", epilogue=() if last else ("gelu",))
        h = compiled(layer)(h, *call.params[2 * i : 2 * i + 2])
    oracle.check(h, oracle.forward(spec, call.x, call.params, replay=True), "layer by layer")


def test_guards_see_what_they_should() -> None:
    """The guards themselves: a write beyond an allocation, and an element that is never written."""

    def write_beyond() -> None:
        with guarded_allocations():
            t = torch.ones(1).new_empty((2, 3))
            assert t.isnan().all()
            torch.as_strided(t, (1,), (1,), t.storage_offset() + 6).fill_(0.0)

    with pytest.raises(AssertionError, match="1 elements written after a tensor of 6"):
        write_beyond()
    view = place(torch.arange(6.0).reshape(2, 3), "strided")
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]] and view.stride() == (7, 2)
    assert view._base is not None and int((~view._base.isnan()).sum()) == 6
