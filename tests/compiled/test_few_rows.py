"""Kernels for few rows as compiled for Hopper: by how many bytes they read weights whose rows are no whole 16."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from mlpdsl import MLPSpec
from mlpdsl.backends import interpreting
from mlpdsl.resources import resources
from tests.compiled.matrix import SPECS as MATRIX

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

SWIGLU = MLPSpec(dims=(1021, 2749, 1021), activation="silu", gated=True, dtype="bfloat16")
GELU = MLPSpec(dims=(333, 1111, 577), activation="gelu", bias=True, dtype="float16", epilogue=("layer_scale", "residual"))
EVEN = SWIGLU.replace(dims=(1022, 2750, 1022))
WIDE = SWIGLU.replace(dims=(4095, 14335, 4095))


def _loads(assembly: str) -> tuple[set[str], set[str]]:
    """Sizes in bytes of asynchronous copies, and types of loads of weights, which nobody reads again."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[.*?\], \[.*?\], (0x\w+)", assembly)
    loads = re.findall(r"ld\.global\.[\w.:]*evict_first[\w.:]*?((?:\.v\d)?\.[bufs]\d+) ", assembly)
    return set(copies), set(loads)


@pytest.mark.parametrize("m", [1, 2, 13, 32, 64])
@pytest.mark.parametrize("spec", [SWIGLU, GELU, EVEN, WIDE], ids=lambda s: s.short_name)
def test_weights_are_read_in_vectors(spec: MLPSpec, m: int) -> None:
    found = [r for r in resources(spec, "sm_90", m, backward=False) if r.config and r.config.strategy == "skinny"]
    wanted = {f"{role}_{'row' if m == 1 else 'skinny'}" for role in ("hidden", "output")}
    assert {r.name for r in found} == (wanted if m <= 16 or spec == GELU else set())  # the others are on copies
    for r in found:
        copies, loads = _loads(r.assembly)
        assert copies | loads and copies <= {"0x10"} and loads <= {".v4.b32"}, (r.name, r.config, copies, loads)
        assert r.fits and r.spills == 0 and not r.serialised, (r.name, r.config, r.registers, r.spills)
        # All of them on their way while others are multiplied, or together.
        assert copies or (m == 1 and r.config is not None and r.config.num_stages == 1), (r.name, r.config)


@pytest.mark.parametrize("m", [1, 16, 32, 64])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_every_value_in_a_register(target: str, m: int) -> None:
    """Of a gate and an epilogue that keep many."""
    for r in resources(MATRIX["own-odd"].replace(dims=(1021, 2749, 1021)), target, m, backward=False):
        assert r.fits and r.spills == 0 and not r.serialised, (r.name, r.config, r.registers, r.spills)


@pytest.mark.parametrize("m", [2, 8, 16])
@pytest.mark.parametrize(("dims", "words"), [
    ((768, 3072, 768), {"epilogue": ("layer_scale", "residual")}),
    ((1024, 8192, 2048), {"gated": True, "epilogue": ("gelu", "residual")}),
    ((4096, 11008, 4096), {"gated": True}),
    ((333, 1111, 577), {}),
])  # fmt: skip
def test_a_few_rows_of_float32(dims: tuple[int, ...], words: dict[str, Any], m: int) -> None:
    """Sums of every row and column in registers, weights by 16 bytes, or 8 where a step is short."""
    spec = MLPSpec(**{"dims": dims, "activation": "gelu", "bias": True, "dtype": "float32", **words})
    found = [r for r in resources(spec, "sm_90", m, backward=False) if r.name.endswith("_skinny")]
    assert len(found) == 2 or m > 8, [r.name for r in found]
    for r in found:
        assert r.fits and r.spills == 0, (r.name, r.config, r.registers, r.spills)
        _, loads = _loads(r.assembly)
        assert loads & {".v4.b32", ".v2.b32"}, (r.name, r.config, loads)


@pytest.mark.parametrize("dims", [(1021, 2749, 1021), (4095, 14335, 4095), (333, 1111, 577)])
def test_one_row_of_float32_too(dims: tuple[int, ...]) -> None:
    for r in resources(MLPSpec(dims=dims, activation="silu", gated=True), "sm_90", 1, backward=False):
        copies, loads = _loads(r.assembly)
        assert r.name.endswith("_row") and r.spills == 0
        # 4 bytes at a time are x.
        assert copies | loads and copies <= {"0x10", "0x4"} and loads <= {".v4.b32"}, (r.name, r.config, copies, loads)
        assert "0x10" in copies or ".v4.b32" in loads
