"""The corpus of tests/functions: what is accepted with which formulas, what is refused with which words, and what has a name."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLPSpec, SpecError, UnstableWarning, UnsupportedError
from mlpdsl.function import Function
from mlpdsl.traced import activation, epilogue
from tests.functions import ACTIVATIONS, EPILOGUES, GATED, REFUSED
from tests.unit.traced.tools import WARNED, check_formulas, scaled, snake, spec_of

ON_A_LINE = ("reduction", "control flow", "integer", "complex", "random")


class TestCorpus:
    @pytest.mark.parametrize("name", [*ACTIVATIONS, *GATED])
    def test_activations(self, name: str) -> None:
        fn = {**ACTIVATIONS, **GATED}[name]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function = activation(fn)
        assert [w.category for w in caught] == [UnstableWarning] * (name in WARNED)
        assert function.inputs == (("gate", "up") if name in GATED else ("x",))
        check_formulas(name, fn, function)

    def test_a_way_through_numpy(self) -> None:
        def detour(x: Tensor) -> Tensor:
            y = x.detach().numpy()
            return torch.from_numpy(abs(y))

        with pytest.raises(UnsupportedError, match=r"numpy on a tensor|test_corpus\.py:\d+: (y|return)"):
            activation(detour)

    def test_a_threshold_that_is_seen(self) -> None:
        fn = partial(F.softplus, threshold=8.0)
        check_formulas("softplus", fn, activation(fn))

    @pytest.mark.parametrize("name", EPILOGUES)
    @pytest.mark.filterwarnings("error")
    def test_epilogues(self, name: str) -> None:
        fn, kinds = EPILOGUES[name]
        function = epilogue(fn, **kinds)
        assert function.operands == kinds
        check_formulas(name, fn, function)

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, name: str) -> None:
        fn, inputs, word = REFUSED[name]
        assert inputs in (1, 2)
        with pytest.raises((UnsupportedError, SpecError)) as caught:
            activation(fn)
        assert word in str(caught.value)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("captured_parameter", "through_numpy")])
    def test_the_line_is_named(self, name: str) -> None:
        """The line of the fault where there is one; else the function's first."""
        fn, _, word = REFUSED[name]
        with pytest.raises((UnsupportedError, SpecError)) as caught:
            activation(fn)
        found = re.search(r"\(refused\.py:(\d+): (.*?)\)?:? ", str(caught.value))
        assert found, str(caught.value)
        lines, first = inspect.getsourcelines(fn)
        at = int(found[1]) - first
        on_a_line = (word in ON_A_LINE and name != "python_random") or name in ("shifted_tokens", "doubly_transposed")
        assert 0 <= at < len(lines)
        assert (at > 0) == on_a_line
        assert lines[at].strip()[:60] in str(caught.value)


TORCHS = [
    (F.silu, "silu"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    (lambda x: F.gelu(x), "gelu"),
    (torch.relu, "relu"),
    (torch.Tensor.relu, "relu"),
    (nn.ReLU(), "relu"),
    (F.relu6, "relu6"),
    (F.leaky_relu, "leaky_relu"),
    (nn.ELU(), "elu"),
    (torch.sigmoid, "sigmoid"),
    (torch.tanh, "tanh"),
    (nn.Softplus(), "softplus"),
    (F.mish, "mish"),
    (nn.Hardswish(), "hardswish"),
    (lambda x: torch.relu(x).square(), "relu2"),
    (lambda x: x, "identity"),
    (nn.Identity(), "identity"),
]


class TestCanonical:
    @pytest.mark.parametrize(("fn", "name"), TORCHS)
    def test_what_has_a_name_becomes_it(self, fn: Callable[..., Tensor], name: str) -> None:
        spec = spec_of(fn, epilogue=(fn,))
        assert spec == spec_of(name, epilogue=(name,))
        assert type(spec.activation) is str

    @pytest.mark.parametrize("fn", [nn.LeakyReLU(0.2), nn.ELU(0.5), partial(F.softplus, beta=2.0), nn.Hardtanh(), F.logsigmoid])
    def test_what_only_looks_like_it_does_not(self, fn: Callable[..., Tensor]) -> None:
        assert isinstance(spec_of(fn).activation, Function)

    def test_equal_formulas_are_equal_functions(self) -> None:
        one, two = activation(lambda x: torch.sin(x) * 3.0), activation(lambda y: 3.0 * y.sin())
        third = activation(lambda x: torch.sin(x) * 4.0)
        assert one == two and hash(one) == hash(two) and one is not two
        assert one != third
        assert spec_of(one) == spec_of(two) and hash(spec_of(one)) == hash(spec_of(two))
        assert spec_of(one).short_name == spec_of(two).short_name != spec_of(third).short_name
        assert mlpdsl.generate(spec_of(one)).key == mlpdsl.generate(spec_of(two)).key != mlpdsl.generate(spec_of(third)).key

    def test_kinds_and_names_of_operands_are_part_of_it(self) -> None:
        kinds: tuple[Any, ...] = ("column", "row", "tile", "scalar")
        assert len({epilogue(scaled, gamma=kind) for kind in kinds}) == 4
        assert epilogue(lambda x, beta: x * torch.tanh(beta), beta="row") != epilogue(scaled, gamma="row")

    def test_declared_twice_traced_once(self) -> None:
        assert activation(snake) is activation(snake)

    def test_a_derivative_of_ones_own_may_be_that_of_a_name(self) -> None:
        own = activation(lambda x: x, derivative=lambda x: torch.ones_like(x))
        assert MLPSpec.from_json(spec_of(own).to_json()) == spec_of(own)
