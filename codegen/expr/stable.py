"""Forms that keep their relative precision in float32, for every input.

`expand` rewrites the intrinsics of `graph` into elementary operations. Each form is built on `exp(-|x|)` or `exp(-x²/2)`, which
cannot overflow, and never subtracts numbers that nearly agree; where the sign of x decides, the quotient stays positive.
`sigmoid(x)` and `sigmoid_grad(x)` share their exponential and reciprocal, because equal nodes are one node.

The polynomials are Chebyshev interpolants fitted in 40-digit arithmetic; the error beside each is its own worst relative error
in units of 2⁻²⁴, before rounding in the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .graph import Expr, call, rebuild

# tanh(x)/x in x², |x| ≤ 0.6: 0.05 units.
_TANH = (
    0.9999999974801559,
    -0.3333328283432541,
    0.13331679634558194,
    -0.05376798350832486,
    0.020751349105947968,
    -0.005849643909786256,
)
# 2·atanh(s)/s in s², s ≤ 1/3: 0.002 units.
_ATANH = (1.9999999998090061, 0.6666667902643397, 0.3999871124686223, 0.28620207408439396, 0.21398560506659048, 0.24393908084086977)
# expm1(x)/x, |x| ≤ 0.5: 0.06 units.
_EXPM1 = (
    1.0,
    0.5000000425920544,
    0.16666667139493802,
    0.041665304193438314,
    0.008333182071584195,
    0.0013997773379590332,
    0.000199621762266955,
)
# Φ(-a)·exp(a²/2)/t in t = 1/(1 + 0.3·a), 0 ≤ a ≤ 14.5: 0.07 units.
_TAIL = (
    0.1196877476912642, 0.11955043147351704, 0.11041841109557173, 0.07751790107697594, 0.09871138234526552,
    -0.08421348151641854, 0.19755058456609909, -0.2325244073163213, 0.1142574529514405, -0.020956024236529876,
)  # fmt: skip


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Horner's scheme, lowest coefficient first."""
    total: Expr | float = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    assert isinstance(total, Expr)
    return total


def _abs(x: Expr) -> Expr:
    return call("abs", x)


def _choose(condition: Expr, yes: Expr | float, no: Expr | float) -> Expr:
    return call("where", condition, yes, no)


def _decay(x: Expr) -> tuple[Expr, Expr]:
    """q = exp(-|x|) in (0, 1] and 1 / (1 + q), the two halves of every logistic form."""
    q = call("exp", -_abs(x))
    return q, 1.0 / (1.0 + q)


def _sigmoid(x: Expr) -> Expr:
    q, r = _decay(x)
    return _choose(call("ge", x, 0.0), r, q * r)


def _sigmoid_grad(x: Expr) -> Expr:
    q, r = _decay(x)
    return q * r * r


def _tanh(x: Expr) -> Expr:
    q, r = _decay(2.0 * x)
    far = (1.0 - q) * r
    return _choose(call("lt", _abs(x), 0.6), x * _polynomial(_TANH, x * x), _choose(call("lt", x, 0.0), -far, far))


def _tanh_grad(x: Expr) -> Expr:
    q, r = _decay(2.0 * x)
    return 4.0 * (q * r * r)


def _bell(x: Expr) -> Expr:
    return call("exp", x * x * -0.5)


def _normal_cdf(x: Expr) -> Expr:
    t = 1.0 / (1.0 + 0.3 * _abs(x))
    tail = _bell(x) * (t * _polynomial(_TAIL, t))
    return _choose(call("lt", x, 0.0), tail, 1.0 - tail)


def _normal_pdf(x: Expr) -> Expr:
    return _bell(x) * (1.0 / math.sqrt(2.0 * math.pi))


def _erfc(x: Expr) -> Expr:
    return 2.0 * _normal_cdf(x * -math.sqrt(2.0))


def _softplus(x: Expr) -> Expr:
    q = call("exp", -_abs(x))
    s = q / (2.0 + q)  # log1p(q) = 2·atanh(q / (2 + q)), and s ≤ 1/3
    return call("max", x, 0.0) + s * _polynomial(_ATANH, s * s)


def _expm1(x: Expr) -> Expr:
    return _choose(call("lt", _abs(x), 0.5), x * _polynomial(_EXPM1, x), call("exp", x) - 1.0)


def _tanh_softplus_parts(x: Expr) -> tuple[Expr, Expr, Expr, Expr]:
    """q = exp(-|x|), x < 0, and tanh(softplus(x)) as a quotient of positive sums, scaled by q² where x ≥ 0."""
    q = call("exp", -_abs(x))
    negative = call("lt", x, 0.0)
    numerator = _choose(negative, q * (q + 2.0), 1.0 + 2.0 * q)
    denominator = numerator + _choose(negative, 2.0, 2.0 * (q * q))
    return q, negative, numerator, denominator


def _tanh_softplus(x: Expr) -> Expr:
    _, _, numerator, denominator = _tanh_softplus_parts(x)
    return numerator / denominator


def _tanh_softplus_grad(x: Expr) -> Expr:
    q, negative, _, denominator = _tanh_softplus_parts(x)
    r = 1.0 / denominator
    return 4.0 * (q * (1.0 + q)) * _choose(negative, 1.0, q) * (r * r)


FORMS: Final[Mapping[str, Callable[[Expr], Expr]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_grad": _sigmoid_grad,
    "tanh": _tanh,
    "tanh_grad": _tanh_grad,
    "normal_cdf": _normal_cdf,
    "normal_pdf": _normal_pdf,
    "erfc": _erfc,
    "softplus": _softplus,
    "expm1": _expm1,
    "tanh_softplus": _tanh_softplus,
    "tanh_softplus_grad": _tanh_softplus_grad,
}


def expand(root: Expr) -> Expr:
    """The same function in elementary operations only."""

    def visit(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op in FORMS:
            return FORMS[node.op](*args)
        return call(node.op, *args) if args else node

    return rebuild(root, visit)
