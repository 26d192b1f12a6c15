"""What the default configs compile to, without a GPU: memory that fits, the right matrix instruction, no spills.

Compiled anew each time: tests/conftest.py gives Triton an empty cache.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.backends import interpreting
from mlpdsl.resources import Resources, resources
from mlpdsl.target import TARGETS

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

SPECS = {
    "gated": MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"),
    "gated-everything": MLPSpec(
        dims=(4096, 14336, 4096), activation="gelu", gated=True, bias=True, dtype="float16",
        epilogue=("layer_scale", "residual", "scale"),
    ),
    "gelu-bias": MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float16"),
    "gelu-residual": MLPSpec(dims=(1024, 4096, 1024), activation="gelu_tanh", dtype="bfloat16", epilogue=("residual",)),
    "odd": MLPSpec(dims=(767, 3071, 769), activation="silu", gated=True, bias=True, dtype="bfloat16"),
    "ieee": MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True),
    "ieee-gated": MLPSpec(dims=(1024, 2816, 1024), activation="silu", gated=True),
    "tf32": MLPSpec(dims=(1024, 4096, 1024), activation="silu", gated=True, precision="tf32"),
    "tf32x3": MLPSpec(dims=(1024, 4096, 1024), activation="silu", precision="tf32x3"),
    "deep": MLPSpec(dims=(256, 512, 256, 512, 128), activation="relu", bias=True, dtype="bfloat16"),
    "single": MLPSpec(dims=(1024, 1024), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "scale")),
}  # fmt: skip

CASES = [
    *[(name, "sm_90", path, 4096) for name in ("gated", "gated-everything", "gelu-residual") for path in ("tma", "masked")],
    *[(name, "sm_90", "tma", 4096) for name in ("gelu-bias", "deep", "single")],
    *[(name, "sm_90", "masked", 4096) for name in ("odd", "ieee", "ieee-gated", "tf32", "tf32x3")],
    *[("gated-everything", "sm_90", path, 16) for path in ("tma", "masked")],
    *[(name, "sm_80", "masked", 4096) for name in ("gated-everything", "odd", "ieee", "tf32", "single")],
    *[(name, "sm_100", "tma", 4096) for name in ("gated-everything", "single")],
    *[(name, "sm_100", "masked", 4096) for name in ("gelu-residual", "ieee", "tf32")],
    *[(name, "gfx942", "masked", 4096) for name in ("gated-everything", "gelu-residual", "odd", "ieee", "tf32")],
    ("ieee", "sm_75", "masked", 16),
    ("gated", "sm_120", "tma", 4096),
    ("gelu-residual", "gfx1100", "masked", 4096),
]

PRODUCT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma", "gfx1100": "wmma"}
"""The matrix instruction of each target, where the tile is large enough for it."""

SPILLS = {
    ("ieee", "sm_90"): 16,  # input_grad and weight_grad, by up to so much in triton 3.6
    ("ieee-gated", "sm_90"): 16,  # triton 3.9
}
"""Bytes a thread that a kernel may spill on sm_90 all the same."""

SPILLS_ELSEWHERE = 192
"""Bytes a thread on other targets, whose configs nobody has measured."""


def expected(name: str, target: str, m: int) -> set[str]:
    """The instructions that products may use."""
    if SPECS[name].precision == "ieee" and SPECS[name].dtype == "float32":
        return {"mfma"} if target == "gfx942" else {"fma"}  # CDNA multiplies whole float32
    small = {"mma"} if m < 64 and target in ("sm_90", "sm_100") else set()  # wgmma wants 64 rows, tcgen05 too
    return {PRODUCT[target], *small}


def faults(r: Resources, name: str, target: str, path: str, m: int) -> list[str]:
    """What is wrong with one kernel, in words."""
    found = []
    limit = TARGETS[target].shared_memory
    if not r.fits or r.shared > limit:
        found.append(f"{r.shared} bytes of shared memory, of {limit}")
    if r.config is not None and r.instruction not in expected(name, target, 4096 if path == "tma" else m):
        found.append(f"its product is by {r.instruction}")
    if r.config is None and r.instruction != "fma":
        found.append(f"no product, yet {r.instruction}")
    if r.serialised:
        found.append("wgmma is serialised")
    if TARGETS[target].kind == "cuda":
        allowed = SPILLS.get((name, target), 0) if target == "sm_90" else SPILLS_ELSEWHERE
        if r.registers is None or r.spills is None:
            found.append("ptxas told nothing")
        elif r.spills > allowed:
            found.append(f"{r.spills} bytes spilled, {r.registers} registers")
    return [f"{r.name}, stage {r.stage}, {r.config}: {fault}" for fault in found]


@pytest.mark.parametrize(("name", "target", "path", "m"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_every_kernel_of_the_default_configs(name: str, target: str, path: str, m: int) -> None:
    spec = SPECS[name]
    found = resources(spec, target, m, path=path)
    roles = {r.name.removesuffix("_tma").removesuffix("_masked") for r in found}
    wanted = {"output", "input_grad", "weight_grad", *(("hidden", "hidden_grad") if spec.depth > 1 else ())}
    assert wanted <= roles
    assert not spec.bias or {"epilogue_grad", "sum_rows"} <= roles
    assert {r.name.rpartition("_")[2] for r in found if r.config is not None} == {path}
    assert [fault for r in found for fault in faults(r, name, target, path, m)] == []


@pytest.mark.parametrize(("name", "target", "word"), [("gelu-bias", "sm_75", "matrix"), ("tf32x3", "gfx942", "tf32x3")])
def test_what_triton_cannot_do_is_refused_with_the_reason(name: str, target: str, word: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        resources(SPECS[name], target, 64)
    assert any(word in reason for reason in refused.value.reasons)


@pytest.mark.parametrize(
    ("name", "target", "word"), [("gelu-bias", "sm_80", "accelerator"), ("ieee", "sm_90", "float32"), ("odd", "sm_90", "767")]
)
def test_a_path_that_is_not_there_is_refused(name: str, target: str, word: str) -> None:
    with pytest.raises(UnsupportedError, match=word):
        resources(SPECS[name], target, 64, path="tma")


def test_forward_alone_compiles_fewer_kernels() -> None:
    found = resources(SPECS["single"], "sm_80", 64, backward=False)
    assert [r.name for r in found] == ["output_masked"]
    assert found[0].config is not None and found[0].warps == found[0].config.num_warps
    assert ".target sm_80" in found[0].assembly


def test_what_triton_cannot_compile_is_unsupported() -> None:
    with pytest.raises(UnsupportedError) as caught:
        resources(SPECS["tf32x3"], "gfx942", 256, backward=False)
    assert any(reason.strip() for reason in caught.value.reasons)
    assert "gfx942" in str(caught.value)


def test_widths_that_16_does_not_divide_are_not_promised_to_be_aligned() -> None:
    aligned, odd = (
        resources(MLPSpec(dims=(width, width), activation="identity", dtype="bfloat16"), "sm_80", 64, backward=False)[0].assembly
        for width in (768, 767)
    )
    wide = "cp.async.cg.shared.global"  # 16 bytes at once
    assert wide in aligned and wide not in odd
