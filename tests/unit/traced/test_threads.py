"""Functions declared in several threads at once: what tracing sets for the whole process is put back, and no trace sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl.codegen.expr import trace
from mlpdsl.codegen.expr.trace import neutral
from mlpdsl.function import REGISTERED


@pytest.fixture(autouse=True)
def _the_programs() -> Iterator[None]:
    """What a program may have set."""
    torch.set_default_dtype(torch.float64)
    torch.autograd.set_detect_anomaly(True)
    yield
    torch.set_default_dtype(torch.float32)
    torch.autograd.set_detect_anomaly(False)


def together(first: Callable[[threading.Event], object], second: Callable[[], object]) -> None:
    """`first` is told by an event when `second`, in another thread, has had the time to begin."""
    begun = threading.Event()

    def work() -> None:
        begun.set()
        second()

    thread = threading.Thread(target=work)

    class Begun(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            thread.start()
            begun.wait(60)
            return super().wait(0.3)

    first(Begun())
    thread.join()


def test_what_is_set_meanwhile_is_put_back() -> None:
    left = threading.Event()

    def one(other_began: threading.Event) -> None:
        with neutral():
            other_began.wait()
        left.set()

    def other() -> None:
        with neutral():
            left.wait(0.5)

    together(one, other)
    assert torch.is_anomaly_enabled() and torch.get_default_dtype() == torch.float64


def test_a_trace_while_another_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would see the program's default dtype from then on, and refuse a function for it."""
    tracing, left, found = threading.Event(), threading.Event(), []
    examples = trace._examples

    def slowly(count: int) -> Any:
        if threading.current_thread() is not threading.main_thread():
            tracing.set()
            left.wait(0.5)
        return examples(count)

    monkeypatch.setattr(trace, "_examples", slowly)

    def plus_zero(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.tensor([0.0]))

    def one(other_began: threading.Event) -> None:
        with neutral():
            other_began.wait()
            tracing.wait(0.3)
        left.set()

    together(one, lambda: found.append(mlpdsl.activation(plus_zero)))
    assert len(found) == 1


def test_a_function_that_declares_another_while_it_is_traced() -> None:
    def inner(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * 1.25)

    def outer(x: Tensor) -> Tensor:
        with suppress(mlpdsl.MLPError):  # what it says of the inner one is another matter
            mlpdsl.activation(inner)
        return torch.tanh(x)

    done: list[object] = []

    def declare() -> None:
        with suppress(mlpdsl.MLPError):
            mlpdsl.activation(outer)
        done.append(True)

    thread = threading.Thread(target=declare, daemon=True)
    thread.start()
    thread.join(60)
    assert done, "it waits for itself"


def test_a_process_forked_while_another_thread_traces() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with neutral():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if trace._lock.acquire(timeout=1) else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_name_replaced_while_another_thread_registers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement stays, whichever thread is done last."""
    first = mlpdsl.activation(lambda x: torch.sin(x) * 0.5)
    second = mlpdsl.activation(lambda x: torch.sin(x) * 0.75)

    class Registry(dict[str, Any]):
        def setdefault(self, name: str, made: Any = None) -> Any:
            found = super().setdefault(name, made)
            if made is first:
                mlpdsl.register_activation("contested", second, replace=True)
            return found

    from mlpdsl import traced

    monkeypatch.setattr(traced, "REGISTERED", Registry(REGISTERED))
    mlpdsl.register_activation("contested", first)
    assert traced.REGISTERED["contested"] is second
