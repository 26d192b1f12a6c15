"""Hand-written Triton text as a function, the way out where nothing can be traced: one expression over the inputs.

Allowed are the inputs, numbers, arithmetic, comparisons, and calls of tl's elementwise functions and of libdevice: the text runs
inside a generated kernel, and may come from a JSON file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from . import syntax

BACKENDS = ("triton",)
_ROOTS = ("tl", "libdevice")
_EXTERN = re.compile(r"[a-z][a-z0-9_]{0,40}")
_TL = ("abs", "exp", "exp2", "log", "log2", "sqrt", "sqrt_rn", "rsqrt", "sin", "cos", "erf", "floor", "ceil", "fma", "maximum",
       "minimum", "clamp", "sigmoid", "where", "div_rn", "fdiv")  # fmt: skip
_ARGUMENTS = {"maximum": 2, "minimum": 2, "div_rn": 2, "fdiv": 2, "fma": 3, "clamp": 3, "where": 3}
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.USub, ast.Invert, ast.BitAnd, ast.BitOr, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
)  # fmt: skip


def checked(text: str, inputs: Sequence[str]) -> str:
    """The text in one canonical form. Raises ValueError, naming what is not allowed."""
    if len(text) > 10_000:
        raise ValueError(f"{len(text)} characters; at most 10000")
    try:
        tree = syntax.expression(text.strip())
        canonical = ast.unparse(tree)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"not one expression: {text[:80]!r}") from error
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(
                f"{ast.unparse(node)[:80]!r}: only arithmetic, comparisons and calls of tl.… and libdevice.… are allowed"
            )
        if isinstance(node, ast.Constant) and not (isinstance(node.value, (int, float)) and abs(node.value) < 3.4e38):
            raise ValueError(f"{ast.unparse(node)[:80]!r}: only finite numbers are constants")
        if isinstance(node, ast.Name) and node.id not in inputs and not (node.id in _ROOTS and id(node) in inner):
            raise ValueError(f"the name {node.id!r}: the inputs are {', '.join(inputs)}")
        if isinstance(node, ast.Attribute):
            root, _, name = ast.unparse(node).partition(".")
            elementwise = (
                name.removeprefix("math.") in _TL if root == "tl" else root == "libdevice" and _EXTERN.fullmatch(name) is not None
            )
            if (id(node) in called and not elementwise) or id(node) not in called | inner:
                raise ValueError(f"{ast.unparse(node)[:80]!r}: only elementwise functions of tl and libdevice are called")
        if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Attribute)):
            raise ValueError(f"{ast.unparse(node)[:80]!r}: only functions of tl and libdevice are called, without keywords")
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tl."):
            name = ast.unparse(node.func).rpartition(".")[2]
            if len(node.args) != _ARGUMENTS.get(name, 1):
                raise ValueError(f"{ast.unparse(node)[:80]!r}: tl.{name} takes {_ARGUMENTS.get(name, 1)} arguments")
    body = tree.body.operand if isinstance(tree.body, ast.UnaryOp) and isinstance(tree.body.op, ast.Invert) else tree.body
    if isinstance(body, ast.Compare) or (isinstance(body, ast.BinOp) and isinstance(body.op, (ast.BitAnd, ast.BitOr))):
        raise ValueError(f"{canonical[:80]!r} is a truth value: write tl.where(…, 1.0, 0.0)")
    return canonical


def positional(text: str, inputs: Sequence[str]) -> str:
    """The text with its inputs named in1, in2, …, in order: the form that an expression's node holds."""
    return _renamed(text, {name: f"in{i}" for i, name in enumerate(inputs, 1)})


def filled(text: str, values: Sequence[str]) -> str:
    """`positional` text with each input replaced by an expression of the generated code."""
    return _renamed(text, {f"in{i}": value for i, value in enumerate(values, 1)})


def _renamed(text: str, values: dict[str, str]) -> str:
    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return syntax.expression(values[node.id]).body if node.id in values else node

    return ast.unparse(Rename().visit(syntax.expression(text)))
