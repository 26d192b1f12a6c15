"""Laws of the Pallas functions under JAX's transformations, and between calls: bit for bit where nothing may round otherwise."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mlpdsl.jax
from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.testing import bounded, oracle
from mlpdsl.testing.calls import Call, judge, make_call, same_bits
from mlpdsl.testing.strategies import calls, specs
from tests.pallas.support import arrays, drawing, gradients, interpreted, of_named, run, to_jax, to_torch

SPECS = {
    "gated": MLPSpec(
        dims=(24, 40, 16), activation="silu", gated=True, bias=True, dtype="bfloat16",
        epilogue=("residual", "layer_scale", "scale"),
    ),
    "plain": MLPSpec(dims=(17, 33, 9), activation="gelu", bias=True, epilogue=("residual",)),
    "exact": MLPSpec(dims=(24, 40, 16), activation="relu", dtype="bfloat16", epilogue=("scale",)),
}  # fmt: skip
"""Between two programs XLA may fuse an activation differently, to other bits; "exact" has nothing to fuse."""

Named = dict[str, Any]


def same(found: Any, wanted: Any) -> bool:
    """Equal dtype, shape and bits, wherever they lie."""
    a, b = np.asarray(found), np.asarray(wanted)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def of_rows(spec: MLPSpec) -> set[str]:
    """The names of what has a row for every row of the batch."""
    return {"x"} | {name for name, kind in spec.operands().items() if kind in ("tile", "row")}


def free(array: jax.Array) -> jax.Array:
    """A copy that is bound to no device."""
    return jnp.asarray(np.asarray(array))


def as_looped(found: tuple[Any, Named], each: list[Call]) -> None:
    """What vmap gave, one after the other: within the oracle, and for the exact spec with the bits of a call by itself."""
    y, grads = found
    both = jax.jit(gradients(each[0].spec, interpreted(each[0].spec)))
    for i, call in enumerate(each):
        judge(call, to_torch(y[i]), {n: to_torch(grads[n][i]) for n in call.named()})
        if call.spec == SPECS["exact"]:
            y_alone, alone = both(to_jax(call.dy), arrays(call))
            assert same(y[i], y_alone)
            assert [n for n in alone if not same(grads[n][i], alone[n])] == []


def stacked(each: list[Named]) -> Named:
    return {name: jnp.stack([one[name] for one in each]) for name in each[0]}


# vmap


def members(call: Call) -> list[Call]:
    """The calls of the first of two leading dimensions."""
    rows = of_rows(call.spec)
    return [
        replace(
            call, x=call.x[i], operands={n: t[i] if n in rows else t for n, t in call.operands.items()}, dy=call.dy[i], recipe={}
        )
        for i in range(len(call.x))
    ]


@pytest.mark.parametrize("name", SPECS)
def test_vmap_over_x_is_the_batch(name: str) -> None:
    """And the batch is its rows: vmap over a leading dimension, and one call with it."""
    spec = SPECS[name]
    call = make_call(spec, (3, 5), 1)
    named, function = arrays(call), of_named(spec, interpreted(spec))
    axes = {n: 0 if n in of_rows(spec) else None for n in named}
    mapped, whole = jax.jit(jax.vmap(function, in_axes=(axes,)))(named), jax.jit(function)(named)
    judge(call, to_torch(mapped), {})
    judge(call, to_torch(whole), {})
    assert name != "exact" or same(mapped, whole)


@pytest.mark.parametrize("name", SPECS)
def test_per_example_gradients_are_a_loop(name: str) -> None:
    """vmap of a gradient over the examples, with shared parameters."""
    spec = SPECS[name]
    call = make_call(spec, (3, 4), 2)
    axes = {n: 0 if n in of_rows(spec) else None for n in call.named()}
    both = jax.vmap(gradients(spec, interpreted(spec)), in_axes=(0, axes))
    as_looped(jax.jit(both)(to_jax(call.dy), arrays(call)), members(call))


@pytest.mark.parametrize("name", SPECS)
def test_vmap_over_parameters_is_a_loop(name: str) -> None:
    """An ensemble: every tensor has a dimension for its members."""
    spec = SPECS[name]
    each = [make_call(spec, (5,), seed) for seed in range(3)]
    both = jax.vmap(gradients(spec, interpreted(spec)))
    as_looped(jax.jit(both)(jnp.stack([to_jax(c.dy) for c in each]), stacked([arrays(c) for c in each])), each)


# shard_map


def sharded(spec: MLPSpec, check_vma: bool) -> tuple[Callable[[Named], Any], Mesh, Named]:
    """The interpreted function over four devices, by rows, of everything by name; the mesh, and how each tensor lies."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    lies = {name: PartitionSpec("batch") if name in of_rows(spec) else PartitionSpec()
            for name in ("x", *spec.parameter_shapes(), *spec.operands())}  # fmt: skip
    function = of_named(spec, interpreted(spec))
    return jax.shard_map(function, mesh=mesh, in_specs=(lies,), out_specs=PartitionSpec("batch"), check_vma=check_vma), mesh, lies


@pytest.mark.parametrize("name", SPECS)
def test_sharded_by_rows(name: str) -> None:
    """Over four devices: y and the gradients of what has rows are those of one, the others sums of four parts, each rounded."""
    spec = SPECS[name]
    call = make_call(spec, (20,), 4)
    function, mesh, lies = sharded(spec, check_vma=False)

    def spread(t: jax.Array, how: PartitionSpec) -> jax.Array:
        placed: jax.Array = jax.device_put(free(t), NamedSharding(mesh, how))
        return placed

    named = {n: spread(t, lies[n]) for n, t in arrays(call).items()}
    assert len({shard.device for shard in named["x"].addressable_shards}) == 4

    def both(dy: jax.Array, t: Named) -> Any:
        y, back = jax.vjp(function, t)
        return y, back(dy)[0]

    y, grads = jax.jit(both)(spread(to_jax(call.dy), PartitionSpec("batch")), named)
    judge(call, to_torch(free(jax.jit(function)(named))), {})
    judge(call, to_torch(free(y)), {n: to_torch(free(grads[n])) for n in of_rows(spec)})
    if name == "exact":
        y_whole, grads_whole = run(call)
        assert same(y, to_jax(y_whole)) and same(grads["x"], to_jax(grads_whole["x"]))
    parts = [oracle.backward(spec, c.x, c.params, c.operands, c.dy, replay=True) for c in quarters(call)]
    unit = bounded.UNIT[call.x.dtype]
    for n in lies.keys() - of_rows(spec):
        values, bounds = (torch.stack([getattr(part[n], what) for part in parts]) for what in ("value", "bound"))
        slack = 4 * unit * values.abs().sum(0)  # three additions, and the sum's own rounding
        total = bounded.Bounded(values.sum(0), bounds.sum(0) + slack)
        oracle.check(to_torch(free(grads[n])), total, f"gradient of {n}, summed over devices")


def quarters(call: Call) -> list[Call]:
    """The calls of four devices."""
    rows = of_rows(call.spec)
    found = []
    for part in torch.arange(len(call.x)).chunk(4):
        operands = {n: t[part] if n in rows else t for n, t in call.operands.items()}
        found.append(replace(call, x=call.x[part], operands=operands, dy=call.dy[part], recipe={}))
    return found


def test_the_interpreter_refuses_varying_axes() -> None:
    """It knows nothing of them, and would fail deep inside Pallas."""
    spec = SPECS["plain"]
    function, _, _ = sharded(spec, check_vma=True)
    with pytest.raises(UnsupportedError, match="check_vma=False"):
        jax.jit(function)({n: free(t) for n, t in arrays(make_call(spec, (8,), 0)).items()})


# Derivatives that there are none of


def test_a_second_derivative_is_refused() -> None:
    """In reverse over reverse. The reference has one."""
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", bias=True)
    call = make_call(spec, (5,), 0)
    x, *params = (to_jax(t) for t in call.named().values())

    def twice(mlp: Callable[..., Any]) -> Any:
        def loss(x: jax.Array) -> Any:
            return (mlp(x, *params) ** 2).sum()

        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    with pytest.raises(UnsupportedError, match=r"mlpdsl\.jax\.reference"):
        twice(interpreted(spec))
    assert np.abs(twice(mlpdsl.jax.reference(spec))).max() > 0


def test_forward_mode_is_refused() -> None:
    """As of every `jax.custom_vjp`. The reference has it."""
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", bias=True)
    x, *params = (to_jax(t) for t in make_call(spec, (5,), 0).named().values())
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: interpreted(spec)(x, *params), (x,), (x,))
    assert jax.jvp(lambda x: mlpdsl.jax.reference(spec)(x, *params), (x,), (x,))[1].shape == (5, 8)


# Between calls of one spec, and of two


def drawn(spec: st.SearchStrategy[MLPSpec]) -> st.SearchStrategy[Call]:
    """Calls with rows, calm values, all gradients."""
    leads = st.sampled_from(((1,), (2,), (7,), (16,), (33,), (2, 3)))
    return leads.flatmap(lambda lead: calls(spec, lead=lead, values="normal", requires_grad=None, pattern="once"))


def given_operand(call: Call, entry: str, value: float) -> Call:
    """The call of the same spec with one more epilogue entry at the end, whose operand is `value` everywhere."""
    spec = call.spec.replace(epilogue=(*call.spec.epilogue, entry))
    shape = {"tile": call.dy.shape, "column": (spec.d_out,), "scalar": ()}[spec.operands()[entry]]
    operand = torch.full(shape, value, dtype=call.x.dtype)
    return replace(call, spec=spec, operands={**call.operands, entry: operand}, recipe={})


@drawing(max_examples=3)
@given(data=st.data())
@pytest.mark.parametrize(("entry", "value"), [("residual", -0.0), ("residual", 0.0), ("scale", 1.0), ("layer_scale", 1.0)])
def test_an_entry_that_changes_nothing(entry: str, value: float, data: st.DataObject) -> None:
    """0 added, or 1 multiplied, stays within the bounds of the spec without; a residual's gradient is dy, every bit."""
    entries = ["residual", "scale", "layer_scale", "silu", "tanh"]
    call = data.draw(drawn(specs(epilogue_entries=[e for e in entries if e != entry], max_epilogues=2, max_depth=3)))
    y, grads = run(given_operand(call, entry, value))
    judge(call, y, {name: grads[name] for name in call.named()}, eager=False)
    if entry == "residual":
        assert same_bits(grads[entry], call.dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_entry_that_changes_no_bit(dtype: str) -> None:
    """Where the epilogue has nothing else, XLA has nothing to fuse otherwise: -0 added, or 1 multiplied, changes no bit."""
    spec = MLPSpec(dims=(20, 33, 12), activation="relu", bias=True, dtype=dtype)
    call = make_call(spec, (9,), 3)
    y, grads = run(call)
    for entry, value in (("residual", -0.0), ("scale", 1.0), ("layer_scale", 1.0)):
        found, found_grads = run(given_operand(call, entry, value))
        assert same_bits(found, y), entry
        assert [n for n in grads if not same_bits(found_grads[n], grads[n])] == [], entry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_powers_of_two(dtype: str) -> None:
    """relu without bias is homogeneous, and a power of two rounds nothing: the bits follow, forward and backward."""
    spec = MLPSpec(dims=(20, 33, 12), activation="relu", dtype=dtype)
    call = make_call(spec, (9,), 5)
    y, grads = run(call)
    found, found_grads = run(replace(call, x=call.x * 1024, recipe={}))
    assert same_bits(found, y * 1024) and same_bits(found_grads["x"], grads["x"])
    for name in spec.parameter_shapes():
        assert same_bits(found_grads[name], grads[name] * 1024), name
    _, found_grads = run(replace(call, dy=call.dy * 1024, recipe={}))
    assert [n for n in grads if not same_bits(found_grads[n], grads[n] * 1024)] == []


def test_a_gradient_asked_for_alone() -> None:
    """By one argument alone: within the oracle as among all."""
    spec = SPECS["gated"]
    call = make_call(spec, (9,), 6)
    named, function, dy = arrays(call), of_named(spec, interpreted(spec)), to_jax(call.dy)
    expected = oracle.backward(spec, call.x, call.params, call.operands, call.dy, replay=True)
    for name in ("x", "up_proj.weight", "scale"):
        _, back = jax.vjp(lambda t, name=name: function({**named, name: t}), named[name])
        oracle.check(to_torch(back(dy)[0]), expected[name], f"gradient of {name} alone")
