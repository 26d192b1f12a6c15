"""The oracle's bounds for users' own functions: float32 stays within them, they say something, and wrong formulas fall out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr.stable import expand
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.errors import UnstableWarning
from mlpdsl.function import Function
from mlpdsl.testing import bounded, custom
from mlpdsl.testing.bounded import Bounded, exact
from mlpdsl.traced import activation, epilogue
from tests.functions import ACTIVATIONS, EPILOGUES, GATED

COUNT = 4096


def declared(name: str) -> Function:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableWarning)
        if name in EPILOGUES:
            fn, kinds = EPILOGUES[name]
            return epilogue(fn, **kinds)
        return activation({**ACTIVATIONS, **GATED}[name])


def points(count: int, seed: int = 0, spread: float = 1.0) -> list[Tensor]:
    """float32 numbers: near 1 by half, of any scale from 1e-6 to 1e4 by half, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        near = torch.randn(COUNT // 2, generator=generator) * 3
        scale = torch.empty(COUNT // 2).uniform_(-6, 4 * spread, generator=generator)
        far = torch.sign(torch.randn(COUNT // 2, generator=generator)) * 10**scale
        found.append(torch.cat([near, far])[torch.randperm(COUNT, generator=generator)])
    return found


def with_kinks(at: Sequence[Tensor]) -> list[Tensor]:
    """The first points zeros and whole numbers, where branches meet."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    return [torch.cat([special, at[0][8:]]), *at[1:]]


def in_float32(function: Function, at: Sequence[Tensor]) -> list[Tensor]:
    """Value and derivatives by the elementary formulas, operation by operation: what a kernel does."""
    value, partials = plain_form.expressions(function)
    with torch.no_grad():
        results = to_torch((expand(value), *map(expand, partials)), function.inputs)(*at)
    assert all(r.dtype == torch.float32 for r in results)
    return [r.double().expand(COUNT) for r in results]


def expected(function: Function, inputs: Sequence[Bounded]) -> list[Bounded]:
    return [custom.value(function, inputs), *custom.partials(function, inputs)]


def outside(got: Tensor, wanted: Bounded) -> Tensor:
    """Where a result is refused, by the rules of `oracle.check`."""
    same = (got == wanted.value) | (got.isnan() & wanted.value.isnan())
    within = (got - wanted.value).abs() <= wanted.bound
    return ~(same | (within & wanted.value.isfinite()) | wanted.bound.isinf() | wanted.value.isnan())


def check_sound(function: Function, at: Sequence[Tensor], inputs: Sequence[Bounded]) -> None:
    for index, (got, wanted) in enumerate(zip(in_float32(function, at), expected(function, inputs), strict=True)):
        out = outside(got, wanted)
        where = int(out.int().argmax())
        found = [float(t[where]) for t in at], float(got[where]), float(wanted.value[where]), float(wanted.bound[where])
        assert not out.any(), f"{function} {index}: {int(out.sum())} of {COUNT} are out; the first, at {found}"


def check_extremes(function: Function) -> None:
    """At ±inf, NaN, the largest and the smallest numbers. Where torch's float64 has no limit, nothing is asked; of NaN comes what
    float64 says."""
    ends = [torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e30, -1e30, 1e-42]
    first = torch.tensor(ends).repeat(COUNT // len(ends))
    at = [first, *(torch.full((COUNT,), 0.7) for _ in function.inputs[1:])]
    for index, (got, wanted) in enumerate(zip(in_float32(function, at), expected(function, [exact(t) for t in at]), strict=True)):
        same = (got == wanted.value) | (got.isnan() & wanted.value.isnan())
        within = ((got - wanted.value).abs() <= wanted.bound) & wanted.value.isfinite()
        assert bool((same | within | wanted.bound.isinf()).all()), f"{function} {index}"
        assert index > 0 or not wanted.bound[first.isnan()].isinf().any()


EVERY = [*ACTIVATIONS, *GATED, *EPILOGUES]


@pytest.mark.parametrize("name", EVERY)
def test_float32_is_within(name: str) -> None:
    function = declared(name)
    at = with_kinks(points(len(function.inputs)))
    check_sound(function, at, [exact(t) for t in at])
    check_extremes(function)


@pytest.mark.parametrize("name", EVERY)
def test_float32_of_other_inputs_within_their_error_is_within(name: str) -> None:
    """The true inputs are anywhere within their bounds of those that the oracle knows."""
    function = declared(name)
    at = points(len(function.inputs), seed=1, spread=0.5)
    generator = torch.Generator().manual_seed(2)
    inputs = []
    for t in at:
        shift = torch.empty(COUNT).uniform_(-1, 1, generator=generator).double()
        size = 1e-6 * t.abs().double() + 1e-9
        inputs.append(Bounded(t.double() + shift * size, 1.01 * size))
    check_sound(function, at, inputs)


CALM = ["snake", "softsign", "lisht", "isru", "arctan", "lecun_tanh", "squareplus", "softplus_logaddexp", "swish_beta_partial",
        "gelu_bert", "gaussian_mixture", "swiglu", "wavenet", "gated_snake", "dynamic_tanh", "film", "norm_rows"]  # fmt: skip


def near(count: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(COUNT, generator=generator) * 2 for _ in range(count)]


@pytest.mark.parametrize("name", CALM)
def test_bounds_are_small(name: str) -> None:
    function = declared(name)
    for wanted in expected(function, [exact(t) for t in near(len(function.inputs))]):
        relative = (wanted.bound / wanted.value.abs()).nan_to_num(nan=0.0)
        assert float(relative.median()) < 1e-5
        assert not wanted.bound.isinf().any()


@pytest.mark.parametrize("name", EVERY)
def test_hardly_anything_is_without_a_bound(name: str) -> None:
    function = declared(name)
    for wanted in expected(function, [exact(t) for t in near(len(function.inputs))]):
        assert float(wanted.bound.isinf().double().mean()) < 0.005


SINE = activation(lambda x: x + torch.sin(2.5 * x) * 0.4)
PAIR = activation(lambda gate, up: torch.tanh(gate) * (up + 1.5))
ENTRY = epilogue(lambda x, gamma, beta: torch.sin(x) * gamma + beta, gamma="column", beta="row")

WRONG: dict[str, tuple[Function, dict[str, Any]]] = {
    "constant": (SINE, {"value": "x + sin(x * 2.5001) * 0.4"}),
    "factor": (SINE, {"value": "x + sin(x * 2.5) * 0.40001"}),
    "term": (SINE, {"value": "sin(x * 2.5) * 0.4"}),
    "derivative's constant": (SINE, {"partials": ("1.0 + cos(x * 2.5) * 1.0001",)}),
    "derivative's sign": (SINE, {"partials": ("1.0 - cos(x * 2.5)",)}),
    "derivative's factor": (SINE, {"partials": ("1.0 + cos(x * 2.5) * 0.4",)}),
    "zero for a derivative": (SINE, {"partials": ("0.0",)}),
    "tanh by few terms": (PAIR, {"value": "gate * (27.0 + gate * gate) / (27.0 + 9.0 * gate * gate) * (up + 1.5)"}),
    "partials the other way round": (PAIR, {"partials": PAIR.partials[::-1]}),
    "gate's without up": (PAIR, {"partials": ("1.0 - tanh(gate) * tanh(gate)", PAIR.partials[1])}),
    "operand left out": (ENTRY, {"value": "sin(tile) * gamma"}),
    "operand's derivative": (ENTRY, {"partials": (ENTRY.partials[0], "tile", "1.0")}),
    "tile's derivative": (ENTRY, {"partials": ("cos(tile)", *ENTRY.partials[1:])}),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_formulas_fall_out(what: str) -> None:
    """The truth is the Python function's, so that a formula cannot excuse itself."""
    function, changes = WRONG[what]
    at = near(len(function.inputs))
    inputs = [exact(t) for t in at]
    wrong = dataclasses.replace(function, **changes)
    assert wrong != function
    out = [outside(g, w).double().mean() for g, w in zip(in_float32(wrong, at), expected(wrong, inputs), strict=True)]
    assert max(out) > 0.5
    assert max(outside(g, w).sum() for g, w in zip(in_float32(function, at), expected(function, inputs), strict=True)) == 0


def test_a_derivative_of_ones_own_is_the_truth() -> None:
    straight = activation(torch.round, derivative=torch.ones_like, check=False)
    at = exact(torch.linspace(-3.3, 3.3, 100))
    (slope,) = custom.partials(straight, [at])
    assert bool((slope.value == 1.0).all()) and float(slope.bound.max()) < 1e-30
    assert torch.equal(custom.value(straight, [at]).value, torch.round(at.value))


def test_without_the_python_function_the_formula_is_the_truth() -> None:
    function = activation(lambda x: x * torch.sin(x) * 0.123)
    again = plain_form.from_plain(function.to_plain(), "here", False)
    assert again.call is None
    inputs = [exact(t) for t in near(1)]
    for one, two in zip(expected(again, inputs), expected(function, inputs), strict=True):
        torch.testing.assert_close(one.value, two.value, rtol=1e-14, atol=0)
        torch.testing.assert_close(one.bound, two.bound, rtol=1e-6, atol=0)


def test_a_formula_with_hand_written_text() -> None:
    plain = {
        "expr": "sin(x) * 0.321",
        "grads": ["cos(x) * 0.321"],
        "snippets": {"triton": ["tl.sin(x) * 0.321", "tl.cos(x) * 0.321"]},
    }
    function = plain_form.from_plain(plain, "here", False)
    assert torch.equal(custom.value(function, [exact(torch.ones(3))]).value, torch.sin(torch.ones(3).double()) * 0.321)


def test_a_wide_error_at_a_jump() -> None:
    """Where the input's error spans a jump, the bound is no smaller than it."""
    step = activation(lambda x: torch.where(x > 1.0, 3.0 + x, x))
    p = Bounded(torch.tensor([0.999, 1.001, 0.5, 2.0]).double(), torch.full((4,), 0.01).double())
    b = custom.value(step, [p]).bound
    assert bool((b[:2] >= 3.0).all()) and bool((b[2:] < 0.02).all())


CUBE = custom.value(activation(lambda x: torch.square(x) * x), [exact(torch.tensor([1e13, 1e10, -1e13]))])


def test_overflow_of_the_truth_is_asked_for() -> None:
    assert CUBE.value[0] == torch.inf and CUBE.value[2] == -torch.inf and CUBE.bound.tolist()[0] == 0.0


@pytest.mark.parametrize("name", ["torch_sigmoid", "lecun_tanh"])
def test_the_truth_of_faint_numbers(name: str) -> None:
    """A right kernel must not be refused where it is better than the truth."""
    function = declared(name)
    at = [torch.linspace(16.0, 34.0, COUNT) * sign for sign in (1.0, -1.0)][: len(function.inputs)]
    for sign in (1.0, -1.0):
        moved = [sign * t for t in at]
        wanted = expected(function, [exact(t) for t in moved])
        assert not any(outside(got, w).any() for got, w in zip(in_float32(function, moved), wanted, strict=True))


def test_overflow_is_infinite_or_unbounded() -> None:
    assert CUBE.value[1].isfinite() and CUBE.bound[1] < 1e24 and CUBE.bound[2] in (0.0, torch.inf)
    through = activation(lambda x: torch.square(x * 1e15) * 1e-30, check=False)
    lost = custom.value(through, [exact(torch.tensor([1e6, 1.0]))])
    assert lost.bound[0] == torch.inf and lost.bound[1] < 1e-6  # float32 leaves its range on the way


def test_operands_broadcast() -> None:
    tile, gamma, beta = exact(torch.randn(5, 7)), exact(torch.randn(7)), exact(torch.randn(5, 1))
    assert custom.value(ENTRY, [tile, gamma, beta]).value.shape == (5, 7)
    assert [p.value.shape for p in custom.partials(ENTRY, [tile, gamma, beta])] == [(5, 7)] * 3


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("div", (1.0, 3.0)), ("exp", (-20.0,)), ("exp", (80.0,)), ("log", (1.001,)), ("sqrt", (2.0,)), ("sin", (1e4,)),
        ("mul", (1e-20, 1e-10)), ("sub", (1.0, 0.9999999)), ("erf", (0.3,)), ("max", (1.0, 1.0)), ("cos", (1.57,)),
        ("add", (1e8, 1.0)), ("floor", (2.9,)), ("floor", (3.0,)),
    ],
)  # fmt: skip
def test_every_step_covers_the_ends_of_its_box(op: str, args: tuple[float, ...]) -> None:
    """The rule of each operation, at inputs moved to the ends of their errors."""
    a = [torch.full((1,), v, dtype=torch.float64) for v in args]
    e = [t.abs() * 1e-6 for t in a]
    _, bound = custom._step(op, a, e)
    functions: dict[str, Any] = {"max": torch.maximum}
    run = functions.get(op, getattr(torch, op))
    middle = run(*a)
    for i in range(len(a)):
        for sign in (-1.0, 1.0):
            moved = [t + sign * s if j == i else t for j, (t, s) in enumerate(zip(a, e, strict=True))]
            assert float((run(*moved) - middle).abs()) <= float(bound) * (1 + 1e-9)
    assert float(bound) >= 0.5 * bounded.U32 * float(middle.abs()) or op in ("floor", "max")


def test_quotients_by_the_largest_numbers_are_asked_for() -> None:
    """PTX's div.full, which Triton's division is on NVIDIA GPUs, is good to 2 ulp there too; div.approx gives 0."""
    a, b = torch.tensor([1e30, 2.0**127, 3e38], dtype=torch.float64), torch.tensor([3e38, 1.9 * 2.0**127, -(2.0**127)]).double()
    zero = torch.zeros_like(a)
    value, loss = custom._step("div", [a, b], [zero, zero])
    assert torch.equal(value, a / b) and (loss < 1e-6 * value.abs()).all()
