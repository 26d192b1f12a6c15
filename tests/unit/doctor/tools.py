"""What the tests of `mlpdsl doctor` share: devices, and what a diagnosis must say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlpdsl import MLPSpec, surroundings
from mlpdsl.doctor import Check, Diagnosis
from mlpdsl.machine import Device

ROOT = Path(__file__).resolve().parents[3]
SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
H200 = Device("NVIDIA H200", "9.0", 141 * 2**30)
T4 = Device("Tesla T4", "7.5", 16 * 2**30)
MI300 = Device("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 192 * 2**30)
NAMES = ["python", "mlpdsl", "torch", "triton", "jinja2", "numpy", "jax", "pair", "devices", "target", "compiler", "headers"]
NAMES += ["environment", "cache", "triton_cache"]


def no_library() -> object:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def programs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(surroundings.shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)


Look = Callable[..., Diagnosis]


def check(found: Diagnosis, name: str) -> Check:
    (one,) = [c for c in found.checks if c.name == name]
    assert (one.next_step == "") == (one.status == "ok"), one
    return one


def problem(found: Diagnosis, name: str, *said: str, status: str = "problem") -> Check:
    one = check(found, name)
    assert one.status == status, one
    for words in said:
        assert words in f"{one.found} → {one.next_step}"
    assert found.status == status or status == "note"
    return one
