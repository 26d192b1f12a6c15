"""What the tests of Pallas kernels run under: JAX on the CPU as four devices, where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NO_JAX = "needs jax: pip install 'mlpdsl[jax]'"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax is imported. Compiling takes most of the time of these tests, and LLVM's optimisations half of that.
_FLAGS = ("--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()


class _NoJax(pytest.Module):
    """A module that is not imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(NO_JAX, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip every module of this folder where there is no jax."""
    if importlib.util.find_spec("jax") is not None:
        return None
    module: pytest.Module = _NoJax.from_parent(parent, path=module_path)
    return module
