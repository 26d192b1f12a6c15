"""Narrow MLPs in one launch on a GPU: any spec, layout, values and pattern; every tile; and nothing else launched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpdsl
from mlpdsl import MLPSpec, dispatch
from mlpdsl.testing.calls import Call, check_call, make_call
from mlpdsl.testing.strategies import calls, specs

SPECS = {
    "relu": MLPSpec(dims=(64, 64, 64, 64, 64), activation="relu", dtype="bfloat16"),
    "padded": MLPSpec(
        dims=(13, 64, 33, 20), activation="sigmoid", bias=True, dtype="bfloat16", epilogue=("layer_scale", "residual")
    ),
    "gated": MLPSpec(dims=(64, 64, 64), activation="silu", gated=True, bias=True, dtype="float16", epilogue=("gelu",)),
    "six": MLPSpec(dims=(64,) * 7, activation="mish", bias=True, dtype="float16", epilogue=("residual",)),
    "wider": MLPSpec(dims=(128,) * 9, activation="gelu", dtype="bfloat16"),
    "wider-gated": MLPSpec(dims=(96, 128, 100), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",)),
}


@pytest.fixture(autouse=True, scope="module")
def _forced() -> Iterator[None]:
    with dispatch.forcing("whole_network"):
        yield


@pytest.mark.parametrize("name", SPECS)
def test_every_tile(name: str, launched: set[str]) -> None:
    spec = SPECS[name]
    for seed, (rows, lies, pattern) in enumerate([
        (1, "dense", "repeat"), (63, "offset", "once"), (65, "padded", "repeat"), (4096, "dense", "captured"),
        (4099, "transposed", "once"), (40001, "dense", "repeat"),
    ]):  # fmt: skip
        call = make_call(spec, (rows,), seed, x=lies, operands=lies, dy=lies, pattern=pattern, device="cuda")
        launched.clear()
        with torch.no_grad():
            call.run(mlpdsl.compile(spec))
        beyond = mlpdsl.explain(spec, rows).strategy != "whole_network"
        assert ("network" in launched) != beyond and (beyond or len(launched) == 1)
        check_call(call)


def test_more_tiles_than_programs_at_once() -> None:
    """Half a million rows: each program takes many tiles, three a multiprocessor."""
    spec = SPECS["relu"]
    call = make_call(spec, (2**19 + 7,), 0, device="cuda")
    with torch.no_grad():
        y = call.run(mlpdsl.compile(spec))
        parts = [call.x[at : at + 50_000] for at in range(0, len(call.x), 50_000)]
        wanted = torch.cat([mlpdsl.compile(spec)(part, *call.params) for part in parts])
    assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))


@settings(max_examples=25, deadline=None)
@given(call=st.sampled_from(("bfloat16", "float16")).flatmap(lambda dtype: calls(specs(dtype=dtype), device="cuda")))
def test_any_spec_any_layout_any_values(call: Call) -> None:
    check_call(call)
