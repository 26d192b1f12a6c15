"""The library's products in place of generated kernels, stage by stage, held against the oracle like any other strategy.

Products are torch's on the CPU; what stands between them is interpreted.
"""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import given, settings

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch, library
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import Call, check_call, judge, make_call, same_bits
from mlpdsl.testing.strategies import calls, leads, specs

torch.set_num_threads(1)

GATED = MLPSpec(dims=(48, 96, 40), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "gelu"))


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("library"):
        yield


@settings(max_examples=20)
@given(call=specs(max_epilogues=3).flatmap(
    lambda spec: leads().filter(lambda lead: 0 < math.prod(lead) <= 70).flatmap(lambda lead: calls(spec, lead=lead))
))  # fmt: skip
def test_any_spec_any_layout_any_values(call: Call) -> None:
    check_call(call)


def test_every_stage_is_the_librarys() -> None:
    stages = dispatch.library_stages(GATED.to_json(), torch.device("cpu"), 20)
    assert stages == {"hidden[0]", "output[1]", "hidden_grad[1]", "weight_grad[0]", "weight_grad[1]"}  # two products, one sum
    wide = GATED.replace(dtype="float32").to_json()
    assert "input_grad[0]" in dispatch.library_stages(wide, torch.device("cpu"), 20)


def test_the_rounded_product_shows() -> None:
    """What the oracle is told of the library matters: without it, a product in 16 bits is out of bounds."""
    spec = GATED.replace(bias=False)
    call = make_call(spec, (60,), 0)
    y, grads = call.gradients(mlpdsl.compile(spec, backend="triton"))
    judge(call, y, grads, library=("hidden[0]", "output[1]", "hidden_grad[1]"))
    for forgotten, refused in (("hidden[0]", "y"), ("output[1]", "y"), ("hidden_grad[1]", "gradient of x")):
        with pytest.raises(oracle.OracleError, match=f"^{refused} of"):
            judge(call, y, grads, library={"hidden[0]", "output[1]", "hidden_grad[1]"} - {forgotten})


def test_a_residual_alone_is_added_after_the_rounding() -> None:
    """cuBLAS rounds the product before it adds a tile."""
    spec = MLPSpec(dims=(32, 64, 24), activation="gelu", dtype="float16", epilogue=("residual",))
    call = make_call(spec, (30,), 0)
    y, grads = call.gradients(mlpdsl.compile(spec, backend="triton"))
    judge(call, y, grads, library=("hidden[0]", "output[1]", "hidden_grad[1]"))
    with pytest.raises(oracle.OracleError, match=r"^y of"):
        judge(call, y, grads, library=("hidden[0]", "hidden_grad[1]"))


@pytest.mark.parametrize(("steps", "right"), [(1, True), (3, False)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bias_may_be_added_to_the_rounded_product(dtype: str, steps: int, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuBLAS adds it where it has no kernel that does both; but nothing coarser than that."""
    inner = library.product

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, addend: torch.Tensor | None = None) -> None:
        inner(a, b, out)
        if addend is not None:
            coarse = out.float()
            coarse = coarse + (coarse.abs() * 2.0 ** (-8 if dtype == "bfloat16" else -11)) * (steps - 1)
            out.copy_(coarse + addend.float())

    monkeypatch.setattr(launch, "product", product)
    spec = GATED.replace(dtype=dtype, epilogue=("residual",))
    if right:
        check_call(make_call(spec, (60,), 0))
    else:
        with pytest.raises(oracle.OracleError):
            check_call(make_call(spec, (60,), 0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_calls_are_recorded_with_their_products(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GATED.replace(dtype=dtype)
    mlp = mlpdsl.compile(spec, backend="triton")
    first = make_call(spec, (2, 9), 0)
    wanted = [replace(make_call(spec, (2, 9), seed), params=first.params, recipe={}) for seed in range(4)]
    products: list[int] = []
    replayed: list[int] = []
    for name, at, heard in (("product", library, products), ("replay", mlpdsl.tape.Tape, replayed)):
        inner = getattr(at, name)
        monkeypatch.setattr(at, name, lambda *args, inner=inner, heard=heard: (heard.append(1), inner(*args))[1])
    for call in wanted:
        check_call(call, mlp)
    assert len(replayed) == 4 and len(products) >= 2 * 6


def test_batch_invariant_never_multiplies_by_the_library() -> None:
    """Not even where that is asked for: rows would depend on the batch."""
    assert not dispatch.library_stages(GATED.to_json(), torch.device("cpu"), 20, batch_invariant=True) & {"hidden[0]", "output[1]"}
    mlp = mlpdsl.compile(GATED, backend="triton", batch_invariant=True)
    call = make_call(GATED, (20,), 0)
    whole = call.run(mlp)
    part = replace(call, x=call.x[3:5], dy=call.dy[3:5], recipe={})
    assert same_bits(part.run(mlp), whole[3:5])
