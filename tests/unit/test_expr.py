"""Scalar expressions: derived by torch, shipped as formulas, precise in float32 everywhere, printed only from an allow-list."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpdsl.codegen.expr import formula, registered, stable
from mlpdsl.codegen.expr.aten import trace
from mlpdsl.codegen.expr.graph import ARITY, ELEMENTARY, INTRINSIC, Expr, call, const, substitute, symbol, symbols, walk
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.functions import FUNCTIONS

X = symbol("x")
UNIT = 2.0**-24

_NUMPY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs, "exp": np.exp,
    "log": np.log, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "max": np.maximum, "min": np.minimum, "where": np.where,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "both": np.logical_and, "either": np.logical_or, "invert": np.logical_not,
}  # fmt: skip


def evaluate(expr: Expr, x: np.ndarray) -> np.ndarray:
    """The elementary form, each operation rounded to float32, as a kernel without fused multiply-adds computes it."""
    values: dict[int, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node in walk(stable.expand(expr)):
            if node.op == "symbol":
                values[id(node)] = x
            elif node.op == "const":
                values[id(node)] = np.float32(node.value)
            else:
                assert node.op in ELEMENTARY
                values[id(node)] = _NUMPY[node.op](*(values[id(a)] for a in node.args))
    result = values[id(stable.expand(expr))]
    return np.broadcast_to(np.asarray(result, dtype=np.float32), x.shape)


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
    assert {"value": formula.to_text(value), "derivative": formula.to_text(partials["x"])} == shipped[name]


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
    relu_grad = symbol("grad") * registered.activation("relu")[1]
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
        assert all(n.op in ELEMENTARY or not n.args for n in walk(stable.expand(call(op, X))))


def test_an_operation_without_a_printing_is_named() -> None:
    with pytest.raises(NotImplementedError, match="cumsum"):
        trace(lambda x: torch.cumsum(x, 0), ("x",))
