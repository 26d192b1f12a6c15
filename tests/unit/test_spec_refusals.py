"""Declarations that are refused: each with where, what, what is allowed, and what to do."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpdsl.errors import SpecError, UnsupportedError
from mlpdsl.names import EPILOGUE_OPERANDS
from mlpdsl.spec import MLPSpec
from tests.declarations import GOOD, Broken, Index, anything, declare, patient

FIELDS = {field.name for field in dataclasses.fields(MLPSpec)}


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
