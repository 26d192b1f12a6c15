"""`mlpdsl.resources`: the specialisations of a real call, what it says of a kernel, what it refuses. Figures: test_matrix.py."""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from mlpdsl import MLPSpec, UnsupportedError, launch, source
from mlpdsl import resources as module
from mlpdsl.backends import BACKENDS, interpreting
from mlpdsl.codegen import narrow
from mlpdsl.codegen.candidates import candidates
from mlpdsl.codegen.config import choose, padded, usual
from mlpdsl.codegen.emit.triton import emit
from mlpdsl.codegen.emit.triton_kernels import Arg
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config
from mlpdsl.resources import compiled, resources
from mlpdsl.target import TARGETS
from tests.compiled.matrix import SPECS as MATRIX

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

SPECS = {
    "gelu-bias": MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float16"),
    "odd": MLPSpec(dims=(767, 3071, 769), activation="silu", gated=True, bias=True, dtype="bfloat16"),
    "ieee": MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True),
    "tf32x3": MLPSpec(dims=(1024, 4096, 1024), activation="silu", precision="tf32x3"),
    "single": MLPSpec(dims=(1024, 1024), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "scale")),
}


# What a real call passes


def _shape(value: int) -> int | str:
    """What Triton makes another kernel for: an integer that is 1, or that 16 divides, or that 32 bits do not hold."""
    return 1 if value == 1 else f"{'divisible' if value % 16 == 0 else 'any'}, {32 if abs(value) < 2**31 else 64} bits"


def _seen(arg: Arg, value: Any) -> Any:
    """One argument as far as it decides which kernel is compiled."""
    if arg.kind == "pointer":
        return value if isinstance(value, tuple) else (str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0)
    if arg.name == "up_distance":  # between two allocations, which may lie anywhere
        return value % 16
    if arg.kind == "stride":
        return _shape(value)
    return int(value) if arg.kind == "constexpr" else None


def _launched(spec: MLPSpec, target: str, m: int, path: str, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Every launch of forward and backward on aligned, contiguous tensors, by its kernel, its options and its arguments."""
    plan = lower(spec, TARGETS[target])
    key, text, file = source.publish(spec, TARGETS[target], "triton")
    generated = BACKENDS["triton"].load(file, text, key)
    kernels = {k.name: k for k in emit(plan).kernels}
    seen = set()

    def record(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        declared = kernels[kernel.fn.__name__]
        assert len(declared.args) == len(args)
        for arg, value in zip(declared.args, args, strict=True):
            if arg.kind == "descriptor":
                sizes = dict(zip((a.name for a in declared.args), args, strict=True))
                assert value.block_shape == [module._block_size(block, sizes) for block in arg.block]
                assert str(value.base.dtype) == f"torch.{arg.dtype}"
        found = tuple(_seen(arg, value) for arg, value in zip(declared.args, args, strict=True))
        seen.add((declared.name, tuple(sorted(options.items())), found))

    def pick(role: str, chosen: str, m: int, n: int, k: int) -> launch.Launch:
        planes = 2 if plan.gated and role == "hidden" else 1
        words: dict[str, Any] = {"dtype": plan.dtype, "precision": plan.precision, "planes": planes, "target": plan.target}
        copied = narrow.network(plan, m) if role == "network" and not linear_by_linear else None
        if role != "network" and path != chosen:  # on descriptors only as copies
            copied = padded(role, m, n, k, **words, epilogue=plan.finishes(role))
        return launch.Launch.of(copied or choose(role, path if plan.uses_tma else "masked", m, n, k, **words))

    linear_by_linear = False  # what `pick` looks at
    monkeypatch.setattr(launch, "run", record)
    if path == "masked":
        monkeypatch.setattr(launch, "fits_tma", lambda *tensors: False)
    dtype = getattr(torch, plan.dtype)
    made = {}
    for linear in plan.linears:
        n, k = linear.width_out, linear.width_in
        near = torch.empty(linear.planes, -(-n * k // 64) * 64, dtype=dtype)  # what one descriptor spans is no terabyte apart
        made |= {i: plane[: n * k].view(n, k) for i, plane in zip(linear.weights, near, strict=True)}
        made |= {i: torch.empty(linear.width_out, dtype=dtype) for i in linear.biases}
    parameters = [made[i] for i in range(len(made))]
    x, last = torch.empty(m, plan.linears[0].width_in, dtype=dtype), plan.linears[-1].width_out
    sizes = {"tile": (m, last), "column": (last,), "row": (m, 1), "scalar": ()}
    operands = [torch.empty(sizes[o.kind], dtype=dtype) for o in plan.epilogue.operands]
    for one_launch in (True, False):
        linear_by_linear = not one_launch
        out, *saved = generated.forward(x, parameters, operands, True, pick)
    needs = [True] * (1 + len(parameters) + len(operands))
    generated.backward(torch.empty_like(out), x, parameters, operands, saved, needs, pick)
    return seen


def _compiled(spec: MLPSpec, target: str, m: int, path: str, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The same of what `resources` compiles."""
    seen = set()

    def record(function: Any, kernel: Any, values: dict[str, Any], options: dict[str, Any], plan: Any) -> tuple[Any, str]:
        pointers = {a.name: (module._element_type(a, values, plan.dtype), True) for a in kernel.args if a.kind == "pointer"}
        found = tuple(_seen(arg, {**values, **pointers}.get(arg.name)) for arg in kernel.args)
        seen.add((kernel.name, tuple(sorted(options.items())), found))
        return SimpleNamespace(asm={"ptx": "", "amdgcn": ""}, metadata=SimpleNamespace(shared=0)), ""

    monkeypatch.setattr(module, "_triton_compile", record)
    resources(spec, target, m, path=path)
    return seen


def _paths(spec: MLPSpec) -> tuple[str, ...]:
    plan = lower(spec, TARGETS["sm_90"])
    return ("tma", "masked") if plan.uses_tma or plan.copies else ("masked",)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, spec in MATRIX.items() for path in _paths(spec)])
def test_the_specialisations_are_those_of_a_real_call(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, launched = (f(MATRIX[name], "sm_90", 1040, path, monkeypatch) for f in (_compiled, _launched))
    assert {seen[0] for seen in compiled} == {seen[0] for seen in launched}
    several = ("sum_rows", "copy_rows")  # of rows of several lengths, of which one is compiled
    assert {seen for seen in compiled if seen[0] not in several} == {seen for seen in launched if seen[0] not in several}


# What it refuses


@pytest.mark.parametrize(("name", "target", "word"), [("gelu-bias", "sm_75", "matrix"), ("tf32x3", "gfx942", "tf32x3")])
def test_what_triton_cannot_do_is_refused_with_the_reason(name: str, target: str, word: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        resources(SPECS[name], target, 64)
    assert any(word in reason for reason in refused.value.reasons)


@pytest.mark.parametrize(
    ("name", "target", "word"),
    [("gelu-bias", "sm_80", "accelerator"), ("ieee", "sm_90", "float32"), ("odd", "sm_80", "accelerator")],
)
def test_a_path_that_is_not_there_is_refused(name: str, target: str, word: str) -> None:
    with pytest.raises(UnsupportedError, match=word):
        resources(SPECS[name], target, 64, path="tma")


def test_forward_alone_compiles_fewer_kernels() -> None:
    found = resources(SPECS["single"], "sm_80", 65, backward=False)
    assert [r.name for r in found] == ["output_masked"]
    assert found[0].config is not None and found[0].warps == found[0].config.num_warps
    assert ".target sm_80" in found[0].assembly


def test_rows_are_copied_for_descriptors_alone() -> None:
    spec = MLPSpec(dims=(333, 335), activation="identity", dtype="bfloat16")
    for target, path, wanted in (("sm_90", "tma", {"output_tma", "copy_rows"}), ("sm_90", "masked", {"output_masked"}),
                                 ("sm_90", None, {"output_tma", "copy_rows"}), ("sm_80", None, {"output_masked"})):  # fmt: skip
        found = resources(spec, target, 4096, backward=False, path=path)
        assert {r.name for r in found} == wanted
        assert all(r.fits and r.spills == 0 for r in found)
    assert {r.name for r in resources(spec, "sm_90", 65, backward=False)} == {"output_masked"}  # too few to be worth it


@pytest.mark.parametrize("m", [127, 512, 1021, 2048, 4093])
def test_last_linears_on_copies_keep_every_value_in_a_register(m: int) -> None:
    """Their tiles are the rule's alone: no kernel of descriptors that fit has them."""
    epilogue = ("layer_scale", "silu", "residual")
    spec = MLPSpec(dims=(333, 1111, 577), activation="gelu", bias=True, dtype="bfloat16", epilogue=epilogue)
    words = {"dtype": "bfloat16", "precision": "ieee", "planes": 1, "target": TARGETS["sm_90"], "epilogue": True}
    config = usual("output", "masked", m, 577, 1111, **words)
    found = module.compiled(spec, "sm_90", "output", 1, "masked", m, config)
    assert found.name == "output_tma" and config.strategy == "padded"
    assert found.fits and not found.spills and not found.serialised


def test_what_triton_cannot_compile_is_unsupported() -> None:
    with pytest.raises(UnsupportedError) as caught:
        resources(SPECS["tf32x3"], "gfx942", 256, backward=False)
    assert any(reason.strip() for reason in caught.value.reasons)
    assert "gfx942" in str(caught.value)


def test_widths_that_16_does_not_divide_are_not_promised_to_be_aligned() -> None:
    aligned, odd = (
        resources(MLPSpec(dims=(width, width), activation="identity", dtype="bfloat16"), "sm_80", 65, backward=False)[0].assembly
        for width in (768, 767)
    )
    wide = "cp.async.cg.shared.global"  # 16 bytes at once
    assert wide in aligned and wide not in odd


# What it says

AMD = """
    .agpr_count:     0
    .private_segment_fixed_size: 104
    .sgpr_spill_count: 7
    .vgpr_count:     256
    .vgpr_spill_count: 25
"""


def test_registers_and_spills_of_amd() -> None:
    assert module._metadata(AMD) == (256, 104, False)
    assert module._metadata(AMD.replace("104", "0").replace("25\n", "0\n")) == (256, 0, False)
    assert module._metadata(AMD.replace(".vgpr_spill_count", ".other")) == (None, None, False)


def test_registers_and_spills_of_nvidia() -> None:
    log = """ptxas info    : 0 bytes gmem
        128 bytes stack frame, 124 bytes spill stores, 132 bytes spill loads
    ptxas info    : Used 255 registers, used 1 barriers, 444 bytes cmem[0]"""
    assert module._ptxas(log) == (255, 132, False)
    assert module._ptxas(f"{log}\nptxas info : (C7515) Potential Performance Loss: wgmma.mma_async") == (255, 132, True)
    assert module._ptxas("") == (None, None, False)


@pytest.mark.parametrize(
    ("spec", "target", "instruction"),
    [(SPECS["ieee"], "sm_75", "fma"), (MATRIX["gated-everything"], "sm_89", "mma"), (MATRIX["gelu_10"], "gfx950", "mfma")],
)
def test_other_targets(spec: MLPSpec, target: str, instruction: str) -> None:
    found = resources(spec, target, 4096)
    assert all(r.fits and r.spills == 0 and r.registers for r in found), [(r.name, r.spills) for r in found]
    assert {r.instruction for r in found if r.config} == {instruction}


def test_what_a_thread_cannot_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MLPSpec(dims=(512, 512), activation="identity", dtype="float16")
    wide = choose("output", "masked", 128, 128, 512, dtype="float16", precision="ieee", planes=1, target=TARGETS["sm_80"])
    wide = replace(wide, block_m=128, block_n=128, block_k=16, num_warps=2)  # 256 accumulators a thread
    monkeypatch.setattr(module, "choose", lambda *args, **options: wide)
    for target in ("sm_80", "gfx1100"):
        (output,) = resources(spec, target, 4096, backward=False)
        assert output.spills is not None and output.spills > 256
        assert (output.registers or 0) >= 255


def test_asked_twice_it_says_the_same() -> None:
    first, second = (resources(SPECS["single"], "sm_80", 64, backward=False) for _ in range(2))
    assert first == second and first[0].registers


def test_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's settings and the program's output are the whole process's, and are put back."""
    from triton import knobs

    first, second, left = threading.Event(), threading.Event(), threading.Event()
    before, output = (knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log), sys.stdout

    def slowly(*_: Any, **__: Any) -> Any:
        if not first.is_set():
            first.set()
            second.wait(0.5)
        else:
            second.set()
            left.wait(0.5)
        raise RuntimeError("not compiled")

    monkeypatch.setattr(triton, "compile", slowly)

    def ask() -> None:
        with contextlib.suppress(UnsupportedError):
            compiled(SPECS["odd"], "sm_90", "output", 1, "masked", 64, Config(64, 64, 32))
        left.set()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    first.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert (knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log) == before
    assert sys.stdout is output


OWN = """{"dims": [1024, 4096, 1024], "activation": "silu", "gated": true, "precision": "tf32",
          "epilogue": [{"expr": "tile * a + b * c", "operands": [["a", "tile"], ["b", "tile"], ["c", "tile"]]}, "gelu"]}"""


@pytest.mark.parametrize(
    "spec",
    [
        MLPSpec(dims=(1024, 4096, 1024), activation="silu", gated=True, precision="tf32"),
        MLPSpec(dims=(1024, 4096, 1022), activation="mish", gated=True, bias=True, precision="tf32"),
        MLPSpec(dims=(2048, 2048), activation="identity", precision="tf32", epilogue=("scale",)),
        MLPSpec.from_json(OWN),
    ],
    ids=lambda spec: spec.short_name,
)  # fmt: skip
def test_tf32_on_descriptors_has_room(spec: MLPSpec) -> None:
    """The largest tiles, of 32-bit results: bare, beside addresses, and with everything that an epilogue reads."""
    for m in (1024, 4096):
        for r in resources(spec, "sm_90", m, backward=False, path="tma"):
            assert r.fits and not r.spills and not r.serialised, (r.config, r.shared, r.spills)
            assert r.instruction == ("fma" if r.name == "copy_rows" else "wgmma")


def test_the_memory_of_tf32_on_descriptors_is_foretold() -> None:
    """What `tune` tries has room whatever the epilogue: within some bytes of barriers, what this one takes."""
    spec = MLPSpec.from_json(OWN)
    words = {"dtype": "float32", "precision": "tf32", "planes": 1, "target": TARGETS["sm_90"]}
    found = [c for c in candidates("output", "masked", 4096, 1024, 4096, **words, epilogue=True) if c.strategy == "padded"]
    largest = sorted(found, key=lambda c: c.num_stages * (c.block_m + c.block_n) * c.block_k + c.block_m * c.block_n // 2)[-3:]
    assert len(found) > 8 and all(compiled(spec, "sm_90", "output", 1, "masked", 4096, c).fits for c in largest), largest
