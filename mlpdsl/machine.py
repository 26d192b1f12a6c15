"""What this machine is, asked without a CUDA context in this process: NVML by its C interface, torch in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Device", "Driver", "Installed", "ask_nvml", "ask_torch"]


@dataclass(frozen=True)
class Device:
    """One GPU: `architecture` is a compute capability ("9.0") or AMD's name ("gfx942:sramecc+:xnack-"); `memory` in bytes."""

    name: str
    architecture: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """What NVML says: every GPU of the machine, hidden ones too. `error` where it is there and fails; all empty without it."""

    version: str | None = None
    devices: tuple[Device, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Installed:
    """What a fresh process says that imports torch and triton.

    `versions` has what could be imported, `errors` what could not ("torch", "triton", "cuda"; "process" where there was no
    answer); `cuda` and `hip` are what torch was built for, `devices` those that it sees.
    """

    versions: Mapping[str, str]
    errors: Mapping[str, str]
    cuda: str | None = None
    hip: str | None = None
    devices: tuple[Device, ...] = ()


def _load_nvml() -> Any:
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


def ask_nvml() -> Driver:
    """Ask NVIDIA's driver. Never raises: without its library there is nothing to say."""
    try:
        nvml = _load_nvml()
    except OSError:
        return Driver()
    try:
        return _nvml_devices(nvml)
    except Exception as error:  # a broken driver may lack any of the functions
        return Driver(error=str(error))


def _nvml_devices(nvml: Any) -> Driver:
    import ctypes

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvml, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} returned {status}")

    def text(name: str, *arguments: object) -> str:
        buffer = ctypes.create_string_buffer(96)
        call(name, *arguments, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode("utf-8", "replace")

    call("nvmlInit_v2")
    try:
        version, count = text("nvmlSystemGetDriverVersion"), ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            memory = (ctypes.c_ulonglong * 3)()  # total, free, used
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            with contextlib.suppress(OSError):  # GPUs that share the host's memory have none to tell of
                call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            devices.append(Device(text("nvmlDeviceGetName", handle), f"{major.value}.{minor.value}", int(memory[0])))
        return Driver(version, tuple(devices))
    finally:
        nvml.nvmlShutdown()


_PROBE = """
import json, sys
found = {"versions": {}, "errors": {}, "cuda": None, "hip": None, "devices": []}
def failure(error):
    return f"{type(error).__name__}: {error}"
try:
    import triton
    found["versions"]["triton"] = str(triton.__version__)
except BaseException as error:
    found["errors"]["triton"] = failure(error)
try:
    import torch
    found["versions"]["torch"] = str(torch.__version__)
    found["cuda"], found["hip"] = torch.version.cuda, torch.version.hip
except BaseException as error:
    found["errors"]["torch"] = failure(error)
else:
    try:
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            architecture = p.gcnArchName if torch.version.hip else f"{p.major}.{p.minor}"
            found["devices"].append([p.name, architecture, p.total_memory])
        if not found["devices"] and (torch.version.cuda or torch.version.hip):
            torch.cuda.init()
    except BaseException as error:
        found["errors"]["cuda"] = failure(error)
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def ask_torch(timeout: float = 120.0) -> Installed:
    """Import torch and triton in a fresh process and ask torch for its devices. Never raises, and never waits much longer."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            answer = os.path.join(folder, "answer.json")  # not its output: what is imported may print
            status = _run(answer, timeout)
            if not os.path.exists(answer):
                return Installed({}, {"process": f"the process that imports torch ended with status {status} and no answer"})
            with open(answer, encoding="utf-8") as file:
                said = json.load(file)
        devices = tuple(Device(str(name), str(architecture), int(memory)) for name, architecture, memory in said["devices"])
        return Installed(said["versions"], said["errors"], said["cuda"], said["hip"], devices)
    except subprocess.TimeoutExpired:
        why = f"importing torch and asking for its devices took more than {timeout:g} s"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"the process that imports torch could not be asked: {error}"
    return Installed({}, {"process": why})


def _run(answer: str, timeout: float) -> int:
    """Run the probe and return its exit status. Raises `OSError`, `subprocess.TimeoutExpired`."""
    # A session of its own, so that all of it can be ended; PYTHONSAFEPATH: nothing is imported from where we stand.
    process = subprocess.Popen(
        [sys.executable, "-c", _PROBE, answer],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver that hangs it cannot be ended at all
                process.wait(5)
