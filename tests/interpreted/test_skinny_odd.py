"""Kernels for few rows, of weights whose rows are no whole 16 bytes: where they read, what they keep of it, and when they do so."""

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
from torch import Tensor
from triton.runtime import interpreter

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch
from mlpdsl.codegen.plan import Config
from mlpdsl.testing.calls import Call, check_call, make_call, same_bits
from tests.mutation import gate
from tests.mutation.mutant import mutant

torch.set_num_threads(1)

GATED = MLPSpec(dims=(45, 83, 27), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "gelu"))
PLAIN = MLPSpec(dims=(45, 83, 27), activation="gelu", bias=True, dtype="float16", epilogue=("residual",))
FLOAT32 = MLPSpec(dims=(45, 83, 27), activation="silu", gated=True)
ROWS = (1, 2, 13, 17, 64)


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("skinny"):
        yield


@pytest.fixture
def periods(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """PERIOD of every launch that has one; and all that launches promise of multiples is held to be so."""
    found: list[int] = []
    run, promise = launch.run, interpreter._patch_lang_core

    def listening(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=True))
        if "PERIOD" in given:
            found.append(given["PERIOD"])
        run(kernel, grid, options, *args)

    def patched(lang: Any, scope: Any) -> None:  # done anew for each launch, and undone after it
        promise(lang, scope)
        inner = lang.multiple_of

        def multiple_of(values: Any, multiples: Any) -> Any:
            expected = getattr(multiples, "value", multiples)
            if hasattr(values, "handle"):
                assert not (values.handle.data.astype("int64") % expected).any(), f"no multiples of {expected}"
            return inner(values, multiples)

        scope.set_attr(lang, "multiple_of", multiple_of)

    monkeypatch.setattr(launch, "run", listening)
    monkeypatch.setattr(interpreter, "_patch_lang_core", patched)
    return found


# Right at every width


@settings(max_examples=40)
@given(
    k=st.integers(1, 70), n=st.integers(1, 40), rows=st.sampled_from(ROWS), gated=st.booleans(), bias=st.booleans(),
    epilogue=st.booleans(), dtype=st.sampled_from(("bfloat16", "float16", "float32")), seed=st.integers(0, 3),
    weights=st.sampled_from(("dense", "ragged", "offset", "transposed")), pair=st.sampled_from(("apart", "stacked", "up_first")),
)  # fmt: skip
def test_any_width(
    k: int, n: int, rows: int, gated: bool, bias: bool, epilogue: bool, dtype: str, seed: int, weights: str, pair: str
) -> None:
    """Weights lie between NaN."""
    spec = MLPSpec(dims=(k, n, k), activation="silu", gated=gated, bias=bias, dtype=dtype, epilogue=("residual",) * epilogue)
    words = {"pair": pair} if gated and weights == "dense" else {"weights": weights}
    check_call(make_call(spec, (rows,), seed, **words), backward=False)


@pytest.mark.parametrize("spec", [GATED, PLAIN, FLOAT32], ids=str)
@pytest.mark.parametrize("remainder", range(8))
@pytest.mark.parametrize("rows", [1, 9])
def test_vectors_begin_at_multiples_of_16_bytes(rows: int, remainder: int, spec: MLPSpec, periods: list[int]) -> None:
    k = 40 + remainder
    spec = spec.replace(dims=(k, 83, k))
    check_call(make_call(spec, (rows,), remainder), backward=False)
    granule = 4 if spec.dtype == "float32" else 8
    if rows == 1 or spec.dtype != "float32":
        assert periods == [granule // math.gcd(k, granule), {4: 4, 8: 8}[granule]]


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("old", "new"),
    [("% 8) % 8", "% 8) % 4"), ("residue * (stride_weight_out % 8)", "(residue + 1) * (stride_weight_out % 8)"),
     ("weight_rows - skew", "weight_rows"), ("PERIOD * (", "(")],
)  # fmt: skip
def test_another_skew_is_no_multiple(old: str, new: str, rows: int, periods: list[int]) -> None:
    """Which GPUs would refuse, and an interpreter reads."""
    within = "hidden_row" if rows == 1 else "hidden_skinny"
    wrong = mutant("skewed", "plain", within, (old, new))
    with gate.running(wrong.text, "plain_skinny"), pytest.raises(interpreter.InterpreterError, match="no multiples of 16"):
        check_call(make_call(PLAIN, (rows,), 0), backward=False)


# What lies beside a row


def _neighbours(spec: MLPSpec, rows: int, at: int, value: float) -> tuple[Tensor, Tensor]:
    """The result, and the result where all of one row of the last linear's weight is `value`."""
    call = make_call(spec, (rows,), 0)
    mlp = mlpdsl.compile(spec, backend="triton")
    position = list(spec.parameter_shapes()).index(next(n for n in reversed(spec.parameter_shapes()) if n.endswith("weight")))
    changed = [p.clone() for p in call.params]
    changed[position][at] = value
    return call.run(mlp), replace(call, params=changed).run(mlp)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", [GATED.replace(epilogue=()), PLAIN.replace(epilogue=()), FLOAT32], ids=str)
def test_what_is_not_finite_stays_in_its_column(spec: MLPSpec, value: float, periods: list[int]) -> None:
    for rows, at in ((1, 0), (1, 13), (1, 26), (5, 0), (5, 13), (40, 26)):
        before, after = _neighbours(spec, rows, at, value)
        others = [i for i in range(spec.d_out) if i != at]
        assert same_bits(before[:, others], after[:, others]), (rows, at)
        assert not after[:, at].isfinite().any()
    assert 1 not in periods and periods


def test_hidden_columns_too(periods: list[int]) -> None:
    """Seen in what is saved for backward."""
    call = make_call(PLAIN, (3,), 0)
    params = [p.clone() for p in call.params]
    params[0][7] = torch.nan
    saved: list[Tensor] = []
    for given_params in (call.params, params):
        with support.kept() as kept:
            mlp = mlpdsl.compile(PLAIN, backend="triton")
            needing = replace(call, params=list(given_params)).needing(("x",))
            needing.run(mlp)
        saved.append(next(copy for _, copy in kept if copy.shape[-2:] == (3, 83)))
    others = [i for i in range(83) if i != 7]
    assert same_bits(saved[0][..., others], saved[1][..., others]) and saved[1][..., 7].isnan().all()
    assert set(periods) == {8}


# Which weights take part


def _weights(call: Call) -> list[Tensor]:
    return [p for p in call.params if p.dim() == 2]


@pytest.mark.parametrize(
    ("spec", "words", "expected"),
    [
        (GATED, {}, [8, 8]), (GATED, {"weights": "ragged"}, [1, 4]), (GATED, {"weights": "offset"}, [1, 1]),
        (GATED, {"weights": "transposed"}, [1, 1]), (GATED, {"weights": "strided"}, [1, 1]), (GATED, {"weights": "padded"}, [1, 1]),
        (GATED, {"pair": "stacked"}, [1, 8]),  # up begins 83 * 45 elements after gate
        (GATED, {"pair": "tied"}, [8, 8]), (GATED.replace(dims=(45, 80, 27)), {"pair": "stacked"}, [8, 1]),
        (PLAIN.replace(dims=(46, 84, 27)), {}, [4, 2]), (FLOAT32, {}, [4, 4]), (FLOAT32.replace(dims=(46, 83, 27)), {}, [2, 4]),
        (PLAIN.replace(dims=(48, 88, 27)), {}, [1, 1]),
    ],
)  # fmt: skip
def test_the_period(spec: MLPSpec, words: dict[str, Any], expected: list[int], periods: list[int]) -> None:
    """Of dense rows that begin at a multiple of 16 bytes."""
    check_call(make_call(spec, (1,), 0, **words), backward=False)
    assert periods == expected


def test_every_column_has_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, int, int]] = []
    inner = launch.run

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=True))
        grids.append((grid[0], given["PERIOD"], given["BLOCK_N"]))
        inner(kernel, grid, options, *args)

    monkeypatch.setattr(launch, "run", run)
    config = Config(16, 16, 32, num_stages=1, strategy="skinny")
    with dispatch.forcing_config("hidden", 3, 300, 45, config):
        check_call(make_call(PLAIN.replace(dims=(45, 300, 27)), (3,), 0), backward=False)
    assert grids[0] == (8 * 3, 8, 16)  # 38 rows of each skew, in 3 blocks


@pytest.mark.usefixtures("no_recordings")
def test_recordings_of_other_weights_are_other_recordings(replays: list[Any], periods: list[int]) -> None:
    """The same call on weights that lie otherwise: neither the kernel nor the grid of those before."""
    mlp = mlpdsl.compile(PLAIN, backend="triton")
    for weights, period in (("dense", 8), ("offset", 1), ("dense", 8)):
        call = make_call(PLAIN, (3,), 0, weights=weights)
        for _ in range(3):
            check_call(call, mlp, backward=False)
        assert periods[0] == period
        periods.clear()
    assert replays
