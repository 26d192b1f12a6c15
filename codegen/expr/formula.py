"""Expressions as text: `max(x, -200.0) * sigmoid(x)`, and back through an allow-listed grammar.

The text is Python's own expression syntax restricted to names, finite numbers, `+ - * /` and calls of the operations of
`graph`. It is what `registered.json` holds and what people are shown.
"""

from __future__ import annotations

import ast
from collections.abc import Collection

from .graph import ARITY, Expr, call, const, symbol

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}


def to_text(expr: Expr) -> str:
    """The formula, with no more parentheses than it needs."""
    return _text(expr)[0]


def _text(expr: Expr) -> tuple[str, int]:
    """The text and how tightly it binds: 1 sums, 2 products, 3 signs, 4 atoms."""
    if expr.op == "symbol":
        return expr.name, 4
    if expr.op == "const":
        return repr(expr.value), 4 if expr.value >= 0 else 3
    if expr.op == "neg":
        inner, binds = _text(expr.args[0])
        return (f"-{inner}" if binds >= 3 else f"-({inner})"), 3
    if expr.op in _INFIX:
        sign, level = _INFIX[expr.op]
        left, left_binds = _text(expr.args[0])
        right, right_binds = _text(expr.args[1])
        left = left if left_binds >= level else f"({left})"
        right = right if right_binds > level else f"({right})"  # the right side of - and / must not regroup
        return f"{left} {sign} {right}", level
    return f"{expr.op}({', '.join(to_text(a) for a in expr.args)})", 4


def parse(text: str, names: Collection[str]) -> Expr:
    """The expression of `text` over the inputs `names`. Anything outside the grammar is a ValueError that names it."""
    if len(text) > 20_000:
        raise ValueError(f"a formula of {len(text)} characters; at most 20000 are read")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a formula: {text[:80]!r}") from error
    return _parse(tree.body, names)


def _parse(node: ast.expr, names: Collection[str]) -> Expr:
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"the formula names {node.id!r}; its inputs are {', '.join(sorted(names))}")
        return symbol(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        try:
            return const(node.value)
        except OverflowError:
            raise ValueError(f"the number {str(node.value)[:20]}… is too large") from None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_parse(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return call(_BINARY[type(node.op)], _parse(node.left, names), _parse(node.right, names))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and not node.keywords
        and ARITY.get(node.func.id) == len(node.args)
    ):
        return call(node.func.id, *(_parse(a, names) for a in node.args))
    raise ValueError(f"{ast.unparse(node)[:80]!r} is outside the grammar of formulas")
