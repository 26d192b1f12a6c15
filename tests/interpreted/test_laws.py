"""Laws between specs, and between calls of one spec: what must be equal, bit for bit where nothing may round otherwise.

None of them needs to know what an MLP computes, so that an oracle that is wrong in the same way as the kernels does not hide it.
"""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing import bounded, oracle
from mlpdsl.testing.calls import LAYOUTS, Call, judge, make_call, place, same_bits
from mlpdsl.testing.strategies import calls, specs

torch.set_num_threads(1)

EXPONENTS = ("float32", "bfloat16")
"""Dtypes whose exponents leave room: what float16 rounds to a subnormal, it does not round so at twice the size."""


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def drawn(spec: MLPSpec | st.SearchStrategy[MLPSpec], **fixed: Any) -> st.SearchStrategy[Call]:
    """Calls with rows, calm values, all gradients."""
    some = st.tuples(st.sampled_from((1, 2, 3, 7, 16, 20, 33)))
    return st.deferred(lambda: some).flatmap(
        lambda lead: calls(spec, **{"lead": lead, "values": "normal", "requires_grad": None, "pattern": "once", **fixed})
    )


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Equal bits of y, and of every gradient that both have."""
    assert same_bits(found[0], wanted[0]), "y"
    for name in found[1].keys() & wanted[1].keys():
        assert same_bits(found[1][name], wanted[1][name]), f"gradient of {name}"


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal numbers: -0 is 0."""
    return a.dtype == b.dtype and torch.equal(a, b)


def given_operand(call: Call, entry: str, value: float) -> Call:
    """The call of the same spec with one more epilogue entry at the end, whose operand is `value` everywhere."""
    spec = call.spec.replace(epilogue=(*call.spec.epilogue, entry))
    shape = {"tile": call.dy.shape, "column": (spec.d_out,), "scalar": ()}[spec.operands()[entry]]
    operand = torch.full(shape, value, dtype=call.x.dtype)
    return replace(call, spec=spec, operands={**call.operands, entry: operand}, recipe={})


# Specs that are one another


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize(("entry", "value"), [("residual", -0.0), ("residual", 0.0), ("scale", 1.0), ("layer_scale", 1.0)])
def test_an_entry_that_changes_nothing(entry: str, value: float, data: st.DataObject) -> None:
    """-0 added, or 1 multiplied, changes no bit of y and of no gradient; 0 added makes a 0 of -0."""
    entries = ["residual", "scale", "layer_scale", "silu", "tanh"]
    call = data.draw(drawn(specs(epilogue_entries=[e for e in entries if e != entry], max_epilogues=2)))
    with_it = given_operand(call, entry, value)
    y, grads = call.gradients(compiled(call.spec))
    found = with_it.gradients(compiled(with_it.spec))
    same(found, (y + 0.0 if (entry, value) == ("residual", 0.0) else y, grads))
    if entry == "residual":
        assert same_bits(found[1][entry], call.dy)


@settings(max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_of_ones(bias: bool, data: st.DataObject) -> None:
    """Gated by identity of exactly 1 (no weight, a bias of 1) is the MLP without a gate, within that one's bounds."""
    gated = specs(activations=["identity"], gated=True, bias=True)
    call = data.draw(drawn(gated, pair="apart"))
    params = dict(zip(call.spec.parameter_shapes(), call.params, strict=True))
    params["gate_proj.weight"] = torch.zeros_like(params["gate_proj.weight"])
    params["gate_proj.bias"] = torch.ones_like(params["gate_proj.bias"])
    if not bias:
        params["up_proj.bias"] = torch.zeros_like(params["up_proj.bias"])
        params["down_proj.bias"] = torch.zeros_like(params["down_proj.bias"])
    y, grads = replace(call, params=list(params.values()), recipe={}).gradients(compiled(call.spec))
    plain = call.spec.replace(gated=False, bias=bias)
    kept = ["up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"]
    kept = [name for name in kept if bias or name.endswith("weight")]
    names = dict(zip(plain.parameter_shapes(), kept, strict=True))
    without = replace(call, spec=plain, params=[params[name] for name in kept], recipe={})
    judge(without, y, {name: grads[names.get(name, name)] for name in without.named()}, eager=False)


@settings(max_examples=15)
@given(data=st.data())
def test_layers_one_by_one(data: st.DataObject) -> None:
    """Every layer an MLP of its own, with the activation for its epilogue, gives y within the bounds of the whole."""
    spec = data.draw(specs(gated=False))
    call = data.draw(drawn(spec))
    h, step = call.x, 2 if spec.bias else 1
    depth = len(spec.dims) - 1
    for i in range(depth):
        last = i == depth - 1
        layer = spec.replace(
            dims=spec.dims[i : i + 2], activation="identity", epilogue=spec.epilogue if last else (spec.activation,)
        )
        h = compiled(layer)(h, *call.params[step * i : step * (i + 1)], **(call.operands if last else {}))
    judge(call, h, {}, eager=False)


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "relu2": lambda x: torch.relu(x).square(),
    "tanh": lambda x: torch.tanh(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x * 0.7071067811865476),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": lambda x: x * torch.nn.functional.relu6(x + 3.0) / 6.0,
}


@settings(max_examples=4)
@given(data=st.data())
@pytest.mark.parametrize("name", OWN)
def test_a_formula_of_ones_own(name: str, data: st.DataObject) -> None:
    """A registered activation written out is within the bounds of the registered one, and that one within its."""
    registered = data.draw(specs(activations=[name], epilogue_entries=["residual", name], max_epilogues=2, max_depth=3))
    assume(len(registered.dims) > 2 or registered.epilogue)
    own = mlpdsl.activation(OWN[name])
    entries = tuple(own if entry == name else entry for entry in registered.epilogue)
    written = registered.replace(activation=own if len(registered.dims) > 2 else "identity", epilogue=entries)
    call = data.draw(drawn(registered, values=data.draw(st.sampled_from(("normal", "tiny", "huge")))))
    same_tensors = replace(call, spec=written, recipe={})
    judge(call, *same_tensors.gradients(compiled(written)), eager=False)
    judge(same_tensors, *call.gradients(compiled(registered)), eager=False)


# Calls that are one another


@settings(max_examples=20)
@given(data=st.data(), k=st.integers(-20, 20))
def test_powers_of_two(data: st.DataObject, k: int) -> None:
    """Without bias, relu and identity and leaky_relu are homogeneous, and a power of two rounds nothing: the bits follow."""
    dtype = data.draw(st.sampled_from(EXPONENTS))
    spec = data.draw(specs(activations=["relu", "identity", "leaky_relu"], gated=False, bias=False, epilogue=(), dtype=dtype))
    call = data.draw(drawn(spec))
    mlp, factor = compiled(spec), 2.0**k
    y, grads = call.gradients(mlp)
    scaled = replace(call, x=call.x * factor, recipe={})
    assert equal(call.x * factor / factor, call.x)
    found, found_grads = scaled.gradients(mlp)
    assert equal(found, y * factor)
    assert equal(found_grads["x"], grads["x"])
    for name in spec.parameter_shapes():
        assert equal(found_grads[name], grads[name] * factor), name


@settings(max_examples=12)
@given(data=st.data())
def test_odd_functions(data: st.DataObject) -> None:
    """Without bias, f(-x) is -f(x) where activation and epilogue are odd; derivatives are even."""
    odd = ["identity", "tanh"]
    spec = data.draw(specs(activations=odd, gated=False, bias=False, epilogue_entries=["tanh", "scale", "layer_scale"]))
    call = data.draw(drawn(spec, values=data.draw(st.sampled_from(("normal", "tiny", "huge")))))
    mlp = compiled(spec)
    y, grads = call.gradients(mlp)
    found, found_grads = replace(call, x=-call.x, recipe={}).gradients(mlp)
    assert equal(found, -y)
    for name, grad in found_grads.items():
        even = name == "x"
        assert equal(grad, grads[name] if even else -grads[name]), name


def permuted(size: int, data: st.DataObject) -> list[int]:
    return data.draw(st.permutations(range(size)))


@settings(max_examples=15)
@given(data=st.data())
def test_permuted_hidden_units(data: st.DataObject) -> None:
    """Hidden units in another order, in what writes them and what reads them, stay within the same bounds."""
    spec = data.draw(specs(max_depth=3))
    assume(len(spec.dims) > 2)
    call = data.draw(drawn(spec, pair="apart"))
    order = torch.tensor(permuted(spec.dims[1], data))
    names = list(spec.parameter_shapes())
    first = names[: (2 if spec.gated else 1) * (2 if spec.bias else 1)]
    second = names[len(first)]

    def moved(name: str, t: Tensor, by: Tensor) -> Tensor:
        return t[by] if name in first else t[:, by] if name == second else t

    params = [moved(name, p, order) for name, p in zip(names, call.params, strict=True)]
    y, grads = replace(call, params=params, recipe={}).gradients(compiled(spec))
    back = torch.argsort(order)
    judge(call, y, {name: moved(name, grad, back) for name, grad in grads.items()}, eager=False)


@settings(max_examples=15)
@given(data=st.data())
def test_permuted_outputs(data: st.DataObject) -> None:
    """The last linear's rows in another order are the columns of y in that order: of y and of their own gradients, every bit."""
    spec = data.draw(specs(max_epilogues=2))
    call = data.draw(drawn(spec, pair="apart", x="dense", dy="dense", weights="dense", operands="dense"))
    order = torch.tensor(permuted(spec.d_out, data))
    moved, follow = support.outputs_in_order(call, order)
    (y, grads), (found, found_grads) = call.gradients(compiled(spec)), moved.gradients(compiled(spec))
    for name, dim in follow.items():
        assert same_bits({"y": found, **found_grads}[name], {"y": y, **grads}[name].index_select(dim, order)), name


@settings(max_examples=15)
@given(data=st.data())
def test_permuted_rows(data: st.DataObject) -> None:
    """Rows of the batch in another order: rows of y and of gradients follow, and sums over them, within the same bounds."""
    spec = data.draw(specs())
    call = data.draw(drawn(spec))
    order = torch.tensor(permuted(len(call.x), data))
    rows = {name for name, kind in spec.operands().items() if kind in ("tile", "row")} | {"x"}
    operands = {name: t[order] if name in rows else t for name, t in call.operands.items()}
    y, grads = replace(call, x=call.x[order], operands=operands, dy=call.dy[order], recipe={}).gradients(compiled(spec))
    back = torch.argsort(order)
    judge(call, y[back], {name: grad[back] if name in rows else grad for name, grad in grads.items()}, eager=False)


@settings(max_examples=20)
@given(data=st.data(), k=st.integers(-20, 20))
def test_backward_is_homogeneous(data: st.DataObject, k: int) -> None:
    """A power of two times dy is that times every gradient, bit for bit."""
    spec = data.draw(specs(dtype=data.draw(st.sampled_from(EXPONENTS))))
    call = data.draw(drawn(spec))
    mlp, factor = compiled(spec), 2.0**k
    _, grads = call.gradients(mlp)
    # What underflows on the way does so elsewhere: gradients of saturated sigmoids and the like.
    tiny = min((float(g[g != 0].abs().min()) for g in grads.values() if g.any()), default=1.0)
    assume(tiny > 1e-25)
    _, found = replace(call, dy=call.dy * factor, recipe={}).gradients(mlp)
    for name, grad in grads.items():
        assert equal(found[name], grad * factor), name


@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_accumulated_gradients(data: st.DataObject, seed: int) -> None:
    """Two backward passes add up, in .grad, to what both incoming gradients give."""
    spec = data.draw(specs())
    call = data.draw(drawn(spec))
    other = torch.randn(call.dy.shape, generator=torch.Generator().manual_seed(seed)).to(call.dy.dtype)
    leaves, mlp = call.needing(), compiled(spec)
    leaves.run(mlp).backward(call.dy)
    leaves.run(mlp).backward(other)
    arguments = (spec, call.x, call.params, call.operands)
    one, two = (oracle.backward(*arguments, dy, replay=True) for dy in (call.dy, other))
    for name, t in leaves.named().items():
        both = bounded.Bounded(one[name].value + two[name].value, one[name].bound + two[name].bound)
        assert t.grad is not None
        oracle.check(t.grad, bounded.rounded(both, t.dtype), f"accumulated gradient of {name} of {spec!r}")


def lies(call: Call, layout: str, which: Sequence[str]) -> Call:
    """The same values lying otherwise. What is expanded is one row, or one column, for all: that of a dense call too."""
    moved = {name: place(t, layout) if name in which else t for name, t in call.named().items()}
    params = [moved[name] for name in call.spec.parameter_shapes()]
    return replace(call, x=moved["x"], params=params, operands={n: moved[n] for n in call.operands}, recipe={})


@settings(max_examples=20)
@given(data=st.data())
def test_layouts_of_one_input(data: st.DataObject) -> None:
    """Widths that no descriptor describes: a strided, offset or expanded x gives the bits of its dense copy."""
    widths = st.lists(st.sampled_from((3, 7, 9, 17, 33, 47)), min_size=3, max_size=3)
    spec = data.draw(widths.flatmap(lambda w: specs(dims=tuple(w))))
    layout = data.draw(st.sampled_from(tuple(LAYOUTS)))
    call = lies(data.draw(drawn(spec, x="dense")), layout, ["x"])
    dense = replace(call, x=call.x.clone(memory_format=torch.contiguous_format))
    assert equal(call.x, dense.x)
    mlp = compiled(spec)
    same(call.gradients(mlp), dense.gradients(mlp))


@settings(max_examples=20)
@given(data=st.data())
def test_layouts_on_either_path(data: st.DataObject) -> None:
    """Widths for descriptors in 16 bits: whichever kernels a layout gets, all results are within the same bounds."""
    widths = st.lists(st.sampled_from((8, 16, 24, 40, 72)), min_size=3, max_size=3)
    dtype = data.draw(st.sampled_from(("float16", "bfloat16")))
    spec = data.draw(widths.flatmap(lambda w: specs(dims=tuple(w), dtype=dtype)))
    call = data.draw(drawn(spec, x="dense", dy="dense", weights="dense", operands="dense", pair="apart"))
    layout = data.draw(st.sampled_from([name for name in LAYOUTS if name not in ("expanded", "columns")]))
    which = data.draw(st.sets(st.sampled_from([name for name, t in call.named().items() if t.dim() == 2]), min_size=1))
    y, grads = lies(call, layout, sorted(which)).gradients(compiled(spec))
    judge(call, y, grads, eager=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_order_of_gate_and_up_in_memory_changes_no_bit(dtype: str) -> None:
    """Where an allocator puts the two weights differs from run to run. The gradient of x, a sum over both, once followed it."""
    spec = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype=dtype)
    for seed in range(3):
        results = []
        for pair in ("stacked", "up_first"):
            call = make_call(spec, (70,), seed, pair=pair)
            gate, up = call.params[:2]
            assert (gate.data_ptr() < up.data_ptr()) == (pair == "stacked")
            y, grads = call.gradients(mlpdsl.compile(spec, backend="triton"))
            results.append({"y": y, **grads})
        for name, t in results[0].items():
            assert same_bits(t, results[1][name]), name
