"""Clocks, power and temperature of a GPU, from NVML, its driver's management library. Reads only; sets nothing."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["Clocks"]


class Clocks:
    """Of the GPU whose UUID torch gives ("GPU-…"). Where there is no NVML, or it does not know the GPU, everything is None."""

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        self._handle = ctypes.c_void_p()
        try:
            self._nvml = _load_nvml()
            self._call("nvmlInit_v2")
            if uuid is not None:
                self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))
        except (OSError, AttributeError):
            self._handle = ctypes.c_void_p()

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._nvml, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} returned {status}")

    def _number(self, name: str, *arguments: object) -> int:
        value = ctypes.c_uint()
        self._call(name, self._handle, *arguments, ctypes.byref(value))
        return value.value

    def sample(self) -> dict[str, float] | None:
        """Clocks of multiprocessors and memory in MHz, power in W, temperature in °C, now; None where it cannot be had."""
        if not self._handle:
            return None
        try:
            return {
                "sm_mhz": float(self._number("nvmlDeviceGetClockInfo", ctypes.c_int(1))),
                "memory_mhz": float(self._number("nvmlDeviceGetClockInfo", ctypes.c_int(2))),
                "power_w": self._number("nvmlDeviceGetPowerUsage") / 1e3,
                "temperature_c": float(self._number("nvmlDeviceGetTemperature", ctypes.c_int(0))),
            }
        except (OSError, AttributeError):
            return None

    def power_limit_w(self) -> float | None:
        """The limit in force, in W."""
        try:
            return self._number("nvmlDeviceGetEnforcedPowerLimit") / 1e3 if self._handle else None
        except (OSError, AttributeError):
            return None

    def driver(self) -> str | None:
        """The driver's version."""
        if self._nvml is None:
            return None
        buffer = ctypes.create_string_buffer(96)
        try:
            self._call("nvmlSystemGetDriverVersion", buffer, ctypes.c_uint(len(buffer)))
        except (OSError, AttributeError):
            return None
        return buffer.value.decode("ascii", "replace")


def _load_nvml() -> Any:
    return ctypes.CDLL("libnvidia-ml.so.1")
