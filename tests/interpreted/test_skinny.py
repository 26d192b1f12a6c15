"""The kernels for few rows, forced wherever there are few, held against the oracle; and how they are launched."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import math
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch
from mlpdsl.testing.calls import Call, check_call, make_call, same_bits
from mlpdsl.testing.strategies import calls, leads, specs

torch.set_num_threads(1)

GATED = MLPSpec(dims=(48, 96, 40), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "gelu"))
DEEP = MLPSpec(dims=(50, 70, 130, 33), activation="gelu", bias=True, dtype="float16", epilogue=("residual",))


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("skinny"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The name, options and constants of every launch."""
    heard: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    inner = launch.run

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=True))
        heard.append((kernel.__name__, options, given))
        inner(kernel, grid, options, *args)

    monkeypatch.setattr(launch, "run", run)
    return heard


@settings(max_examples=16)
@given(call=specs(max_epilogues=3).flatmap(
    lambda spec: leads().filter(lambda lead: 0 < math.prod(lead) <= 70).flatmap(lambda lead: calls(spec, lead=lead))
))  # fmt: skip
def test_any_spec_any_layout_any_values(call: Call) -> None:
    check_call(call)


@pytest.mark.parametrize("spec", [GATED, DEEP, GATED.replace(dtype="float32")], ids=str)
@pytest.mark.parametrize(("rows", "path"), [(1, "row"), (2, "skinny"), (16, "skinny"), (17, "skinny"), (64, "skinny"), (65, "")])
def test_which_kernel_runs(rows: int, path: str, spec: MLPSpec, launched: list[Any]) -> None:
    check_call(make_call(spec, (rows,), 0), backward=False)
    wide = path == "skinny" and spec.dtype == "float32" and rows > 16  # which no matrix instruction multiplies exactly
    names = {name.rpartition("_")[2] for name, _, _ in launched}
    assert names == {path} if path and not wide else not names & {"row", "skinny"}


def test_the_sums_of_one_row_in_one_piece_and_in_steps(launched: list[Any]) -> None:
    spec = MLPSpec(dims=(40, 300, 70), activation="relu", dtype="bfloat16")
    check_call(make_call(spec, (1,), 0))
    pieces = {name: given["BLOCK_K"] >= given["K"] for name, _, given in launched if name.endswith("_row")}
    assert pieces == {"hidden_row": True, "output_row": False}


def test_backward_is_given_what_was_saved() -> None:
    for spec in (GATED, DEEP):
        for rows in (1, 5, 40):
            check_call(make_call(spec, (rows,), rows))


def test_batch_invariant_never_takes_them(launched: list[Any]) -> None:
    """A row alone has the bits that it has among others."""
    mlp = mlpdsl.compile(GATED, backend="triton", batch_invariant=True)
    call = make_call(GATED, (20,), 0)
    whole = call.run(mlp)
    alone = mlp(call.x[3:4], *call.params, **call.operands)
    assert same_bits(alone, whole[3:4])
    assert not [name for name, _, _ in launched if name.endswith(("_row", "_skinny"))]


def test_a_kernel_that_follows_one_of_ours_may_start_before_its_end(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the first: it follows somebody else's, which need not wait for what it reads."""
    inner = launch.run

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        monkeypatch.setattr(launch, "overlaps", lambda t: False)  # nothing to wait for where kernels are interpreted
        flags = [i for i, name in enumerate(kernel.arg_names) if name in ("OVERLAPS", "FOLLOWS")]
        told.append((kernel.__name__, [args[i] for i in flags], options.get("launch_pdl", False)))
        inner(kernel, grid, {k: v for k, v in options.items() if k != "launch_pdl"},
              *(False if i in flags else arg for i, arg in enumerate(args)))  # fmt: skip
        monkeypatch.setattr(launch, "overlaps", lambda t: True)

    told: list[Any] = []
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "overlaps", lambda t: True)
    for rows, suffix in ((1, "row"), (9, "skinny")):
        told.clear()
        check_call(make_call(DEEP, (rows,), 0), backward=False)
        assert told[:3] == [
            (f"hidden_{suffix}", [True, False], False),
            (f"hidden_{suffix}", [True, True], True),
            (f"output_{suffix}", [True, True], True),
        ]


def test_after_another_strategy_none_starts_early(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpdsl.codegen.plan import Config

    tiled = Config(16, 32, 32, num_stages=1)
    told: list[Any] = []
    inner = launch.run

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=True))
        told.append((kernel.__name__, given.get("FOLLOWS"), options.get("launch_pdl", False)))
        given = {name: False if name in ("OVERLAPS", "FOLLOWS") else value for name, value in given.items()}
        inner(kernel, grid, options, *given.values())

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "overlaps", lambda t: True)
    with dispatch.forcing_config("hidden", 9, 96, 48, tiled):
        check_call(make_call(GATED, (9,), 0), backward=False)
    assert told[:2] in ([("hidden_tma", None, False), ("output_skinny", False, False)],
                        [("hidden_masked", None, False), ("output_skinny", False, False)])  # fmt: skip
