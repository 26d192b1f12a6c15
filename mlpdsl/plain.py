"""The JSON form of a user's function, and what its formulas mean: everything about a `Function` that needs no Python function."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlpdsl.codegen.expr import formula, snippet
from mlpdsl.codegen.expr.graph import Expr, substitute, symbol, walk
from mlpdsl.codegen.expr.registered import activation as registered_activation
from mlpdsl.errors import SpecError, describe
from mlpdsl.function import ACTIVATION_INPUTS, GATED_INPUTS, TILE, Function, check_kind, check_operand_name
from mlpdsl.names import ACTIVATIONS, listed

__all__ = ["canonical_name", "checked_snippets", "expressions", "from_plain"]


_KEYS = ("expr", "grads", "operands", "snippets", "inputs")


def from_plain(content: Mapping[str, Any], where: str, epilogue: bool) -> Function:
    """The function of its JSON form: {"expr": formula, "grads": [formula …], "operands": [[name, kind] …]}.

    Without "grads" they are derived, by torch. Raises `SpecError` for anything outside the grammar.
    """
    unknown = [k for k in content if k not in _KEYS]
    if unknown:
        raise SpecError(describe(f"{where}, key", unknown[0], listed(_KEYS), "Remove what is not one of these."))
    operands = _pairs(content.get("operands", []), f"{where}.operands")
    if operands and not epilogue:
        raise SpecError(describe(f"{where}.operands", content["operands"], "none in an activation", "Use an epilogue."))
    inputs, text = _inputs(content, operands, where, epilogue), content["expr"]
    kinds = tuple(kind for _, kind in operands)
    raw = content.get("snippets", {})
    if type(raw) is not dict or any(b not in snippet.BACKENDS for b in raw):
        raise SpecError(describe(f"{where}.snippets", raw, f"an object with {listed(snippet.BACKENDS)}", "Leave it out."))
    snippets = checked_snippets(raw.get("triton"), inputs, where)
    if text == "" and snippets:
        return Function(inputs, kinds, "", (), snippets)
    value = _parsed(text, inputs, f"{where}.expr")
    grads = content.get("grads")
    if grads is None:
        from mlpdsl.codegen.expr.refusal import Refused
        from mlpdsl.codegen.expr.torch_code import to_torch
        from mlpdsl.codegen.expr.trace import MAX_OPERATIONS, trace

        if sum(1 for node in walk(value) if node.args) > MAX_OPERATIONS:
            step = "Write the derivatives into grads, or apply it outside the MLP."
            raise SpecError(describe(f"{where}.expr", text, f"at most {MAX_OPERATIONS} operations", step))
        run = to_torch((value,), inputs)
        try:
            _, by = trace(lambda *tensors: run(*tensors)[0], inputs)
        except Refused as refused:
            raise SpecError(describe(f"{where}.expr", text, "a formula that torch differentiates", str(refused))) from refused
        partials = list(by.values())
        try:
            for partial in partials:
                formula.check(partial)
        except ValueError as error:  # such as log(0.0), where the formula says pow(0.0, x)
            allowed = f"a formula whose derivatives are finite numbers ({error})"
            raise SpecError(describe(f"{where}.expr", text, allowed, "Write the derivatives into grads.")) from None
    elif type(grads) is list and len(grads) == len(inputs):
        partials = [_parsed(g, inputs, f"{where}.grads[{i}]") for i, g in enumerate(grads)]
    else:
        step = "Leave grads out to have them derived."
        raise SpecError(describe(f"{where}.grads", grads, f"{len(inputs)} formulas, by {', '.join(inputs)}", step))
    texts = [formula.to_text(e, inputs) for e in (value, *partials)]
    return Function(inputs, kinds, texts[0], tuple(texts[1:]), snippets)


def _parsed(text: object, inputs: Sequence[str], where: str) -> Expr:
    try:
        parsed = formula.parse(text if type(text) is str else repr(text)[:80], inputs)
        formula.check(parsed)
        return parsed
    except (ValueError, RecursionError) as error:
        step = "Formulas are names, numbers, + - * / and calls like sigmoid(x); see the docs page on activations."
        raise SpecError(describe(where, text, str(error), step)) from None


def _pairs(value: object, where: str) -> list[tuple[str, str]]:
    step = 'Write [["gamma", "column"], …].'
    if type(value) is not list or any(type(p) is not list or len(p) != 2 for p in value):
        raise SpecError(describe(where, value, "a list of [name, kind] pairs", step))
    pairs = [(check_operand_name(name, where), check_kind(kind, where)) for name, kind in value]
    if len({name for name, _ in pairs}) < len(pairs):
        raise SpecError(describe(where, value, "every name once", step))
    return pairs


def _inputs(content: Mapping[str, Any], operands: Sequence[tuple[str, str]], where: str, epilogue: bool) -> tuple[str, ...]:
    text, grads, count = content["expr"], content.get("grads"), content.get("inputs")
    if type(text) is not str:
        raise SpecError(describe(f"{where}.expr", text, "a formula as text", "For example {'expr': 'x * sigmoid(x)'}."))
    counts = (len(operands) + 1,) if epilogue else (1, 2)
    if count is not None and (type(count) is not int or count not in counts):
        raise SpecError(describe(f"{where}.inputs", count, " or ".join(map(str, counts)), "Leave it out."))
    if epilogue:
        return (TILE, *(name for name, _ in operands))
    if count == 2 or (type(grads) is list and len(grads) == 2) or (grads is None and re.search(r"\b(gate|up)\b", text)):
        return GATED_INPUTS
    return ACTIVATION_INPUTS


def canonical_name(function: Function) -> str | None:
    """The registered activation that a function of one input is, formula by formula; None for any other."""
    if len(function.inputs) != 1 or function.snippets:
        return None
    x = symbol("x")
    value, partials = expressions(function)
    if function.is_epilogue:
        value, *partials = (substitute(e, {TILE: x}) for e in (value, *partials))
    return next((name for name in ACTIVATIONS if registered_activation(name) == (value, partials[0])), None)


def expressions(function: Function) -> tuple[Expr, list[Expr]]:
    """Value and partial derivatives as expressions, over the function's inputs."""
    value, *partials = (formula.parse(text, function.inputs) for text in (function.value, *function.partials))
    return value, partials


def checked_snippets(triton: object, inputs: tuple[str, ...], where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if triton is None:
        return ()
    if isinstance(triton, str) or not isinstance(triton, Sequence) or len(triton) != 1 + len(inputs):
        allowed = f"{1 + len(inputs)} texts: the value, then the derivative by {', '.join(inputs)}"
        raise SpecError(describe(f"{where}, triton", triton, allowed, "Write one Triton expression for each."))
    return (("triton", tuple(_snippet(text, inputs, f"{where}, triton[{i}]") for i, text in enumerate(triton))),)


def _snippet(text: object, inputs: Sequence[str], where: str) -> str:
    try:
        checked = snippet.checked(text if type(text) is str else "", inputs)
        missing = _missing_extern(checked)
        if missing:
            raise ValueError(f"libdevice has no {missing}")
        return checked
    except ValueError as error:
        raise SpecError(describe(where, text, f"one Triton expression ({error})", "Use tl's elementwise functions.")) from None


def _missing_extern(text: str) -> str:
    """A function of libdevice that the installed Triton does not have; empty where there is none, or no Triton to ask."""
    names = re.findall(r"\blibdevice\.(\w+)", text)
    try:
        libdevice = importlib.import_module("triton.language.extra.libdevice") if names else None
    except ImportError:
        return ""
    return next((name for name in names if not hasattr(libdevice, name)), "")
