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
from mlpdsl.codegen.emit.triton import Arg, Kernel, Module, emit
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, Linear, Plan
from mlpdsl.errors import ShapeError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec, check_spec
from mlpdsl.target import Target, detect, parse_target

__all__ = ["Resources", "resources"]

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


_POINTWISE_WARPS = 4
"""Warps of the kernels without a product: `mlpdsl.launch.POINTWISE`, which cannot be imported without torch."""


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
    from mlpdsl.source import DEFAULT_TARGET, publish

    check_spec(spec)
    if type(m) is not int or m < 1:
        raise ShapeError(describe("m", m, "an integer, 1 or more", "Pass the number of rows of x."))
    if interpreting():
        raise UnsupportedError("Triton interprets kernels in this process (TRITON_INTERPRET=1) and cannot compile them: unset it")
    chosen = parse_target(target) if target is not None else detect() or parse_target(DEFAULT_TARGET)
    plan = lower(spec, chosen)
    if path == "tma" and not plan.uses_tma:
        raise UnsupportedError(f"path 'tma' is not printed for {spec.short_name} on {chosen.name}", plan.tma_reasons)
    if path is None:
        path = "tma" if plan.uses_tma else "masked"
    from mlpdsl.backends import BACKENDS

    key, text, file = publish(spec, chosen, "triton")
    module = BACKENDS["triton"].load(file, text, key)
    view = emit(plan)
    found = [
        _compile(module, plan, kernel, stage, linear, m) for kernel, stage, linear in _launches(plan, view.kernels, path, backward)
    ]
    if backward:
        partial = any(r.config is not None and r.config.splits > 1 for r in found)
        last = len(plan.linears) - 1
        found += [_compile(module, plan, view.kernel(role, ""), last, plan.linears[-1], m) for role in _pointwise(view, partial)]
    return found


def _pointwise(view: Module, partial: bool) -> Iterator[str]:
    """Roles of the kernels without a product that backward launches. `partial`: some weight gradient is summed in parts."""
    if view.epilogue_grad:
        yield "epilogue_grad"
    if partial or view.plan.bias or any(o.grad == "own" and o.kind != "tile" for o in view.operands):
        yield "sum_rows"


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


def _config(plan: Plan, kernel: Kernel, linear: Linear, m: int) -> Config:
    """The config that the launcher would choose, from (M, N, K) of the launch."""
    rows, n, k = m, linear.width_out, linear.width_in
    if kernel.role == "weight_grad":
        rows, n, k = linear.width_out, linear.width_in, m
    elif kernel.role in ("hidden_grad", "input_grad"):
        n, k = k, n
    planes = linear.planes if kernel.role == "hidden" else 1
    return choose(kernel.role, kernel.path, rows, n, k, dtype=plan.dtype, planes=planes, target=plan.target)


def _compile(module: Any, plan: Plan, kernel: Kernel, stage: int, linear: Linear, m: int) -> Resources:
    config = _config(plan, kernel, linear, m) if kernel.path else None
    values = {a.name: int(a.passed) for a in kernel.args if a.kind == "constexpr" and a.passed.isdigit()}
    if config is None:
        values["N"] = linear.width_out
    else:
        across = kernel.role in ("hidden_grad", "input_grad")  # the product sums over the weight's rows
        n, k = (linear.width_in, linear.width_out) if across else (linear.width_out, linear.width_in)
        values |= {"N": n, "K": k, "PLANES": linear.planes, "PARTIAL": config.splits > 1, "GROUP_M": config.group_m}
        values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        values |= {"SAVE": True, "EMIT_HIDDEN": True, "SUM_BIAS": True}
    # Triton specialises on integers that 16 divides: strides are widths, or multiples of one.
    divisible = linear.width_in % 16 == 0 and linear.width_out % 16 == 0
    compiled = _triton_compile(getattr(module, kernel.name), kernel, values, config, plan, divisible)
    if plan.target.kind == "hip":
        text = compiled.asm["amdgcn"]
        registers = spills = None
        serialised = False
    else:
        text = compiled.asm["ptx"]
        registers, spills, serialised = _ptxas(text, int(plan.target.arch))
    shared = int(compiled.metadata.shared)
    warps = config.num_warps if config else _POINTWISE_WARPS
    fits = shared <= plan.target.shared_memory
    instruction = _instruction(text)
    return Resources(kernel.name, stage, config, registers, spills, shared, warps, instruction, serialised, fits, text)


def _triton_compile(
    function: Any, kernel: Kernel, values: dict[str, Any], config: Config | None, plan: Plan, divisible: bool
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, arg in enumerate(kernel.args):
        kind = _signature_type(arg, values, plan)
        if arg.kind == "constexpr":
            constants[arg.name] = values[arg.name]
        elif _is_unit_stride(arg):
            kind, constants[arg.name] = "constexpr", 1
        elif arg.kind == "pointer" or (arg.kind == "stride" and divisible):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[arg.name] = kind
    target = GPUTarget(plan.target.kind, plan.target.arch, plan.target.warp_size)
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    options: dict[str, Any] = {"num_warps": _POINTWISE_WARPS, "enable_fp_fusion": True}
    if config is not None:
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:  # Triton's own errors have no common base, and each release adds some
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        message = f"triton {triton.__version__} cannot compile {kernel.name} of {plan.name} for {plan.target.name}"
        raise UnsupportedError(message, [f"{type(error).__name__}: {reason}"[:400]]) from error


def _is_unit_stride(arg: Arg) -> bool:
    """Whether the stride is the one of a matrix's columns, 1 in a contiguous tensor and then no argument at all."""
    return arg.kind == "stride" and arg.passed.endswith(("stride(-1)", "stride(1)"))


def _signature_type(arg: Arg, values: dict[str, Any], plan: Plan) -> str:
    if arg.kind == "constexpr":
        return "constexpr"
    if arg.kind == "pointer":
        return f"*{_TYPES[arg.dtype or plan.dtype]}"
    if arg.kind == "descriptor":
        block = ", ".join(str(_block_size(b, values)) for b in arg.block)
        return f"tensordesc<{_TYPES[arg.dtype]}[{block}]>"
    return "i32"


def _block_size(text: str, values: dict[str, Any]) -> int:
    name, _, divisor = text.partition(" // ")
    return int(values.get(name, name if name.isdigit() else 0)) // int(divisor or 1)


def _ptxas(ptx: str, arch: int) -> tuple[int | None, int | None, bool]:
    """Registers, spilled bytes and whether wgmma was serialised, from the assembler that triton uses."""
    from triton.backends.nvidia.compiler import get_ptxas  # releases differ in which of theirs they use for what

    tool = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [tool, "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
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
    patterns = {
        r"wgmma\.mma_async": "wgmma", r"tcgen05\.mma": "tcgen05", r"\bmma\.sync": "mma", r"v_mfma": "mfma", r"v_s?wmma": "wmma",
    }  # fmt: skip
    for pattern, name in patterns.items():
        if re.search(pattern, text):
            return name
    return "fma"
