"""What a spec's kernels compile to for an architecture, without a GPU: PTX or assembly, registers, shared memory, spills.

Needs triton (not interpreting). The specialisations are those of a real call on aligned, contiguous tensors; compiling is not
launchability, so `fits` compares the shared memory with what one block of the target may have.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlpdsl.backends import interpreting
from mlpdsl.codegen import narrow
from mlpdsl.codegen.config import choose, padded, usual
from mlpdsl.codegen.config import library as library_config
from mlpdsl.codegen.emit.triton import Module, emit
from mlpdsl.codegen.emit.triton_kernels import Arg, Kernel, stages
from mlpdsl.codegen.few_rows import granule, period
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, Linear, Plan
from mlpdsl.errors import ShapeError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec, check_spec
from mlpdsl.tables import best_path
from mlpdsl.target import Target, detect, parse_target

__all__ = ["Resources", "compiled", "resources"]

_lock = threading.RLock()  # around settings and an output that are the whole process's

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Resources:
    """One kernel as compiled for the target.

    `registers` and `spills` are a thread's: its (vector) registers, and the bytes of those that did not fit (CUDA: from ptxas;
    HIP: from the assembly's metadata, without what went to other registers; None where they say nothing). `shared` is in bytes a
    block, `instruction` the matrix instruction chosen ("wgmma", "mma", "tcgen05", "mfma", "wmma", "fma" without one), `serialised`
    whether ptxas had to serialise wgmma, `fits` whether `shared` is within the target's limit.
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
    spec: MLPSpec, target: str | Target | None = None, m: int = 4096, *, backward: bool = True, path: str | None = None,
    library: bool = False,
) -> list[Resources]:  # fmt: skip
    """Compile every kernel that a call with `m` rows launches on `target` (default: this machine's, else sm_90).

    `path` is "tma" or "masked", of every linear (in TF32 "tma" is forward's alone); by default each product's that aligned tensors
    take, copies of them where the rule makes some, and one kernel where all linears are one launch.
    With `library`, also what stands between the library's products where those take the place of kernels. Takes 0.2 to 2 s a
    kernel.
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
    if path == "tma" and not (plan.uses_tma or plan.copies):
        raise UnsupportedError(f"path 'tma' is not printed for {spec.short_name} on {chosen.name}", plan.tma_reasons)
    from mlpdsl.backends import BACKENDS

    key, text, file = publish(spec, chosen, "triton")
    module = BACKENDS["triton"].load(file, text, key)
    view = emit(plan)
    launches = list(_launches(plan, view, path, m, backward))
    found = [_compile(module, plan, kernel, stage, linear, m, config) for kernel, stage, linear, config in launches]
    described = path == "tma" or any(config.strategy == "padded" for *_, config in launches)
    short = any(width % granule(plan.dtype) for linear in plan.linears for width in (linear.width_in, linear.width_out))
    roles = ["copy_rows"] if plan.copies and described and short else []
    if backward:
        roles += _pointwise(view, partial=any(r.config is not None and r.config.splits > 1 for r in found))
    last = len(plan.linears) - 1
    found += [_compile(module, plan, view.kernel(role, ""), last, plan.linears[-1], m) for role in roles]
    if library:
        found += [
            _compile(module, plan, view.kernel(name, ""), stage, linear, m, config)
            for name, stage, linear, config in _passes(plan, view, m, backward)
        ]
    return found


def _passes(plan: Plan, view: Module, m: int, backward: bool) -> Iterator[tuple[str, int, Linear, Config | None]]:
    """The passes over what the library's products leave, with the stage of each."""
    last = len(plan.linears) - 1
    first, end = plan.linears[0], plan.linears[-1]
    if plan.hidden is not None:
        planes = first.planes
        yield "activate_rows", 0, first, library_config("hidden", m, first.width_out, dtype=plan.dtype, planes=planes)
        if backward:
            yield "activate_grad_rows", 0, first, library_config("hidden_grad", m, first.width_out, dtype=plan.dtype, planes=1)
    if plan.epilogue.entries or plan.bias_pass:
        yield "finish_rows", last, end, library_config("output", m, end.width_out, dtype=plan.dtype, planes=1)


def compiled(spec: MLPSpec, target: str | Target, role: str, stage: int, path: str, m: int, config: Config) -> Resources:
    """Compile one generated kernel with this config, as for a call with `m` rows. Raises `UnsupportedError` as `resources` does."""
    from mlpdsl.backends import BACKENDS
    from mlpdsl.source import publish

    chosen = parse_target(target)
    plan = lower(spec, chosen)
    key, text, file = publish(spec, chosen, "triton")
    module = BACKENDS["triton"].load(file, text, key)
    return _compile(module, plan, emit(plan).kernel(role, _path(config, path)), stage, plan.linears[stage], m, config)


def _pointwise(view: Module, partial: bool) -> Iterator[str]:
    """Roles of the kernels without a product that backward launches. `partial`: some weight gradient is summed in parts."""
    if view.epilogue_grad:
        yield "epilogue_grad"
    if partial or view.plan.bias or any(o.grad == "own" and o.kind != "tile" for o in view.operands):
        yield "sum_rows"


def _launches(plan: Plan, view: Module, path: str | None, m: int, backward: bool) -> Iterator[tuple[Kernel, int, Linear, Config]]:
    """Each different launch of a call with a product: kernel, position of the stage, the stage, and the config."""
    last = len(plan.linears) - 1
    seen = set()
    whole = narrow.network(plan, m)
    if whole is not None:
        yield view.kernel("network", ""), last, plan.linears[-1], whole
    one_launch = whole is not None and path is None
    for i, linear in enumerate(plan.linears):
        role = "output" if i == last else "hidden"
        roles = [] if one_launch else [role]
        if backward:
            roles += ["weight_grad"] + (["hidden_grad"] if i > 0 else ["input_grad"])
        for name in roles:
            shape = (name, linear.width_in, linear.width_out, linear.planes)
            if shape not in seen:
                seen.add(shape)
                taken = path or best_path(plan, linear.width_out, linear.width_in)
                if taken not in view.paths(name):  # backward in TF32
                    taken = "masked"
                config = _config(plan, name, taken, linear, m, copies=path is None)
                yield view.kernel(name, _path(config, taken)), i, linear, config


def _path(config: Config, path: str) -> str:
    """The path of the kernel that a config is for, where tensors would take `path`."""
    if config.strategy == "padded":
        return "tma"
    return path if config.strategy != "skinny" else "row" if config.block_m == 1 else "skinny"


def _config(plan: Plan, role: str, path: str, linear: Linear, m: int, copies: bool) -> Config:
    """The config that the launcher would choose among kernels, from (M, N, K) of the launch: with `copies` one on copies where the
    rule takes it, and on the path "tma" wherever nothing else leads there."""
    rows, n, k = m, linear.width_out, linear.width_in
    if role == "weight_grad":
        rows, n, k = linear.width_out, linear.width_in, m
    elif role in ("hidden_grad", "input_grad"):
        n, k = k, n
    planes = 2 if plan.gated and role in ("hidden", "hidden_grad", "input_grad") else 1
    words: dict[str, Any] = {"dtype": plan.dtype, "precision": plan.precision, "planes": planes, "target": plan.target}
    chosen = choose(role, path, rows, n, k, **words)
    epilogue = plan.finishes(role)
    if path == "tma" and chosen.strategy != "skinny":
        return padded(role, rows, n, k, **words, epilogue=epilogue) or chosen
    by_rule = usual(role, path, rows, n, k, epilogue=epilogue, **words)
    return by_rule if copies and by_rule.strategy == "padded" else chosen


def _compile(
    module: Any, plan: Plan, kernel: Kernel, stage: int, linear: Linear, m: int, config: Config | None = None
) -> Resources:
    from mlpdsl.launch import POINTWISE, SUM_COLUMNS, Launch  # needs torch, as the module does

    values = {a.name: int(a.passed) for a in kernel.args if a.kind == "constexpr" and a.passed.isdigit()}
    if kernel.role == "sum_rows":
        values["BLOCK_N"] = SUM_COLUMNS
    size = granule(plan.dtype)
    if config is None:
        overlaps = plan.target.kind == "cuda" and int(plan.target.arch) >= 90
        values |= {"N": linear.width_out, "WIDTH": -(-linear.width_out // size) * size, "FOLLOWS": overlaps}
    else:
        across = kernel.role in ("hidden_grad", "input_grad")  # the product sums over the weight's rows
        n, k = (linear.width_in, linear.width_out) if across else (linear.width_out, linear.width_in)
        values |= {"N": n, "K": k, "PLANES": linear.planes, "PARTIAL": config.splits > 1, "GROUP_M": config.group_m}
        values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        values |= {"SAVE": True, "EMIT_HIDDEN": True, "SUM_BIAS": True, "SPLITS": config.splits, "STAGES": config.num_stages}
        values |= {"ADD_BIAS": True, "REWRITE": True}
        values["PERIOD"] = period(linear.width_in, size)
        overlaps = plan.target.kind == "cuda" and int(plan.target.arch) >= 90
        values |= {"OVERLAPS": overlaps, "FOLLOWS": overlaps and (stage > 0 or config.strategy == "library")}
    if kernel.role == "network":
        widths = {weight: stage.k for stage in stages(plan) for weight in stage.weights} | {"x": plan.linears[0].width_in}
        values |= {a.name: _stride_of(a, widths, linear.width_out, m) for a in kernel.args if a.kind == "stride"}
    else:
        values |= {a.name: _stride(a, kernel.role, linear, m) for a in kernel.args if a.kind == "stride"}
    options = Launch.of(config).options if config else POINTWISE
    compiled, log = _triton_compile(getattr(module, kernel.name), kernel, values, options, plan)
    text = compiled.asm["amdgcn" if plan.target.kind == "hip" else "ptx"]
    registers, spills, serialised = _metadata(text) if plan.target.kind == "hip" else _ptxas(log)
    shared = int(compiled.metadata.shared)
    warps = options["num_warps"]
    fits = shared <= plan.target.shared_memory
    instruction = _instruction(text)
    return Resources(kernel.name, stage, config, registers, spills, shared, warps, instruction, serialised, fits, text)


_NARROW = {
    "hidden": ("x", "weight"), "output": ("x", "weight"), "hidden_grad": ("weight", "preact", "preact_grad", "hidden"),
    "input_grad": ("weight", "x_grad"), "weight_grad": ("x",),
}  # fmt: skip
"""The tensors of each role whose rows are as long as the linear's input is wide; the others' are as long as its output."""


def _stride(arg: Arg, role: str, linear: Linear, m: int) -> int:
    """A stride argument, in elements, where every tensor is contiguous and begins at a multiple of 16 elements."""
    if arg.name in ("distance", "up_distance"):
        return linear.width_out * linear.width_in * 16  # of which only the divisibility is known
    return _stride_of(arg, dict.fromkeys(_NARROW.get(role, ()), linear.width_in), linear.width_out, m)


def _stride_of(arg: Arg, widths: Mapping[str, int], other: int, m: int) -> int:
    """A stride of a contiguous tensor whose rows are as long as `widths` says, else as `other`."""
    name, _, axis = arg.name.removeprefix("stride_").rpartition("_")
    width = widths.get(name, other)
    if arg.passed.endswith(("stride(-1)", "stride(1)")):
        return 1
    return m * width if axis == "p" else width


def _triton_compile(function: Any, kernel: Kernel, values: dict[str, Any], options: dict[str, Any], plan: Plan) -> tuple[Any, str]:
    """The kernel as Triton compiles it for strides and constants of these values, and ptxas's log on the way (HIP: empty)."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, arg in enumerate(kernel.args):
        kind, divisible = _signature_type(arg, values, plan), [["tt.divisibility", 16]]
        if arg.kind == "constexpr":
            constants[arg.name] = values[arg.name]
        elif arg.kind == "pointer":
            # AMD: tensors below 2 GiB may be read by buffer instructions.
            attributes[(position,)] = [*divisible, ["tt.pointer_range", 32]] if plan.target.kind == "hip" else divisible
        elif arg.kind == "stride" and values[arg.name] == 1:  # no argument at all
            kind, constants[arg.name] = "constexpr", 1
        elif arg.kind == "stride" and values[arg.name] % 16 == 0:
            attributes[(position,)] = divisible
        signature[arg.name] = kind
    target = GPUTarget(plan.target.kind, plan.target.arch, plan.target.warp_size)
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    log = io.StringIO()
    try:
        with _lock, knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            # Registers and spills stand in ptxas's log alone, so a kernel in Triton's cache will not do.
            knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
            return triton.compile(source, target=target, options=options), log.getvalue()
    except Exception as error:  # Triton's own errors have no common base, and each release adds some
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        message = f"triton {triton.__version__} cannot compile {kernel.name} of {plan.name} for {plan.target.name}"
        raise UnsupportedError(message, [f"{type(error).__name__}: {reason}"[:400]]) from error


def _signature_type(arg: Arg, values: dict[str, Any], plan: Plan) -> str:
    if arg.kind == "constexpr":
        return "constexpr"
    if arg.kind == "pointer":
        return f"*{_TYPES[_element_type(arg, values, plan.dtype)]}"
    if arg.kind == "descriptor":
        block = ", ".join(str(_block_size(b, values)) for b in arg.block)
        return f"tensordesc<{_TYPES[arg.dtype]}[{block}]>"
    return "i32" if values.get(arg.name, 0) < 2**31 else "i64"


def _element_type(arg: Arg, values: dict[str, Any], dtype: str) -> str:
    """What a pointer points to; where there are no partial sums, the launcher passes a gradient in their place."""
    return dtype if arg.name == "partial_ptr" and not values["PARTIAL"] else arg.dtype or dtype


def _block_size(text: str, values: dict[str, Any]) -> int:
    name, _, divisor = text.partition(" // ")
    return int(values.get(name, name if name.isdigit() else 0)) // int(divisor or 1)


def _ptxas(log: str) -> tuple[int | None, int | None, bool]:
    """Registers, spilled bytes and whether wgmma was serialised, as ptxas says."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return (
        int(registers[1]) if registers else None,
        max(int(spills[1]), int(spills[2])) if spills else None,
        "C7515" in log or "C7510" in log or "serializ" in log.lower(),
    )


def _metadata(assembly: str) -> tuple[int | None, int | None, bool]:
    """Registers, spilled bytes, and False for what there is not, as the metadata at the end of AMD's assembly say.

    The larger of two figures: the registers spilled, 4 bytes each, and the memory that one thread has for them, which may be used
    several times over. Scalar registers that went to the lanes of a vector register cost no memory, and do not count.
    """
    found = dict(re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE))
    registers, spilled, scratch = (found.get(n) for n in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"))
    if registers is None or spilled is None or scratch is None:
        return None, None, False
    return int(registers), max(4 * int(spilled), int(scratch)), False


def _instruction(text: str) -> str:
    patterns = {
        r"wgmma\.mma_async": "wgmma", r"tcgen05\.mma": "tcgen05", r"\bmma\.sync": "mma", r"v_mfma": "mfma", r"v_s?wmma": "wmma",
    }  # fmt: skip
    for pattern, name in patterns.items():
        if re.search(pattern, text):
            return name
    return "fma"
