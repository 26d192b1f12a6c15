"""What a function reads besides its arguments is frozen where it can be."""

from __future__ import annotations

import enum
import functools
import math
import operator
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl.traced import activation
from tests.unit.traced.capturing import Map, check_frozen, refused, spec_of

SLOPE: Any = 0.75
WORD = "none"
HELPER: Any = None


class Mode(enum.Enum):
    LOUD = 2.0


class TestFrozen:
    def test_a_global(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_frozen(lambda x: torch.sin(x) * SLOPE, lambda: monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0))

    def test_a_global_read_in_a_lambda_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fn(x: Tensor) -> Tensor:
            return (lambda y: torch.sin(y) * SLOPE)(x)

        check_frozen(fn, lambda: monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0))

    def test_a_closure(self) -> None:
        k = 0.5

        def fn(x: Tensor) -> Tensor:
            return torch.sin(x) * k

        def change() -> None:
            nonlocal k
            k = 3.0

        check_frozen(fn, change)

    def test_a_default(self) -> None:
        def fn(x: Tensor, k: float = 0.5, *, shift: float = 0.0) -> Tensor:
            return torch.sin(x) * k + shift

        check_frozen(fn, lambda: setattr(fn, "__defaults__", (3.0,)))
        assert fn.__kwdefaults__ is not None
        check_frozen(fn, lambda: fn.__kwdefaults__.update(shift=1.0))

    def test_a_helper_and_what_it_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def helper(x: Tensor) -> Tensor:
            return torch.sin(x) * SLOPE

        module = sys.modules[__name__]
        monkeypatch.setattr(module, "HELPER", helper)
        check_frozen(lambda x: HELPER(x) + 1.0, lambda: monkeypatch.setattr(module, "SLOPE", 2.0))
        check_frozen(lambda x: HELPER(x) + 1.0, lambda: monkeypatch.setattr(module, "HELPER", torch.cos))

    def test_a_partial(self) -> None:
        def fn(x: Tensor, k: float, shift: float = 0.0) -> Tensor:
            return torch.sin(x) * k + shift

        bound = functools.partial(fn, k=2.0)
        check_frozen(bound, lambda: bound.keywords.update(shift=1.0))
        assert activation(functools.partial(fn, k=2.0)).value == "sin(x) * 2.0"

    def test_a_module(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.k = 2.0
                self.inner = nn.Hardtanh(-1.0, 1.0)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(torch.sin(x)) * self.k

        module = Scaled()
        check_frozen(module, lambda: setattr(module, "k", 3.0))
        check_frozen(module, lambda: setattr(module.inner, "max_val", 0.25))

    def test_a_derivative(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def declare() -> mlpdsl.Function:
            return activation(torch.round, derivative=lambda x: torch.cos(x) * SLOPE, check=False)

        function = declare()
        monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0)
        assert function.partials == ("cos(x) * 0.75",)
        spec = spec_of(function)
        x = torch.randn(1, 4, requires_grad=True)
        params = [torch.randn(s) for s in spec.parameter_shapes().values()]
        mlpdsl.reference(spec)(x, *params).sum().backward()
        slope = torch.cos(x.detach() @ params[0].T) * 0.75
        torch.testing.assert_close(x.grad, (slope * params[1].sum(0)) @ params[0])
        assert declare().partials == ("cos(x) * 2.0",)


class TestTaken:
    def test_numbers_words_and_what_is_made_of_them(self) -> None:
        flag, word, nothing, whole, pair = True, "tanh", None, np.float32(2.0), (1.0, (2.0, 3))

        def fn(x: Tensor) -> Tensor:
            assert nothing is None and flag
            y = F.gelu(x, approximate=word) * float(whole)
            return y * pair[0] + pair[1][1] * Mode.LOUD.value + math.pi

        # An enumeration's class can be changed, its member cannot.
        assert "class" in refused(fn) or "type" in refused(fn).lower()

        loud = Mode.LOUD

        def by_member(x: Tensor) -> Tensor:
            return F.gelu(x, approximate=word) * float(whole) * pair[1][1] + loud.value

        assert activation(by_member).value.endswith("+ 2.0")

    def test_recursion(self) -> None:
        def power(x: Tensor, n: int) -> Tensor:
            return x if n == 1 else x * power(x, n - 1)

        def even(x: Tensor, n: int = 4) -> Tensor:
            return torch.sin(x) if n == 0 else odd(x, n - 1)

        def odd(x: Tensor, n: int = 3) -> Tensor:
            return torch.cos(x) if n == 0 else even(x, n - 1)

        assert activation(lambda x: power(x, 3)).value == "x * (x * x)"
        assert (activation(even).value, activation(odd).value) == ("sin(x)", "sin(x)")
        assert activation(functools.partial(even, n=3)).value == "cos(x)"

    def test_a_helper_used_twice(self) -> None:
        def helper(x: Tensor) -> Tensor:
            return torch.sin(x)

        assert activation(lambda x: helper(x) * helper(2.0 * x)).value == "sin(x) * sin(x * 2.0)"

    def test_functions_of_torch_python_and_mathematics(self) -> None:
        cosine, root, multiply = torch.cos, math.sqrt, operator.mul
        assert activation(lambda x: multiply(cosine(x), root(4.0)) ** max(1, 0)).value == "cos(x) * 2.0"

    def test_a_lambda_of_a_lambda(self) -> None:
        def outer(f: Map, g: Map) -> Map:
            return lambda x: f(g(x))

        assert activation(outer(torch.sin, outer(torch.cos, torch.tanh))).value == "sin(cos(tanh(x)))"

    def test_one_code_with_two_contents_is_two_functions(self) -> None:
        def times(k: object) -> Map:
            return lambda x: torch.sin(x) * k

        assert len({activation(times(k)) for k in (1.5, 2.5, 3)}) == 3
        assert activation(times(2)) == activation(times(2.0))  # the same formula, though not the same content
        assert activation(functools.partial(F.elu, alpha=0.7)) != activation(functools.partial(F.elu, alpha=0.8))
        assert activation(nn.Softshrink(0.3)) != activation(nn.Softshrink(0.4))

    def test_an_autograd_function_brings_its_derivative(self) -> None:
        class Straight(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return torch.round(x)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return grad * (x.abs() < 2.0)

        found = activation(lambda x: Straight.apply(x), check=False)
        at = torch.linspace(-3.3, 3.3, 50)
        spec = spec_of(found)
        x = at.repeat(4, 1).T.contiguous().requires_grad_()
        params = [torch.ones(s) for s in spec.parameter_shapes().values()]
        mlpdsl.reference(spec)(x, *params).sum().backward()
        torch.testing.assert_close(x.grad, (((4 * at).abs() < 2.0) * 15.0).float()[:, None].expand(50, 4))
        assert "abs(x)" in found.partials[0]

    def test_wrappers_of_torch(self) -> None:
        assert activation(torch.func.vmap(torch.sin)) != activation(torch.func.vmap(torch.cos))
        silent = activation(torch.no_grad()(lambda x: torch.sin(x) * 2.0))
        assert silent.partials == ("0.0",)
