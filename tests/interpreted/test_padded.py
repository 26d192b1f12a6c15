"""Products on copies whose rows are of whole 16 bytes, forced wherever rows are not: held against the oracle; what is copied."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch
from mlpdsl.codegen.config import library
from mlpdsl.codegen.plan import Config
from mlpdsl.dispatch import runner
from mlpdsl.tape import Tape
from mlpdsl.testing.calls import Call, check_call, make_call, same_bits
from mlpdsl.testing.strategies import calls, leads, specs
from tests.recordings import anew, assert_same, compiled, plain_gradients, plainly

torch.set_num_threads(1)

GATED = MLPSpec(dims=(50, 70, 33), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "residual"))
DEEP = MLPSpec(dims=(50, 70, 130, 33), activation="gelu", bias=True, dtype="float16", epilogue=("gelu",))
PLAIN = MLPSpec(dims=(50, 70, 33), activation="relu", dtype="bfloat16")
WIDE = MLPSpec(dims=(267, 70, 531), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",))
"""Copies of several blocks of columns."""
WHOLE = MLPSpec(dims=(48, 72, 40), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",))
"""Rows of whole 16 bytes."""
TF32 = GATED.replace(dtype="float32", precision="tf32")
"""Whose forward alone has kernels on descriptors, and masked loads beside them."""
WIDTHS = (1, 3, 8, 13, 17, 31, 40, 50, 64, 65, 71)
"""What fits a descriptor lies beside what does not."""


def names(spec: MLPSpec) -> str:
    return spec.short_name


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("padded"):
        yield


def drawn_specs() -> SearchStrategy[MLPSpec]:
    """Any spec in 16 bits or TF32, of widths of both kinds."""
    each = st.sampled_from((1, 2, 2, 3)).flatmap(lambda depth: st.tuples(*[st.sampled_from(WIDTHS)] * (depth + 1)))
    kinds = st.sampled_from((("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32")))
    return st.tuples(each, kinds).flatmap(lambda drawn: specs(dims=drawn[0], dtype=drawn[1][0], precision=drawn[1][1]))


def drawn_calls(spec: MLPSpec) -> SearchStrategy[Call]:
    return leads().filter(lambda lead: 0 < math.prod(lead) <= 70).flatmap(lambda lead: calls(spec, lead=lead))


def test_any_spec_any_layout_any_values(launched: list[str]) -> None:
    tried: list[bool] = []

    @settings(max_examples=24)
    @given(call=drawn_specs().flatmap(drawn_calls))
    def holds(call: Call) -> None:
        launched.clear()
        check_call(call)
        tried.append("copy_rows" in launched)

    holds()
    assert sum(tried) > len(tried) // 2, "calls without a copy say nothing here"


# Which kernels run, and what is copied


@pytest.mark.parametrize("spec", [GATED, DEEP, PLAIN, WIDE, TF32, TF32.replace(gated=False, activation="gelu")], ids=names)
def test_every_product_is_on_descriptors(spec: MLPSpec, launched: list[str]) -> None:
    """In TF32 those of forward."""
    back = "masked" if spec.dtype == "float32" else "tma"
    for rows in (1, 20):
        launched.clear()
        check_call(make_call(spec, (rows,), 0))
        products = {name for name in launched if name.partition("_")[0] in ("hidden", "output", "input", "weight")}
        assert products == {"hidden_tma", "output_tma", f"hidden_grad_{back}", f"input_grad_{back}", f"weight_grad_{back}"}
        assert "copy_rows" in launched


@pytest.mark.parametrize("pair", ["apart", "stacked", "up_first", "unlike", "tied"])
def test_what_fits_is_not_copied_in_tf32(pair: str, launched: list[str]) -> None:
    """Rows of whole 16 bytes are of four elements there. One descriptor spans both weights, but not one that is both."""
    for dims in ((48, 72, 40), (36, 76, 44)):
        call = make_call(TF32.replace(dims=dims), (20,), 1, pair=pair)
        launched.clear()
        check_call(call)
        assert "hidden_tma" in launched and ("copy_rows" in launched) == (pair == "tied"), launched


@pytest.mark.parametrize("spec", [WHOLE, WHOLE.replace(dtype="float32"), GATED.replace(dtype="float32")], ids=names)
def test_others_are_as_they_were(spec: MLPSpec, launched: list[str]) -> None:
    """In float32, and where rows are of whole 16 bytes, however they lie."""
    for layout in ("dense", "offset"):
        check_call(make_call(spec, (20,), 0, x=layout))
    assert "copy_rows" not in launched and "hidden_masked" in launched  # the latter for a first element off every alignment
    assert ("hidden_tma" in launched) == (spec.dtype != "float32")


def test_a_forward_copies_what_does_not_fit(launched: list[str]) -> None:
    """x and the weights; hidden activations are written where they fit, and the result by pointers."""
    call = make_call(PLAIN, (20,), 0, requires_grad=())
    call.run(compiled(PLAIN))
    assert launched == ["copy_rows", "copy_rows", "hidden_tma", "copy_rows", "output_tma"]
    launched.clear()
    fits = replace(call, x=padded(call.x), params=[padded(w) for w in call.params])
    fits.run(compiled(PLAIN))
    assert launched == ["hidden_tma", "output_tma"]


def test_a_backward_copies_what_does_not_fit(launched: list[str]) -> None:
    """The result's gradient, once for both its products; weights, the preactivation, x. What backward made fits."""
    y = (call := make_call(PLAIN, (20,), 0).needing()).run(compiled(PLAIN))
    launched.clear()
    torch.autograd.grad(y, list(call.named().values()), call.dy)
    assert [name for name in launched if name != "sum_rows"] == [
        *["copy_rows"] * 3, "hidden_grad_tma", "weight_grad_tma",
        "copy_rows", "weight_grad_tma", "copy_rows", "input_grad_tma",
    ]  # fmt: skip


@pytest.mark.parametrize(("dims", "copies"), [((48, 70, 40), 1), ((50, 72, 33), 2), ((48, 72, 33), 0)], ids=str)
def test_what_fits_beside_what_does_not(dims: tuple[int, ...], copies: int, launched: list[str]) -> None:
    """Of these, what does not fit: the second weight; x and its weight; nothing but the result, which is not copied."""
    spec = PLAIN.replace(dims=dims)
    make_call(spec, (20,), 0, requires_grad=()).run(compiled(spec))
    assert launched.count("copy_rows") == copies
    assert {name for name in launched if name != "copy_rows"} == {"hidden_tma", "output_tma"}
    check_call(make_call(spec, (20,), 0))


@pytest.mark.parametrize(("pair", "copies"), [("apart", 1), ("up_first", 1), ("tied", 2)])
def test_gate_and_up_that_fit_are_not_copied(pair: str, copies: int, launched: list[str]) -> None:
    """Whatever the width of the result has as its remainder. One tensor that is both is no pair."""
    spec = PLAIN.replace(dims=(48, 70, 40), activation="silu", gated=True)
    make_call(spec, (20,), 0, pair=pair, requires_grad=()).run(compiled(spec))
    assert launched.count("copy_rows") == copies and "hidden_tma" in launched


def padded(t: Tensor) -> Tensor:
    """The same values in rows of whole 16 bytes."""
    made = t.new_zeros(*t.shape[:-1], -(-t.shape[-1] // 8) * 8)[..., : t.shape[-1]]
    return made.copy_(t)


# What comes out


@pytest.mark.parametrize("spec", [GATED, DEEP, PLAIN, PLAIN.replace(dims=(48, 70, 40)), TF32], ids=names)
def test_results_lie_as_without_copies(spec: MLPSpec) -> None:
    """Results, what is saved for backward, and gradients: contiguous, however few rows there are."""
    run = runner(spec.to_json(), torch.device("cpu"))
    for rows in (1, 20):
        call = make_call(spec, (rows,), 0)
        needs = [True] * (1 + len(call.params) + len(call.operands))
        operands = list(call.operands.values())
        for save in (False, True):
            y, *saved = run.module.forward(call.x, call.params, operands, save, run.pick)
            assert all(plainly_contiguous(t) for t in (y, *saved))
        saved_before = [t.clone() for t in saved]
        grads = run.module.backward(call.dy, call.x, call.params, operands, saved, needs, run.pick)
        assert all(plainly_contiguous(t) for t in grads if t is not None)
        assert all(same_bits(a, b) for a, b in zip(saved, saved_before, strict=True))


def plainly_contiguous(t: Tensor) -> bool:
    """Also in dimensions of size 1, whose strides torch leaves arbitrary."""
    return t.stride() == torch.empty(t.shape, device="meta").stride()


@pytest.mark.parametrize("spec", [GATED, DEEP, PLAIN, TF32], ids=names)
def test_what_is_saved_is_what_is_saved_without_copies(spec: MLPSpec) -> None:
    """Sums have the order of the tiles, which the interpreter has the same of for every path: so the same bits."""
    call = make_call(spec, (20,), 0)
    found = []
    for strategy in ("padded", "generated"):
        with dispatch.forcing(strategy):
            run = runner(spec.to_json(), torch.device("cpu"))
            found.append(run.module.forward(call.x, call.params, list(call.operands.values()), True, run.pick))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("pair", ["apart", "stacked", "up_first", "unlike", "tied"])
def test_gate_and_up_wherever_they_lie(pair: str) -> None:
    for dims in ((50, 70, 33), (48, 70, 40)):
        check_call(make_call(GATED.replace(dims=dims), (20,), 1, pair=pair))


def test_operands_in_any_layout() -> None:
    for operands in ("dense", "padded", "transposed", "expanded", "columns"):
        check_call(make_call(GATED, (20,), 2, operands=operands, dy=operands))


@pytest.mark.usefixtures("no_recordings")
@pytest.mark.parametrize("spec", [GATED, DEEP, PLAIN, TF32], ids=names)
def test_repeated_from_a_recording(spec: MLPSpec, replays: list[Tape], launched: list[str]) -> None:
    """Views of allocations among the arguments: the bits of a call made in the ordinary way, for other values elsewhere."""
    first, mlp = make_call(spec, (2, 9), 0), compiled(spec)
    for count in range(2):
        anew(first, count).gradients(mlp)
        anew(first, count).run(mlp)
    replays.clear()
    launched.clear()
    check_call(anew(first, 2), mlp)
    assert len(replays) == 2 and "copy_rows" in launched and not {"hidden_masked", "output_masked"} & set(launched)
    call = anew(first, 3)
    assert_same(call.gradients(mlp), plain_gradients(call))
    assert same_bits(call.run(mlp), plainly(call))
    assert len(replays) == 5


# Where it is not taken


@pytest.mark.parametrize("spec", [GATED, DEEP, PLAIN.replace(dims=(48, 70, 40))], ids=names)
def test_batch_invariant_never_takes_it(spec: MLPSpec, launched: list[str]) -> None:
    """But for weight gradients, which sum over the batch anyway. A row alone has the bits that it has among others."""
    mlp = mlpdsl.compile(spec, backend="triton", batch_invariant=True)
    call = make_call(spec, (20,), 0, requires_grad=())
    whole = call.run(mlp)
    part = replace(call, x=call.x[3:4], operands={name: t[3:4] if t.dim() == 2 else t for name, t in call.operands.items()})
    assert same_bits(part.run(mlp), whole[3:4])
    assert "copy_rows" not in launched and "output_masked" in launched
    launched.clear()
    check_call(make_call(spec, (20,), 0), mlp)
    assert {"hidden_masked", "output_masked", "hidden_grad_masked", "input_grad_masked", "weight_grad_tma"} <= set(launched)


@pytest.mark.parametrize("spec", [PLAIN, PLAIN.replace(activation="silu", gated=True, bias=True)], ids=names)
def test_one_product_of_several(spec: MLPSpec, launched: list[str]) -> None:
    """A kernel of masked loads, or the library, reads what another wrote into rows of whole 16 bytes, and the other way round."""
    products = [("hidden", 20, 70, 50), ("output", 20, 33, 70), ("hidden_grad", 20, 70, 33), ("input_grad", 20, 50, 70)]
    for role, m, n, k in [*products, ("weight_grad", 33, 70, 20), ("weight_grad", 70, 50, 20)]:
        for config in (Config(32, 64, 32, num_stages=1), library(role, m, n, dtype=spec.dtype, planes=1 + spec.gated)):
            if config is None:
                continue
            launched.clear()
            with dispatch.forcing_config(role, m, n, k, config):
                check_call(make_call(spec, (20,), 0))
            assert "copy_rows" in launched and (config.strategy == "library" or f"{role}_masked" in launched)


def test_a_copy_is_not_handed_to_what_may_not_depend_on_the_batch(launched: list[str]) -> None:
    """Batch-invariant, the gradient of a weight may take copies from some number of rows on, and that of x is none the wiser."""
    seen: list[tuple[int, ...]] = []
    inner = launch.run

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        if kernel.__name__ == "input_grad_masked":
            seen.append(args[0].stride())
        inner(kernel, grid, options, *args)

    for spec in (PLAIN, PLAIN.replace(dims=(50, 33), activation="identity")):
        call = make_call(spec, (20,), 0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(launch, "run", run)
            call.gradients(mlpdsl.compile(spec, backend="triton", batch_invariant=True))
        assert "weight_grad_tma" in launched
        width = spec.dims[1]
        assert seen.pop()[-2:] == (width, 1)
