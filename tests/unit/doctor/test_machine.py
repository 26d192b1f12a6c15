"""How `mlpdsl doctor` asks the machine: through NVML, and torch in a process of its own."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

from mlpdsl import machine
from mlpdsl.machine import Device, Driver, Installed
from tests.unit.doctor.tools import no_library


class Nvml:
    """NVML with one GPU; a function in `fails` returns 9."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.ended = fails, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            pointers = [a._obj for a in arguments if hasattr(a, "_obj")]
            if name in self.fails:
                return 9
            if name in ("nvmlSystemGetDriverVersion", "nvmlDeviceGetName"):
                arguments[-2].value = {"nvmlDeviceGetName": b"NVIDIA H200"}.get(name, b"580.1")
            elif name == "nvmlDeviceGetCount_v2":
                pointers[0].value = 1
            elif name == "nvmlDeviceGetCudaComputeCapability":
                pointers[0].value, pointers[1].value = 9, 0
            elif name == "nvmlDeviceGetMemoryInfo":
                ctypes.memmove(pointers[0], (ctypes.c_ulonglong * 3)(7, 6, 1), 24)
            elif name == "nvmlShutdown":
                self.ended += 1
            return 0

        return call


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(machine, "_load_nvml", lambda: nvml)
    assert machine.ask_nvml() == Driver("580.1", (Device("NVIDIA H200", "9.0", 7),))
    assert nvml.ended == 1
    monkeypatch.setattr(machine, "_load_nvml", lambda: Nvml("nvmlDeviceGetMemoryInfo"))
    assert machine.ask_nvml().devices[0].memory == 0
    monkeypatch.setattr(machine, "_load_nvml", lambda: Nvml("nvmlInit_v2"))
    assert machine.ask_nvml() == Driver(error="nvmlInit_v2 returned 9")
    monkeypatch.setattr(machine, "_load_nvml", lambda: object())
    assert machine.ask_nvml().error
    monkeypatch.setattr(machine, "_load_nvml", no_library)
    assert machine.ask_nvml() == Driver()


FAKE_TORCH = """
print("chatter")
__version__ = "2.11.0+fake"
class version: cuda, hip = CUDA, None
class cuda:
    device_count = staticmethod(lambda: COUNT)
    def init(): raise RuntimeError("no driver")
    def get_device_properties(index):
        class p: name, major, minor, total_memory = "Fake", 9, 0, 12
        return p
"""


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        (
            FAKE_TORCH.replace("CUDA", "'13.0'").replace("COUNT", "2"),
            {"cuda": "13.0", "devices": (Device("Fake", "9.0", 12),) * 2},
        ),
        (
            FAKE_TORCH.replace("CUDA", "'13.0'").replace("COUNT", "0"),
            {"cuda": "13.0", "errors": {"cuda": "RuntimeError: no driver"}},
        ),
        (FAKE_TORCH.replace("CUDA", "None").replace("COUNT", "0"), {}),
        ("import sys; sys.exit(3)", {"versions": {"triton": "3.6.0"}, "errors": {"torch": "SystemExit: 3"}}),
        ("raise OSError('libcudart.so')", {"versions": {"triton": "3.6.0"}, "errors": {"torch": "OSError: libcudart.so"}}),
        (
            "import os; os.abort()",
            {"versions": {}, "errors": {"process": "the process that imports torch ended with status -6 and no answer"}},
        ),
    ],
)
def test_torch_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "triton.py").write_text("__version__ = '3.6.0'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    versions = {"torch": "2.11.0+fake", "triton": "3.6.0"}
    assert machine.ask_torch() == Installed(**{"versions": versions, "errors": {}, **expected})


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "torch.py").write_text(text)
    (tmp_path / "triton.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    found = machine.ask_torch(timeout=1)
    assert found == Installed({}, {"process": "importing torch and asking for its devices took more than 1 s"})
    assert time.monotonic() - start < 4
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "executable", "/no/such/python")
    assert "could not be asked" in machine.ask_torch().errors["process"]
