"""Triton's launcher without a GPU: what it is handed, and what its C launcher would be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver as nvidia

from mlpdsl.launch import descriptor as describe
from mlpdsl.tape import Recorder

META = [
    {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [16, 32], "fp4_padded": False},
    {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [1, 16, 16], "fp4_padded": False},
]
SIGNATURE = {
    "x": "*fp32", "a": "tensordesc<fp32[16, 32]>", "M": "i32", "b": "tensordesc<fp16[1, 16, 16]>", "FIRST": "constexpr",
    "out": "*fp32", "scale": "fp32", "BLOCK": "constexpr", "SAVE": "constexpr", "N": "i64",
}  # fmt: skip
POINTERS = {"x": "*fp32", "M": "i32", "BLOCK": "constexpr", "out": "*fp32"}


class Native:
    """A C function: no Python one, and it remembers its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


class Utils:
    """What a CUDA driver gives Triton, without one. A descriptor is what it was made of."""

    def __init__(self) -> None:
        self.launch = Native()
        self.filled = 0

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return "|".join(signature).encode()

    def fill_tma_descriptor_tiled(self, *args: Any) -> tuple[Any, ...]:
        self.filled += 1
        return ("descriptor", *(tuple(a) if isinstance(a, list) else a for a in args))

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6


def install(monkeypatch: pytest.MonkeyPatch) -> Utils:
    """Triton's CUDA driver, active and without a GPU."""
    utils = Utils()
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
    # Triton 3.7 reads its C classes from the module; 3.6 compiles a launcher for every signature.
    monkeypatch.setattr(nvidia, "PyKernelArg", lambda nested_tuple, type: (nested_tuple, type), raising=False)
    monkeypatch.setattr(nvidia, "ARG_CONSTEXPR", 0, raising=False)
    monkeypatch.setattr(nvidia, "ARG_KERNEL", 1, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=utils.launch))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 777, raising=False)
    return utils


def compiled(signature: dict[str, str] = SIGNATURE, **changes: Any) -> Any:
    """A compiled kernel as `launch.run` knows one, with the launcher that is installed."""
    about: dict[str, Any] = {"num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
                             "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": True}  # fmt: skip
    if any(kind.startswith("tensordesc") for kind in signature.values()):
        about["tensordesc_meta"] = META
    metadata = SimpleNamespace(**{**about, **changes})
    names = list(signature)
    constants = {(i,): 64 for i, kind in enumerate(signature.values()) if kind == "constexpr"}
    source = SimpleNamespace(constants=constants, signature=signature, fn=SimpleNamespace(arg_names=names))
    run = nvidia.CudaLauncher(source, metadata)
    return SimpleNamespace(run=run, metadata=metadata, function=4321, packed_metadata=(4, 1, 1024))


def by_triton(kernel: Any, grid: tuple[int, ...], args: list[Any], utils: Utils) -> tuple[Any, ...]:
    """The C call that Triton's launcher makes of these arguments, tensors as their addresses."""
    x, y, z = (*grid, 1, 1)[:3]
    utils.launch.calls.clear()
    kernel.run(x, y, z, 777, kernel.function, kernel.packed_metadata, None, None, None, *args)
    (call,) = utils.launch.calls
    utils.launch.calls.clear()
    return plain(call)


def plain(value: Any) -> Any:
    """Tensors as their addresses, which the C launcher asks them for; lists as tuples, which are one to it."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def arguments(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> list[Any]:
    return [
        x, describe(a, [24, 64], [64, 1], [16, 32]), 24, describe(b, [2, 16, 32], [512, 32, 1], [1, 16, 16]), 0, out[1:], 0.5,
        64, True, 2**40,
    ]  # fmt: skip


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(24, 64), torch.zeros(24, 64), torch.zeros(2, 16, 32, dtype=torch.float16)


def recorded(kernel: Any, grid: tuple[int, ...], utils: Utils) -> tuple[Any, list[Tensor]]:
    """A recording of one launch whose inputs are x (varying) and a, b (fixed), and which allocates its output."""
    x, a, b = tensors()
    recorder = Recorder([x], [a, b])
    out = x.new_empty((25, 64))
    recorder.allocated(out)
    recorder.launched("kernel", grid, {}, kernel, arguments(x, a, b, out))
    found = recorder.tape([out], direct=True)
    assert found is not None and found.direct
    return found, [x, a, b]


def leaves(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, (list, tuple)) else [value]
