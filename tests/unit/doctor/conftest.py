"""A machine with nothing set and a compiler, and the diagnosis of any other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from mlpdsl import MLPSpec, doctor, machine, requirements, target
from mlpdsl.doctor import Diagnosis, diagnose
from mlpdsl.machine import Device, Driver, Installed
from tests.unit.doctor.tools import Look, no_library, programs


@pytest.fixture(autouse=True)
def _plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment with nothing set, a compiler, and no driver."""
    for name in list(os.environ):
        if name.startswith(("MLPDSL_", "TRITON_", "TORCH", "CUDA_", "HIP_", "ROCR_")) or name == "CC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(target, "_load_nvml", no_library)
    monkeypatch.setattr(machine, "_load_nvml", no_library)
    programs(monkeypatch, "gcc")
    target._ask.cache_clear()
    yield
    target._ask.cache_clear()


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Diagnose a machine that has these devices and versions; a version None is not installed."""

    def look(
        *devices: Device,
        specs: tuple[MLPSpec, ...] = (),
        m: tuple[int, ...] = (1, 4096),
        driver: Driver | None = None,
        errors: dict[str, str] | None = None,
        cuda: str | None = "13.0",
        hip: str | None = None,
        **versions: str | None,
    ) -> Diagnosis:
        known: dict[str, str | None] = {"torch": "2.11.0+cu130", "triton": "3.6.0", "jinja2": "3.1.6", "numpy": "2.3.0", **versions}

        def version(name: str) -> str:
            found = known.get(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(requirements.metadata, "version", version)
        monkeypatch.setattr(requirements.metadata, "requires", lambda name: [])
        imported = {n: v for n in ("torch", "triton") if (v := known[n]) is not None and n not in (errors or {})}
        installed = Installed(imported, errors or {}, cuda, hip, devices)
        monkeypatch.setattr(doctor, "ask_torch", lambda: installed)
        monkeypatch.setattr(doctor, "ask_nvml", lambda: driver or Driver("580.1" if devices and not hip else None, devices))
        return diagnose(specs, m)

    return look
