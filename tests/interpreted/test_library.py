"""The library's products in place of generated kernels, stage by stage, held against the oracle like any other strategy.

Products are torch's on the CPU; what stands between them is interpreted.
"""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch, library
from mlpdsl.codegen import config as rule
from mlpdsl.codegen.plan import Config
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

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, addend: torch.Tensor | None = None, **_: bool) -> None:
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
    for name, at, heard in (("multiply", library, products), ("replay", mlpdsl.tape.Tape, replayed)):
        inner = getattr(at, name)
        monkeypatch.setattr(at, name, lambda *args, inner=inner, heard=heard, **words: (heard.append(1), inner(*args, **words))[1])
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


@settings(max_examples=20)
@given(call=specs(max_epilogues=1).filter(lambda spec: spec.gated).flatmap(
    lambda spec: leads().filter(lambda lead: 0 < math.prod(lead) <= 70).flatmap(lambda lead: calls(spec, lead=lead))
))  # fmt: skip
def test_any_gated_spec_by_one_batch(call: Call) -> None:
    with dispatch.forcing("batched"):
        check_call(call)


def batched(spec: MLPSpec, rows: int) -> Config:
    config = rule.library("hidden", rows, spec.dims[1], dtype=spec.dtype, planes=2)
    assert config is not None
    return replace(config, batched=True)


@pytest.mark.parametrize("pair", ["apart", "stacked", "up_first", "unlike", "tied"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gate_and_up_as_one_batch(dtype: str, bias: bool, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever weight lies first, with gradients and without, to the same bits; and in recordings."""
    spec, rows = GATED.replace(bias=bias, epilogue=("gelu",), dtype=dtype), 18
    heard: list[str] = []
    inner = library.multiply_two
    monkeypatch.setattr(library, "multiply_two", lambda *args, **words: (heard.append(""), inner(*args, **words))[1])
    first = make_call(spec, (rows,), 0, pair=pair)
    with dispatch.forcing_config("hidden", rows, 96, 48, batched(spec, rows)):
        mlp = mlpdsl.compile(spec, backend="triton")
        for seed in range(3):  # the second is recorded, the third repeats it
            call = replace(make_call(spec, (rows,), seed), params=first.params, recipe={})
            heard.clear()
            with torch.no_grad():
                y = call.run(mlp)
            assert len(heard) == 1
            with_gradients, grads = call.gradients(mlp)
            assert len(heard) == 2 and same_bits(y, with_gradients)
            judge(call, y, grads, library=("hidden[0]", "output[1]", "hidden_grad[1]", "input_grad[0]"))


@pytest.mark.parametrize("bias", [False, True])
def test_the_bits_of_a_batch_follow_no_address(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a batched product sums in another order than two do: nothing falls back to two for where weights lie."""
    inner = library.multiply_two

    def coarse(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out: torch.Tensor, **words: bool) -> None:
        inner(x, low, high, out, **words)
        out.mul_(1.0 + 2.0**-9)

    monkeypatch.setattr(library, "multiply_two", coarse)
    spec, rows = GATED.replace(bias=bias, dtype="float32", epilogue=()), 18
    calls_ = [make_call(spec, (rows,), 0, pair=pair) for pair in ("stacked", "up_first")]
    with dispatch.forcing_config("hidden", rows, 96, 48, batched(spec, rows)):
        mlp = mlpdsl.compile(spec, backend="triton")
        found = [call.gradients(mlp) for call in calls_]
        assert same_bits(found[0][0], found[1][0]) and same_bits(calls_[0].run(mlp), found[0][0])
        assert all(same_bits(found[0][1][name], found[1][1][name]) for name in found[0][1])


@settings(max_examples=20)
@given(call=specs(max_epilogues=3).filter(lambda spec: spec.bias).map(lambda spec: spec.replace(dtype="float32")).flatmap(
    lambda spec: leads().filter(lambda lead: 0 < math.prod(lead) <= 70).flatmap(lambda lead: calls(spec, lead=lead))
))  # fmt: skip
def test_any_spec_with_biases_in_the_pass(call: Call) -> None:
    with dispatch.forcing("bias_pass"):
        check_call(call)


@pytest.mark.parametrize(
    "words", [{}, {"gated": True}, {"epilogue": ("gelu",)}, {"epilogue": ("layer_scale", "residual")}], ids=str
)
def test_biases_in_the_pass(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of forward is given one; and the bits are the same with gradients, without, and in a recording."""
    spec = MLPSpec(**{"dims": (48, 96, 40), "activation": "silu", "bias": True, "dtype": "float32", **words})
    added: list[bool] = []
    inner = library.multiply

    def heard(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, addend: torch.Tensor | None = None, **words: bool) -> None:
        added.append(addend is not None)
        inner(a, b, out, addend, **words)

    monkeypatch.setattr(library, "multiply", heard)
    with dispatch.forcing("bias_pass"):
        mlp = mlpdsl.compile(spec, backend="triton")
        call = make_call(spec, (18,), 0)
        with torch.no_grad():
            results = [call.run(mlp) for _ in range(3)]  # the second is recorded, the third repeats it
        assert len(added) == 3 * (3 if spec.gated else 2) and not any(added)
        y, grads = call.gradients(mlp)
        judge(call, y, grads, library=dispatch.library_stages(spec.to_json(), torch.device("cpu"), 18))
    assert all(same_bits(result, y) for result in results)


def test_a_batch_needs_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view over both weights is made by torch alone, which otherwise asks numpy what elements are."""
    low, high = sorted(torch.randn(2, 8, 4).unbind(0), key=torch.Tensor.data_ptr)
    assert library.REINTERPRET is not None
    both = library.spanning(low, high)
    assert torch.equal(both, torch.stack([low.t(), high.t()])) and not both.requires_grad
    apart = [torch.randn(8, 4) for _ in range(2)]
    low, high = sorted(apart, key=torch.Tensor.data_ptr)
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert torch.equal(
        torch.bmm(torch.ones(2, 1, 4), library.spanning(low, high)), torch.stack([low.sum(1)[None], high.sum(1)[None]])
    )


def test_weights_no_whole_16_bytes_apart_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, rows = GATED.replace(bias=False, epilogue=(), dtype="float16"), 18
    call = make_call(spec, (rows,), 0)
    loose = torch.empty(2 * 96 * 48 + 3, dtype=torch.float16)
    pair = loose[: 96 * 48].view(96, 48), loose[96 * 48 + 3 :].view(96, 48)
    for ours, theirs in zip(pair, call.params, strict=False):
        ours.copy_(theirs)
    monkeypatch.setattr(launch, "product_of_two", lambda *args: pytest.fail("one batched product"))
    with dispatch.forcing_config("hidden", rows, 96, 48, batched(spec, rows)):
        assert not library.fits_batch(*pair)
        check_call(replace(call, params=[*pair, call.params[2]], recipe={}), mlpdsl.compile(spec, backend="triton"), eager=False)


@pytest.mark.parametrize(("apart", "fits"), [(0, True), (16, True), (-4096, True), (8, False), (2**40, False), (-(2**40), False)])
def test_how_far_apart_two_weights_of_a_batch_may_lie(apart: int, fits: bool) -> None:
    class At:
        def __init__(self, address: int) -> None:
            self.data_ptr = lambda: address

    assert library.fits_batch(At(2**41), At(2**41 + apart)) is fits  # type: ignore[arg-type]
