"""What a function reads that can change without a trace: refused by name."""

from __future__ import annotations

import functools
import random
import time
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlpdsl import SpecError
from mlpdsl.traced import activation
from tests.unit.traced.capturing import Map, refused

SLOPE: Any = 0.75
WEIGHT = torch.tensor(2.0)
TABLE = {"slope": 1.0}


def unassigned() -> Map:
    def fn(x: Tensor) -> Tensor:
        return x * later

    if SLOPE is None:
        later = 1.0
    return fn


class Annealed:
    beta = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.beta

    def method(self, x: Tensor) -> Tensor:
        return x * self.beta


class Holding(nn.Module):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def closing(value: Any) -> Map:
    def fn(x: Tensor) -> Tensor:
        return torch.sin(x) if value is None else x

    return fn


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "says"),
        [
            (torch.tensor(1.0), r"closure 'value' is a captured tensor of shape \(\)"),
            (nn.Parameter(torch.ones(3)), r"closure 'value' is a captured tensor of shape \(3,\)"),
            ((1.0, (torch.ones(2),)), "captured tensor"),
            (np.ones(3), "captured tensor"),
            ([1.0], "closure 'value' is a list, which can change"),
            ({"a": 1.0}, "is a dict, which can change"),
            ({1.0}, "is a set, which can change"),
            (bytearray(b"x"), "is a bytearray"),
            (([1.0],), "is a list"),
            (object(), "is a object"),
            (Annealed(), "is a Annealed, which can change"),
            (Annealed().method, "is a method"),
            (Annealed, "is a type"),
            (nn.PReLU(), r"PReLU holds captured tensors \(weight\)"),
            (nn.BatchNorm1d(3), "holds captured tensors"),
            (random.random, "gives random or changing numbers"),
            (random.gauss, "random or changing"),
            (time.time, "gives random or changing numbers"),
            (random, "module random"),
            (time, "module time"),
            (np.random, "module numpy.random"),
            (iter([1.0]), "list_iterator"),
            (functools.partial(closing([1.0])), "is a list"),
            (closing(WEIGHT), "captured tensor"),
            (types.SimpleNamespace(k=1.0), "SimpleNamespace"),
        ],
        ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
    )
    def test_what_can_change(self, value: Any, says: str) -> None:
        import re

        for fn in (closing(value), functools.partial(lambda x, k: torch.sin(x), k=value)):
            message = refused(fn)
            assert re.search(says.replace("closure 'value'", ".*"), message), message
        assert re.search(says, refused(closing(value)))
        assert "test_capture_refused.py:" in refused(closing(value)) or isinstance(value, nn.Module)

    def test_globals_and_defaults(self) -> None:
        def by_default(x: Tensor, table: Any = [1.0]) -> Tensor:  # noqa: B006
            return x * table[0]

        def by_keyword(x: Tensor, *, weight: Any = WEIGHT) -> Tensor:
            return x * weight

        assert "global 'TABLE' is a dict" in refused(lambda x: x * TABLE["slope"])
        assert "global 'WEIGHT' is a captured tensor" in refused(lambda x: x * WEIGHT)
        assert "default 0 is a list" in refused(by_default)
        assert "default 'weight' is a captured tensor" in refused(by_keyword)

    def test_where_it_is(self) -> None:
        def inner(x: Tensor) -> Tensor:
            return x * WEIGHT

        message = refused(lambda x: inner(x) + 1.0)
        assert "def inner" in message and "mlpdsl.epilogue(fn, name=kind)" in message

    def test_a_closure_without_a_value(self) -> None:
        assert "closure 'later' has no value yet" in refused(unassigned())

    def test_objects_and_classes(self) -> None:
        assert "a Annealed object has state that can change" in refused(Annealed())
        assert "method of an object whose attributes can change" in refused(Annealed().method)
        with pytest.raises(SpecError, match=r"Pass an instance: SiLU\(\)"):
            activation(nn.SiLU)

    def test_modules(self) -> None:
        assert "holds captured tensors (1.weight)" in refused(nn.Sequential(nn.Tanh(), nn.Linear(6, 6, bias=False)))
        assert "attribute 'table' is a list" in refused(Holding(table=[1.0]))
        assert "captured tensor" in refused(Holding(weight=torch.ones(1)))
        assert activation(Holding(k=1.0, name="sine")).value == "sin(x)"

    def test_compiled_functions(self) -> None:
        assert activation(torch.compile(lambda x: torch.sin(x) * 1.5)).value == "sin(x) * 1.5"
