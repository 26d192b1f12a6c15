"""Scalar expressions: one small, immutable graph that is traced, differentiated, simplified and printed.

An `Expr` is a node: an operation name and its arguments. Leaves are `symbol(name)` and `const(value)`. Nodes are interned,
so that equal expressions are one object: common subexpressions need no pass of their own, and identity is equality.

The operations stand at the level of mathematics (`sigmoid`, `normal_cdf`); `stable` rewrites them into the elementary ones
(`ELEMENTARY`) in forms that keep their relative precision, and backends print only those.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

ELEMENTARY: Final = frozenset([
    "add", "sub", "mul", "div", "neg", "abs", "floor", "exp", "log", "sqrt", "sin", "cos", "erf", "max", "min",
    "where", "lt", "le", "gt", "ge", "eq", "ne", "both", "either", "invert",
])  # fmt: skip
"""What every backend prints. `max` and `min` pass NaN on, as torch does; comparisons with NaN are false."""

BOOLEAN: Final = frozenset(["lt", "le", "gt", "ge", "eq", "ne", "both", "either", "invert"])
"""Operations whose result is true or false."""

_INTRINSIC_PAIRS: Final = frozenset(["pow", "atan2", "hypot", "logaddexp"])

INTRINSIC: Final = _INTRINSIC_PAIRS | frozenset([
    "sigmoid", "sigmoid_grad", "tanh", "tanh_grad", "normal_cdf", "normal_pdf", "erfc",
    "softplus", "log_sigmoid", "tanh_softplus", "tanh_softplus_grad",
    "expm1", "exp2", "log1p", "log2", "log10", "rsqrt",
    "sinh", "cosh", "tan", "asin", "acos", "atan", "asinh", "acosh", "atanh",
])  # fmt: skip
"""Functions that `stable` knows a form of, in elementary operations and precise at every scale. `pow(x, y)` is the real power:
NaN for x < 0, unless y is a whole constant. `atan2(y, x)` takes the ordinate first, as everywhere."""

ARITY: Final[Mapping[str, int]] = {
    **dict.fromkeys(("neg", "abs", "floor", "exp", "log", "sqrt", "sin", "cos", "erf", "invert"), 1),
    **dict.fromkeys(sorted(INTRINSIC - _INTRINSIC_PAIRS), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "lt", "le", "gt", "ge", "eq", "ne", "both", "either"), 2),
    **dict.fromkeys(sorted(_INTRINSIC_PAIRS), 2),
    "where": 3,
}


@dataclass(frozen=True, eq=False)
class Expr:
    """One node. Make nodes with `symbol`, `const` and `call`, never directly: those intern and fold."""

    op: str
    args: tuple[Expr, ...] = ()
    name: str = ""
    value: float = 0.0

    def __add__(self, other: Expr | float) -> Expr:
        return call("add", self, other)

    def __radd__(self, other: float) -> Expr:
        return call("add", other, self)

    def __sub__(self, other: Expr | float) -> Expr:
        return call("sub", self, other)

    def __rsub__(self, other: float) -> Expr:
        return call("sub", other, self)

    def __mul__(self, other: Expr | float) -> Expr:
        return call("mul", self, other)

    def __rmul__(self, other: float) -> Expr:
        return call("mul", other, self)

    def __truediv__(self, other: Expr | float) -> Expr:
        return call("div", self, other)

    def __rtruediv__(self, other: float) -> Expr:
        return call("div", other, self)

    def __neg__(self) -> Expr:
        return call("neg", self)

    def is_const(self, value: float | None = None) -> bool:
        return self.op == "const" and (value is None or self.value == value)


class _Rules(threading.local):
    differentiating = False


_rules = _Rules()


@contextmanager
def differentiating() -> Iterator[None]:
    """Inside, products are those of derivatives: what a shut gate multiplies does not matter."""
    before, _rules.differentiating = _rules.differentiating, True
    try:
        yield
    finally:
        _rules.differentiating = before


_interned: dict[tuple[object, ...], Expr] = {}


def _intern(op: str, args: tuple[Expr, ...] = (), name: str = "", value: float = 0.0) -> Expr:
    # The repr keeps 0.0 and -0.0 apart; ids are stable because the table keeps every node alive.
    key = (op, *(id(a) for a in args), name, repr(value))
    found = _interned.get(key)
    if found is None:
        found = _interned.setdefault(key, Expr(op, args, name, value))
    return found


def symbol(name: str) -> Expr:
    """An input: `x`, `gate`, `up`, or an operand's name."""
    return _intern("symbol", name=name)


def const(value: float) -> Expr:
    """A finite number. Infinities and NaN have no printing, so an expression that folds to one is refused."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an expression holds the constant {number}; only finite numbers can be printed into a kernel")
    return _intern("const", value=number)


def _as_expr(value: Expr | float) -> Expr:
    return value if isinstance(value, Expr) else const(value)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (1.0 if x >= 0.0 else small) / (1.0 + small)


_FOLD: Final[Mapping[str, Callable[..., float]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "max": max,
    "min": min,
    "abs": abs,
    **{name: getattr(math, name) for name in (
        "floor", "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
        "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "pow", "atan2", "hypot",
    )},
    "sigmoid": _sigmoid,
    "sigmoid_grad": lambda x: _sigmoid(x) * _sigmoid(-x),
    "tanh_grad": lambda x: 4.0 * _sigmoid(2.0 * x) * _sigmoid(-2.0 * x),
    "normal_cdf": lambda x: 0.5 * math.erfc(-x * math.sqrt(0.5)),
    "normal_pdf": lambda x: math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi),
    "tanh_softplus": lambda x: math.tanh(_softplus(x)),
    "tanh_softplus_grad": lambda x: 4.0 * _sigmoid(2.0 * _softplus(x)) * _sigmoid(-2.0 * _softplus(x)) * _sigmoid(x),
    "exp2": lambda x: math.pow(2.0, x),
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "softplus": _softplus,
    "log_sigmoid": lambda x: -_softplus(-x),
    "logaddexp": lambda a, b: max(a, b) + _softplus(-abs(a - b)),
}  # fmt: skip


_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


def _truth(value: bool) -> Expr:
    """A comparison of numbers: true is 0 == 0, false 0 != 0."""
    zero = const(0.0)
    return _intern("eq" if value else "ne", (zero, zero))


def call(op: str, *operands: Expr | float) -> Expr:
    """The node `op(*operands)`, folded and simplified by rules that change no value by more than a rounding."""
    if ARITY.get(op) != len(operands):
        raise ValueError(f"no operation {op!r} of {len(operands)} arguments")
    args = tuple(_as_expr(o) for o in operands)
    if op in _FOLD and all(a.op == "const" for a in args):
        try:
            folded = _FOLD[op](*(a.value for a in args))
        except (ArithmeticError, ValueError):
            folded = math.nan
        if math.isfinite(folded):
            return const(folded)
    if op in _COMPARE and all(a.op == "const" for a in args):
        return _truth(_COMPARE[op](args[0].value, args[1].value))
    return _simplify(op, args) or _intern(op, args)


def _simplify(op: str, args: tuple[Expr, ...]) -> Expr | None:
    if op == "add":
        a, b = args
        if a.is_const(0.0):
            return b
        if b.is_const(0.0):
            return a
    elif op == "sub":
        a, b = args
        if b.is_const(0.0):
            return a
        if a.is_const(0.0):
            return call("neg", b)
        if a.is_const(1.0) and b.op == "sigmoid":
            return call("sigmoid", -b.args[0])  # 1 - sigmoid(x) cancels; sigmoid(-x) is the same number
    elif op == "mul":
        a, b = args
        if a.is_const() and not b.is_const():
            return call("mul", b, a)  # constants stand on the right, so that they meet
        if b.is_const() and math.isclose(b.value, 1.0, rel_tol=1e-15):
            return a  # 1.702 * (1 / 1.702) comes back as 0.9999999999999999
        if b.is_const(-1.0):
            return call("neg", a)
        for factor, gate in ((a, b), (b, a)):
            # A gate that is shut gives 0, not 0 times what may be infinite or NaN: in derivatives, as torch's own formulas have it,
            # and where its other branch is 0 to the last bit. A value that somebody masks and multiplies lets NaN through.
            if is_far_gate(gate) or (_rules.differentiating and gate.op == "where" and gate.args[1].is_const(0.0)):
                return call("where", gate.args[0], 0.0, factor * gate.args[2])
        if b.is_const() and a.op == "mul" and a.args[1].is_const():
            return call("mul", a.args[0], a.args[1].value * b.value)
    elif op == "div":
        a, b = args
        if b.is_const() and abs(b.value) > 1e-300:  # below, the reciprocal is infinite
            return call("mul", a, 1.0 / b.value)
    elif op == "neg":
        (a,) = args
        if a.op == "neg":
            return a.args[0]
        if a.op == "mul" and a.args[1].is_const():
            return call("mul", a.args[0], -a.args[1].value)
        if is_far_gate(a):  # it stays in sight
            return call("where", a.args[0], 0.0, -a.args[2])
    elif op == "where":
        condition, a, b = args
        if a is b or condition is _truth(True):
            return a
        if condition is _truth(False):
            return b
    elif op in ("both", "either"):
        decides = _truth(op == "either")
        if decides in args:
            return decides
        if _truth(op == "both") in args:
            return args[1] if args[0] is _truth(op == "both") else args[0]
    elif op == "invert" and args[0] in (_truth(True), _truth(False)):
        return _truth(args[0] is _truth(False))
    elif op == "pow" and args[1].is_const():
        return _constant_power(args[0], args[1].value)
    return None


FAR: Final = 200.0
"""Beyond this, in absolute value, exp(-x) and the derivatives of sigmoid and tanh are 0 in float32, and in any product there."""


def is_far_gate(node: Expr) -> bool:
    """Whether the node is `where(a < -FAR, 0, …)` or `where(abs(a) > FAR, 0, …)`, which only `aten` makes."""
    if node.op != "where" or not node.args[1].is_const(0.0):
        return False
    condition = node.args[0]
    return condition.op in ("lt", "gt") and condition.args[1].is_const(-FAR if condition.op == "lt" else FAR)


def _constant_power(x: Expr, exponent: float) -> Expr | None:
    """Products, reciprocals and roots where they do: more precise than exp(y·log(x)), and right for negative x."""
    if exponent.is_integer() and abs(exponent) <= 8:
        product = _product(x, int(abs(exponent)))
        return product if exponent >= 0 else 1.0 / product
    if exponent == 1.5:
        return x * call("sqrt", x)
    return call("sqrt" if exponent > 0 else "rsqrt", x) if abs(exponent) == 0.5 else None


def _product(x: Expr, count: int) -> Expr:
    """x·x·…·x by repeated squaring."""
    if count < 2:
        return x if count else const(1.0)
    half = _product(x, count // 2)
    return half * half * x if count % 2 else half * half


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every node under the roots once, arguments before users."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if id(a) not in seen)


def rebuild(root: Expr, visit: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Expr:
    """The graph rewritten from the leaves up: `visit(node, its rewritten arguments)`."""
    done: dict[int, Expr] = {}
    for node in walk(root):
        if id(node) not in done:
            done[id(node)] = visit(node, tuple(done[id(a)] for a in node.args))
    return done[id(root)]


def renewed(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operation on other arguments."""
    if node.op == "snippet":
        return handwritten(node.name, args)
    return call(node.op, *args) if args else node


def handwritten(text: str, args: Sequence[Expr]) -> Expr:
    """A backend's own text, in the form of `snippet.positional`, over its arguments. Nothing is known about it here."""
    return _intern("snippet", tuple(args), text)


def substitute(root: Expr, bindings: Mapping[str, Expr]) -> Expr:
    """The expression with symbols replaced: this is function composition."""

    def visit(node: Expr, args: tuple[Expr, ...]) -> Expr:
        return bindings.get(node.name, node) if node.op == "symbol" else renewed(node, args)

    return rebuild(root, visit)


def symbols(*roots: Expr) -> frozenset[str]:
    """The names of all inputs that the expressions depend on."""
    return frozenset(n.name for n in walk(*roots) if n.op == "symbol")
