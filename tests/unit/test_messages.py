"""The exact words a user reads. A change here is a change to the product."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mlpdsl.errors import MLPError, ShapeError, SpecError, UnsupportedError, describe, shorten
from mlpdsl.names import did_you_mean
from mlpdsl.spec import MLPSpec
from mlpdsl.target import parse_target

NAMES = (
    "'gelu', 'gelu_tanh', 'gelu_10', 'quick_gelu', 'silu', 'relu', 'relu2', 'relu6', 'leaky_relu', 'elu', 'sigmoid', "
    "'tanh', 'softplus', 'mish', 'hardswish', 'laplace', 'identity'"
)
EPILOGUES = f"'residual', 'layer_scale', 'scale', {NAMES}"
FIELDS = "'dims', 'activation', 'gated', 'bias', 'dtype', 'precision', 'epilogue', 'layout'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dims": (768,)},
            "MLPSpec.dims: got (768,); allowed: 2 to 257 widths, not 1. "
            "Give the widths of input, hidden layers and output, for example dims=(768, 3072, 768).",
        ),
        (
            {"dims": 768},
            "MLPSpec.dims: got 768; allowed: a tuple or list of integers. Write a tuple, for example dims=(768, 3072, 768).",
        ),
        (
            {"dims": (768, 3072.0, 768)},
            "MLPSpec.dims[1]: got 3072.0; allowed: an integer from 1 to 1073741824. Write 3072.",
        ),
        (
            {"dims": (768, True, 768)},
            "MLPSpec.dims[1]: got True; allowed: an integer from 1 to 1073741824. Write the number of features as an int.",
        ),
        (
            {"dims": (768, 3072)},
            "MLPSpec.activation: got 'gelu'; allowed: 'identity' where there are two dims (one linear). "
            "An activation on the output is an epilogue: write activation='identity', epilogue=('gelu',).",
        ),
        (
            {"dims": (768, 64, 64, 1), "gated": True},
            "MLPSpec.dims: got (768, 64, 64, 1); allowed: three widths (input, hidden, output) where gated=True. Set gated=False.",
        ),
        (
            {"activation": "gelu-tanh"},
            f"MLPSpec.activation: got 'gelu-tanh'; allowed: {NAMES}. Did you mean 'gelu_tanh'?",
        ),
        (
            {"activation": "SwiGLU"},
            f"MLPSpec.activation: got 'SwiGLU'; allowed: {NAMES}. For SwiGLU, write activation='silu', gated=True.",
        ),
        (
            {"activation": "residual"},
            f"MLPSpec.activation: got 'residual'; allowed: {NAMES}. 'residual' is an epilogue: write epilogue=('residual',).",
        ),
        ({"gated": 1}, "MLPSpec.gated: got 1; allowed: True or False. Write gated=True or gated=False."),
        (
            {"dtype": "bf16"},
            "MLPSpec.dtype: got 'bf16'; allowed: 'float32', 'float16', 'bfloat16'. Did you mean 'bfloat16'?",
        ),
        (
            {"dtype": "tf32"},
            "MLPSpec.dtype: got 'tf32'; allowed: 'float32', 'float16', 'bfloat16'. "
            "For tf32, write dtype='float32', precision='tf32'.",
        ),
        (
            {"dtype": "float16", "precision": "tf32"},
            "MLPSpec.precision: got 'tf32'; allowed: 'ieee' where dtype is 'float16'. "
            "Leave precision out for float16, or set dtype='float32'.",
        ),
        (
            {"precision": "high"},
            "MLPSpec.precision: got 'high'; allowed: 'ieee', 'tf32', 'tf32x3'. Write precision='ieee', or leave it out.",
        ),
        (
            {"epilogue": "residual"},
            "MLPSpec.epilogue: got 'residual'; allowed: a tuple or list of epilogues. Write epilogue=('residual',).",
        ),
        (
            {"epilogue": ("relu", "residul")},
            f"MLPSpec.epilogue[1]: got 'residul'; allowed: {EPILOGUES}. Did you mean 'residual'?",
        ),
        (
            {"epilogue": ("residual", "residual")},
            "MLPSpec.epilogue[1]: got 'residual'; allowed: the operand 'residual' once, because it goes by that name. "
            "Add or multiply the two operands before the call and pass one, or rename the function's parameter.",
        ),
        (
            {"activation": print},
            "mlpdsl.activation: got <built-in function print>; allowed: a function of x, or of (gate, up), not of (). "
            "Numbers are default arguments or closures; a learned scalar is an operand of an epilogue.",
        ),
        (
            {"activation": {"expr": "y"}},
            "MLPSpec.activation.expr: got 'y'; allowed: the formula names 'y'; its inputs are x. "
            "Formulas are names, numbers, + - * / and calls like sigmoid(x); see the docs page on activations.",
        ),
        (
            {"activation": {"expr": "gate * up", "grads": ["up", "gate"]}},
            "MLPSpec.activation: got <function(gate, up)>; allowed: a function of one tensor where gated=False. "
            "Set gated=True, or pass a function of one tensor.",
        ),
        (
            {"epilogue": ({"expr": "tile * s", "grads": ["s", "tile"], "operands": [["s", "colum"]]},)},
            "MLPSpec.epilogue[0].operands: got 'colum'; allowed: 'tile', 'column', 'row', 'scalar'. Did you mean 'column'?",
        ),
        (
            {"epilogue": ({"expr": "tile", "grads": ["1.0", "0.0"], "operands": [["grad", "row"]]},)},
            "MLPSpec.epilogue[0].operands: got 'grad'; allowed: the name of a keyword argument. Choose a name of letters, "
            "digits and _, at most 64, no Python keyword and none of 'x', 'self', 'tile', 'grad', 'tl', 'libdevice'.",
        ),
        (
            {"layout": "packd"},
            "MLPSpec.layout: got 'packd'; allowed: 'separate'. Write layout='separate', or leave it out.",
        ),
    ],
    ids=lambda value: next(iter(value)) if type(value) is dict else "",
)
def test_spec_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        MLPSpec(**{"dims": (768, 3072, 768), "activation": "gelu", **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation": "prelu"},
            f"MLPSpec.activation: got 'prelu'; allowed: {NAMES}. Use one of these, or keep this MLP in PyTorch.\n"
            "  - 'prelu' has a learned slope, and activations here have no parameters",
        ),
        (
            {"layout": "packed"},
            "MLPSpec.layout: got 'packed': layout='packed' comes in a later release. Split the weights, and use layout='separate'.",
        ),
    ],
    ids=["prelu", "layout"],
)
def test_unsupported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        MLPSpec(**{"dims": (768, 3072, 768), "activation": "gelu", **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"dims": [4, 5], "activation": "identity", "dtpye": "float16"}',
            f"MLPSpec.from_json, unknown field: got 'dtpye'; allowed: {FIELDS}, 'schema_version'. Did you mean 'dtype'?",
        ),
        (
            '{"dims": [4, 5], "activation": "identity", "schema_version": 7}',
            "MLPSpec.from_json, schema_version: got 7; allowed: an integer from 1 to 1. "
            "A newer mlpdsl wrote this: upgrade mlpdsl to read it.",
        ),
        (
            '{"bias": true}',
            "MLPSpec.from_json: got ['bias']; allowed: an object with 'dims' and 'activation'. "
            "Add 'dims', 'activation'; the other fields have defaults.",
        ),
        (
            '{"bias": true, "bias": false}',
            "MLPSpec.from_json, repeated key: got 'bias'; allowed: every key once. "
            "Remove all but one: readers disagree about which one counts.",
        ),
        (
            "{'dims'}",
            "MLPSpec.from_json: got \"{'dims'}\"; allowed: one JSON object (Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)). Pass what to_json() returned.",
        ),
    ],
    ids=["unknown", "newer", "missing", "repeated", "not-json"],
)
def test_json_errors(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        MLPSpec.from_json(text)
    assert str(caught.value) == message


def test_rows() -> None:
    with pytest.raises(ShapeError) as caught:
        MLPSpec(dims=(4, 5), activation="identity").flops(-1)
    assert str(caught.value) == "m: got -1; allowed: an integer, 0 or more. Pass the number of rows of x."


def test_target() -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_target("sm_91")
    assert str(caught.value) == (
        "target: got 'sm_91'; allowed: 'sm_75', 'sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_100', 'sm_103', 'sm_120', "
        "'sm_121', 'gfx90a', 'gfx942', 'gfx950', 'gfx1100', 'gfx1101', 'gfx1200', 'gfx1201', "
        "'tpu_v4', 'tpu_v5e', 'tpu_v5p', 'tpu_v6e', 'cpu'. Did you mean 'sm_90'?"
    )


class TestErrors:
    def test_each_is_also_the_builtin_it_resembles(self) -> None:
        assert issubclass(SpecError, ValueError)
        assert issubclass(ShapeError, ValueError)
        assert issubclass(UnsupportedError, NotImplementedError)
        assert all(issubclass(kind, MLPError) for kind in (SpecError, ShapeError, UnsupportedError))

    @pytest.mark.parametrize("error", [SpecError("a"), ShapeError("a"), UnsupportedError("a", ("b", "c"))])
    def test_pickles(self, error: MLPError) -> None:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert getattr(again, "reasons", None) == getattr(error, "reasons", None)

    def test_reasons_are_all_shown(self) -> None:
        error = UnsupportedError("No backend can do this.", reasons=["too wide", "no TMA"])
        assert error.reasons == ("too wide", "no TMA")
        assert str(error) == "No backend can do this.\n  - too wide\n  - no TMA"

    def test_the_message_is_the_reason_where_there_is_no_other(self) -> None:
        assert UnsupportedError("No backend.").reasons == ("No backend.",)
        assert str(UnsupportedError("No backend.")) == "No backend."
        assert UnsupportedError("No backend.", "one string").reasons == ("one string",)


class TestShorten:
    def test_short_values_are_shown_whole(self) -> None:
        assert [shorten(value) for value in ("silu", 3, None, (1, 2.5), b"x")] == [
            "'silu'",
            "3",
            "None",
            "(1, 2.5)",
            "b'x'",
        ]

    @pytest.mark.parametrize(
        "value",
        [
            "x" * 10**6,
            b"x" * 10**6,
            [0] * 10**6,
            10**5000,
            -(10**5000),
            {str(n): n for n in range(1000)},
            "\n\t" * 1000,
            "\ud800" * 100,
            [[[[[[[[["deep"]]]]]]]]],
            type("T" * 1000, (), {"__repr__": lambda self: "r" * 10**6})(),
            type("T" * 1000, (), {"__repr__": lambda self: 1 / 0})(),
            type("T", (), {"__repr__": lambda self: 7})(),
        ],
        ids=lambda value: type(value).__name__[:8],
    )
    def test_never_long_and_never_raises(self, value: object) -> None:
        text = shorten(value)
        assert 0 < len(text) <= 80
        assert "\n" not in text

    def test_a_list_that_holds_itself(self) -> None:
        endless: list[object] = []
        endless.append(endless)
        assert len(shorten(endless)) <= 80

    def test_describe(self) -> None:
        assert describe("m", "x" * 200, "an integer", "Pass one.").startswith("m: got 'xxxxxxxxxxx")


def test_did_you_mean() -> None:
    assert did_you_mean("sillu", ("silu", "relu")) == "Did you mean 'silu'?"
    assert did_you_mean("zzzz", ("silu", "relu")) == ""
    assert did_you_mean("s" * 10**6, ("silu", "relu")) == ""
