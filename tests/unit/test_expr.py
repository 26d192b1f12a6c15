"""Scalar expressions: derived by torch, shipped as formulas, precise in float32 everywhere, printed only from an allow-list."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpdsl.codegen.emit import functions, pallas, triton
from mlpdsl.codegen.expr import formula, registered, stable
from mlpdsl.codegen.expr.graph import (
    ARITY,
    ELEMENTARY,
    INTRINSIC,
    Expr,
    call,
    const,
    differentiating,
    substitute,
    symbol,
    symbols,
    walk,
)
from mlpdsl.codegen.expr.torch_code import functions as torch_functions
from mlpdsl.codegen.expr.trace import trace
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.functions import FUNCTIONS

X, Y = symbol("x"), symbol("y")
UNIT = 2.0**-24

_NUMPY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs, "exp": np.exp,
    "log": np.log, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "max": np.maximum, "min": np.minimum, "where": np.where,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "both": np.logical_and, "either": np.logical_or, "invert": np.logical_not, "floor": np.floor,
    "erf": np.vectorize(math.erf, otypes=[np.float32]),
}  # fmt: skip


def evaluate(expr: Expr, *inputs: np.ndarray) -> np.ndarray:
    """The elementary form, each operation rounded to float32, as a kernel without fused multiply-adds computes it.

    The inputs are those of x and y.
    """
    root = stable.expand(expr)
    environment = dict(zip(("x", "y"), inputs, strict=False))
    values: dict[int, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node in walk(root):
            if node.op == "symbol":
                values[id(node)] = environment[node.name]
            elif node.op == "const":
                values[id(node)] = np.float32(node.value)
            else:
                assert node.op in ELEMENTARY
                values[id(node)] = _NUMPY[node.op](*(values[id(a)] for a in node.args))
    return np.broadcast_to(np.asarray(values[id(root)], dtype=np.float32), inputs[0].shape)


_ROUND = np.array([3.0, 6.0, 88.0, 100.0])
SWEEP = np.concatenate(
    [
        sign * points
        for sign in (1.0, -1.0)
        for points in (np.linspace(0, 12, 4001), np.geomspace(1e-38, 1.0, 400), np.linspace(12, 103, 300), _ROUND)
    ]
).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_shipped_formulas_are_what_torch_derives_today(name: str) -> None:
    shipped = json.loads(registered.SHIPPED.read_text())
    assert list(shipped) == list(registered.definitions())
    value, partials = trace(registered.definitions()[name], ("x",))
    traced = registered.VALUES.get(name, formula.to_text(value))  # by hand or not, held to float64 below
    assert {"value": traced, "derivative": formula.to_text(partials["x"])} == shipped[name]


@pytest.mark.parametrize("which", ["value", "derivative"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_precise_in_float32_at_every_scale(name: str, which: str) -> None:
    """Relative to the value: |error| ≤ 6·2⁻²⁴·(|f| + |x·f′|), (12 for derivatives), and half the smallest normal number."""
    expr = registered.activation(name)[which == "derivative"]
    x64 = torch.from_numpy(SWEEP.astype(np.float64))
    function = FUNCTIONS[name]
    expected, slope = (function.value, function.derivative) if which == "value" else (function.derivative, function.curvature)
    # laplace is (x - μ)/σ inside: its conditioning is that of x - μ.
    reach = x64.abs() + (0.707107 if name == "laplace" else 0.0)
    f = expected(x64)
    bound = (6 if which == "value" else 12) * UNIT * (f.abs() + reach * slope(x64).abs()) + 2.0**-127
    error = (torch.from_numpy(evaluate(expr, SWEEP).astype(np.float64)) - f).abs()
    worst = int((error / bound).argmax())
    assert error[worst] <= bound[worst], f"x={SWEEP[worst]!r}: {float(error[worst] / bound[worst]):.2f} bounds"


_FAR = np.geomspace(103, 3.4e38, 500)
_NEAR_ONE = np.concatenate([1.0 + np.geomspace(2.0**-23, 1.0, 300), 1.0 - np.geomspace(2.0**-24, 0.99, 300)])
WIDE = np.concatenate([SWEEP, *(sign * p for sign in (1, -1) for p in (_FAR, _NEAR_ONE, np.linspace(88, 90, 500)))]).astype(
    np.float32
)
LARGEST = float(np.finfo(np.float32).max)

Limits = list[tuple[float, float]]
_INF, _PI = math.inf, math.pi
_ODD: Limits = [(0.0, 0.0), (-0.0, -0.0), (1e-45, 1e-45), (-1e-45, -1e-45), (1e-40, 1e-40)]
# For each: the reference, where it is smooth and finite, values at points, and arguments outside its domain.
UNARY: dict[str, tuple[Callable[..., torch.Tensor], Callable[[np.ndarray], np.ndarray], Limits, tuple[float, ...]]] = {
    "log1p": (torch.log1p, lambda x: x > -1, [*_ODD, (-1, -_INF), (_INF, _INF)], (-1.0000001, -2, -3, -_INF)),
    "log2": (torch.log2, lambda x: x > 0, [(0.0, -_INF), (1, 0), (1e-45, -149), (_INF, _INF)], (-1e-45, -1, -_INF)),
    "log10": (torch.log10, lambda x: x > 0, [(0.0, -_INF), (1, 0), (_INF, _INF)], (-1e-45, -1, -_INF)),
    "exp2": (torch.exp2, lambda x: x < 128, [(0.0, 1), (128, _INF), (-_INF, 0), (_INF, _INF)], ()),
    "rsqrt": (torch.rsqrt, lambda x: x > 0, [(0.0, _INF), (1, 1), (4, 0.5), (_INF, 0)], (-1, -_INF)),
    "log_sigmoid": (torch.nn.functional.logsigmoid, lambda x: x == x, [(-_INF, -_INF), (_INF, 0), (-LARGEST, -LARGEST)], ()),
    "sinh": (torch.sinh, lambda x: abs(x) < 89.4159, [*_ODD, (90, _INF), (-90, -_INF), (_INF, _INF), (-_INF, -_INF)], ()),
    "cosh": (torch.cosh, lambda x: abs(x) < 89.4159, [(0.0, 1), (90, _INF), (_INF, _INF), (-_INF, _INF)], ()),
    "tan": (torch.tan, lambda x: abs(x) < 1000, _ODD, (_INF, -_INF)),
    "asin": (torch.asin, lambda x: abs(x) < 1, [*_ODD, (1, _PI / 2), (-1, -_PI / 2)], (1.0000001, -1.0000001, 3, _INF, -_INF)),
    "acos": (torch.acos, lambda x: abs(x) < 1, [(1, 0), (0.0, _PI / 2), (-1, _PI)], (1.0000001, -1.0000001, 3, _INF, -_INF)),
    "atan": (torch.atan, lambda x: x == x, [*_ODD, (_INF, _PI / 2), (-_INF, -_PI / 2)], ()),
    "asinh": (torch.asinh, lambda x: x == x, [*_ODD, (_INF, _INF), (-_INF, -_INF)], ()),
    "acosh": (torch.acosh, lambda x: x > 1, [(1, 0), (_INF, _INF)], (0.9999999, 0.0, -1, -1.1, -1e5, -1e30, -_INF)),
    "atanh": (torch.atanh, lambda x: abs(x) < 1, [*_ODD, (1, _INF), (-1, -_INF)], (1.0000001, -1.0000001, -3, _INF, -_INF)),
}
_FINITE = (1e-45, 1.0, 2.5, LARGEST)
# For each: the reference, where it is smooth, and (x, y, value).
BINARY: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., np.ndarray], list[tuple[float, float, float]]]] = {
    "pow": (torch.pow, lambda x, y: x > 0, [
        (0.0, 2.5, 0), (0.0, 0.0, 1), (-0.0, 2.5, 0), (0.0, -2.5, _INF), (_INF, 0.0, 1), (1, _INF, 1), (_INF, 2.5, _INF),
        (_INF, -2.5, 0), (2, _INF, _INF), (2, -_INF, 0), (0.5, _INF, 0), (-2, 2.5, math.nan), (-_INF, 2.5, math.nan),
    ]),
    "atan2": (torch.atan2, lambda y, x: x == x, [
        (0.0, 0.0, 0), (-0.0, 0.0, -0.0), (0.0, 1, 0), (-0.0, 1, -0.0), (0.0, -1, _PI), (1, 0.0, _PI / 2), (-1, 0.0, -_PI / 2),
        (_INF, _INF, _PI / 4), (-_INF, _INF, -_PI / 4), (_INF, -_INF, 3 * _PI / 4), (-_INF, -_INF, -3 * _PI / 4),
        *[(s * _INF, f, s * _PI / 2) for s in (1, -1) for f in _FINITE], *[(f, _INF, 0) for f in _FINITE],
        *[(f, -_INF, _PI) for f in _FINITE], *[(f, f, _PI / 4) for f in _FINITE], *[(-f, -f, -3 * _PI / 4) for f in _FINITE],
    ]),
    "hypot": (torch.hypot, lambda a, b: a == a, [
        (0.0, 0.0, 0), (-0.0, 0.0, 0), (3, -4, 5), (1e-45, 0.0, 1e-45), (LARGEST, 1, LARGEST), (-LARGEST, 0.0, LARGEST),
        *[(*p, _INF) for f in (*_FINITE, _INF) for p in ((_INF, f), (f, -_INF), (-_INF, -f))],
    ]),
    "logaddexp": (torch.logaddexp, lambda a, b: a == a, [
        (_INF, _INF, _INF), (-_INF, -_INF, -_INF), (_INF, -_INF, _INF), (-_INF, _INF, _INF), (-_INF, 2.5, 2.5), (2.5, -_INF, 2.5),
        (LARGEST, LARGEST, LARGEST), (-LARGEST, LARGEST, LARGEST), (0.0, 0.0, math.log(2.0)), (_INF, 1, _INF),
    ]),
}  # fmt: skip


def measured(expr: Expr, reference: Callable[..., torch.Tensor], *inputs: np.ndarray) -> float:
    """The worst error in units of 2⁻²⁴·(|f| + Σ|x·∂f/∂x|), where f is finite in float32; 2⁻¹²⁷ is forgiven."""
    leaves = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in inputs]
    f = reference(*leaves)
    slopes = torch.autograd.grad(f.sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        scale = UNIT * (f.abs() + sum((x * slope).abs() for x, slope in zip(leaves, slopes, strict=True)))
        error = (torch.from_numpy(evaluate(expr, *inputs).astype(np.float64)) - f).abs()
        # Where the reference's own bound crosses the largest number, infinity is right as well.
        finite = ~((f.abs() >= LARGEST) | (f.abs() + 6 * scale >= LARGEST))
        units = ((error - 2.0**-127).clamp(min=0.0) / scale.clamp(min=2.0**-1000))[finite]
        assert len(units) > 500
        assert not bool(units.isnan().any())  # neither in the result nor in the reference
        return float(units.max())


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Two inputs: of any two scales, of like scale, and nearly equal."""
    random = np.random.default_rng(0)

    def any_scale(low: float, high: float) -> np.ndarray:
        return np.exp(random.uniform(math.log(low), math.log(high), 20_000)) * random.choice([1.0, -1.0], 20_000)

    close = any_scale(1e-30, 1e30)
    first = np.concatenate([any_scale(2e-38, 3e38), any_scale(1e-3, 1e2), random.uniform(-12, 12, 20_000), close])
    second = np.concatenate([any_scale(2e-38, 3e38), any_scale(1e-3, 1e2), random.uniform(-12, 12, 20_000), close * 1.0001])
    return first.astype(np.float32), second.astype(np.float32)


def test_every_intrinsic_is_tested() -> None:
    shipped = {n.op for name in ACTIVATIONS for root in registered.activation(name) for n in walk(root)}
    assert (shipped & INTRINSIC) | set(UNARY) | set(BINARY) == INTRINSIC


@pytest.mark.parametrize("op", UNARY)
def test_intrinsics_are_precise_at_every_scale(op: str) -> None:
    reference, inside, _, _ = UNARY[op]
    assert measured(call(op, X), reference, WIDE[inside(WIDE)]) <= 4


@pytest.mark.parametrize("op", BINARY)
def test_intrinsics_of_two_arguments_are_precise_at_every_scale(op: str) -> None:
    reference, inside, _ = BINARY[op]
    x, y = pairs()
    kept = inside(x, y)
    assert measured(call(op, X, Y), reference, x[kept], y[kept]) <= 4


def check_values(expr: Expr, expected: list[float], *inputs: list[float]) -> None:
    """To 4 ulp, exactly in sign and where the value is tiny."""
    results, known = evaluate(expr, *(np.array(x, dtype=np.float32) for x in inputs)), np.array(expected, dtype=np.float32)
    np.testing.assert_allclose(results, known, rtol=2.0**-21)
    np.testing.assert_array_equal(np.signbit(results)[known == known], np.signbit(known)[known == known])


@pytest.mark.parametrize("op", UNARY)
def test_limits_of_intrinsics(op: str) -> None:
    _, _, limits, outside = UNARY[op]
    points = [*limits, *((x, math.nan) for x in (*outside, math.nan))]
    check_values(call(op, X), [f for _, f in points], [x for x, _ in points])


@pytest.mark.parametrize("op", BINARY)
def test_limits_of_intrinsics_of_two_arguments(op: str) -> None:
    nan = math.nan
    x, y, expected = zip(*BINARY[op][2], (nan, 2.5, nan), (2.5, nan, nan), (nan, nan, nan), strict=True)
    check_values(call(op, X, Y), list(expected), list(x), list(y))


@pytest.mark.parametrize("exponent", [*range(-11, 12), 0.5, -0.5, 1.5, -1.5, 0.3, -2.2, 1 / 3, 20.5])
def test_constant_powers(exponent: float) -> None:
    power = call("pow", X, exponent)
    if exponent == 0:
        assert power.is_const(1.0)
        return
    whole = float(exponent).is_integer()
    points = WIDE[WIDE != 0] if whole else WIDE[WIDE > 0]

    def reference(x: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        # Products and roots owe nothing to the conditioning in the exponent.
        small = abs(exponent) in (*range(9), 0.5) or exponent == 1.5
        return torch.pow(x, exponent) if small else x.sign() ** exponent * x.abs() ** (exponent * one)

    assert measured(power, reference, points, np.ones_like(points)) <= (2 if abs(exponent) <= 8 and whole else 4)
    check_values(power, [0.0 if exponent > 0 else math.inf, math.nan], [0.0, math.nan])


@pytest.mark.parametrize("base", [0.3, 2.5, 10.0])
def test_powers_of_a_constant(base: float) -> None:
    assert measured(call("pow", base, X), lambda x: torch.pow(base, x), SWEEP) <= 4


def test_small_constant_powers_are_products_and_roots() -> None:
    def text(exponent: float) -> str:
        return formula.to_text(call("pow", X, exponent))

    assert [text(e) for e in (0, 1, 2, 3, 5)] == ["1.0", "x", "x * x", "x * x * x", "x * x * (x * x) * x"]
    assert [text(e) for e in (-1, -2, 0.5, -0.5, 1.5)] == ["1.0 / x", "1.0 / (x * x)", "sqrt(x)", "rsqrt(x)", "x * sqrt(x)"]
    assert [text(e) for e in (0.3, 9)] == ["pow(x, 0.3)", "pow(x, 9.0)"]


def test_floor() -> None:
    points = np.array([-1.5, -1.0, -0.0, 0.0, 0.99, 2.0, 1e30, math.inf, -math.inf, math.nan], dtype=np.float32)
    np.testing.assert_array_equal(evaluate(call("floor", X), points), np.floor(points))
    assert triton._TRITON.calls["floor"] == "tl.floor({})"
    for language in (triton._TRITON, pallas._JAX):
        assert set(language.calls) | set(functions._INFIX) | set(functions._SIGNS) == ELEMENTARY


@pytest.mark.parametrize("op", [*UNARY, *BINARY, "sin", "cos", "erf", "erfc", "tanh", "expm1", "softplus", "exp", "sqrt", "floor"])
def test_calls_of_constants_fold(op: str) -> None:
    points = [2.5, 1.25] if op in (*BINARY, "acosh") else [0.7, 0.3]
    function = {**UNARY, **BINARY}[op][0] if op in (*UNARY, *BINARY) else getattr(torch, op, torch.nn.functional.softplus)
    for arguments in (points[: ARITY[op]], points[::-1][: ARITY[op]]):
        folded = call(op, *arguments)
        expected = function(*(torch.tensor(a, dtype=torch.float64) for a in arguments))
        assert folded.op == "const"
        assert folded.value == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize(
    ("op", "arguments"), [("log1p", (-2,)), ("acosh", (0,)), ("pow", (0, -1)), ("pow", (-2, 2.5)), ("exp2", (5000,))]
)
def test_calls_of_constants_without_a_finite_value_stay(op: str, arguments: tuple[float, ...]) -> None:
    assert call(op, *arguments).op != "const"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_limits_at_infinity_and_nan(name: str) -> None:
    value, derivative = registered.activation(name)
    ends = np.array([np.inf, -np.inf], dtype=np.float32)
    for expr, expected in ((value, FUNCTIONS[name].value), (derivative, FUNCTIONS[name].derivative)):
        np.testing.assert_array_equal(evaluate(expr, ends), expected(torch.from_numpy(ends).double()).float().numpy())
    assert np.isnan(evaluate(value, np.array([np.nan], dtype=np.float32))).all()


def test_signed_zero_and_subnormals_pass_through_odd_functions() -> None:
    tiny = np.array([1e-45, -1e-45, 1e-40, -1e-40, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(evaluate(call("tanh", X), tiny), tiny)
    np.testing.assert_array_equal(evaluate(registered.activation("elu")[0], tiny), tiny)


def test_a_gate_that_is_shut_passes_no_infinite_gradient() -> None:
    with differentiating():
        relu_grad = symbol("grad") * registered.activation("relu")[1]
    assert (symbol("up") * registered.activation("relu")[1]).op == "mul"  # in a value NaN goes through
    assert relu_grad.op == "where" and relu_grad.args[1].is_const(0.0)


def test_equal_expressions_are_one_object() -> None:
    assert call("sigmoid", X) * 2.0 is 2.0 * call("sigmoid", X)
    assert (1.0 - call("sigmoid", X)).op == "sigmoid"
    assert const(0.0) is not const(-0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_constant_that_cannot_be_printed(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        const(value)


def test_composition() -> None:
    inner, _ = registered.activation("relu")
    outer = substitute(registered.activation("tanh")[0], {"x": inner})
    assert formula.to_text(outer) == "tanh(max(x, 0.0))"
    assert symbols(outer) == {"x"}


_numbers = st.floats(-1e6, 1e6).map(const)


def _grow(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    ops = sorted(ARITY)
    return st.sampled_from(ops).flatmap(lambda op: st.tuples(*[children] * ARITY[op]).map(lambda args: call(op, *args)))


@given(st.recursive(st.one_of(_numbers, st.just(X), st.just(symbol("up"))), _grow, max_leaves=12))
def test_formulas_read_back_as_the_same_object(expr: Expr) -> None:
    assert formula.parse(formula.to_text(expr), ("x", "up")) is expr


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.real", "x[0]", "lambda: x", "exec(x)", "sigmoid(x, x)", "sigmoid(x=1)", "y", "'x'", "x if x else x",
     "1e999", "x ** 2", "x and x", "(" * 5000 + "x" + ")" * 5000, "x" * 30_000, "", "x; x"],
)  # fmt: skip
def test_nothing_outside_the_grammar_is_read(text: str) -> None:
    with pytest.raises(ValueError):
        formula.parse(text, ("x",))


def test_every_intrinsic_has_a_stable_form() -> None:
    assert set(stable.FORMS) == INTRINSIC
    for op in INTRINSIC:
        form = stable.expand(call(op, *(X, Y)[: ARITY[op]]))
        assert all(n.op in ELEMENTARY or not n.args for n in walk(form))


def test_an_operation_without_a_printing_is_named() -> None:
    with pytest.raises(NotImplementedError, match="cumsum"):
        trace(lambda x: torch.cumsum(x, 0), ("x",))


@pytest.mark.parametrize("value", [-30.0, -1.5, 0.0, 0.7, 30.0])
@pytest.mark.parametrize("op", sorted(op for op in INTRINSIC if ARITY[op] == 1))
def test_every_intrinsic_folds(op: str, value: float) -> None:
    """A number in a user's function, torch.sigmoid(torch.tensor(0.7)), is a number in its formula."""
    want = float(torch_functions()[op](torch.tensor(value, dtype=torch.float64)))
    folded = call(op, value)
    if math.isfinite(want):
        assert folded.op == "const" and folded.value == pytest.approx(want, rel=1e-12, abs=1e-15)
    else:
        assert folded.op != "const"


def test_a_parser_that_another_thread_disturbs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 counts the depth of all threads' trees together, and raises SystemError for text that is right."""
    import ast

    from mlpdsl.codegen.expr import formula, syntax

    real, failures = ast.parse, [SystemError("AST constructor recursion depth mismatch (before=60, after=53)")] * 3

    def parse(*args: object, **words: object) -> ast.AST:
        if failures:
            raise failures.pop()
        return real(*args, **words)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(syntax.ast, "parse", parse)
    assert formula.to_text(formula.parse("x * 2.0", ["x"])) == "x * 2.0"
    failures += [SystemError("for good")] * 10
    with pytest.raises(SystemError, match="for good"):
        formula.parse("x", ["x"])


def test_what_a_formula_names_on_the_way_is_no_input() -> None:
    """Found by a hostile spec: an operand called t1, on which the gradient of another operand does not depend."""
    shared = formula.parse("exp(sin(x) * 3.0 + cos(x) / 7.0)", ["x"])
    text = formula.to_text(shared * shared, ("x", "t1"))
    assert text.startswith("t1001 = ") and formula.parse(text, ("x", "t1")) is shared * shared
