"""`batch_invariant=True`: a row has the same bits whatever batch it is in, wherever in it, and however the batch lies in memory."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import PAIRS, WEIGHT_LAYOUTS, make_call, place, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import pickle
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, ops
from mlpdsl.dispatch import runner
from mlpdsl.tape import Tapes
from mlpdsl.testing import strategies
from mlpdsl.testing.calls import LAYOUTS, check_call
from tests.invariance import differing, rows_of

torch.set_num_threads(1)

GATED = MLPSpec(dims=(64, 72, 40), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual", "gelu"))
SINGLE = MLPSpec(dims=(40, 24), activation="identity", bias=True, dtype="float16")
MIXED = MLPSpec(dims=(64, 37, 40), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",))
"""Of widths of which one is no multiple of 8: a single row of that many columns fits a descriptor, several rows do not."""
ROWWISE = MLPSpec.from_json("""{
    "dims": [33, 50, 97], "activation": "gelu", "dtype": "float32",
    "epilogue": [{"expr": "skip + keep * tile", "operands": [["keep", "row"], ["skip", "tile"]]}]
}""")
ROWWISE_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("expanded", "columns"))


@settings(max_examples=15)
@given(data=st.data(), seed=strategies.SEEDS)
def test_rows_do_not_depend_on_their_batch(data: st.DataObject, seed: int) -> None:
    spec = data.draw(strategies.specs(max_epilogues=2))
    count = data.draw(st.sampled_from((2, 3, 17, 40, 70, 129)))
    lie = {"weights": st.sampled_from(WEIGHT_LAYOUTS), "pair": st.sampled_from(PAIRS), "operands": st.sampled_from(ROWWISE_LAYOUTS)}
    call = make_call(spec, (count,), seed, **data.draw(st.fixed_dictionaries(lie)))
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))
    assert differing(call, chosen, data.draw(st.sampled_from(ROWWISE_LAYOUTS))) == []


@pytest.mark.parametrize("spec", [GATED, SINGLE, MIXED, MIXED.replace(gated=True), ROWWISE], ids=lambda spec: spec.short_name)
def test_the_same_kernels_with_the_same_tiles(spec: MLPSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a sum has the same order in any tile, so bits alone say little: what is launched may not depend on the batch,
    but for weight gradients. Without `batch_invariant` it does, or this test says nothing."""
    seen: list[tuple[str, ...]] = []
    own = runner(spec.to_json(), torch.device("cpu"))

    def watched(inner: Any) -> Any:
        def pick(role: str, path: str, m: int, n: int, k: int) -> Any:
            found = inner(role, path, m, n, k)
            if role != "weight_grad":
                seen.append((role, path, str(found)))
            return found

        return pick

    watching = own._replace(pick=watched(own.pick), invariant=watched(own.invariant), tapes=Tapes(False))
    monkeypatch.setattr(ops, "runner", lambda spec_json, device: watching)
    for invariant in (True, False):
        mlp = mlpdsl.compile(spec, backend="triton", batch_invariant=invariant)
        launched = set()
        for rows in (1, 33, 70):
            for lies in ("dense", "offset"):
                seen.clear()
                make_call(spec, (rows,), 3, x=lies, dy=lies, operands=lies).gradients(mlp)
                launched.add(tuple(seen))
        assert (len(launched) == 1) == invariant, launched


def test_it_is_held_against_the_oracle_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlpdsl.compile
    monkeypatch.setattr("mlpdsl.testing.calls.compile_spec", lambda spec, **k: real(spec, batch_invariant=True, **k))
    for spec in (GATED, SINGLE, ROWWISE):
        for lies in ("dense", "strided", "expanded"):
            check_call(make_call(spec, (70,), 5, x=lies, operands=lies, dy=lies))


def test_every_way_in_is_invariant() -> None:
    """As a module, pickled, in another dtype, under autocast, through torch.func."""
    from mlpdsl import MLP

    layer = MLP(GATED, batch_invariant=True)
    assert "batch_invariant=True" in repr(layer._mlp)
    again = pickle.loads(pickle.dumps(layer._mlp))
    assert again.batch_invariant and again.with_dtype(torch.float16).batch_invariant
    assert not mlpdsl.compile(GATED).batch_invariant

    seen: list[bool] = []
    real = ops.forward

    def watched(*args: Any) -> list[Tensor]:
        seen.append(args[5])
        return real(*args)

    call = make_call(ROWWISE, (5,), 0)
    mlp = mlpdsl.compile(ROWWISE, backend="triton", batch_invariant=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "forward", watched)
        call.run(mlp)
        call.gradients(mlp)
        with torch.autocast("cpu", torch.bfloat16):
            call.run(mlp)
        torch.func.grad(lambda x: mlp(x, *call.params, **call.operands).sum())(call.x)
    assert len(seen) >= 4 and all(seen)  # the operator calls itself below autograd


def test_a_copy_is_made_only_where_it_must_be() -> None:
    """Rows that descriptors fit are not copied, and neither is anything where there are none."""
    run = runner(GATED.to_json(), torch.device("cpu"))
    fits, ragged = place(torch.randn(5, 64).bfloat16(), "padded"), place(torch.randn(5, 64).bfloat16(), "ragged")
    assert ops._rows(fits, run, True) is fits
    assert ops._rows(ragged, run, False) is ragged
    copied = ops._rows(ragged, run, True)
    assert same_bits(copied, ragged) and copied.is_contiguous() and copied.data_ptr() != ragged.data_ptr()
    assert ops._rows(ragged, runner(ROWWISE.to_json(), torch.device("cpu")), True) is ragged


def test_differing_sees_a_row_that_differs() -> None:
    """The law's own helper: one element of one row."""
    call = make_call(GATED, (9,), 0)
    parts = rows_of(call, [3, 7], "dense")
    assert parts.x.shape == (2, 64) and same_bits(parts.x[1], call.x[7]) and same_bits(parts.dy[0], call.dy[3])
    real = ops.forward

    def one_element_off(x: Tensor, *rest: Any) -> list[Tensor]:
        results: list[Tensor] = real(x, *rest)
        if x.shape[0] == 2:
            results[0][1, 5] = 1e4
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "forward", one_element_off)
        assert differing(call, [3, 7], "dense") == ["y"]


def test_explained() -> None:
    texts = {str(mlpdsl.explain(GATED, m, "sm_90", batch_invariant=True)).split("\n", 1)[1].replace("weight_grad", "")
             for m in (1, 16)}  # fmt: skip
    assert len(texts) == 1
    assert "whatever the batch" in str(mlpdsl.explain(GATED, 1, batch_invariant=True))
    mlpdsl.warmup(GATED, m=3, backward=True, batch_invariant=True)
