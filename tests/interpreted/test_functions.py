"""Users' own functions through the generated kernels, forward and backward, against the oracle and eager PyTorch."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import check_call, make_call, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mlpdsl
from mlpdsl import Function, MLPSpec, SpecError, UnstableWarning
from mlpdsl.testing.oracle import OracleError
from mlpdsl.traced import activation, epilogue
from tests.functions import ACTIVATIONS, EPILOGUES, GATED

torch.set_num_threads(1)

Map = Callable[[Tensor], Tensor]

SOME = ("star_relu", "telu", "softsign", "snake", "siren", "selu", "symlog", "band_pass", "gelu_new", "rational", "dorefa_ste",
        "clipped_gelu_module")  # fmt: skip
CASES = [*SOME, *GATED, *EPILOGUES]
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = (((16, 24, 8), 16), ((9, 13, 11), 9))
"""Widths fit for tensor descriptors and others, with enough rows to compare root mean squares."""


def spec_of(name: str, dims: tuple[int, ...], dtype: str) -> MLPSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableWarning)
        if name in EPILOGUES:
            fn, kinds = EPILOGUES[name]
            return MLPSpec(dims=dims, activation="relu", dtype=dtype, epilogue=(epilogue(fn, **kinds),))
        gated = name in GATED
        return MLPSpec(dims=dims, activation={**ACTIVATIONS, **GATED}[name], gated=gated, bias=not gated, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_corpus(name: str, dtype: str) -> None:
    for dims, rows in {"float32": SHAPES, "float16": SHAPES[:1], "bfloat16": SHAPES[1:]}[dtype]:
        check_call(make_call(spec_of(name, dims, dtype), (rows,), 7))


@pytest.mark.parametrize("name", ["snake", "gpt_oss_swiglu", "layer_scale_drop_path", "norm_rows"])
def test_other_layouts_and_leading_dimensions(name: str) -> None:
    for dims, _ in SHAPES:
        spec = spec_of(name, dims, "bfloat16")
        lies = {"x": "strided", "operands": "ragged", "dy": "transposed", "weights": "padded", "wide_operands": True}
        check_call(make_call(spec, (2, 5), 3, **lies))
        check_call(make_call(spec, (3, 1, 2), 4, swap=True))
        check_call(make_call(spec, (), 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_read_from_json_runs_alike(dtype: str) -> None:
    for name in ("snake", "wavenet", "norm_rows"):
        spec = spec_of(name, *SHAPES[0][:1], dtype)
        again = MLPSpec.from_json(spec.to_json())
        call = make_call(spec, (16,), 1)
        results = [call.gradients(mlpdsl.compile(s, backend="triton")) for s in (spec, again)]
        assert same_bits(results[0][0], results[1][0])
        assert all(same_bits(g, results[1][1][n]) for n, g in results[0][1].items())


def test_act_of_gate_times_up() -> None:
    for dims, rows in SHAPES:
        check_call(make_call(MLPSpec(dims=dims, activation=ACTIVATIONS["snake"], gated=True, bias=True), (rows,), 2))


def modulate(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    return x * (1.0 + gain) + shift


def add_if_kept(x: Tensor, keep: Tensor, skip: Tensor) -> Tensor:
    return skip + keep * torch.sin(x)


def tempered(x: Tensor, temperature: Tensor) -> Tensor:
    return x * torch.exp(-0.1 * temperature)


CHAIN = (
    epilogue(modulate, shift="column", gain="column"),
    ACTIVATIONS["softsign"],
    "layer_scale",
    epilogue(add_if_kept, keep="row", skip="tile"),
    "gelu",
    epilogue(tempered, temperature="scalar"),
    "residual",
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_in_a_row_with_every_kind_of_operand(dtype: str) -> None:
    """Every gradient says far more than its bound; several tiles of rows and columns are summed."""
    for dims, rows, least in (((16, 24, 8), 24, 10), ((9, 13, 71), 70, 10)):
        spec = MLPSpec(dims=dims, activation="silu", bias=True, dtype=dtype, epilogue=CHAIN)
        verdict = check_call(make_call(spec, (rows,), 5, wide_operands=dtype == "float16"))
        assert set(spec.operands()) <= set(verdict.strength)
        assert min(verdict.strength.values()) > least, verdict


@pytest.mark.parametrize("kind", ["tile", "column", "row", "scalar"])
def test_a_function_that_leaves_something_out(kind: str) -> None:
    """No derivative by an operand is a gradient of zeros; none by the tile, zeros for everything before it."""

    def ignoring(x: Tensor, unused: Tensor, used: Tensor) -> Tensor:
        return x * used

    entry = epilogue(ignoring, unused=kind, used=kind)
    for dims, rows in SHAPES:
        call = make_call(MLPSpec(dims=dims, activation="relu", epilogue=(entry,)), (rows,), 0)
        check_call(call)
        _, grads = call.gradients(mlpdsl.compile(call.spec, backend="triton"))
        assert not grads["unused"].any() and grads["used"].any()


def test_a_derivative_of_ones_own() -> None:
    straight = activation(torch.round, derivative=torch.ones_like, check=False)
    for spec in (
        MLPSpec(dims=(16, 24, 8), activation=straight),
        MLPSpec(dims=(16, 24, 8), activation=straight, gated=True, dtype="bfloat16"),
        MLPSpec(dims=(16, 24, 8), activation="relu", epilogue=(straight,)),
    ):
        call = make_call(spec, (16,), 0)
        check_call(call)
        _, grads = call.gradients(mlpdsl.compile(spec, backend="triton"))
        assert grads["x"].any()


def test_hand_written_text() -> None:
    act = activation(torch.sin, triton=("tl.sin(x)", "tl.cos(x)"))
    entry = epilogue(
        add_if_kept, keep="row", skip="tile", triton=("skip + keep*tl.sin(tile)", "keep*tl.cos(tile)", "tl.sin(tile)", "1.0")
    )
    for dims, rows in SHAPES:
        for gated in (False, True):
            check_call(make_call(MLPSpec(dims=dims, activation=act, gated=gated, epilogue=(act, entry)), (rows,), 3))


def test_an_operand_may_have_any_name() -> None:
    def odd(x: Tensor, M: Tensor, acc: Tensor, rows: Tensor, operand0: Tensor, out: Tensor) -> Tensor:
        return x * M + acc * rows - operand0 * out

    kinds = {"M": "row", "acc": "column", "rows": "tile", "operand0": "scalar", "out": "column"}
    for dims, rows in SHAPES:
        check_call(make_call(MLPSpec(dims=dims, activation="relu", epilogue=(epilogue(odd, **kinds),)), (rows,), 3))


# Random functions

UNARY: dict[str, Map] = {
    "sin": torch.sin, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu, "silu": F.silu, "softplus": F.softplus,
    "abs": torch.abs, "relu": torch.relu, "atan": torch.atan, "asinh": torch.asinh, "erf": torch.erf, "neg": torch.neg,
    "square": lambda x: x.clamp(-8.0, 8.0).square(), "exp": lambda x: torch.exp(x.clamp(max=4.0)), "elu": F.elu,
    "log1p": lambda x: torch.log1p(x.abs()), "root": lambda x: torch.sqrt(x.abs() + 0.5), "hardswish": F.hardswish,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": lambda a, b: a.clamp(-9.0, 9.0) * b, "max": torch.maximum, "min": torch.minimum,
    "where": lambda a, b: torch.where(a > 0.25, a, b), "div": lambda a, b: a / (1.5 + b.abs()), "hypot": torch.hypot,
}  # fmt: skip


def constant(k: float) -> Callable[..., Tensor]:
    return lambda *inputs: inputs[0] * k + 0.5


def chosen(i: int) -> Callable[..., Tensor]:
    return lambda *inputs: inputs[i % len(inputs)]


def after(op: Map, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: op(f(*inputs))


def joined(op: Callable[[Tensor, Tensor], Tensor], f: Callable[..., Tensor], g: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: op(f(*inputs), g(*inputs))


def grown(inner: st.SearchStrategy[Callable[..., Tensor]]) -> st.SearchStrategy[Callable[..., Tensor]]:
    return st.builds(after, st.sampled_from(list(UNARY.values())), inner) | st.builds(
        joined, st.sampled_from(list(BINARY.values())), inner, inner
    )


leaves = st.builds(chosen, st.integers(0, 2)) | st.builds(constant, st.sampled_from([-1.5, -0.3, 0.7, 2.5]))
expressions = st.recursive(leaves, grown, max_leaves=7)


def of_one(f: Callable[..., Tensor]) -> Map:
    return lambda x: f(x)


def of_two(f: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: f(gate, up)


def of_three(f: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, first, second: f(x, first, second) + 0.0 * x


@settings(max_examples=30)
@given(
    expressions, st.sampled_from(["plain", "gated", "epilogue"]), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31 - 1)
)
def test_any_function(f: Callable[..., Tensor], use: str, dtype: str, aligned: bool, seed: int) -> None:
    dims, rows = SHAPES[not aligned]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableWarning)
        try:
            if use == "epilogue":
                entry = epilogue(of_three(f), first="row", second="column")
                spec = MLPSpec(dims=dims, activation="relu", dtype=dtype, epilogue=(entry,))
            else:
                act = activation(of_two(f) if use == "gated" else of_one(f))
                spec = MLPSpec(dims=dims, activation=act, gated=use == "gated", dtype=dtype)
        except SpecError as error:
            if "is unstable" not in str(error):
                raise
            assume(False)
    check_call(make_call(spec, (rows,), seed), eager=False)


# Wrong formulas


SINE = activation(lambda x: x + torch.sin(2.5 * x) * 0.4)
PAIR = activation(lambda gate, up: torch.tanh(gate) * (up + 1.5))
ENTRY = epilogue(add_if_kept, keep="row", skip="tile")
COLUMN = epilogue(modulate, shift="column", gain="column")

MUTANTS: dict[str, tuple[Function, dict[str, Any]]] = {
    "constant": (SINE, {"value": "x + sin(x * 2.501) * 0.4"}),
    "derivative's sign": (SINE, {"partials": ("1.0 - cos(x * 2.5)",)}),
    "derivative's factor": (SINE, {"partials": ("1.0 + cos(x * 2.5) * 1.001",)}),
    "no derivative": (SINE, {"partials": ("0.0",)}),
    "pair: value": (PAIR, {"value": "tanh(gate) * (up + 1.501)"}),
    "pair: partials the other way round": (PAIR, {"partials": PAIR.partials[::-1]}),
    "pair: gate's without up": (PAIR, {"partials": ("tanh_grad(gate)", PAIR.partials[1])}),
    "pair: up's as if linear": (PAIR, {"partials": (PAIR.partials[0], "gate")}),
    "epilogue: value": (ENTRY, {"value": "skip + keep * tile"}),
    "epilogue: tile's derivative": (ENTRY, {"partials": ("keep", *ENTRY.partials[1:])}),
    "epilogue: row's derivative": (ENTRY, {"partials": (ENTRY.partials[0], "tile", ENTRY.partials[2])}),
    "epilogue: tile operand's derivative": (ENTRY, {"partials": (*ENTRY.partials[:2], "0.999")}),
    "epilogue: columns the other way round": (COLUMN, {"partials": (COLUMN.partials[0], *COLUMN.partials[:0:-1])}),
    "epilogue: kind": (COLUMN, {"value": "tile * (1.0 + shift) + gain"}),
}


def spec_with(function: Function) -> MLPSpec:
    if function.is_epilogue:
        return MLPSpec(dims=(16, 24, 8), activation="relu", epilogue=(function,))
    return MLPSpec(dims=(16, 24, 8), activation=function, gated=len(function.inputs) == 2)


@pytest.mark.parametrize("function", [SINE, PAIR, ENTRY, COLUMN], ids=["sine", "pair", "entry", "column"])
def test_the_function_itself_passes(function: Function) -> None:
    check_call(make_call(spec_with(function), (16,), 0))


@pytest.mark.parametrize("what", MUTANTS)
def test_a_wrong_formula_is_refused(what: str) -> None:
    function, changes = MUTANTS[what]
    with pytest.raises(OracleError, match="out of bounds"):
        check_call(make_call(spec_with(dataclasses.replace(function, **changes)), (16,), 0))
