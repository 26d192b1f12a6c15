"""Formulas that break in float32: found where they are declared, with the input, and with what to write for them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlpdsl import SpecError, UnstableWarning, traced
from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr import formula, registered, soundness
from mlpdsl.codegen.expr.stable import expand
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.names import ACTIVATIONS
from mlpdsl.traced import activation, epilogue
from tests import functions
from tests.functions import UNSTABLE

# Entries that pass, and why that is right.
FAR_OUT = ("smooth_sign", "bent_identity", "gelu_new")  # beyond the largest float16
FAINT = ("naive_elu_near_zero", "naive_gelu_tail")  # no correct digit, of a number that no sum would notice
HELD = ("naive_elu_side_not_taken", "telu", "golu")  # right as fused: the side not taken passes no gradient
WARNED = ("squareplus",)
BROKEN = tuple(n for n in UNSTABLE if n not in (*FAR_OUT, *FAINT, *HELD, *WARNED))


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_traced", {})


def in_float32(function: traced.Function, at: float) -> list[float]:
    """Value and derivative as the kernel has them."""
    value, partials = plain_form.expressions(function)
    with torch.no_grad():
        results = to_torch((expand(value), *map(expand, partials)), function.inputs)(torch.tensor([at]))
    return [float(r) for r in results]


def exactly(fn: Callable[[Tensor], Tensor], at: float) -> list[float]:
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    y = fn(x)
    (slope,) = torch.autograd.grad(y, x)
    return [y.item(), slope.item()]


def message_of(fn: Callable[..., Tensor]) -> str:
    with pytest.raises(SpecError) as caught:
        activation(fn)
    return str(caught.value)


class TestCorpus:
    def test_every_entry_is_sorted(self) -> None:
        assert len(BROKEN) == 13
        assert set(UNSTABLE) == {*BROKEN, *FAR_OUT, *FAINT, *HELD, *WARNED}

    @pytest.mark.parametrize("name", BROKEN)
    def test_broken_ones_are_refused(self, name: str) -> None:
        """The message has an input at which float32 is wrong; with check=False the same function shows just that."""
        fn, _ = UNSTABLE[name]
        message = message_of(fn)
        found = re.search(r"the (value|derivative) at x = (\S+) is (\S+) in float32, where (.*) is (true|a number)", message)
        assert found, message
        assert fn.__name__ in message and "unstable.py:" in message and "mlpdsl.activation(fn, check=False)" in message
        unchecked = activation(fn, check=False)
        got = in_float32(unchecked, float(found[2]))[found[1] == "derivative"]
        assert not math.isfinite(got)
        assert f"{got:g}" == found[3]

    @pytest.mark.parametrize("name", WARNED)
    def test_imprecise_ones_are_warned_of(self, name: str) -> None:
        fn, _ = UNSTABLE[name]
        with pytest.warns(UnstableWarning, match=rf"{name} \(activations\.py:\d+.*the value at x = -\d+.* in float32") as caught:
            function = activation(fn)
        assert caught[0].filename == __file__
        at = float(re.search(r"at x = (\S+)", str(caught[0].message))[1])  # type: ignore[index]
        got, want = in_float32(function, at)[0], exactly(fn, at)[0]
        assert abs(got - want) > 0.01 * abs(want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert activation(fn, check=False) == function

    @pytest.mark.parametrize("name", [*FAR_OUT, *FAINT, *HELD])
    @pytest.mark.filterwarnings("error")
    def test_the_others_pass(self, name: str) -> None:
        fn, at = UNSTABLE[name]
        function = activation(fn)
        value, partials = plain_form.expressions(function)
        kinds = {p.kind for p in soundness.problems(fn, None, ("x",), [value, *partials])}
        assert kinds == {"faint"} if name in FAINT else kinds <= {"faint"}
        if name in FAR_OUT:
            assert abs(at) > 65504
        if name in HELD:
            for got, want in zip(in_float32(function, at), exactly(fn, at), strict=True):
                assert got == pytest.approx(want if math.isfinite(want) else 0.0, rel=1e-5, abs=1e-30)
        if name in FAINT:
            assert abs(exactly(fn, at)[0]) < 1e-8

    @pytest.mark.parametrize("name", functions.ACTIVATIONS)
    def test_formulas_of_papers_are_not_refused(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnstableWarning)
            activation(functions.ACTIVATIONS[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_registered_functions_are_sound(name: str) -> None:
    problems = soundness.problems(registered.definitions()[name], None, ("x",), list(registered.activation(name)))
    assert [p for p in problems if p.kind != "faint"] == []


class TestSuggestions:
    @pytest.mark.parametrize(
        ("name", "stable"),
        [
            ("naive_swish", "torch.nn.functional.silu(x)"),
            ("naive_sigmoid", "torch.sigmoid(x)"),
            ("naive_softplus_right", "torch.nn.functional.softplus(x)"),
            ("naive_tanh", "torch.tanh(x)"),
            ("naive_mish", "torch.nn.functional.softplus(x)"),
            ("naive_log_sigmoid", "torch.nn.functional.logsigmoid(x)"),
            ("root_of_square", "torch.abs(x)"),
            ("naive_asinh", "torch.hypot(x, sqrt(1.0))"),
        ],
    )
    def test_the_message_has_it(self, name: str, stable: str) -> None:
        assert f"Stable: {stable}" in message_of(UNSTABLE[name][0])

    @pytest.mark.parametrize(
        ("text", "suggested"),
        [
            ("x / (1.0 + exp(-x))", ["torch.nn.functional.silu(x) for b/(1 + exp(-b))"]),
            ("1.0 / (exp(-x) + 1.0)", ["torch.sigmoid(x) for 1/(1 + exp(-b))"]),
            ("exp(2.0 * x) / (1.0 + exp(2.0 * x))", ["torch.sigmoid(x * 2.0) for exp(b)/(1 + exp(b))"]),
            ("log(1.0 + x * x)", ["torch.log1p(x * x)"]),
            ("exp(x) - 1.0", ["torch.expm1(x) for exp(b) - 1"]),
            ("1.0 + erf(x)", ["torch.special.erfc(-x) for 1 + erf(b) (gelu: torch.nn.functional.gelu)"]),
            ("1.0 + tanh(x)", ["2·torch.sigmoid(x * 2.0) for 1 + tanh(b)"]),
            ("sqrt(x * x + 1.0)", ["torch.hypot(x, sqrt(1.0)) for sqrt(b·b + c)"]),
            ("x * sigmoid(x)", []),
            ("1.0 + x", []),
        ],
    )
    def test_parts(self, text: str, suggested: list[str]) -> None:
        assert soundness.suggestions(formula.parse(text, ("x",))) == suggested

    @pytest.mark.parametrize(
        ("naive", "stable"),
        [
            (UNSTABLE["naive_swish"][0], F.silu),
            (UNSTABLE["naive_softplus_right"][0], F.softplus),
            (UNSTABLE["naive_tanh"][0], torch.tanh),
            (UNSTABLE["naive_log_sigmoid"][0], F.logsigmoid),
            (lambda x: torch.sqrt(x * x), torch.abs),
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_what_is_suggested_is_the_same_function_and_passes(
        self, naive: Callable[[Tensor], Tensor], stable: Callable[[Tensor], Tensor]
    ) -> None:
        x = torch.linspace(-5, 5, 64, dtype=torch.float64)
        torch.testing.assert_close(naive(x), stable(x), rtol=1e-7, atol=1e-10)
        activation(stable)


class TestInputs:
    def test_the_sweep_has_every_scale(self) -> None:
        points = soundness.sweep()
        assert points[0] == 0.0 and points.abs().max() == 65504.0
        assert torch.equal(points.float().double(), points)
        assert bool((points.abs()[2:] >= points.abs()[:-2]).all())  # the first problem is the nearest
        for low in (1e-18, 1e-12, 1e-6, 1e-2, 1.0, 20.0, 80.0, 1e3, 6e4):
            near = (points.abs() >= low) & (points.abs() <= 3 * low)
            assert near.any() and bool((points[near] > 0).any()) and bool((points[near] < 0).any())

    def test_a_pair_is_swept_both_ways(self) -> None:
        for broken, word in ((lambda gate, up: gate / (1 + torch.exp(-gate)) * up, "gate"),
                             (lambda gate, up: gate * torch.log(1 + torch.exp(up)), "up")):  # fmt: skip
            message = message_of(broken)
            assert re.search(r"at gate = \S+, up = \S+ is (nan|inf|-inf) in float32", message), word

    def test_epilogues_and_operands_are_named(self) -> None:
        def naive(x: Tensor, gamma: Tensor) -> Tensor:
            return gamma * torch.log(1 + torch.exp(x))

        with pytest.raises(SpecError, match=r"at tile = \S+, gamma = \S+ is .*mlpdsl\.epilogue\(fn, check=False\)"):
            epilogue(naive, gamma="column")
        assert epilogue(naive, gamma="column", check=False).operands == {"gamma": "column"}

    def test_an_edge_of_a_domain_is_no_fault(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for fn in (torch.log, torch.sqrt, torch.acos, torch.atanh, torch.rsqrt):
                activation(fn)

    def test_what_overflows_as_it_should_is_no_fault(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            activation(torch.exp)
            activation(lambda x: (x * x) ** 8)
            activation(torch.sinh)

    def test_a_cast_to_float32_costs_the_truth_no_digits(self) -> None:
        x = soundness.sweep()
        for cast in (lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.to(dtype=torch.float32)):
            value, slope = soundness.truth(lambda x, cast=cast: torch.sin(cast(x)).type_as(x), None, [x])
            assert torch.equal(value, torch.sin(x)) and torch.equal(slope, torch.cos(x))

    def test_a_wrong_formula_is_a_problem(self) -> None:
        """The check compares with the function itself, so that it would also find a fault of the tracer."""
        right, wrong = formula.parse("sin(x)", ("x",)), formula.parse("sin(x * 1.02)", ("x",))
        slope = formula.parse("cos(x)", ("x",))
        assert soundness.problems(torch.sin, None, ("x",), [right, slope]) == []
        (first,) = soundness.problems(torch.sin, None, ("x",), [wrong, slope])
        assert (first.kind, first.what) == ("imprecise", "the value")
        (second,) = soundness.problems(torch.sin, None, ("x",), [right, -slope])
        assert (second.kind, second.what, dict(second.at)) == ("imprecise", "the derivative", {"x": 0.0})
