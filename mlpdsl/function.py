"""`Function`: a user's own activation or epilogue, as formulas. Made by `mlpdsl.activation` and `mlpdsl.epilogue`.

Only the data: what a declaration holds, compares, and writes into JSON. Tracing lives in `mlpdsl.traced`.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlpdsl.errors import SpecError, describe
from mlpdsl.names import did_you_mean, listed

__all__ = ["ACTIVATION_INPUTS", "GATED_INPUTS", "KINDS", "REGISTERED", "TILE", "Function", "check_kind", "check_operand_name"]

KINDS: tuple[str, ...] = ("tile", "column", "row", "scalar")
"""Kinds of operands: tile (M, N), column (N,), row (M, 1), scalar ()."""

ACTIVATION_INPUTS = ("x",)
GATED_INPUTS = ("gate", "up")
TILE = "tile"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TAKEN = ("x", "self", "tile", "grad", "tl", "libdevice")  # what a call, a module, a formula and a snippet use themselves

REGISTERED: dict[str, Function] = {}
"""Names given by `mlpdsl.register_activation`, in this process. A spec holds the function, never the name."""


@dataclass(frozen=True)
class Function:
    """An elementwise function and its partial derivatives, in the grammar of `mlpdsl.codegen.expr.formula`.

    Two are equal where their formulas are: a lambda written twice, or read back from JSON in another process, is one function.
    """

    inputs: tuple[str, ...]
    """("x",) or ("gate", "up") for an activation; ("tile", *operands) for an epilogue."""
    kinds: tuple[str, ...]
    """The kind of each operand of an epilogue, in the order of inputs[1:]; empty for an activation."""
    value: str
    """The formula of the value; empty where the function could not be traced and `snippets` stand for it."""
    partials: tuple[str, ...]
    """The formula of the derivative by each input; empty with `value`."""
    snippets: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(backend, hand-written texts) pairs, sorted: the value, then the derivative by each input."""
    name: str = field(default="function", compare=False)
    """What people call it; no part of its identity."""
    call: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    """The torch function itself, as it was when it was declared; None where it was read from JSON."""
    derivative: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    """The user's own derivative, where one was given: `derivative(*inputs)`."""

    @property
    def operands(self) -> dict[str, str]:
        """Name to kind of each operand, in order."""
        return dict(zip(self.inputs[1:], self.kinds, strict=True)) if self.is_epilogue else {}

    @property
    def is_epilogue(self) -> bool:
        return self.inputs[0] == TILE

    @property
    def digest(self) -> str:
        """Six hex digits, for names of files."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:6]

    def to_plain(self) -> dict[str, Any]:
        """What JSON holds: formulas, operands, snippets; no Python function, and no name."""
        plain: dict[str, Any] = {"expr": self.value, "grads": list(self.partials)}
        if self.kinds:
            plain["operands"] = [list(pair) for pair in self.operands.items()]
        if self.snippets:
            plain["snippets"] = {backend: list(texts) for backend, texts in self.snippets}
            plain["inputs"] = len(self.inputs)
        return plain

    def as_epilogue(self, where: str) -> Function:
        """An activation of one tensor, applied to the output tile. Raises `SpecError` for one of (gate, up)."""
        if self.inputs != ACTIVATION_INPUTS:
            step = "Pass mlpdsl.epilogue(fn, name=kind)."
            raise SpecError(describe(where, self, "a function of one tensor", step))

        def renamed(text: str) -> str:
            return re.sub(r"\bx\b", TILE, text)

        snippets = tuple((backend, tuple(map(renamed, texts))) for backend, texts in self.snippets)
        partials = tuple(map(renamed, self.partials))
        return replace(self, inputs=(TILE,), value=renamed(self.value), partials=partials, snippets=snippets)

    def __repr__(self) -> str:
        return f"<{self.name}({', '.join(self.inputs)})>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Lambdas do not pickle, formulas do.
        return _restore, (self.inputs, self.kinds, self.value, self.partials, self.snippets, self.name)


def _restore(*arguments: Any) -> Function:
    return Function(*arguments)


def check_operand_name(name: object, where: str) -> str:
    """A name that a call can take by keyword. Raises `SpecError`."""
    if type(name) is not str or not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in _TAKEN:
        step = f"Choose a name of letters, digits and _, at most 64, no Python keyword and none of {listed(_TAKEN)}."
        raise SpecError(describe(where, name, "the name of a keyword argument", step))
    return name


def check_kind(kind: object, where: str) -> str:
    """One of `KINDS`. Raises `SpecError`."""
    if type(kind) is not str or kind not in KINDS:
        step = (did_you_mean(kind, KINDS) if type(kind) is str else "") or "tile is (M, N), column (N,), row (M, 1), scalar ()."
        raise SpecError(describe(where, kind, listed(KINDS), step))
    return kind
