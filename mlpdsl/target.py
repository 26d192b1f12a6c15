"""The architectures kernels are written for, and which one this machine has.

Nothing here creates a CUDA context: the machine is asked through NVML, the driver's management library.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mlpdsl.errors import UnsupportedError, describe
from mlpdsl.names import did_you_mean, exact_str, listed

__all__ = ["TARGETS", "VARIABLE", "Target", "detect", "from_capability", "parse_target"]

VARIABLE = "MLPDSL_TARGET"
"""The environment variable that names the target, before the machine is asked."""


@dataclass(frozen=True)
class Target:
    """One architecture, as far as choosing and writing a kernel depends on it."""

    name: str
    """The canonical name: "sm_90", "gfx942", "tpu_v5e", "cpu"."""
    kind: Literal["cuda", "hip", "tpu", "cpu"]
    arch: int | str
    """What Triton calls the architecture: 90 for CUDA, "gfx942" for HIP; for a TPU what JAX calls it, "TPU v5 lite"."""
    warp_size: int
    """Threads of one warp (CUDA) or wavefront (HIP): 32 or 64; 1 elsewhere."""
    shared_memory: int
    """Bytes of shared memory (LDS) that one block may use, the opt-in maximum where there is one; of a TPU's VMEM, what one kernel
    gets unless it asks for more."""
    has_tma: bool
    """Whether there is a tensor memory accelerator (CUDA, sm_90 and newer)."""


# Bytes per block after opt-in: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_CUDA = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}

# (wavefront, LDS bytes per workgroup): the ROCm documentation's "GPU hardware specifications".
_HIP = {
    "gfx90a": (64, 64 * 1024),
    "gfx942": (64, 64 * 1024),
    "gfx950": (64, 160 * 1024),
    "gfx1100": (32, 64 * 1024),
    "gfx1101": (32, 64 * 1024),
    "gfx1200": (32, 64 * 1024),
    "gfx1201": (32, 64 * 1024),
}

# As jax.Device.device_kind has them. 16 MiB of VMEM is the compiler's limit unless a kernel raises it; v6e's is 32.
_TPU = {
    "tpu_v4": ("TPU v4", 16 * 2**20),
    "tpu_v5e": ("TPU v5 lite", 16 * 2**20),
    "tpu_v5p": ("TPU v5", 16 * 2**20),
    "tpu_v6e": ("TPU v6 lite", 32 * 2**20),
}

TARGETS: dict[str, Target] = {
    **{f"sm_{arch}": Target(f"sm_{arch}", "cuda", arch, 32, size, arch >= 90) for arch, size in _CUDA.items()},
    **{arch: Target(arch, "hip", arch, warp, size, False) for arch, (warp, size) in _HIP.items()},
    **{name: Target(name, "tpu", arch, 1, size, False) for name, (arch, size) in _TPU.items()},
    "cpu": Target("cpu", "cpu", "cpu", 1, 16 * 2**20, False),
}
"""Every target, by its canonical name. On "cpu" kernels are interpreted: a place to test them, for the backend "pallas"."""


def _spellings(target: Target) -> list[str]:
    if target.kind == "tpu":
        return [target.name, target.name.removeprefix("tpu_"), str(target.arch).lower()]
    if target.kind != "cuda":
        return [target.name]
    arch = int(target.arch)
    # nvcc's own suffixes: "a" (this architecture only) since sm_90, "f" (its family) since sm_100.
    suffixes = ("", *("a" for _ in range(arch >= 90)), *("f" for _ in range(arch >= 100)))
    return [f"{prefix}{arch}{suffix}" for prefix in ("sm_", "sm", "") for suffix in suffixes]


_BY_SPELLING = {spelling: target for target in TARGETS.values() for spelling in _spellings(target)}


_PRODUCTS = {
    "a100": "sm_80", "a10": "sm_86", "rtx3090": "sm_86", "l4": "sm_89", "l40": "sm_89", "l40s": "sm_89", "rtx4090": "sm_89",
    "h100": "sm_90", "h200": "sm_90", "gh200": "sm_90", "h20": "sm_90", "b200": "sm_100", "gb200": "sm_100", "b300": "sm_103",
    "rtx5090": "sm_120", "mi300": "gfx942", "mi300x": "gfx942", "mi325x": "gfx942",
}  # fmt: skip
"""Names that GPUs are sold under."""


def parse_target(text: str | Target, where: str = "target") -> Target:
    """The target called `text`: "sm_90", "sm90", "sm_90a" and "90" are one; "gfx942:sramecc+:xnack-" is gfx942.

    Case and surrounding spaces do not matter; a `Target` is returned as it is. `where` is the argument or variable
    named in the message. Raises `UnsupportedError`, naming every valid target, for anything else.
    """
    if isinstance(text, Target):
        return text
    word = exact_str(text)
    if word is not None and len(word) <= 64:
        word = word.strip().lower()
        if word.startswith("gfx"):
            word = word.partition(":")[0]  # ROCm appends the features of the device
        if word in _BY_SPELLING:
            return _BY_SPELLING[word]
    if word in _PRODUCTS:
        step = f"Did you mean {_PRODUCTS[word]!r}? That is what an {word.upper()} is."
    else:  # names of products are like each other's targets: H100 is no sm_100
        like = word is not None and word.startswith(("sm", "gfx", "tpu", *"0123456789"))
        step = (did_you_mean(word, TARGETS) if word and like else "") or "Choose one of these names."
    raise UnsupportedError(describe(where, text, listed(TARGETS), step))


def from_capability(major: int, minor: int) -> Target | None:
    """The CUDA target of compute capability `major.minor`, or None where it is not a known one."""
    return TARGETS.get(f"sm_{10 * major + minor}") if 0 <= minor <= 9 else None


def detect() -> Target | None:
    """The target kernels should be written for here, or None: then generation waits for the first call.

    `MLPDSL_TARGET` where it is set, else the compute capability of the GPUs that `CUDA_VISIBLE_DEVICES` leaves visible,
    asked from NVML without a CUDA context. None where there is no NVML (AMD, CPU), no visible GPU, only a MIG slice, an
    unknown architecture, or where it is ambiguous: visible GPUs differ, or they are given by number, the machine's GPUs
    differ, and CUDA may number them otherwise than NVML (unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`).

    Asked once per combination of these variables. Raises `UnsupportedError` for a bad `MLPDSL_TARGET`, else nothing.
    """
    named = os.environ.get(VARIABLE, "").strip()
    if named:
        return parse_target(named, where=f"environment variable {VARIABLE}")
    return _ask(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")


@lru_cache(maxsize=64)
def _ask(visible: str | None, pci_order: bool) -> Target | None:
    try:
        devices = _nvml_devices(_load_nvml()) if visible is None or _numbers_or_uuids(visible) else []
    except Exception:  # a broken or absent driver must not break `import`; the first call will meet it and say so
        return None
    chosen = _visible(visible, devices, pci_order)
    capabilities = {capability for _, capability in chosen}
    return from_capability(*capabilities.pop()) if len(capabilities) == 1 else None


_Device = tuple[str, tuple[int, int]]
"""UUID ("GPU-…") and compute capability."""


def _numbers_or_uuids(visible: str) -> bool:
    """Whether the first entry could name a whole GPU, so that it is worth asking NVML."""
    first = visible.split(",")[0].strip()
    return first.startswith("GPU-") or _leading_int(first) is not None


def _leading_int(text: str) -> int | None:
    """The non-negative integer that `text` begins with, as C's strtoul reads it ("1abc" is 1), else None."""
    digits = ""
    for character in text.removeprefix("+"):
        if character not in "0123456789":
            break
        digits += character
    # Nobody has a billion GPUs, and Python refuses to read integers of thousands of digits.
    return int(digits) if 0 < len(digits) < 10 else None


def _visible(visible: str | None, devices: Sequence[_Device], pci_order: bool) -> list[_Device]:
    """What CUDA would show: entries up to the first invalid one, and nothing at all where one is repeated."""
    if visible is None:
        return list(devices)
    by_uuid = visible.strip().startswith("GPU-")
    if not by_uuid and not pci_order and len({capability for _, capability in devices}) > 1:
        return []  # CUDA puts the fastest first, so its numbers are not NVML's
    chosen: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        index: int | None
        if by_uuid:
            named = enumerate(devices) if entry.startswith("GPU-") else ()
            matches = [at for at, (uuid, _) in named if uuid.startswith(entry)]
            index = matches[0] if len(matches) == 1 else None
        else:
            index = _leading_int(entry)
        if index is None or index >= len(devices):
            break
        if index in chosen:
            return []
        chosen.append(index)
    return [devices[at] for at in chosen]


def _load_nvml() -> Any:
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


def _nvml_devices(nvml: Any) -> list[_Device]:
    """UUID and capability of every GPU, in NVML's (PCI bus) order. Raises `OSError` where NVML reports an error."""
    import ctypes

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvml, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} returned {status}")

    call("nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices: list[_Device] = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            uuid = ctypes.create_string_buffer(96)
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            call("nvmlDeviceGetUUID", handle, uuid, ctypes.c_uint(len(uuid)))
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            devices.append((uuid.value.decode("ascii", "replace"), (major.value, minor.value)))
        return devices
    finally:
        nvml.nvmlShutdown()
