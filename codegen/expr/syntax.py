"""`ast.parse` for several threads at once. No lock: a process that forks meanwhile would leave it taken in its child."""

from __future__ import annotations

import ast

__all__ = ["expression", "module"]


def module(text: str) -> ast.Module:
    """The syntax tree of statements. Raises what `ast.parse` raises."""
    tree = _parsed(text, "exec")
    assert isinstance(tree, ast.Module)
    return tree


def expression(text: str) -> ast.Expression:
    """The syntax tree of one expression. Raises what `ast.parse` raises."""
    tree = _parsed(text, "eval")
    assert isinstance(tree, ast.Expression)
    return tree


def _parsed(text: str, mode: str) -> ast.AST:
    """In CPython 3.11 the depth of what is being built is counted for all threads together, and where another gets in between,
    SystemError ("AST constructor recursion depth mismatch") is raised for text that is right: python/cpython#106905. Another try
    is not likely to meet another thread.
    """
    for _ in range(9):
        try:
            return ast.parse(text, mode=mode)
        except SystemError:
            continue
    return ast.parse(text, mode=mode)
