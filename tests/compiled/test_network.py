"""Narrow MLPs in one launch, as compiled for four architectures: every value in a register, and room in shared memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from mlpdsl import MLPSpec
from mlpdsl.backends import interpreting
from mlpdsl.codegen import narrow
from mlpdsl.codegen.lower import lower
from mlpdsl.resources import compiled
from mlpdsl.target import TARGETS

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

MANY = ("layer_scale", "residual", "gelu")
SPECS = {
    "six": MLPSpec(dims=(64,) * 7, activation="mish", bias=True, dtype="bfloat16", epilogue=MANY),
    "mixed": MLPSpec(dims=(16, 64, 16, 64, 16, 64, 16), activation="mish", bias=True, dtype="bfloat16", epilogue=("residual",)),
    "gated": MLPSpec(dims=(48, 64, 32), activation="mish", gated=True, bias=True, dtype="float16", epilogue=MANY),
    "odd": MLPSpec(dims=(63, 61, 59, 57, 55), activation="mish", bias=True, dtype="bfloat16", epilogue=MANY),
    "odd-gated": MLPSpec(dims=(63, 63, 63), activation="mish", gated=True, bias=True, dtype="float16", epilogue=MANY),
    "odd-128": MLPSpec(dims=(100, 128, 127, 97), activation="gelu_10", bias=True, dtype="bfloat16", epilogue=MANY),
    "128": MLPSpec(dims=(128,) * 9, activation="gelu_10", bias=True, dtype="float16", epilogue=("residual",)),
    "128-gated": MLPSpec(dims=(128, 128, 128), activation="mish", gated=True, bias=True, dtype="bfloat16", epilogue=MANY),
}
CASES = [
    (name, chip, m)
    for at, name in enumerate(SPECS)
    for chip in ("sm_90", ("sm_80", "sm_100", "sm_120")[at % 3])
    for m in (256, 4096, 2**14, 2**18)
]


def _differing(cases: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """One case of each that take the same tiles; none where there is no such kernel."""
    found = {}
    for name, chip, m in cases:
        config = narrow.network(lower(SPECS[name], TARGETS[chip]), m)
        if config is not None:
            found.setdefault((name, chip, config), (name, chip, m))
    return list(found.values())


@pytest.mark.parametrize(("name", "chip", "m"), _differing(CASES))
def test_every_value_in_a_register(name: str, chip: str, m: int) -> None:
    plan = lower(SPECS[name], TARGETS[chip])
    config = narrow.network(plan, m)
    assert config is not None
    found = compiled(SPECS[name], chip, "network", len(plan.linears) - 1, "", m, config)
    assert found.fits and found.spills == 0 and not found.serialised, (found.config, found.registers, found.spills)
    assert found.instruction in ("wgmma", "mma", "tcgen05")
