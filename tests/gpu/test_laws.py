"""Laws between specs and between calls on a GPU, bit for bit where nothing may round otherwise; `tests/interpreted/test_laws.py`
has them for specs without end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import Call, judge, make_call, same_bits
from tests.sixteen import SPECS
from tests.support import outputs_in_order

pytestmark = pytest.mark.usefixtures("generated")

DEVICE = "cuda"
NAMES = ("swiglu", "gelu-residual", "odd", "fp32", "tf32", "deep")
each_spec = pytest.mark.parametrize("name", NAMES)


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def results(call: Call) -> dict[str, Tensor]:
    y, grads = call.gradients(compiled(call.spec))
    return {"y": y, **grads}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """The results, of those that both have, that differ in some bit."""
    return [name for name in found if name in wanted and not same_bits(found[name], wanted[name])]


@pytest.mark.parametrize("name", ["swiglu", "everything", "odd-gated", "fp32-gated", "tf32"])
def test_the_order_of_gate_and_up_in_memory_changes_no_bit(name: str) -> None:
    for seed, rows in enumerate((1, 70, 300)):
        found, wanted = (results(make_call(SPECS[name], (rows,), seed, pair=p, device=DEVICE)) for p in ("stacked", "up_first"))
        assert differing(found, wanted) == []


@each_spec
@pytest.mark.parametrize(("entry", "value"), [("residual", -0.0), ("scale", 1.0), ("layer_scale", 1.0)])
def test_an_entry_that_changes_nothing(name: str, entry: str, value: float) -> None:
    """-0 added, or 1 multiplied, changes no bit of y and of no gradient. But a factor's kernel sums the last bias's gradient in
    an order of its own, of which float32 has the last bits: there it is held against the oracle."""
    spec = SPECS[name].replace(epilogue=())
    for rows in (1, 129):
        call = make_call(spec, (rows,), 0, device=DEVICE)
        more = spec.replace(epilogue=(entry,))
        shape = {"tile": call.dy.shape, "column": (spec.d_out,), "scalar": ()}[more.operands()[entry]]
        operand = torch.full(shape, value, dtype=call.x.dtype, device=DEVICE)
        with_it = replace(call, spec=more, operands={entry: operand}, recipe={})
        found = results(with_it)
        apart = differing(found, results(call))
        if spec.dtype == "float32" and entry != "residual" and apart == [list(spec.parameter_shapes())[-1]]:
            apart = []
            judge(with_it, found.pop("y"), found)
        assert apart == []


@each_spec
def test_powers_of_two(name: str) -> None:
    """Without bias, leaky_relu is homogeneous, and a power of two rounds nothing; nor does one times dy."""
    if SPECS[name].dtype == "float16":
        pytest.skip("float16 rounds to a subnormal what it does not round so at twice the size")
    spec = SPECS[name].replace(activation="leaky_relu", gated=False, bias=False, epilogue=())
    for rows, k in ((1, 7), (129, -9)):
        call, factor = make_call(spec, (rows,), 0, device=DEVICE), 2.0**k
        wanted = results(call)
        found = results(replace(call, x=call.x * factor, recipe={}))
        assert differing({"y": found["y"]}, {"y": wanted["y"] * factor}) == []
        assert torch.equal(found["x"], wanted["x"])
        found = results(replace(call, dy=call.dy * factor, recipe={}))
        assert [n for n, t in found.items() if n != "y" and not torch.equal(t, wanted[n] * factor)] == []


@each_spec
def test_permuted_outputs(name: str) -> None:
    """The last linear's rows in another order are the columns of y in that order, and its own gradients follow, every bit."""
    call = make_call(SPECS[name], (129,), 0, device=DEVICE)
    order = torch.randperm(call.spec.d_out, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    moved, follow = outputs_in_order(call, order)
    wanted = results(call)
    found = {name: t for name, t in results(moved).items() if name in follow}
    assert differing(found, {name: wanted[name].index_select(dim, order) for name, dim in follow.items()}) == []


@each_spec
def test_permuted_rows(name: str) -> None:
    """In a batch of the same size a row has the same bits at any place; sums over rows stay within their bounds."""
    call = make_call(SPECS[name], (129,), 0, device=DEVICE)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kinds = call.spec.operands()
    operands = {n: t[order] if kinds[n] in ("tile", "row") else t for n, t in call.operands.items()}
    found = results(replace(call, x=call.x[order], operands=operands, dy=call.dy[order], recipe={}))
    wanted = results(call)
    assert same_bits(found["y"], wanted["y"][order]) and same_bits(found["x"], wanted["x"][order])
    back = torch.argsort(order)
    rowwise = {"x", *(n for n, kind in kinds.items() if kind in ("tile", "row"))}
    judge(call, found.pop("y")[back], {n: t[back] if n in rowwise else t for n, t in found.items()}, eager=False)


def test_layers_one_by_one() -> None:
    spec = SPECS["deep"]
    call = make_call(spec, (129,), 0, device=DEVICE)
    h, last = call.x, len(spec.dims) - 2
    for i in range(last + 1):
        entries = spec.epilogue if i == last else (spec.activation,)
        layer = spec.replace(dims=spec.dims[i : i + 2], activation="identity", epilogue=entries)
        h = compiled(layer)(h, *call.params[2 * i : 2 * i + 2])
    judge(call, h, {}, eager=False)
