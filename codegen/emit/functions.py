"""The expressions of a plan as device functions: straight-line code in the words of one language, the same for every backend."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from mlpdsl.codegen.expr import snippet
from mlpdsl.codegen.expr.graph import Expr, symbols, walk
from mlpdsl.codegen.expr.stable import expand
from mlpdsl.codegen.plan import Plan

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
          "both": "&", "either": "|"}  # fmt: skip
_SIGNS = {"neg": "-{}", "invert": "~{}"}


Idiom = tuple[str, tuple[Expr, ...]]
"""What is written for a node, and the nodes whose texts it is filled with."""


@dataclass(frozen=True)
class Language:
    """How a language calls what `mlpdsl.codegen.expr.graph.ELEMENTARY` names and Python's operators do not; `max` and `min` must
    let NaN through. `zeros_like` is a tile of zeros in the shape of another. `idiom` knows shorter words for some nodes."""

    calls: Mapping[str, str]
    zeros_like: str
    idiom: Callable[[Expr], Idiom | None] = lambda node: None


@dataclass(frozen=True)
class Function:
    """A device function: straight-line assignments, then the values it returns, all in float32. `doc` is in lines."""

    name: str
    params: tuple[str, ...]
    doc: tuple[str, ...]
    lines: tuple[str, ...]
    returns: tuple[str, ...]


@dataclass(frozen=True)
class OperandView:
    """An epilogue operand under its name in generated code; `grad` says where its gradient comes from ("own" is computed)."""

    index: int
    ident: str
    kind: str
    grad: str


_FIXED_WORDS = frozenset({"residual", "layer_scale", "scale"})


def operand_views(plan: Plan) -> tuple[OperandView, ...]:
    """The epilogue's operands under the names that generated code has for them: users' names never reach source."""
    return tuple(
        OperandView(i, o.name if o.name in _FIXED_WORDS else f"operand{i}", o.kind, same or "own")
        for i, (o, same) in enumerate(zip(plan.epilogue.operands, plan.epilogue.same_as, strict=True))
    )


def print_function(
    language: Language,
    name: str,
    params: Sequence[str],
    doc: Sequence[str],
    results: Sequence[Expr],
    rename: dict[str, str],
    whole: Collection[str],
) -> Function:
    """Straight-line code for several results at once; what they share is computed once.

    `whole` are the inputs that are whole tiles, the first parameter among them: a result that depends on none of them, a number
    or an operand alone, is spread over a tile.
    """
    roots = [expand(r) for r in results]
    uses: dict[int, int] = {}
    for node in walk(*roots):
        for a in node.args:
            uses[id(a)] = uses.get(id(a), 0) + 1
    for root in roots:
        uses[id(root)] = uses.get(id(root), 0) + 1
    text: dict[int, str] = {}
    lines: list[str] = []
    for node in walk(*roots):
        if node.op == "symbol":
            text[id(node)] = rename.get(node.name, node.name)
            continue
        if node.op == "const":
            text[id(node)] = repr(node.value)
            continue
        args = [text[id(a)] for a in node.args]
        idiom = language.idiom(node)
        if idiom is not None:
            printed = idiom[0].format(*(_bare(text[id(a)]) for a in idiom[1]))
        elif node.op == "snippet":
            printed = f"({snippet.filled(node.name, args)})"
        elif node.op in _SIGNS:
            printed = _SIGNS[node.op].format(*args)
        elif node.op in _INFIX:
            printed = f"({args[0]} {_INFIX[node.op]} {args[1]})"
        else:
            printed = language.calls[node.op].format(*map(_bare, args))
        if uses.get(id(node), 0) > 1 or (len(printed) > 72 and node not in roots):
            variable = f"t{len(lines)}"
            lines.append(f"{variable} = {_bare(printed)}")
            printed = variable
        text[id(node)] = printed
    spread = f" + {language.zeros_like.format(params[0])}"
    returns = (_bare(text[id(r)]) if symbols(r) & set(whole) else f"{text[id(r)]}{spread}" for r in roots)
    return Function(name, tuple(params), tuple(doc), tuple(lines), tuple(returns))


def _bare(text: str) -> str:
    """Without the outer parentheses, where they are one pair."""
    if not text.startswith("("):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:-1] if position == len(text) - 1 else text
    return text


def device_functions(plan: Plan, operands: Sequence[OperandView], language: Language) -> list[Function]:
    """`activate` and `activate_grad` of the hidden layers, `finish` and `finish_grad` of the epilogue, where there are any."""
    functions = []
    hidden, epilogue = plan.hidden, plan.epilogue
    if hidden is not None:
        whole = ("grad", *hidden.inputs)
        functions.append(print_function(language, "activate", hidden.inputs, _paragraph(hidden.text), [hidden.value], {}, whole))
        doc = ["Gradients of the preactivation" + ("s" if plan.gated else "") + ", and the hidden value again."]
        results = [*hidden.grads, hidden.value]
        functions.append(print_function(language, "activate_grad", whole, doc, results, {}, whole))
    if epilogue.entries:
        rename = {o.name: v.ident for o, v in zip(epilogue.operands, operands, strict=True)}
        names = [v.ident for v in operands]
        whole = ("grad", "tile", *(o.name for o in epilogue.operands if o.kind == "tile"))
        about = [
            f"{v.ident} is {o.name}, a {o.kind}." for o, v in zip(epilogue.operands, operands, strict=True) if v.ident != o.name
        ]
        notes = [line for note in epilogue.notes for line in _paragraph(note)]
        doc = [*_paragraph(epilogue.text), *(["", *notes, *about] if notes else [])]
        functions.append(print_function(language, "finish", ["tile", *names], doc, [epilogue.value], rename, whole))
        own = [g for g, v in zip(epilogue.operand_grads, operands, strict=True) if v.grad == "own"]
        of = ["the tile", *(v.ident for v in operands if v.grad == "own")]
        doc = [f"Gradient{'s' if len(of) > 1 else ''} of {', '.join(of[:-1])}{' and ' if len(of) > 1 else ''}{of[-1]}."]
        results = [epilogue.tile_grad, *own]
        functions.append(print_function(language, "finish_grad", ["grad", "tile", *names], doc, results, rename, whole))
    return functions


def _paragraph(text: str) -> list[str]:
    """A formula in lines: one for each expression that it names on the way, none too long."""
    lines = [line for part in text.split("; ") for line in textwrap.wrap(part, 116, break_long_words=False)]
    return lines if len(lines) <= 12 else [*lines[:11], "…"]
