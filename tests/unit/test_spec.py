"""The declaration: what is accepted, what it becomes, and the JSON form."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpdsl.errors import ShapeError, SpecError, UnsupportedError
from mlpdsl.names import ACTIVATIONS, ALIASES, DTYPES, EPILOGUE_OPERANDS, REFUSED, canonical_activation
from mlpdsl.spec import MLPSpec
from tests.declarations import BERT, GOOD, LLAMA, Broken, Index, Width, Word, declare, json_like, patient, specs, words


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
