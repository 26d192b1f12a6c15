"""The GPU suite: skipped as a whole where there is none, each file in any order, alone or in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlpdsl import dispatch, launch
from tests import support


def _one_gpu_each() -> None:
    """Of several GPUs, the processes of pytest-xdist get one each in turn, before CUDA starts: many processes on one GPU wait for
    their time on it. What needs two GPUs has a process of its own, by `make test-gpu-2`."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), torch.cuda.device_count()
    if worker and count > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seen = seen if len(seen) == count else list(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(worker.removeprefix("gw")) % count]


_one_gpu_each()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, each with a short one: pytest-xdist hands tests out in pairs (Makefile), so each process begins with one.
    tier = [item for item in items if "test_three_hundred_calls" in item.name]
    rest = [item for item in items if "test_three_hundred_calls" not in item.name]
    items[:] = [item for pair in zip(tier, rest, strict=False) for item in pair] + tier[len(rest) :] + rest[len(tier) :]
    reason = support.NO_GPU if not torch.cuda.is_available() else ""
    if support.INTERPRETING:
        reason = "needs TRITON_INTERPRET unset: kernels are compiled here"
    for item in items:
        if reason and "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def generated() -> Iterator[None]:
    """Every product by a generated kernel, also where the library's is as fast."""
    with dispatch.forcing("generated"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that are launched, but for repetitions from a recording."""
    names: set[str] = set()
    inner = launch.run

    def run(kernel: Any, *rest: Any) -> None:
        names.add(kernel.fn.__name__)
        inner(kernel, *rest)

    monkeypatch.setattr(launch, "run", run)
    return names


@pytest.fixture(autouse=True)
def _leave_no_memory() -> Iterator[None]:
    """A process that held on to gigabytes would take them from the eleven beside it."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()
