"""What each operation that torch records means as an `Expr`.

Torch's fused forward and backward operations (`silu`, `gelu_backward`) are one formula each, so that their stable forms survive.

Where a product of the form x·s(x) would meet ∞·0, x is held inside a range beyond which s(x) is 0 in float32: the result is
then the mathematical limit (silu(-∞) = 0), where eager PyTorch gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from .graph import BOOLEAN, FAR, Expr, call, const, walk

Handler = Callable[..., Any]


def _choose(condition: Expr, yes: Expr | float, no: Expr | float) -> Expr:
    return call("where", condition, yes, no)


def _at_least(x: Expr, low: float) -> Expr:
    return call("max", x, low)


def _within(x: Expr, limit: float) -> Expr:
    return call("min", call("max", x, -limit), limit)


def _silu(x: Expr) -> Expr:
    return _at_least(x, -200.0) * call("sigmoid", x)


def _silu_backward(g: Expr, x: Expr) -> Expr:
    return g * (call("sigmoid", x) + _within(x, 200.0) * call("sigmoid_grad", x))


def _mish(x: Expr) -> Expr:
    return _at_least(x, -200.0) * call("tanh_softplus", x)


def _mish_backward(g: Expr, x: Expr) -> Expr:
    return g * (call("tanh_softplus", x) + _within(x, 200.0) * call("tanh_softplus_grad", x))


_CUBIC = 0.044715
_TANH_SCALE = 2.0 * math.sqrt(2.0 / math.pi)


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        near = _within(x, 30.0)
        return _at_least(x, -30.0) * call("sigmoid", near * _TANH_SCALE * (near * near * _CUBIC + 1.0))
    return _at_least(x, -40.0) * call("normal_cdf", x)


def _gelu_backward(g: Expr, x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        near = _within(x, 30.0)
        u = near * _TANH_SCALE * (near * near * _CUBIC + 1.0)
        slope = (near * near * (3.0 * _CUBIC) + 1.0) * _TANH_SCALE
        return g * (call("sigmoid", u) + near * slope * call("sigmoid_grad", u))
    return g * (call("normal_cdf", x) + _within(x, 40.0) * call("normal_pdf", x))


def _softplus(x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    # As a rule the threshold only spares torch an overflow: past 17, log1p(exp(x)) is x to the last bit of a float32.
    smooth = call("softplus", x * beta) / const(beta)
    return smooth if threshold >= 17.0 else _choose(call("gt", x * beta, threshold), x, smooth)


def _softplus_backward(g: Expr, x: Expr, beta: float, threshold: float) -> Expr:
    smooth = call("sigmoid", x * beta)
    return g * (smooth if threshold >= 17.0 else _choose(call("gt", x * beta, threshold), 1.0, smooth))


def _elu(x: Expr, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Expr:
    return _choose(call("gt", x, 0.0), x * scale, call("expm1", x * input_scale) * (alpha * scale))


def _elu_backward(g: Expr, alpha: float, scale: float, input_scale: float, is_result: bool, x: Expr) -> Expr:
    if is_result:
        return g * _choose(call("le", x, 0.0), (x + alpha * scale) * input_scale, scale)
    return g * _choose(call("le", x, 0.0), call("exp", x * input_scale) * (input_scale * alpha * scale), scale)


def _hardtanh_backward(g: Expr, x: Expr, low: float = -1.0, high: float = 1.0) -> Expr:
    return _choose(call("either", call("le", x, low), call("ge", x, high)), 0.0, g)


def _hardswish(x: Expr) -> Expr:
    middle = x * (x + 3.0) / 6.0
    return _choose(call("le", x, -3.0), 0.0, _choose(call("ge", x, 3.0), x, middle))


def _hardswish_backward(g: Expr, x: Expr) -> Expr:
    return _choose(call("le", x, -3.0), 0.0, _choose(call("lt", x, 3.0), g * (x / 3.0 + 0.5), g))


def _leaky_relu(x: Expr, slope: float = 0.01) -> Expr:
    return _choose(call("gt", x, 0.0), x, x * slope)


def _leaky_relu_backward(g: Expr, x: Expr, slope: float, is_result: bool) -> Expr:
    return _choose(call("gt", x, 0.0), g, g * slope)


def _threshold_backward(g: Expr, x: Expr, threshold: float) -> Expr:
    return _choose(call("le", x, threshold), 0.0, g)


_GROWS: Final = frozenset(["exp", "exp2", "expm1", "sinh", "cosh", "pow"])


def _shut(x: Expr, y: Expr, far: Expr) -> Expr:
    """y, or a shut gate where `far`: y is then 0 to the last bit, and must stay 0 in a product with what overflows.

    Only where the argument x itself grows exponentially, as in x·tanh(exp(x)); elsewhere nothing overflows.
    """
    return _choose(far, 0.0, y) if any(node.op in _GROWS for node in walk(x)) else y


def _exp(x: Expr) -> Expr:
    return _shut(x, call("exp", x), call("lt", x, -FAR))


def _sigmoid_backward(g: Expr, y: Expr) -> Expr:
    if y.op != "sigmoid":
        return g * (y * (1.0 - y))
    (x,) = y.args
    return g * _shut(x, call("sigmoid_grad", x), call("gt", call("abs", x), FAR))


def _tanh_backward(g: Expr, y: Expr) -> Expr:
    if y.op != "tanh":
        return g * (1.0 - y * y)
    (x,) = y.args
    return g * _shut(x, call("tanh_grad", x), call("gt", call("abs", x), FAR))


def _power(x: Expr, exponent: Expr | float) -> Expr:
    if not isinstance(exponent, Expr) or exponent.is_const():
        power = exponent.value if isinstance(exponent, Expr) else float(exponent)
        if power == int(power) and 8 < abs(power) <= 64 and isinstance(x, Expr):  # by squaring: exact for negative x too
            whole = int(abs(power))
            half = _power(x, float(whole // 2))
            product = half * half * x if whole % 2 else half * half
            return product if power > 0 else 1.0 / product
    return call("pow", x, exponent)


def _clamp(x: Expr, min: Expr | float | None = None, max: Expr | float | None = None) -> Expr:
    x = x if min is None or min == -math.inf else call("max", x, min)
    return x if max is None or max == math.inf else call("min", x, max)


def _add(a: Expr | float, b: Expr | float, alpha: float = 1.0) -> Expr:
    return call("add", a, call("mul", b, alpha))


def _sub(a: Expr | float, b: Expr | float, alpha: float = 1.0) -> Expr:
    return call("sub", a, call("mul", b, alpha))


def _div(a: Expr | float, b: Expr | float, rounding_mode: str | None = None) -> Expr:
    quotient = call("div", a, b)
    return {None: quotient, "floor": _floor(quotient), "trunc": _trunc(quotient)}[rounding_mode]


def _floor(x: Expr) -> Expr:
    return call("floor", x)


def _trunc(x: Expr) -> Expr:
    return _choose(call("lt", x, 0.0), -_floor(-x), _floor(x))


def _round(x: Expr, decimals: int = 0) -> Expr:
    """To the nearest whole number, halves to the even one."""
    if decimals:
        raise NotImplementedError("torch.round with decimals")
    up = _floor(x + 0.5)
    tie = call("both", call("eq", up - x, 0.5), call("ne", _floor(up * 0.5) * 2.0, up))
    return _choose(call("ge", call("abs", x), 2.0**22), x, _choose(tie, up - 1.0, up))


def _sign(x: Expr) -> Expr:
    return _choose(call("gt", x, 0.0), 1.0, _choose(call("lt", x, 0.0), -1.0, 0.0))


def _remainder(x: Expr, y: Expr | float) -> Expr:
    return x - _floor(x / y) * y


def _fmod(x: Expr, y: Expr | float) -> Expr:
    return x - _trunc(x / y) * y


def _hardsigmoid_backward(g: Expr, x: Expr) -> Expr:
    return _choose(call("both", call("gt", x, -3.0), call("lt", x, 3.0)), g / 6.0, 0.0)


def _softshrink(x: Expr, lambd: float = 0.5) -> Expr:
    return _choose(call("gt", x, lambd), x - lambd, _choose(call("lt", x, -lambd), x + lambd, x * 0.0))


def _hardshrink(x: Expr, lambd: float = 0.5) -> Expr:
    return _choose(call("le", call("abs", x), lambd), 0.0, x)


def _shrink_backward(g: Expr, x: Expr, lambd: float) -> Expr:
    return _choose(call("le", call("abs", x), lambd), 0.0, g)


def _celu(x: Expr, alpha: float = 1.0) -> Expr:
    return _elu(x, alpha, 1.0, 1.0 / alpha)


def _lerp(a: Expr, b: Expr, weight: Expr | float) -> Expr:
    return a + weight * (b - a)


_LARGEST = 3.4028234663852886e38
"""The largest finite float32: what is beyond is infinite."""


def _nan_to_num(x: Expr, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Expr:
    high = _choose(call("gt", x, _LARGEST), _LARGEST if posinf is None else posinf, x)
    both = _choose(call("lt", x, -_LARGEST), -_LARGEST if neginf is None else neginf, high)
    return _choose(call("ne", x, x), 0.0 if nan is None else nan, both)


def _xlogy(x: Expr, y: Expr | float) -> Expr:
    return _choose(call("eq", x, 0.0), 0.0, x * call("log", y))


def _sinc(x: Expr) -> Expr:
    scaled = x * math.pi
    return _choose(call("eq", x, 0.0), 1.0, call("sin", scaled) / scaled)


def _logit(x: Expr, eps: float | None = None) -> Expr:
    x = x if eps is None else _clamp(x, eps, 1.0 - eps)
    return call("log", x / (1.0 - x))


def _logit_backward(g: Expr, x: Expr, eps: float | None = None) -> Expr:
    slope = g / (x * (1.0 - x))
    low = 0.0 if eps is None else eps
    return _choose(call("both", call("ge", x, low), call("le", x, 1.0 - low)), slope, 0.0)


def _prelu_backward(x: Expr, weight: Expr, g: Expr) -> tuple[Expr, Expr]:
    positive = call("gt", x, 0.0)
    return _choose(positive, g, weight * g), _choose(positive, 0.0, x * g)


def _rrelu(
    x: Expr, noise: object, low: float = 0.125, high: float = 1.0 / 3.0, training: bool = False, generator: Any = None
) -> Expr:
    if training:
        raise NotImplementedError("randomness")
    return _leaky_relu(x, (low + high) / 2.0)


def _rrelu_backward(g: Expr, x: Expr, noise: object, low: float, high: float, training: bool, is_result: bool) -> Expr:
    return _leaky_relu_backward(g, x, (low + high) / 2.0, is_result)


def _smooth_l1(x: Expr, y: Expr, reduction: int = 1, beta: float = 1.0) -> Expr:
    _unreduced(reduction)
    size = call("abs", x - y)
    return _choose(call("lt", size, beta), size * size * (0.5 / beta), size - 0.5 * beta)


def _smooth_l1_backward(g: Expr, x: Expr, y: Expr, reduction: int, beta: float) -> Expr:
    _unreduced(reduction)
    return g * _within((x - y) / beta, 1.0)


def _squared(x: Expr, y: Expr, reduction: int = 1) -> Expr:
    _unreduced(reduction)
    return (x - y) * (x - y)


def _squared_backward(g: Expr, x: Expr, y: Expr, reduction: int) -> Expr:
    _unreduced(reduction)
    return g * ((x - y) * 2.0)


def _unreduced(reduction: int) -> None:
    if reduction:
        raise NotImplementedError("a reduction; pass reduction='none'")


def _logical_not(x: Expr) -> Expr:
    return call("invert", x) if x.op in BOOLEAN else call("eq", x, 0.0)


def _copysign(x: Expr, y: Expr | float) -> Expr:
    number = y.value if isinstance(y, Expr) and y.op == "const" else y
    if isinstance(number, Expr):
        return _choose(call("lt", number, 0.0), -call("abs", x), call("abs", x))
    return -call("abs", x) if math.copysign(1.0, number) < 0 else call("abs", x)


def _ignoring_nan(op: str) -> Handler:
    """fmax and fmin: the other operand where one is NaN."""
    return lambda x, y: _choose(call("ne", x, x), y, _choose(call("ne", y, y), x, call(op, x, y)))


def _comparison(op: str) -> Handler:
    """A comparison; with an infinity, which has no printing, it is one with the largest number."""

    def compare(a: Expr, b: Expr | float) -> Expr:
        if isinstance(b, Expr) or not math.isinf(b):
            return call(op, a, b)
        if b < 0:
            mirror = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(op, op)
            return _comparison(mirror)(-a, math.inf)  # type: ignore[no-any-return]
        beyond = call("gt", a, _LARGEST)
        return {
            "eq": beyond, "ge": beyond, "gt": call("ne", 0.0, 0.0), "lt": call("le", a, _LARGEST), "ne": call("invert", beyond),
            "le": call("eq", a, a),
        }[op]  # fmt: skip

    return compare


def _elementwise(op: str) -> Handler:
    return lambda *args: call(op, *args)


TAKES_BOOLEANS: Final = frozenset(
    ["where", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "masked_fill"]
)
"""Torch's operations that take truth values; to every other, true is 1 and false is 0."""


ATEN: Final[Mapping[str, Handler]] = {
    **{name: _elementwise(op) for name, op in {
        "mul": "mul", "neg": "neg", "abs": "abs", "log": "log", "sqrt": "sqrt", "sin": "sin", "cos": "cos",
        "erf": "erf", "erfc": "erfc", "special_erfc": "erfc", "sigmoid": "sigmoid", "tanh": "tanh", "expm1": "expm1",
        "log1p": "log1p", "sinh": "sinh", "cosh": "cosh", "tan": "tan", "asin": "asin", "acos": "acos", "atan": "atan",
        "asinh": "asinh", "acosh": "acosh", "atanh": "atanh", "rsqrt": "rsqrt", "exp2": "exp2", "special_exp2": "exp2",
        "log2": "log2", "log10": "log10", "atan2": "atan2", "hypot": "hypot", "logaddexp": "logaddexp", "floor": "floor",
        "special_ndtr": "normal_cdf", "maximum": "max", "minimum": "min", "where": "where",
        "logical_and": "both",
        "logical_or": "either", "bitwise_and": "both", "bitwise_or": "either", "bitwise_not": "invert",
    }.items()},
    **{name: _comparison(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "exp": _exp,
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1.0: _sub(b, a, alpha),
    "div": _div,
    "floor_divide": lambda a, b: _div(a, b, "floor"),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / x,
    "pow": _power,
    "ceil": lambda x: -_floor(-x),
    "trunc": _trunc,
    "frac": lambda x: x - _trunc(x),
    "round": _round,
    "sign": _sign,
    "sgn": _sign,
    "copysign": _copysign,
    "fmax": _ignoring_nan("max"),
    "fmin": _ignoring_nan("min"),
    "_efficientzerotensor": lambda size: const(0.0),
    "remainder": _remainder,
    "fmod": _fmod,
    "lerp": _lerp,
    "addcmul": lambda a, b, c, value=1.0: a + b * c * value,
    "addcdiv": lambda a, b, c, value=1.0: a + b / c * value,
    "clamp": _clamp,
    "clamp_min": lambda x, low: call("max", x, low),
    "clamp_max": lambda x, high: call("min", x, high),
    "masked_fill": lambda x, mask, value: _choose(mask, value, x),
    "logical_not": _logical_not,
    "mse_loss": _squared,
    "mse_loss_backward": _squared_backward,
    "smooth_l1_loss": _smooth_l1,
    "smooth_l1_loss_backward": _smooth_l1_backward,
    "fill": lambda x, value: const(value),
    "zero": lambda x: const(0.0),
    "isnan": lambda x: call("ne", x, x),
    "isinf": lambda x: call("gt", call("abs", x), _LARGEST),
    "nan_to_num": _nan_to_num,
    "xlogy": _xlogy,
    "sinc": _sinc,
    "logit": _logit,
    "logit_backward": _logit_backward,
    "scalar_tensor": const,
    "zeros_like": lambda x: const(0.0),
    "ones_like": lambda x: const(1.0),
    "full_like": lambda x, value: const(value),
    "new_zeros": lambda x, size: const(0.0),
    "new_ones": lambda x, size: const(1.0),
    "new_full": lambda x, size, value: const(value),
    "full": lambda size, value: const(value),
    "zeros": lambda size: const(0.0),
    "ones": lambda size: const(1.0),
    **dict.fromkeys(("detach", "clone", "alias", "lift_fresh_copy", "lift_fresh", "contiguous"), lambda x: x),
    "relu": lambda x: call("max", x, 0.0),
    "relu6": lambda x: _clamp(x, 0.0, 6.0),
    "threshold": lambda x, threshold, value: _choose(call("le", x, threshold), value, x),
    "threshold_backward": _threshold_backward,
    "hardtanh": lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    "hardtanh_backward": _hardtanh_backward,
    "hardsigmoid": lambda x: _clamp(x + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid_backward": _hardsigmoid_backward,
    "softshrink": _softshrink,
    "softshrink_backward": _shrink_backward,
    "hardshrink": _hardshrink,
    "hardshrink_backward": _shrink_backward,
    "leaky_relu": _leaky_relu,
    "leaky_relu_backward": _leaky_relu_backward,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_backward": _rrelu_backward,
    "_prelu_kernel": lambda x, weight: _choose(call("gt", x, 0.0), x, weight * x),
    "_prelu_kernel_backward": lambda x, weight, g: _prelu_backward(x, weight, g),
    "elu": _elu,
    "elu_backward": _elu_backward,
    "celu": _celu,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "log_sigmoid_forward": lambda x: (-call("softplus", -x), x),
    "log_sigmoid_backward": lambda g, x, buffer: g * call("sigmoid", -x),
    "silu": _silu,
    "silu_backward": _silu_backward,
    "mish": _mish,
    "mish_backward": _mish_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "hardswish": _hardswish,
    "hardswish_backward": _hardswish_backward,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
}  # fmt: skip
"""Every operation of torch that has a printing, to the expression it means."""
