"""Narrow MLPs in one launch, forced wherever there is such a kernel, held against the oracle."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpdsl
from mlpdsl import MLPSpec, dispatch
from mlpdsl.codegen import narrow
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config
from mlpdsl.target import parse_target
from mlpdsl.testing.calls import Call, check_call, make_call, same_bits
from mlpdsl.testing.strategies import calls, specs

torch.set_num_threads(1)

RESIDENT = MLPSpec(
    dims=(13, 64, 33, 20), activation="sigmoid", bias=True, dtype="bfloat16", epilogue=("residual", "layer_scale", "gelu")
)
ANEW = MLPSpec(dims=(40, 100, 128, 17), activation="gelu", dtype="float16", epilogue=("scale",))
GATED = MLPSpec(dims=(24, 50, 30), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",))
DEEP = MLPSpec(dims=(64,) * 7, activation="relu", dtype="bfloat16")
ODD = DEEP.replace(dims=(63,) * 7)
SINGLE = MLPSpec(dims=(24, 20), activation="identity", dtype="bfloat16")
WIDE = MLPSpec(dims=(70, 129, 20), activation="relu", dtype="bfloat16")


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("whole_network"):
        yield


@settings(max_examples=24)
@given(call=st.sampled_from(("bfloat16", "float16")).flatmap(lambda dtype: specs(dtype=dtype)).flatmap(calls))
def test_any_spec_any_layout_any_values(call: Call) -> None:
    check_call(call)


@pytest.mark.parametrize("spec", [RESIDENT, ANEW, GATED], ids=str)
def test_one_launch_forward_and_what_backward_needs(spec: MLPSpec, launched: list[str]) -> None:
    mlp = mlpdsl.compile(spec)
    for rows in (1, 31, 32, 33, 200):
        call = make_call(spec, (rows,), rows)
        with torch.no_grad():
            call.run(mlp)
        assert set(launched) == {"network"}
        check_call(call)
        launched.clear()


@pytest.mark.parametrize("spec", [WIDE, GATED.replace(dtype="float32"), SINGLE], ids=str)
def test_others_take_a_kernel_a_linear(spec: MLPSpec, launched: list[str]) -> None:
    check_call(make_call(spec, (40,), 0))
    assert launched and "network" not in launched


def test_which_text_is_printed() -> None:
    """Weights once a program where they find room together, else for each tile."""
    for spec, chip, once in (
        (RESIDENT, "sm_90", True),
        (ANEW, "sm_90", False),
        (GATED, "sm_80", True),
        (DEEP, "sm_120", True),
        (ODD, "sm_90", False),
    ):
        assert narrow.resident(lower(spec, parse_target(chip))) is once
        text = mlpdsl.generate(spec, target=chip).text
        body = text[text.index("def network(") :]
        assert (body.index("padded_matrix(") < body.index("rows = tile * BLOCK_M")) is once
    assert "def network(" not in mlpdsl.generate(WIDE, target="sm_90").text + mlpdsl.generate(GATED, target="gfx942").text


def test_what_is_padded_reaches_nothing() -> None:
    """An activation that is infinite or NaN at 0, where widths are no powers of two: padding stays out of the sums."""
    spec = MLPSpec(dims=(20, 33, 20, 5), activation=lambda x: 1.0 / x, dtype="bfloat16")
    check_call(make_call(spec, (50,), 0))


def test_recorded_and_repeated() -> None:
    for spec in (RESIDENT, ANEW, GATED):
        check_call(make_call(spec, (70,), 1, pattern="repeat"))


def test_the_librarys_stages_are_none_of_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the rule, asked for a linear, would say the library: the oracle allows what it rounds."""
    inner, config = dispatch._decided, Config(4, 16, 16, strategy="library")
    monkeypatch.setattr(dispatch, "_decided", lambda plan, role, *a: inner(plan, role, *a) if role == "network" else config)
    dispatch.forget()
    assert dispatch.library_stages(GATED.to_json(), torch.device("cpu"), 50) == {
        "hidden_grad[1]", "weight_grad[1]", "weight_grad[0]", "input_grad[0]",
    }  # fmt: skip
    forward = {"hidden[0]", "output[1]"}
    assert forward <= dispatch.library_stages(GATED.replace(dtype="float32").to_json(), torch.device("cpu"), 50)
    dispatch.forget()


def test_operands_reach_as_far_as_others() -> None:
    """Columns that lie more than 2**31 elements apart."""
    spec = MLPSpec(dims=(16, 16, 20), activation="relu", dtype="bfloat16", epilogue=("residual",))
    far = torch.empty(20 * 2**27, dtype=torch.bfloat16).as_strided((4, 20), (1, 2**27))  # of which pages are taken where written
    call = make_call(spec, (4,), 0)
    far.copy_(call.operands["residual"])
    with torch.no_grad():
        wanted = call.run(mlpdsl.compile(spec))
        assert same_bits(mlpdsl.compile(spec)(call.x, *call.params, residual=far), wanted)
