"""Processes whose kernels are wrong, for tests of what finds them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")


from tests.unit.test_strategies import entry_points

# What a process that imports this first has wrong.
CHANGED_KERNELS = """
import mlpdsl.loader as loader
load, right, wrong = loader.load, "gate += tl.load(", {wrong!r}
def load_wrong(path, text, key):
    return load(path, text.replace(right, wrong), "wrong" + key) if right in text else load(path, text, key)
loader.load = load_wrong
"""
SUBTRACTED = "gate -= tl.load("
"""The gate's bias is subtracted."""
REFUSED = "sorted([1]); gate += tl.load("
"""Right, and interpreted without a word; the compiler knows no lists."""


def python_path(folder: Path, wrong: str = "") -> str:
    """A PYTHONPATH with mlpdsl, its entry points, and kernels changed to `wrong`."""
    path = entry_points(folder)
    if wrong:
        (folder / "wrong").mkdir(exist_ok=True)
        (folder / "wrong" / "sitecustomize.py").write_text(CHANGED_KERNELS.format(wrong=wrong))
        path = os.pathsep.join([str(folder / "wrong"), path])
    return path


def run(command: list[str], folder: Path, wrong: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "CI")}
    inherited |= {"PYTHONPATH": python_path(folder, wrong), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=120)
