"""From a Python function of torch tensors to an `Expr` and its derivatives: `make_fx` over `torch.func.vjp`.

Torch differentiates; this module only reads what it recorded, operation by operation. Torch's fused forward and backward
operations (`silu`, `gelu_backward`) are read as one formula each, so that their stable forms survive.

Where a product of the form x·s(x) would meet ∞·0, x is held inside a range beyond which s(x) is 0 in float32: the result is
then the mathematical limit (silu(-∞) = 0), where eager PyTorch gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from .graph import Expr, call, const, substitute, symbol

if TYPE_CHECKING:
    from torch import fx

Handler = Callable[..., Expr]


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
    # The threshold only spares torch an overflow: past it, log1p(exp(x)) is x to the last bit of a float32.
    return call("softplus", x * beta) / const(beta)


def _softplus_backward(g: Expr, x: Expr, beta: float, threshold: float) -> Expr:
    return g * call("sigmoid", x * beta)


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


def _sigmoid_backward(g: Expr, y: Expr) -> Expr:
    return g * (call("sigmoid_grad", y.args[0]) if y.op == "sigmoid" else y * (1.0 - y))


def _tanh_backward(g: Expr, y: Expr) -> Expr:
    return g * (call("tanh_grad", y.args[0]) if y.op == "tanh" else 1.0 - y * y)


def _power(x: Expr, exponent: float) -> Expr:
    whole = int(exponent)
    if whole != exponent or not 0 <= whole <= 8:
        raise NotImplementedError(f"a power of {exponent}; whole powers from 0 to 8 have a printing")
    return math.prod([x] * whole, start=const(1.0))


def _clamp(x: Expr, low: float | None = None, high: float | None = None) -> Expr:
    x = x if low is None else call("max", x, low)
    return x if high is None else call("min", x, high)


def _add(a: Expr | float, b: Expr | float, alpha: float = 1.0) -> Expr:
    return call("add", a, call("mul", b, alpha))


def _sub(a: Expr | float, b: Expr | float, alpha: float = 1.0) -> Expr:
    return call("sub", a, call("mul", b, alpha))


def _elementwise(op: str) -> Handler:
    return lambda *args: call(op, *args)


_ATEN: Final[Mapping[str, Handler]] = {
    **{name: _elementwise(op) for name, op in {
        "mul": "mul", "div": "div", "neg": "neg", "abs": "abs", "exp": "exp", "log": "log", "sqrt": "sqrt", "sin": "sin",
        "cos": "cos", "erf": "erf", "erfc": "erfc", "special_erfc": "erfc", "sigmoid": "sigmoid", "tanh": "tanh",
        "expm1": "expm1", "maximum": "max", "minimum": "min", "where": "where", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
        "eq": "eq", "ne": "ne", "logical_and": "both", "logical_and_": "both", "logical_or": "either", "logical_not": "invert",
        "bitwise_and": "both", "bitwise_or": "either", "bitwise_not": "invert",
    }.items()},
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1.0: _sub(b, a, alpha),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / x,
    "pow": _power,
    "clamp": _clamp,
    "scalar_tensor": const,
    "relu": lambda x: call("max", x, 0.0),
    "threshold_backward": _threshold_backward,
    "hardtanh": lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    "hardtanh_backward": _hardtanh_backward,
    "leaky_relu": _leaky_relu,
    "leaky_relu_backward": _leaky_relu_backward,
    "elu": _elu,
    "elu_backward": _elu_backward,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
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


def trace(function: Callable[..., Any], names: Sequence[str]) -> tuple[Expr, dict[str, Expr]]:
    """The function's value over the inputs `names`, and its partial derivative by each of them.

    Raises NotImplementedError, naming the operation, where torch recorded one that has no printing.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    def value_and_pullback(cotangent: Any, *inputs: Any) -> Any:
        value, pullback, *_ = torch.func.vjp(function, *inputs)
        with torch.no_grad():  # else torch records its twice-differentiable formulas, which are less stable
            return (value, *pullback(cotangent))

    example = torch.linspace(-1.0, 1.0, 4)
    graph = make_fx(value_and_pullback)(example, *(example.clone() for _ in names)).graph
    results = _read(graph, ("cotangent", *names))
    value, pulled = results[0], results[1:]
    one = {"cotangent": const(1.0)}
    return value, {name: substitute(p, one) for name, p in zip(names, pulled, strict=True)}


def _read(graph: fx.Graph, names: Sequence[str]) -> list[Expr]:
    known: dict[Any, Expr] = {}
    inputs = iter(names)

    def look_up(argument: Any) -> Any:
        return known[argument] if hasattr(argument, "op") and hasattr(argument, "graph") else argument

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = symbol(next(inputs))
        elif node.op == "output":
            return [look_up(a) for a in node.args[0]]
        elif node.op == "call_function":
            name = str(node.target).removeprefix("aten.").split(".")[0]
            if name not in _ATEN:
                raise NotImplementedError(f"torch recorded aten.{name}, which has no scalar printing")
            known[node] = _ATEN[name](
                *(look_up(a) for a in node.args), **{k: look_up(v) for k, v in node.kwargs.items() if k in ("approximate", "alpha")}
            )
        else:
            raise NotImplementedError(f"torch recorded a node of kind {node.op!r}: a captured tensor has no scalar printing")
    raise AssertionError("a traced graph without an output")
