"""What a spec's kernels compile to for an architecture, without a GPU: PTX or assembly, registers, shared memory, spills.

Needs triton (not interpreting). The specialisations are those of a real call on aligned, contiguous tensors; compiling is not
launchability, so `fits` compares the shared memory with what one block of the target may have.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpdsl.backends import interpreting
from mlpdsl.codegen.config import choose
from mlpdsl.codegen.emit.triton import Arg, Kernel, emit
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, Linear, Plan
from mlpdsl.errors import ShapeError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec
from mlpdsl.target import Target, detect, parse_target

__all__ = ["Resources", "resources"]

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Resources:
    """One kernel as compiled for the target.

    `registers` a thread and `spills` in bytes a thread (CUDA: from ptxas; None for HIP, where they are not read), `shared` in
    bytes a block, `instruction` the matrix instruction chosen ("wgmma", "mma", "tcgen05", "mfma", "wmma", "fma" without one),
    `serialised` whether ptxas had to serialise wgmma, `fits` whether `shared` is within the target's limit.
    """

    name: str
    stage: int
    config: Config | None
    registers: int | None
    spills: int | None
    shared: int
    warps: int
    instruction: str
    serialised: bool
    fits: bool
    assembly: str


def resources(
    spec: MLPSpec, target: str | Target | None = None, m: int = 4096, *, backward: bool = True, path: str | None = None
) -> list[Resources]:
    """Compile every kernel that a call with `m` rows launches on `target` (default: this machine's, else sm_90).

    `path` is "tma" or "masked"; by default the one that aligned tensors take. Takes 0.2 to 2 s a kernel.
    Raises `UnsupportedError` where triton is missing or interpreting, or does not know the target.
    """
    from mlpdsl.eager import check_spec
    from mlpdsl.source import DEFAULT_TARGET, publish

    check_spec(spec)
    if type(m) is not int or m < 1:
        raise ShapeError(describe("m", m, "an integer, 1 or more", "Pass the number of rows of x."))
    if interpreting():
        raise UnsupportedError("Triton interprets kernels in this process (TRITON_INTERPRET=1), and so cannot compile them")
    chosen = parse_target(target) if target is not None else detect() or parse_target(DEFAULT_TARGET)
    plan = lower(spec, chosen)
    if path is None or not plan.uses_tma:
        path = "tma" if plan.uses_tma else "masked"
    from mlpdsl.backends import BACKENDS

    key, text, file = publish(spec, chosen, "triton")
    module = BACKENDS["triton"].load(file, text, key)
    view = emit(plan)
    return [_compile(module, plan, kernel, stage, linear, m) for kernel, stage, linear in _launches(plan, view.kernels, path, backward)]


def _launches(plan: Plan, kernels: tuple[Kernel, ...], path: str, backward: bool) -> Iterator[tuple[Kernel, int, Linear]]:
    """Each different launch of a call: kernel, position of the stage, and the stage."""
    by_role = {k.role: k for k in kernels if k.path in (path, "")}
    last = len(plan.linears) - 1
    seen = set()
    for i, linear in enumerate(plan.linears):
        role = "output" if i == last else "hidden"
        roles = [role]
        if backward:
            roles += ["weight_grad"] + (["hidden_grad"] if i > 0 else ["input_grad"])
        for name in roles:
            shape = (name, linear.width_in, linear.width_out, linear.planes)
            if shape not in seen:
                seen.add(shape)
                yield by_role[name], i, linear


def _product(role: str, linear: Linear, m: int) -> tuple[int, int, int]:
    """(M, N, K) of the launch, as its launcher would pass them."""
    if role in ("hidden", "output"):
        return m, linear.width_out, linear.width_in
    if role == "weight_grad":
        return linear.width_out, linear.width_in, m
    return m, linear.width_in, linear.width_out


def _compile(module: Any, plan: Plan, kernel: Kernel, stage: int, linear: Linear, m: int) -> Resources:
    rows, n, k = _product(kernel.role, linear, m)
    planes = linear.planes if kernel.role == "hidden" else 1
    config = choose(kernel.role, kernel.path, rows, n, k, dtype=plan.dtype, planes=planes, target=plan.target)
    sizes = (linear.width_out, linear.width_in) if kernel.role == "weight_grad" else (n, k)
    values = {"N": sizes[0], "K": sizes[1], "PLANES": linear.planes, "PARTIAL": config.splits > 1, "SAVE": True, "EMIT_HIDDEN": True}
    values |= {"SUM_BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    values["GROUP_M"] = config.group_m
    compiled = _triton_compile(getattr(module, kernel.name), kernel, values, config, plan)
    if plan.target.kind == "hip":
        text = compiled.asm["amdgcn"]
        registers = spills = None
        serialised = False
    else:
        text = compiled.asm["ptx"]
        registers, spills, serialised = _ptxas(text, int(plan.target.arch))
    shared = int(compiled.metadata.shared)
    return Resources(
        kernel.name, stage, config, registers, spills, shared, config.num_warps, _instruction(text), serialised,
        shared <= plan.target.shared_memory, text,
    )  # fmt: skip


def _triton_compile(function: Any, kernel: Kernel, values: dict[str, Any], config: Config, plan: Plan) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, arg in enumerate(kernel.args):
        kind = _signature_type(arg, values)
        if arg.kind == "constexpr":
            constants[arg.name] = values[arg.name]
        elif _is_unit_stride(arg):
            kind, constants[arg.name] = "constexpr", 1
        elif arg.kind in ("pointer", "stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[arg.name] = kind
    target = GPUTarget(plan.target.kind, plan.target.arch, plan.target.warp_size)
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def _is_unit_stride(arg: Arg) -> bool:
    """Whether the stride is the one of a matrix's columns, 1 in a contiguous tensor and then no argument at all."""
    return arg.kind == "stride" and arg.passed.endswith(("stride(-1)", "stride(1)"))


def _signature_type(arg: Arg, values: dict[str, Any]) -> str:
    if arg.kind == "constexpr":
        return "constexpr"
    if arg.kind == "pointer":
        return f"*{_TYPES.get(arg.dtype, 'fp32')}"
    if arg.kind == "descriptor":
        block = ", ".join(str(_block_size(b, values)) for b in arg.block)
        return f"tensordesc<{_TYPES[arg.dtype]}[{block}]>"
    return "i32"


def _block_size(text: str, values: dict[str, Any]) -> int:
    name, _, divisor = text.partition(" // ")
    return int(values.get(name, name if name.isdigit() else 0)) // int(divisor or 1)


def _ptxas(ptx: str, arch: int) -> tuple[int | None, int | None, bool]:
    """Registers, spilled bytes and whether wgmma was serialised, from the assembler that triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if arch >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [str(tool), "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        try:
            log = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
        except (OSError, subprocess.SubprocessError):
            return None, None, False
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return (
        int(registers[1]) if registers else None,
        max(int(spills[1]), int(spills[2])) if spills else None,
        "C7515" in log or "C7510" in log or "serializ" in log.lower(),
    )


def _instruction(text: str) -> str:
    for pattern, name in (
        (r"wgmma\.mma_async", "wgmma"), (r"tcgen05\.mma", "tcgen05"), (r"\bmma\.sync", "mma"), (r"v_mfma", "mfma"), (r"v_s?wmma", "wmma"),
    ):  # fmt: skip
        if re.search(pattern, text):
            return name
    return "fma"
