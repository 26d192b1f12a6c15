"""What every generated launcher needs: does memory fit the tensor memory accelerator, descriptors, grids.

Imported by generated modules, so it imports torch and triton; nothing that declares or compiles a spec imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mlpdsl import triton_cache
from mlpdsl.agreement import GRANULE, MAX_STRIDE
from mlpdsl.backends import interpreting
from mlpdsl.codegen import few_rows
from mlpdsl.codegen.plan import Config
from mlpdsl.library import fits_batch, product, product_of_two
from mlpdsl.tape import recorder

__all__ = [
    "DIRECT", "POINTWISE", "SUM_COLUMNS", "Launch", "blocks", "describe", "describe_pair", "describe_planes", "descriptor",
    "distance", "empty", "empty_like", "empty_padded", "empty_pair", "fits_batch", "fits_pair", "fits_tma", "following", "overlaps",
    "period", "product", "product_of_two", "programs", "run", "second_first", "tiles",
]  # fmt: skip

POINTWISE: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
"""Launch options of the kernels without a product."""

SUM_COLUMNS = 512 if interpreting() else 64
"""Columns that one program of `sum_rows` adds up. The interpreter has one program after another, and most of its time is each
program's own, however wide; the sums are the same."""


@dataclass(frozen=True)
class Launch:
    """A `Config` as launchers read it, with the options that Triton takes beside the kernel's own arguments."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_stages: int
    splits: int
    residency: int
    strategy: str
    batched: bool
    bias_pass: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, config: Config) -> Launch:
        # enable_fp_fusion is said aloud because Triton's default for it changes between releases.
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        if config.registers:
            options["maxnreg"] = config.registers
        c = config
        tile = c.block_m, c.block_n, c.block_k, c.group_m, c.num_stages, c.splits, c.residency
        return cls(*tile, c.strategy, c.batched, c.bias_pass, options)


def fits_tma(*tensors: torch.Tensor) -> bool:
    """Whether descriptors can describe the tensors as they lie: dense rows, 16-byte base and strides, nothing empty or expanded."""
    for t in tensors:
        size = t.element_size()
        if t.stride(-1) != 1 or t.data_ptr() % GRANULE or t.numel() == 0:
            return False
        for extent, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
            if extent > 1 and (stride < t.shape[-1] or stride * size % GRANULE or stride * size >= MAX_STRIDE):
                return False
    return True


def _strides(t: torch.Tensor) -> list[int]:
    """The strides, but those of dimensions of size 1, which torch leaves arbitrary, as in a contiguous tensor."""
    strides = list(t.stride())
    if 1 not in t.shape:
        return strides
    granule = GRANULE // t.element_size()
    for i in range(t.dim() - 2, -1, -1):
        if t.shape[i] == 1:
            inner = strides[i + 1] * t.shape[i + 1]
            strides[i] = -(-inner // granule) * granule
    return strides


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """A descriptor of what is known to fit. Its constructor would check that again, at 3 us a descriptor."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = base, shape, strides, block
    return made


def describe(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A host descriptor of a matrix, in tiles of (rows, columns)."""
    return descriptor(t, list(t.shape), _strides(t), [rows, columns])


def describe_planes(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A host descriptor of (planes, M, N), in tiles of one plane's (rows, columns)."""
    return descriptor(t, list(t.shape), _strides(t), [1, rows, columns])


def second_first(first: torch.Tensor, second: torch.Tensor) -> int:
    """1 where the second of two weights lies at the lower address, else 0."""
    return int(second.data_ptr() < first.data_ptr())


def describe_pair(first: torch.Tensor, second: torch.Tensor, planes: int, rows: int, columns: int) -> TensorDescriptor:
    """One host descriptor [2, N, K] over two allocations, the lower address first; its outer stride is their distance.

    Its tiles are (planes, rows, columns). Only for weights that pass `fits_pair`.
    """
    low, high = (second, first) if second_first(first, second) else (first, second)
    apart = (high.data_ptr() - low.data_ptr()) // low.element_size()
    return descriptor(low, [2, *low.shape], [apart, *_strides(low)], [planes, rows, columns])


def distance(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many elements after the first tensor the second one starts; negative where it lies before."""
    return (second.data_ptr() - first.data_ptr()) // first.element_size()


def fits_pair(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether one descriptor can span two weights that pass `fits_tma`: equal strides, a distance that TMA can step.

    CUDA documents outer strides as multiples of inner ones, and this is not one, so it is proved once per device.
    """
    apart = abs(second.data_ptr() - first.data_ptr())
    if first.stride() != second.stride() or not 0 < apart < MAX_STRIDE or apart % GRANULE:
        return False
    return _pair_proved(first.device)


_proved: dict[torch.device, bool] = {}
_unseen: dict[torch.device, int] = {}
"""How often an error kept it from being proved."""


def _pair_proved(device: torch.device) -> bool:
    """Whether one descriptor over two allocations was seen to work on the device; tried at the first call that could use it."""
    if device.type == "cpu":
        return True  # the interpreter follows strides exactly
    works = _proved.get(device)
    if works is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # nothing can be compared inside a capture: this once the masked path, and the next call decides
        from mlpdsl.probe import pair_descriptor_works

        works = pair_descriptor_works(device)
        if works is None:  # perhaps for a passing reason: the masked path, and the next call tries again, if it is not the third
            _unseen[device] = _unseen.get(device, 0) + 1
            if _unseen[device] < 3:
                return False
        works = _proved[device] = bool(works)
    return works


def tiles(config: Launch, rows: int, columns: int) -> int:
    """How many tiles cover (rows, columns)."""
    return -(-rows // config.block_m) * -(-columns // config.block_n)


def blocks(config: Launch, rows: int, columns: int) -> tuple[int, int]:
    """How many blocks cover the rows, and the columns."""
    return -(-rows // config.block_m), -(-columns // config.block_n)


def period(*weights: torch.Tensor) -> int:
    """How many rows apart rows of the weights lie alike to multiples of 16 bytes; 1 where 16 of their bytes cannot be loaded at
    once: columns that are not dense, or a first row that begins elsewhere."""
    if weights[0].stride(1) != 1 or any(t.data_ptr() % GRANULE for t in weights):
        return 1
    return few_rows.period(weights[0].stride(0), GRANULE // weights[0].element_size())


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def programs(t: torch.Tensor, config: Launch, tiles: int) -> int:
    """How many persistent programs walk the tiles: as many as are resident (3 when interpreting, so that they do walk)."""
    return min(tiles, config.residency * _processors(t.device))


DIRECT = not interpreting() and torch.version.hip is None
"""Whether kernels compiled once are launched without Triton's binding of arguments. (For HIP it looks at more than `run` does.)"""


def overlaps(t: torch.Tensor) -> bool:
    """Whether a kernel on this device may start before the one before it has ended, and wait for it: CUDA from sm_90 on."""
    return DIRECT and t.is_cuda and _overlapping(t.device)


@cache
def _overlapping(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def following(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a kernel that does so."""
    return {**options, "launch_pdl": True}


_compiled: dict[tuple[Any, ...], Any] = {}


def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
    """`kernel[grid](*args, **options)`, on the current device and stream.

    Triton chooses among compiled variants by the alignment and type of pointers and by properties of integers; that takes it
    20 us a launch. Here the variant is remembered by those of the pointers and by the integers themselves, which decide more.
    Descriptors decide nothing: their type is the spec's, and their tiles are among the integers.
    """
    recording = recorder()
    if not DIRECT:
        if recording is not None:
            recording.launched(kernel, grid, options, None, args)
        kernel[grid](*args, **options)
        return
    device = torch.cuda.current_device()
    variant: list[Any] = [id(kernel), device, options["num_warps"], options.get("num_stages"), options.get("maxnreg")]
    for arg in args:
        kind = type(arg)
        if kind is int or kind is bool:
            variant.append(arg)
        elif kind is not TensorDescriptor:
            variant.append((arg.dtype, arg.data_ptr() % GRANULE))
    key = tuple(variant)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = triton_cache.compiled(kernel, grid, options, args)
        if compiled is None:  # a hook of Triton's kept it from compiling
            if recording is not None:
                recording.known = False
            return
        if len(_compiled) >= 4096:  # a server that sees every batch size there is
            _compiled.clear()
        _compiled[key] = compiled
    if recording is not None:
        recording.launched(kernel, grid, options, compiled, args)
    stream = torch._C._cuda_getCurrentRawStream(device)
    hooks = knobs.runtime
    compiled.run(
        grid[0], grid[1] if len(grid) > 1 else 1, 1, stream, compiled.function, compiled.packed_metadata,
        compiled.launch_metadata(grid, stream, *args), hooks.launch_enter_hook, hooks.launch_exit_hook, *args,
    )  # fmt: skip


def empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous, uninitialised tensor on the device of `like`, and of its dtype where none is given."""
    made = like.new_empty(shape, dtype=dtype)
    recording = recorder()
    if recording is not None:
        recording.allocated(made)
    return made


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """A contiguous, uninitialised tensor of t's shape, dtype and device."""
    return empty(t, tuple(t.shape))


def empty_pair(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """As `empty`, (2, rows, columns): two dense matrices that each begin at a multiple of 16 bytes. The library multiplies into
    others more slowly."""
    granule = GRANULE // like.element_size()
    made = empty(like, (2, -(-rows * columns // granule) * granule))
    return made[:, : rows * columns].view(2, rows, columns)


def empty_padded(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """As `empty`, but with rows that begin at multiples of 16 bytes: all but the last columns of what is allocated."""
    granule = GRANULE // like.element_size()
    width = -(-shape[-1] // granule) * granule
    made = empty(like, (*shape[:-1], width))
    return made if width == shape[-1] else made[..., : shape[-1]]
