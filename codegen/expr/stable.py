"""Forms that keep their relative precision in float32, for every input.

`expand` rewrites the intrinsics of `graph` into elementary operations. The forms overflow nowhere on the way to a finite value
(exponentials are `exp(-|x|)`, `exp(-x²/2)` or already halved) and never subtract rounded numbers that nearly agree; where the
sign of x decides, the quotient stays positive. Odd functions end in x·p(x²) with p(0) = 1, so that signed zeros and subnormals
pass. A condition with NaN is false, so the last branch of each `where` is the one that passes NaN on.
`sigmoid(x)` and `sigmoid_grad(x)` share their exponential and reciprocal, because equal nodes are one node.

The unit of error is 2⁻²⁴·(|f| + Σ|x·∂f/∂x|), what the rounding of the inputs costs anyway. With IEEE operations the worst forms
measure 5.5 of it (erfc), 4.1 (normal_cdf) and 3.8 (logaddexp), most of the others under 2.5; were each division, root, sine and
exponential off by a GPU's full bound of 2 ulp, no form passes 15, and most stay under 5. `log` needs no form of its own.

The polynomials are Chebyshev interpolants fitted in 40-digit arithmetic; the error beside each is its own worst relative error
in units of 2⁻²⁴, before rounding in the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .graph import Expr, call, rebuild, renewed

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
# sinh(x)/x in x², |x| ≤ 0.8: 0.06 units.
_SINH = (0.9999999963457387, 0.1666668493466278, 0.008331907542620785, 0.00020196839124335302)
# asin(x)/x in x², |x| ≤ 0.5: 0.08 units.
_ASIN = (
    0.999999995983738, 0.16666782005775338, 0.07494696687423973, 0.045520635631714566, 0.02399399965364759, 0.04241737375979984,
)  # fmt: skip
# atan(x)/x in x², |x| ≤ 1: 0.05 units.
_ATAN = (
    0.9999999971605454, -0.3333327629198255, 0.19998075281148714, -0.14260016082820906, 0.10932341501303093,
    -0.08349724968301601, 0.05708955593030619, -0.030351864785781172, 0.010487649254949306, -0.0017011700640685973,
)  # fmt: skip
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


def _signed(x: Expr, size: Expr | float) -> Expr:
    """The size with the sign of x."""
    return _choose(call("lt", x, 0.0), -size, size)


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


def _log1p_decay(size: Expr) -> Expr:
    """log(1 + exp(-size)) for a size ≥ 0."""
    q = call("exp", -size)
    s = q / (2.0 + q)  # log1p(q) = 2·atanh(q / (2 + q)), and s ≤ 1/3
    return s * _polynomial(_ATANH, s * s)


def _softplus(x: Expr) -> Expr:
    return call("max", x, 0.0) + _log1p_decay(_abs(x))


def _log_sigmoid(x: Expr) -> Expr:
    return call("min", x, 0.0) - _log1p_decay(_abs(x))


def _logaddexp(a: Expr, b: Expr) -> Expr:
    apart = _choose(call("eq", a, b), 0.0, _abs(a - b))  # equal infinities are 0 apart
    return call("max", a, b) + _log1p_decay(apart)


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


def _log1p(x: Expr) -> Expr:
    r = 1.0 / (2.0 + x)
    s = x * r  # |s| ≤ 1/3 where -1/2 ≤ x ≤ 1
    near = call("le", _abs(x - 0.25), 0.75)
    return _choose(near, x * (r * _polynomial(_ATANH, s * s)), call("log", 1.0 + x))


def _halved_exp(x: Expr) -> Expr:
    """exp(|x|)/2, which overflows no earlier than sinh and cosh."""
    return call("exp", _abs(x) - math.log(2.0))


def _sinh(x: Expr) -> Expr:
    e = _halved_exp(x)
    return _choose(call("lt", _abs(x), 0.8), x * _polynomial(_SINH, x * x), _signed(x, e - 0.25 / e))


def _cosh(x: Expr) -> Expr:
    e = _halved_exp(x)
    return e + 0.25 / e


def _tan(x: Expr) -> Expr:
    return call("sin", x) / call("cos", x)


def _asin_parts(x: Expr) -> tuple[Expr, Expr]:
    """|x| ≤ 1/2, and there asin(x), elsewhere asin(√((1 - |x|)/2)) = acos(|x|)/2; NaN for |x| > 1."""
    a = _abs(x)
    near = call("le", a, 0.5)
    square = _choose(near, x * x, 0.5 - 0.5 * a)
    return near, _choose(near, x, call("sqrt", square)) * _polynomial(_ASIN, square)


def _asin(x: Expr) -> Expr:
    near, part = _asin_parts(x)
    return _choose(near, part, _signed(x, 0.5 * math.pi - 2.0 * part))


def _acos(x: Expr) -> Expr:
    near, part = _asin_parts(x)
    far = _choose(call("lt", x, 0.0), math.pi - 2.0 * part, 2.0 * part)
    return _choose(near, 0.5 * math.pi - part, far)


def _atan(x: Expr) -> Expr:
    near = call("le", _abs(x), 1.0)
    t = _choose(near, x, 1.0 / x)
    part = t * _polynomial(_ATAN, t * t)
    return _choose(near, part, _signed(x, 0.5 * math.pi) - part)


def _atan2(y: Expr, x: Expr) -> Expr:
    """The quotient is the one of size ≤ 1; ±1 at equal infinities, and y where both are 0 (the sign of x = -0 is not seen)."""
    a, b = _abs(y), _abs(x)
    steep = call("gt", a, b)
    corner = _choose(call("eq", a, 0.0), y, _signed(x, _signed(y, 1.0)))
    t = _choose(call("eq", a, b), corner, _choose(steep, x, y) / _choose(steep, y, x))
    part = t * _polynomial(_ATAN, t * t)
    flat = _choose(call("lt", x, 0.0), part + _signed(y, math.pi), part)
    return _choose(steep, _signed(y, 0.5 * math.pi) - part, flat)


def _asinh(x: Expr) -> Expr:
    """2·atanh(s) with s = x / (1 + √(1 + x²)), |s| ≤ 1/3 where |x| ≤ 3/4; past 2¹³, log(2·|x|) to the last bit."""
    a = _abs(x)
    c = call("sqrt", 1.0 + x * x)
    r = 1.0 / (1.0 + c)
    s = x * r
    huge = call("gt", a, 8192.0)
    far = call("log", _choose(huge, a, a + c)) + _choose(huge, math.log(2.0), 0.0)
    return _choose(call("le", a, 0.75), x * (r * _polynomial(_ATANH, s * s)), _signed(x, far))


def _acosh(x: Expr) -> Expr:
    """2·atanh(s) with s = √(x - 1) / √(x + 1), s ≤ 1/3 where x ≤ 5/4; past it x + √(x² - 1) = (√(x - 1) + √(x + 1))²/2.

    The root of x - 1 is NaN for x < 1, in either branch.
    """
    low, high = call("sqrt", x - 1.0), call("sqrt", x + 1.0)
    s = low / high
    far = 2.0 * call("log", (low + high) * math.sqrt(0.5))
    return _choose(call("le", x, 1.25), s * _polynomial(_ATANH, s * s), far)


def _atanh(x: Expr) -> Expr:
    a = _abs(x)
    far = 0.5 * call("log", (1.0 + a) / (1.0 - a))
    return _choose(call("le", a, 1.0 / 3.0), x * (0.5 * _polynomial(_ATANH, x * x)), _signed(x, far))


def _rsqrt(x: Expr) -> Expr:
    return 1.0 / call("sqrt", x)


def _hypot(a: Expr, b: Expr) -> Expr:
    large, small = call("max", _abs(a), _abs(b)), call("min", _abs(a), _abs(b))
    t = small / large
    # Where both agree it is √2 times either: also where they are 0 or infinite, and t is NaN.
    return large * _choose(call("eq", small, large), math.sqrt(2.0), call("sqrt", 1.0 + t * t))


def _pow(x: Expr, y: Expr) -> Expr:
    """exp(y·log x), with a relative error of 2 + 3·|y·log x| units of 2⁻²⁴, and of 4 + 4·|y·log x| with a GPU's exp.

    The rounding of y alone costs |y·log x| units; still, x^0.3 is off by up to 3e-6 at the ends of the range. `graph` has turned
    the common powers into products and roots. A whole constant y sees |x|, and the sign of x where it is odd.
    """
    if x.is_const():
        return call("exp", y * call("log", x))
    if not y.is_const():
        one = call("either", call("eq", x, 1.0), call("eq", y, 0.0))  # also at infinity, as in C
        return _choose(one, 1.0, call("exp", y * call("log", x)))
    if not y.value.is_integer():
        return call("exp", y * call("log", x))
    size = call("exp", y * call("log", _abs(x)))
    return _signed(x, size) if y.value % 2 else size


FORMS: Final[Mapping[str, Callable[..., Expr]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_grad": _sigmoid_grad,
    "tanh": _tanh,
    "tanh_grad": _tanh_grad,
    "normal_cdf": _normal_cdf,
    "normal_pdf": _normal_pdf,
    "erfc": _erfc,
    "softplus": _softplus,
    "log_sigmoid": _log_sigmoid,
    "logaddexp": _logaddexp,
    "expm1": _expm1,
    "exp2": lambda x: call("exp", x * math.log(2.0)),
    "log1p": _log1p,
    "log2": lambda x: call("log", x) * (1.0 / math.log(2.0)),
    "log10": lambda x: call("log", x) * (1.0 / math.log(10.0)),
    "tanh_softplus": _tanh_softplus,
    "tanh_softplus_grad": _tanh_softplus_grad,
    "sinh": _sinh,
    "cosh": _cosh,
    "tan": _tan,
    "asin": _asin,
    "acos": _acos,
    "atan": _atan,
    "atan2": _atan2,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "rsqrt": _rsqrt,
    "hypot": _hypot,
    "pow": _pow,
}


def expand(root: Expr) -> Expr:
    """The same function in elementary operations only."""

    def visit(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op in FORMS:
            return FORMS[node.op](*args)
        return renewed(node, args)

    return rebuild(root, visit)
