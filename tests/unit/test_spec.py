"""The declaration: what is accepted, what it becomes, what is refused, and the JSON form."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import re
import subprocess
import sys
from enum import Enum, IntEnum
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpdsl.errors import ShapeError, SpecError, UnsupportedError
from mlpdsl.names import ACTIVATIONS, ALIASES, DTYPES, EPILOGUE_OPERANDS, PRECISIONS, REFUSED, canonical_activation
from mlpdsl.spec import MLPSpec

LLAMA = MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16")
BERT = MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, epilogue=("residual",))
FIELDS = {field.name for field in dataclasses.fields(MLPSpec)}

# A list, or an activation by another name, may be declared; the annotations describe the canonical form.
declare: Any = MLPSpec


class Word(str, Enum):
    SILU = "swish"


class Width(IntEnum):
    HIDDEN = 5


class Index:
    """An integer of a foreign type, as numpy's and torch's are."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value  # type: ignore[return-value]


class Broken:
    """Every way of looking at it raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __index__(self) -> int:
        raise KeyError("no index")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


@st.composite
def specs(draw: st.DrawFn) -> MLPSpec:
    dims = draw(st.lists(st.integers(1, 2**30), min_size=2, max_size=9))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    operands = draw(st.permutations(sorted(EPILOGUE_OPERANDS)))[: draw(st.integers(0, 3))]
    activations = draw(st.lists(st.sampled_from([*ACTIVATIONS, *ALIASES]), max_size=4))
    spec: MLPSpec = declare(
        dims=dims,
        activation="identity" if len(dims) == 2 else draw(st.sampled_from([*ACTIVATIONS, *ALIASES])),
        gated=len(dims) == 3 and draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=dtype,
        precision=draw(st.sampled_from(PRECISIONS)) if dtype == "float32" else "ieee",
        epilogue=draw(st.permutations([*operands, *activations])),
    )
    return spec


# Generation may be slow on a loaded machine; that says nothing about the spec.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

words = st.sampled_from([*ACTIVATIONS, *EPILOGUE_OPERANDS, "expr", "packed", ""]) | st.text("aeilsu_ \n\0'{}é\ud800", max_size=9)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
anything = json_like | st.binary(max_size=8)


class TestCanonicalForm:
    def test_defaults(self) -> None:
        spec = MLPSpec(dims=(8, 16, 8), activation="relu")
        assert (spec.gated, spec.bias, spec.dtype, spec.precision) == (False, False, "float32", "ieee")
        assert (spec.epilogue, spec.layout) == ((), "separate")

    @pytest.mark.parametrize("dims", [[4, 5, 6], (4, 5, 6), [Index(4), Index(5), 6], (4, Width.HIDDEN, 6)])
    def test_dims_become_a_tuple_of_plain_ints(self, dims: object) -> None:
        spec = declare(dims=dims, activation="relu")
        assert spec.dims == (4, 5, 6)
        assert {type(width) for width in spec.dims} == {int}

    def test_numpy_integers_and_torch_sizes(self) -> None:
        np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
        assert declare(dims=torch.Size([4, 5, 6]), activation="relu").dims == (4, 5, 6)
        spec = declare(dims=list(np.array([4, 5, 6])), activation=np.str_("relu"))
        assert [type(width) for width in spec.dims] == [int] * 3
        assert type(spec.activation) is str

    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_aliases_are_the_same_spec(self, alias: str, name: str) -> None:
        one, two = (declare(dims=(4, 5, 6), activation=word, epilogue=[word]) for word in (alias, name))
        assert one == two
        assert hash(one) == hash(two)
        assert one.to_json() == two.to_json()

    def test_every_activation_transformers_knows_has_an_answer(self) -> None:
        known = """gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_python_tanh gelu_accurate
        hardswish laplace leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh
        prelu xielu"""
        for word in known.split():
            if word in REFUSED:
                with pytest.raises(UnsupportedError) as caught:
                    canonical_activation(word)
                assert caught.value.reasons == (REFUSED[word],)
            else:
                assert canonical_activation(word) in ACTIVATIONS

    def test_the_word_lists_agree(self) -> None:
        assert set(ALIASES.values()) <= set(ACTIVATIONS)
        groups = [set(ACTIVATIONS), set(ALIASES), set(REFUSED), set(EPILOGUE_OPERANDS)]
        assert not any(one & two for one, two in itertools.combinations(groups, 2))
        assert len(set(ACTIVATIONS)) == len(ACTIVATIONS)

    def test_a_string_enum_becomes_a_plain_string(self) -> None:
        spec = declare(dims=(4, 5, 6), activation=Word.SILU)
        assert spec.activation == "silu"
        assert type(spec.activation) is str

    def test_torch_dtypes(self) -> None:
        torch = pytest.importorskip("torch")
        for dtype in (torch.half, torch.bfloat16, torch.float):
            assert declare(dims=(4, 5, 6), activation="relu", dtype=dtype).dtype == str(dtype).removeprefix("torch.")
        assert declare(dims=(4, 5, 6), activation="relu", dtype="torch.float16").dtype == "float16"
        for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn):
            with pytest.raises(SpecError, match="float16"):
                declare(dims=(4, 5, 6), activation="relu", dtype=dtype)

    def test_identity_leaves_the_epilogue(self) -> None:
        spec = declare(dims=(4, 5), activation="linear", epilogue=["linear", "relu", "identity", "relu"])
        assert spec.epilogue == ("relu", "relu")

    def test_frozen_and_keyword_only(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            LLAMA.bias = True  # type: ignore[misc]
        with pytest.raises(TypeError):
            declare((4, 5, 6), "relu")

    def test_limits_are_inclusive(self) -> None:
        assert MLPSpec(dims=(1, 2**30), activation="identity").d_out == 2**30
        assert MLPSpec(dims=(1,) * 257, activation="relu").depth == 256
        assert len(MLPSpec(dims=(1, 1), activation="identity", epilogue=("relu",) * 32).epilogue) == 32


GOOD = {"dims": (4, 5, 6), "activation": "relu"}


class TestRefusals:
    @pytest.mark.parametrize(
        "dims",
        [
            (),
            [],
            (4,),
            (1,) * 258,
            [1] * 10**6,
            None,
            4,
            "4,5,6",
            b"456",
            {4, 5, 6},
            {4: 5, 6: 7},
            range(4, 7),
            (4, 0, 6),
            (4, -1, 6),
            (4, 2**30 + 1, 6),
            (4, 10**5000, 6),
            (4, 5.0, 6),
            (4, float("nan"), 6),
            (4, float("inf"), 6),
            (4, True, 6),
            (4, None, 6),
            (4, "5", 6),
            (4, "x" * 10**6, 6),
            (4, (5,), 6),
            (4, Broken(), 6),
            (4, Index("five"), 6),
            Broken(),
        ],
        ids=lambda dims: type(dims).__name__,
    )
    def test_dims(self, dims: object) -> None:
        with pytest.raises(SpecError) as caught:
            declare(dims=dims, activation="relu")
        assert str(caught.value).startswith("MLPSpec.dims")
        assert len(str(caught.value)) < 400

    def test_numpy_and_torch_lookalikes(self) -> None:
        np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
        lookalikes = [np.array([4, 5, 6]), [4, np.True_, 6], [4, np.array(5), 6], [4, torch.tensor(5), 6]]
        for dims in (*lookalikes, [4, np.float64(5), 6], torch.tensor([4, 5, 6])):
            with pytest.raises(SpecError, match=r"MLPSpec\.dims"):
                declare(dims=dims, activation="relu")
        with pytest.raises(SpecError, match=r"MLPSpec\.gated"):
            declare(**GOOD, gated=np.True_)

    def test_an_endless_generator_is_not_consumed(self) -> None:
        endless = itertools.count(1)
        for field in ("dims", "epilogue"):
            with pytest.raises(SpecError):
                declare(**{**GOOD, field: endless})
        assert next(endless) == 1

    @pytest.mark.parametrize("field", sorted(FIELDS))
    @pytest.mark.parametrize(
        "value",
        [None, 1, 1.5, float("nan"), 10**5000, "x" * 10**6, "\ud800", b"relu", {}, object(), Broken(), [None], (b"x",)],
        ids=lambda value: type(value).__name__,
    )
    def test_no_field_takes_a_wrong_type(self, field: str, value: object) -> None:
        with pytest.raises(SpecError) as caught:
            declare(**{**GOOD, field: value})
        assert str(caught.value).startswith(f"MLPSpec.{field}")
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize("field", ["gated", "bias"])
    @pytest.mark.parametrize("value", [0, 1, "True", None])
    def test_a_flag_is_a_bool(self, field: str, value: object) -> None:
        with pytest.raises(SpecError, match=f"MLPSpec.{field}: .*True or False"):
            declare(**GOOD, **{field: value})

    def test_gated_has_three_dims(self) -> None:
        for dims in ((4, 5), (4, 5, 6, 7)):
            with pytest.raises(SpecError, match="gated=True"):
                MLPSpec(dims=dims, activation="identity", gated=True)

    def test_one_linear_has_no_activation_between(self) -> None:
        with pytest.raises(SpecError, match=re.escape("activation='identity', epilogue=('gelu',)")):
            MLPSpec(dims=(4, 5), activation="gelu")

    def test_precision_is_for_float32(self) -> None:
        assert declare(**GOOD, precision="tf32x3").precision == "tf32x3"
        with pytest.raises(SpecError, match="precision"):
            declare(**GOOD, precision="tf32", dtype="float16")

    @pytest.mark.parametrize("operand", EPILOGUE_OPERANDS)
    def test_an_operand_comes_once(self, operand: str) -> None:
        with pytest.raises(SpecError, match=r"epilogue\[2\]"):
            declare(**GOOD, epilogue=(operand, "relu", operand))

    def test_too_many_epilogues(self) -> None:
        with pytest.raises(SpecError, match="at most 32"):
            declare(**GOOD, epilogue=("identity",) * 33)

    def test_a_name_is_never_split_into_letters(self) -> None:
        with pytest.raises(SpecError, match=re.escape("epilogue=('residual',)")):
            declare(**GOOD, epilogue="residual")

    @pytest.mark.parametrize("word", ["silu\n", " silu", "silu' #", "__import__('os')", "{{ 7*7 }}", "../relu", "\uff53ilu", ""])
    def test_hostile_names(self, word: str) -> None:
        for field, value in (("activation", word), ("epilogue", (word,)), ("layout", word), ("dtype", word)):
            with pytest.raises(SpecError):
                declare(**{**GOOD, field: value})

    @pytest.mark.parametrize("function", [print, lambda: None, lambda a, b, c: a, {"expr": ["x"]}, {"expr": "y"}, str])
    def test_what_is_no_function_of_tensors(self, function: object) -> None:
        with pytest.raises(SpecError):
            declare(dims=(4, 5, 6), activation=function)
        with pytest.raises(SpecError):
            declare(**GOOD, epilogue=("relu", function))

    def test_an_object_without_an_expression_is_no_function(self) -> None:
        with pytest.raises(SpecError, match=r"MLPSpec\.activation.*registered name"):
            declare(dims=(4, 5, 6), activation={"formula": "x"})

    def test_one_linear_has_no_function_between(self) -> None:
        with pytest.raises(SpecError, match="'identity' where there are two dims"):
            declare(dims=(4, 5), activation={"expr": "x * x"})
        assert declare(dims=(4, 5), activation={"expr": "x"}).activation == "identity"

    @pytest.mark.parametrize("layout", ["packed", "interleaved", "transposed"])
    def test_layouts_to_come(self, layout: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            declare(**GOOD, layout=layout)
        assert caught.value.reasons == (f"layout='{layout}' comes in a later release",)

    def test_learned_epilogue(self) -> None:
        with pytest.raises(UnsupportedError, match="learned"):
            declare(**GOOD, epilogue=("prelu",))

    def test_what_comes_later(self) -> None:
        for make in (MLPSpec.from_hf, MLPSpec.from_module):
            with pytest.raises(UnsupportedError, match="later release"):
                make(object())

    @patient
    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(FIELDS), anything)))
    def test_anything_else_is_refused_by_our_own_errors(self, changes: dict[str, object]) -> None:
        try:
            spec = declare(**{**GOOD, **changes})
        except (SpecError, UnsupportedError):
            return
        assert MLPSpec.from_json(spec.to_json()) == spec


class TestShapes:
    def test_gated(self) -> None:
        spec = declare(dims=(4, 5, 6), activation="silu", gated=True, bias=True)
        assert list(spec.parameter_shapes().items()) == [
            ("gate_proj.weight", (5, 4)),
            ("gate_proj.bias", (5,)),
            ("up_proj.weight", (5, 4)),
            ("up_proj.bias", (5,)),
            ("down_proj.weight", (6, 5)),
            ("down_proj.bias", (6,)),
        ]

    def test_one_hidden_layer(self) -> None:
        assert list(BERT.parameter_shapes()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
        assert declare(**GOOD).parameter_shapes() == {"fc1.weight": (5, 4), "fc2.weight": (6, 5)}

    def test_other_depths(self) -> None:
        assert MLPSpec(dims=(4, 5), activation="identity").parameter_shapes() == {"layers.0.weight": (5, 4)}
        shapes = MLPSpec(dims=(4, 5, 6, 7), activation="relu", bias=True).parameter_shapes()
        assert list(shapes)[-2:] == ["layers.2.weight", "layers.2.bias"]
        assert (shapes["layers.1.weight"], shapes["layers.2.bias"]) == ((6, 5), (7,))

    def test_a_caller_may_change_what_it_got(self) -> None:
        LLAMA.parameter_shapes().clear()
        assert len(LLAMA.parameter_shapes()) == 3

    def test_operands_in_epilogue_order(self) -> None:
        spec = declare(**GOOD, epilogue=("layer_scale", "relu", "residual", "scale"))
        assert list(spec.operands().items()) == [("layer_scale", "column"), ("residual", "tile"), ("scale", "scalar")]
        assert LLAMA.operands() == {}

    def test_widths(self) -> None:
        spec = MLPSpec(dims=(4, 5, 6, 7), activation="relu")
        assert (spec.d_in, spec.d_out, spec.depth) == (4, 7, 3)


class TestCosts:
    def test_flops_count_gate_and_up(self) -> None:
        assert LLAMA.flops(1) == 2 * 3 * 4096 * 14336
        assert LLAMA.replace(gated=False).flops(16) == 16 * 2 * 2 * 4096 * 14336
        assert LLAMA.flops(0) == 0

    def test_bytes_moved(self) -> None:
        assert LLAMA.bytes_moved(16) == 2 * (3 * 4096 * 14336 + 16 * 2 * 4096)
        # x and y, both weights, both biases, and the residual tile
        assert BERT.bytes_moved(10) == 4 * (10 * 2 * 768 + 2 * 768 * 3072 + 3072 + 768 + 10 * 768)
        spec = declare(**GOOD, epilogue=("scale", "layer_scale"))
        assert spec.bytes_moved(0) == 4 * (4 * 5 + 5 * 6 + 1 + 6)

    @patient
    @given(specs(), st.integers(0, 2**40))
    def test_both_follow_the_parameters(self, spec: MLPSpec, m: int) -> None:
        weights = [shape for shape in spec.parameter_shapes().values() if len(shape) == 2]
        assert spec.flops(m) == 2 * m * sum(rows * columns for rows, columns in weights)
        per_row = DTYPES[spec.dtype] * (spec.d_in + spec.d_out * (1 + ("residual" in spec.epilogue)))
        assert spec.bytes_moved(m) - spec.bytes_moved(0) == m * per_row

    @pytest.mark.parametrize("m", [-1, True, 1.0, float("nan"), None, "16", [16], Broken()], ids=lambda m: type(m).__name__)
    def test_rows_are_an_integer(self, m: object) -> None:
        for method in (LLAMA.flops, LLAMA.bytes_moved):
            with pytest.raises(ShapeError, match=r"^m: got"):
                method(m)  # type: ignore[arg-type]
        assert LLAMA.flops(Index(2)) == LLAMA.flops(2)  # type: ignore[arg-type]


class TestJSON:
    def test_canonical_text(self) -> None:
        assert BERT.to_json() == (
            '{"activation":"gelu","bias":true,"dims":[768,3072,768],"dtype":"float32","epilogue":["residual"],'
            '"gated":false,"layout":"separate","precision":"ieee","schema_version":1}'
        )

    @patient
    @given(specs())
    def test_round_trips(self, spec: MLPSpec) -> None:
        text = spec.to_json()
        assert text.isascii()
        for again in (MLPSpec.from_json(text), MLPSpec.from_json(text.encode()), pickle.loads(pickle.dumps(spec))):
            assert again == spec
            assert hash(again) == hash(spec)
            assert again.to_json() == text
        assert copy.deepcopy(spec) == spec

    def test_defaults_and_version_may_be_left_out(self) -> None:
        assert MLPSpec.from_json('{"dims": [4, 5, 6], "activation": "swish"}') == declare(dims=(4, 5, 6), activation="silu")

    def test_a_pickle_holds_the_canonical_text(self) -> None:
        assert LLAMA.to_json().encode() in pickle.dumps(LLAMA)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "Expecting value"),
            ("\ufeff{}", "BOM"),
            ("[]", "one JSON object"),
            ("null", "one JSON object"),
            ("{}", "'dims', 'activation'"),
            ('{"dims": [4, 5]}', "Add 'activation'"),
            ('{"dims": [4, 5], "activation": "identity", "actvation": 1}', "Did you mean 'activation'"),
            ('{"dims": [4, 5], "dims": [4, 5], "activation": "identity"}', "repeated key"),
            ('{"dims": [4, 5], "activation": {"a": 1, "a": 2}}', "repeated key"),
            ('{"dims": [4, NaN], "activation": "identity"}', "finite"),
            ('{"dims": [4, -Infinity], "activation": "identity"}', "finite"),
            ('{"dims": [4, 1e999], "activation": "identity"}', r"dims\[1\]"),
            ('{"dims": [4, 5.0], "activation": "identity"}', r"dims\[1\]"),
            ('{"dims": [4, ' + "9" * 5000 + '], "activation": "identity"}', "size|dims"),
            ('{"dims": [4, 5], "activation": "identity", "schema_version": 2}', "upgrade mlpdsl"),
            ('{"dims": [4, 5], "activation": "identity", "schema_version": 0}', "schema_version"),
            ('{"dims": [4, 5], "activation": "identity", "schema_version": true}', "schema_version"),
            ('{"dims": [4, 5], "activation": "identity", "schema_version": 1.0}', "schema_version"),
            ('{"dims": [4, 5], "activation": "identity", "schema_version": "1"}', "schema_version"),
            ("[" * 10**5, "deep"),
            ('{"dims":' * 10**5, "deep"),
            ("{" + " " * 10**6 + "}", "at most 1000000"),
            (b"\xff{}", "UTF-8"),
            (None, "JSON text"),
            ({"dims": [4, 5], "activation": "identity"}, "JSON text"),
            (bytearray(b"{}"), "JSON text"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_refusals(self, text: object, says: str) -> None:
        with pytest.raises(SpecError, match=says) as caught:
            declare.from_json(text)
        assert len(str(caught.value)) < 400

    def test_a_function_is_its_formulas(self) -> None:
        spec = MLPSpec.from_json('{"dims": [4, 5, 6], "activation": {"grads": ["2.0 * x"], "expr": "(x) * x"}}')
        assert '"activation":{"expr":"x * x","grads":["x * 2.0"]}' in spec.to_json()
        assert MLPSpec.from_json(spec.to_json()) == spec
        assert hash(MLPSpec.from_json(spec.to_json())) == hash(spec)

    @patient
    @given(json_like | st.fixed_dictionaries({"dims": json_like}, optional={"activation": words}))
    def test_any_json_is_a_spec_or_our_own_error(self, content: object) -> None:
        try:
            spec = MLPSpec.from_json(json.dumps(content))
        except (SpecError, UnsupportedError):
            return
        assert MLPSpec.from_json(spec.to_json()) == spec


class TestReplace:
    def test_validates_again(self) -> None:
        assert LLAMA.replace(dtype="float32", precision="tf32").precision == "tf32"
        with pytest.raises(SpecError, match="precision"):
            LLAMA.replace(precision="tf32")
        with pytest.raises(SpecError, match="Did you mean 'gated'"):
            LLAMA.replace(gate=True)

    def test_the_text_is_not_carried_over(self) -> None:
        before = BERT.to_json()
        assert BERT.replace(bias=False).to_json() != before == BERT.to_json()


class TestShortName:
    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            (LLAMA, "gated-silu-4096x14336x4096-bf16"),
            (MLPSpec(dims=(64,) * 9, activation="relu"), "relu-64x64x..x64-9dims-fp32"),
            (MLPSpec(dims=(3, 64, 64, 1), activation="relu", precision="tf32x3"), "relu-3x64x64x1-tf32x3"),
            (MLPSpec(dims=(768, 30522), activation="identity", dtype="float16"), "identity-768x30522-fp16"),
        ],
    )
    def test_examples(self, spec: MLPSpec, name: str) -> None:
        assert spec.short_name == name

    @patient
    @given(specs())
    def test_is_a_safe_file_name(self, spec: MLPSpec) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_.x-]{0,59}", spec.short_name)

    @pytest.mark.parametrize("count", [2, 3, 4, 5, 257])
    def test_the_longest(self, count: int) -> None:
        activation = "identity" if count == 2 else "leaky_relu"
        spec = MLPSpec(dims=(2**30,) * count, activation=activation, precision="tf32x3", gated=count == 3)
        assert len(spec.short_name) <= 60


def test_the_ground_floor_imports_the_standard_library_only() -> None:
    code = """if True:
        import sys
        before = set(sys.modules)
        from mlpdsl import errors, names, spec, target
        spec.MLPSpec(dims=(4, 5, 6), activation="silu").to_json(), target.detect()
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - set(sys.stdlib_module_names) - {"mlpdsl"}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
