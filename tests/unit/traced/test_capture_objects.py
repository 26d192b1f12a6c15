"""Functions that read objects which change, and what reviews found."""

from __future__ import annotations

import sys
import types
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.traced import activation
from tests.unit.traced.capturing import Map, check_frozen, refused, run, spec_of

SLOPE: Any = 0.75


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
