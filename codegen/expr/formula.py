"""Expressions as text: `max(x, -200.0) * sigmoid(x)`, and back through an allow-listed grammar.

The text is Python's own syntax restricted to names, finite numbers, `+ - * /` and calls of the operations of `graph`; what is
used more than once, or nested deeply, is named first: `t1 = exp(-abs(x)); t1 / (1.0 + t1)`. It is what `registered.json` and
the JSON form of a spec hold, and what people are shown.
"""

from __future__ import annotations

import ast
from collections.abc import Collection

from . import syntax
from .graph import ARITY, BOOLEAN, Expr, call, const, symbol, symbols, walk

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}

MAX_CHARACTERS = 100_000
_SHORT = 24
"""Characters up to which a shared expression is written out each time."""
_DEEP = 30
"""Levels of nesting after which an expression is named: Python's parser takes about 90."""


def to_text(expr: Expr, inputs: Collection[str] = ()) -> str:
    """The formula, with no more parentheses than it needs. What it names on the way has none of the names of `inputs`, which may
    be more than the expression depends on."""
    uses: dict[int, int] = {}
    for node in walk(expr):
        for a in node.args:
            uses[id(a)] = uses.get(id(a), 0) + 1
    taken = symbols(expr) | set(inputs)
    texts: dict[int, tuple[str, int, int]] = {}  # text, how tightly it binds, levels of nesting
    bindings: list[str] = []
    for node in walk(expr):
        text, binds = _text(node, texts)
        depth = 1 + max((texts[id(a)][2] for a in node.args), default=0)
        if node is not expr and node.args and ((uses[id(node)] > 1 and len(text) > _SHORT) or depth > _DEEP):
            count = len(bindings) + 1
            while f"t{count}" in taken:
                count += 1000
            bindings.append(f"t{count} = {text}")
            text, binds, depth = f"t{count}", 4, 0
        texts[id(node)] = text, binds, depth
    return "; ".join([*bindings, texts[id(expr)][0]])


def _text(node: Expr, texts: dict[int, tuple[str, int, int]]) -> tuple[str, int]:
    """The text and how tightly it binds: 1 sums, 2 products, 3 signs, 4 atoms."""
    if node.op == "symbol":
        return node.name, 4
    if node.op == "const":
        return repr(node.value), 4 if node.value >= 0 else 3
    args = [texts[id(a)][:2] for a in node.args]
    if node.op == "neg":
        inner, binds = args[0]
        return (f"-{inner}" if binds >= 3 else f"-({inner})"), 3
    if node.op in _INFIX:
        sign, level = _INFIX[node.op]
        (left, left_binds), (right, right_binds) = args
        left = left if left_binds >= level else f"({left})"
        right = right if right_binds > level else f"({right})"  # the right side of - and / must not regroup
        return f"{left} {sign} {right}", level
    return f"{node.op}({', '.join(text for text, _ in args)})", 4


def parse(text: str, names: Collection[str]) -> Expr:
    """The expression of `text` over the inputs `names`. Anything outside the grammar is a ValueError that names it."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a formula of {len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        body = syntax.module(text.strip()).body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"not a formula: {text[:80]!r}") from error
    known = {name: symbol(name) for name in names}
    for statement in body[:-1]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in known:
                known[name] = _parse(value, known)
            case _:
                raise ValueError(
                    f"{ast.unparse(statement)[:80]!r} is outside the grammar of formulas: `name = formula`, each name once"
                )
    if not body or not isinstance(body[-1], ast.Expr):
        raise ValueError(f"not a formula: {text[:80]!r}")
    return _parse(body[-1].value, known)


def check(expr: Expr) -> None:
    """Truth values stand where they belong, and nowhere else; the whole is a number, and every number finite. Raises ValueError."""
    for node in walk(expr):
        if node.args and all(a.op == "const" for a in node.args) and node.op not in BOOLEAN:
            raise ValueError(f"{to_text(node)[:60]!r} is no finite number; only those can be printed into a kernel")
        for index, a in enumerate(node.args):
            wanted = node.op in ("both", "either", "invert") or (node.op == "where" and index == 0)
            if (a.op in BOOLEAN) != wanted:
                what = "a truth value" if wanted else "a number"
                raise ValueError(f"{node.op} takes {what} as argument {index + 1}, not {to_text(a)[:60]!r}")
    if expr.op in BOOLEAN:
        raise ValueError(f"{to_text(expr)[:60]!r} is a truth value; write where({expr.op}(…), 1.0, 0.0)")


def _parse(node: ast.expr, known: dict[str, Expr]) -> Expr:
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise ValueError(f"the formula names {node.id!r}; its inputs are {', '.join(sorted(known))}")
        return known[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        try:
            return const(node.value)
        except OverflowError:
            raise ValueError(f"the number {str(node.value)[:20]}… is too large") from None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_parse(node.operand, known)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return call(_BINARY[type(node.op)], _parse(node.left, known), _parse(node.right, known))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and not node.keywords
        and ARITY.get(node.func.id) == len(node.args)
    ):
        return call(node.func.id, *(_parse(a, known) for a in node.args))
    raise ValueError(f"{ast.unparse(node)[:80]!r} is outside the grammar of formulas{_instead(node)}")


def _instead(node: ast.expr) -> str:
    """How the grammar says what Python has a sign for."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return ", which has x * x, and pow(x, y)"
    if isinstance(node, ast.Compare):
        return ", which has lt, le, gt, ge, eq and ne"
    if isinstance(node, ast.IfExp):
        return ", which has where(condition, x, y)"
    return ""
