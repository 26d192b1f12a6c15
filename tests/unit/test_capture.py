"""What a function reads besides its arguments: frozen where it can be, refused by name where it cannot."""

from __future__ import annotations

import enum
import functools
import math
import operator
import random
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLPSpec, SpecError, UnsupportedError, traced
from mlpdsl.traced import activation

Map = Callable[[Tensor], Tensor]

SLOPE: Any = 0.75
WORD = "none"
HELPER: Any = None
TABLE = {"slope": 1.0}
WEIGHT = torch.tensor(2.0)


class Mode(enum.Enum):
    LOUD = 2.0


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_traced", {})


def spec_of(fn: Any) -> MLPSpec:
    return MLPSpec(dims=(4, 5, 3), activation=fn)


def run(spec: MLPSpec) -> Tensor:
    torch.manual_seed(3)
    return mlpdsl.reference(spec)(torch.randn(7, 4), *(torch.randn(s) for s in spec.parameter_shapes().values()))


def check_frozen(fn: Any, change: Callable[[], object]) -> None:
    """Declared, then changed: formula and reference stay; declared again, both are new."""
    spec = spec_of(fn)
    before, text = run(spec), spec.to_json()
    change()
    assert spec.to_json() == text
    assert torch.equal(run(spec), before)
    again = spec_of(fn)
    assert again != spec
    assert not torch.equal(run(again), before)


def refused(fn: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        activation(fn)
    return str(caught.value)


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
        assert "test_capture.py:" in refused(closing(value)) or isinstance(value, nn.Module)

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


@pytest.fixture
def settings_module() -> types.ModuleType:
    module = types.ModuleType("settings_of_a_test")
    module.beta = 2.0  # type: ignore[attr-defined]
    return module


# Formulas unlike any above, because eager keeps what it runs by the formula.
class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * SLOPE + 0.125


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sin(x) * SLOPE + 0.375

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * SLOPE


class Private(nn.Module):
    def gate(self, x: Tensor) -> Tensor:
        return torch.sin(x) * SLOPE + 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


class TestObjectsThatChange:
    """What is read through objects: frozen with the rest, or refused."""

    def test_a_number_of_a_module(self, settings_module: Any) -> None:
        settings = settings_module

        def fn(x: Tensor) -> Tensor:
            return torch.sin(x) * settings.beta

        with suppress(UnsupportedError):  # to refuse it is as good
            check_frozen(fn, lambda: setattr(settings, "beta", 3.0))

    def test_a_tensor_of_a_module(self, settings_module: Any) -> None:
        settings = settings_module
        settings.beta = torch.tensor(2.0)
        refused(lambda x: torch.sin(x) * settings.beta)

    def test_a_global_of_a_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_frozen(Global(), lambda: monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0))

    def test_a_global_of_an_autograd_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fn = activation(lambda x: Surrogate.apply(x), check=False)
        spec = spec_of(fn)
        before = run(spec)
        monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0)
        assert torch.equal(run(spec), before)

    def test_a_method_of_a_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_frozen(Private(), lambda: monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0))

    def test_a_private_attribute(self) -> None:
        class Hidden(nn.Module):
            def __init__(self, k: float) -> None:
                super().__init__()
                self._k = k

            def forward(self, x: Tensor) -> Tensor:
                return torch.sin(x) * self._k

        kinds = [Hidden(2.0), Hidden(3.0)]
        assert activation(kinds[0]).value != activation(kinds[1]).value

    def test_two_helpers_of_one_name(self) -> None:
        def times(k: float) -> Map:
            return lambda x: torch.sin(x) * k

        def combined(f: Map, g: Map, h: Map) -> Map:
            return lambda x: f(x) + g(x) * h(x)

        two, three = times(2.0), times(3.0)
        assert activation(combined(two, three, two)) != activation(combined(two, three, three))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted_functions(self) -> None:
        def doubled(x: Tensor) -> Tensor:
            return torch.sin(x) * 2.0

        def tripled(x: Tensor) -> Tensor:
            return torch.cos(x) * 3.0

        assert activation(torch.jit.script(doubled)) != activation(torch.jit.script(tripled))

    def test_an_attribute_with_the_name_of_a_global(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules[__name__], "sigmoid", [1.0], raising=False)
        assert activation(lambda x: torch.sin(x) * x.sigmoid()).value == "sin(x) * sigmoid(x)"

    # The formulas differ, because two equal functions are one to eager.
    @pytest.mark.parametrize("how", ["attribute", "property", "static", "super"])
    def test_what_its_class_holds(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Base(nn.Module):
            k = 2.0

            @property
            def slope(self) -> Any:
                return SLOPE

            @staticmethod
            def gate(x: Tensor) -> Tensor:
                return torch.sin(x) * SLOPE

            def forward(self, x: Tensor) -> Tensor:
                return torch.sin(x) * SLOPE + 0.0625

        class Derived(Base):
            def forward(self, x: Tensor) -> Tensor:
                if how == "super":
                    return super().forward(x)
                if how == "static":
                    return self.gate(x) + 0.03125
                return torch.sin(x) * (self.slope if how == "property" else self.k) + (1.5 if how == "property" else 2.5)

        def change() -> None:
            monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0)
            Base.k = 3.0

        with suppress(UnsupportedError):  # to refuse it is as good
            check_frozen(Derived(), change)


class TestReviewed:
    """Found by those who tried to break it."""

    def test_training_and_evaluation_are_two_functions(self) -> None:
        assert activation(nn.Dropout(0.5).eval()).value == "x"
        assert "random" in refused(nn.Dropout(0.5))

        class Either(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(x) * 2.0 if self.training else torch.sin(x) * 2.0

        assert activation(Either().eval()).value != activation(Either().train()).value

    def test_a_forward_that_was_replaced(self) -> None:
        module = nn.SiLU()
        module.forward = lambda x: x * 3.0  # type: ignore[method-assign, assignment]
        assert "was replaced" in refused(module)
        assert MLPSpec(dims=(4, 4, 4), activation=nn.SiLU()).activation == "silu"

    def test_a_method_behind_an_attribute(self) -> None:
        class GELUActivation(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = self._python

            def _python(self, x: Tensor) -> Tensor:
                return torch.tanh(x) * 0.75

            def forward(self, x: Tensor) -> Tensor:
                return self.act(x)

        assert activation(GELUActivation()).value == "tanh(x) * 0.75"

    def test_what_reads_the_world(self, tmp_path: Any) -> None:
        def imported(x: Tensor) -> Tensor:
            import string

            return x * len(string.digits)

        def opened(x: Tensor) -> Tensor:
            with open(tmp_path / "alpha") as file:
                return x * float(file.read())

        assert "import string" in refused(imported)
        assert "calls open" in refused(opened)

    def test_numbers_that_print_as_they_like(self) -> None:
        class Short(float):
            def __repr__(self) -> str:
                return f"{self:.1f}"

        def scaled(a: float) -> Any:
            return lambda x: torch.tanh(x * a)

        values = [activation(scaled(Short(v))).value for v in (0.51, 0.54)]
        assert values == ["tanh(x * 0.51)", "tanh(x * 0.54)"]
