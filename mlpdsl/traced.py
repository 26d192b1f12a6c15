"""`mlpdsl.activation`, `mlpdsl.epilogue`, `mlpdsl.register_activation`: from a Python function to a `Function` of formulas.

Here torch traces, checks and names what is wrong; what comes out is data. Nothing in this file runs when a spec is read or called.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mlpdsl.codegen.expr import formula, soundness
from mlpdsl.codegen.expr.capture import capture
from mlpdsl.codegen.expr.graph import Expr
from mlpdsl.codegen.expr.refusal import Refused, location
from mlpdsl.codegen.expr.trace import neutral, trace, trace_value
from mlpdsl.errors import MLPError, SpecError, UnstableWarning, UnsupportedError, describe, shorten
from mlpdsl.function import ACTIVATION_INPUTS, GATED_INPUTS, REGISTERED, TILE, Function, check_kind, check_operand_name
from mlpdsl.names import ACTIVATIONS, ALIASES, EPILOGUE_OPERANDS, REFUSED
from mlpdsl.plain import canonical_name, checked_snippets, from_plain

__all__ = ["accept", "activation", "epilogue", "register_activation"]

_traced: dict[object, tuple[Function, str]] = {}
"""What was traced in this process, and the warning, by fingerprint: declaring ten specs with one function traces once."""


def activation(
    fn: Callable[..., Any],
    /,
    *,
    derivative: Callable[..., Any] | None = None,
    triton: Sequence[str] | None = None,
    check: bool = True,
) -> Function:
    """A torch function as an activation: of one tensor x, or of (gate, up) where the MLP is gated.

    The function is elementwise, on float32 tensors of one shape. It is traced now, with the numbers it captures as they are now;
    value and derivative are compared with the function in float64 over a sweep of inputs up to ±65504 (`check=False` leaves that
    out). MLPSpec(activation=fn) does the same with the defaults.

    `derivative(x)`, or `derivative(gate, up)` returning a pair, replaces the one that torch derives. `triton` is the way out where
    nothing can be traced: one Triton expression of the value, then one of the derivative by each input, over the names of the
    inputs ("x", or "gate" and "up"), made of arithmetic, tl's elementwise functions and libdevice's.

    Raises `SpecError` where it is not such a function or its formula breaks in float32, `UnsupportedError` with the reason and the
    line where it cannot be fused. Warns with `UnstableWarning` where it loses most of its digits.
    """
    inputs = GATED_INPUTS if _arity(fn, "mlpdsl.activation") == 2 else ACTIVATION_INPUTS
    return _function(fn, inputs, (), derivative, triton, check, "mlpdsl.activation")


def epilogue(
    fn: Callable[..., Any],
    /,
    *,
    derivative: Callable[..., Any] | None = None,
    triton: Sequence[str] | None = None,
    check: bool = True,
    **kinds: str,
) -> Function:
    """A torch function as an entry of MLPSpec.epilogue: `epilogue(fn, residual="tile", gamma="column")`.

    fn's first parameter is the output tile, in float32 before its rounding; the others are operands by name, each of a kind: "tile"
    (M, N), "column" (N,), "row" (M, 1) or "scalar" (). All are tensors of a call, with gradients; a learned scalar is an operand,
    and changing it compiles nothing. The options and errors are those of `activation`; `derivative` returns one tensor for the
    tile and each operand, in the order of fn's parameters.
    """
    where = "mlpdsl.epilogue"
    names = _parameters(fn, where)
    if names is None:
        names = ["tile", *kinds]
    if not names or names[0] in _keyword_only(fn):
        raise SpecError(describe(where, fn, "a function whose first parameter is the output tile", "Add the parameter."))
    for name, kind in kinds.items():
        check_operand_name(name, f"{where}, operand")
        check_kind(kind, f"{where}, {name}")
    wanted, optional = names[1:], _optional(fn)
    options = [n for n in wanted if n in ("check", "derivative", "triton")]
    if options:
        step = "These are options of mlpdsl.epilogue itself: rename the function's parameter."
        raise SpecError(describe(f"{where}, operand", options[0], "a name that is no option", step))
    missing = [n for n in wanted if n not in kinds and n not in optional]
    unknown = [n for n in kinds if n not in wanted]
    if missing or unknown:
        said = "; ".join(f"{word} {', '.join(those)}" for word, those in (("missing", missing), ("no parameter", unknown)) if those)
        step = "Give each its kind: tile (M, N), column (N,), row (M, 1) or scalar." if missing else "Name them as fn's parameters."
        raise SpecError(describe(f"{where}, operands", said, f"one kind for each of: {', '.join(wanted) or 'none'}", step))
    operands = [n for n in wanted if n in kinds]
    if operands != wanted[: len(operands)] or set(operands) & _keyword_only(fn):  # a number with a default may stand between
        fn = _by_name(fn, tuple(operands))
    return _function(fn, (TILE, *operands), tuple(kinds[n] for n in operands), derivative, triton, check, where)


def _by_name(fn: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(tile: Any, *operands: Any) -> Any:
        return fn(tile, **dict(zip(names, operands, strict=True)))

    return call


def register_activation(
    name: str,
    fn: Callable[..., Any] | Function,
    *,
    replace: bool = False,
    derivative: Callable[..., Any] | None = None,
    triton: Sequence[str] | None = None,
    check: bool = True,
) -> Function:
    """Give a function a name, in this process: MLPSpec(activation=name), and as an epilogue where it has one input.

    A spec holds the function itself, so that its JSON means the same where the name is not registered. Registering an equal
    function again changes nothing; another one under the same name needs `replace`. Raises as `activation` does, and `SpecError`
    for a name that is taken or no word of [a-z][a-z0-9_]*, at most 40 characters.
    """
    where = "mlpdsl.register_activation, name"
    if type(name) is not str or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise SpecError(describe(where, name, "a word of a-z, 0-9 and _", "Choose another name."))
    if name in (*ACTIVATIONS, *ALIASES, *REFUSED, *EPILOGUE_OPERANDS):
        raise SpecError(describe(where, name, "a name that mlpdsl does not use itself", "Choose another name."))
    made = fn if isinstance(fn, Function) else activation(fn, derivative=derivative, triton=triton, check=check)
    if made.is_epilogue:
        raise SpecError(describe("mlpdsl.register_activation, fn", fn, "an activation", "Pass what mlpdsl.activation returned."))
    if replace:
        REGISTERED[name] = made
    elif REGISTERED.setdefault(name, made) != made:
        raise SpecError(describe(where, name, "a name not registered yet", "Pass replace=True to replace the other function."))
    return made


# Declaring


def _parameters(fn: Any, where: str) -> list[str] | None:
    """The names of the parameters that can be named; None where Python cannot tell (torch's builtins)."""
    if not callable(fn) or isinstance(fn, type):
        step = f"Pass an instance: {fn.__name__}()." if isinstance(fn, type) else "Pass a function of torch tensors."
        raise SpecError(describe(where, fn, "a function of torch tensors", step))
    signature = _signature(fn)
    if signature is None:
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.kind not in variadic]


def _signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(getattr(fn, "forward", fn))  # a module is called through *args
    except (TypeError, ValueError):
        return None


def _keyword_only(fn: Any) -> set[str]:
    signature = _signature(fn)
    found = signature.parameters.values() if signature else ()
    return {p.name for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _optional(fn: Any) -> set[str]:
    signature = _signature(fn)
    found = signature.parameters.values() if signature else ()
    return {p.name for p in found if p.default is not inspect.Parameter.empty}


def _arity(fn: Any, where: str) -> int:
    names = _parameters(fn, where)
    if names is None:
        return _takes(fn)
    names = [n for n in names if n not in _keyword_only(fn)]
    required = [n for n in names if n not in _optional(fn)]
    if len(required) == 2:
        return 2
    if len(required) > 2 or not names:
        step = "Numbers are default arguments or closures; a learned scalar is an operand of an epilogue."
        raise SpecError(describe(where, fn, f"a function of x, or of (gate, up), not of ({', '.join(required)})", step))
    return 1


def _takes(fn: Any) -> int:
    """How many tensors one of torch's builtins takes: it has no signature, so it is tried."""
    import torch

    try:
        with neutral():
            fn(torch.ones(2))
    except TypeError:
        return 2
    except Exception:  # it takes one; what is wrong with it is said later
        return 1
    return 1


def _function(
    fn: Any,
    inputs: tuple[str, ...],
    kinds: tuple[str, ...],
    derivative: Callable[..., Any] | None,
    triton: Sequence[str] | None,
    checked: bool,
    where: str,
) -> Function:
    name = re.sub(r"\W+", "_", str(getattr(fn, "__name__", type(fn).__name__))).strip("_") or "function"
    snippets = checked_snippets(triton, inputs, where)
    if type(checked) is not bool:
        raise SpecError(describe(f"{where}, check", checked, "True or False", "Leave it out for True."))
    try:
        frozen, mark = capture(fn)
        frozen_derivative, derivative_mark = (None, None) if derivative is None else capture(derivative)
        key = (mark, derivative_mark, inputs, kinds, snippets, checked)
        if key not in _traced:
            _traced[key] = _trace(frozen, frozen_derivative, inputs, kinds, snippets, checked, name, where)
        made, warning = _traced[key]
        if warning:
            warnings.warn(warning, UnstableWarning, stacklevel=_outside())
        return made
    except Refused as refused:
        at = f" ({refused.where})" if refused.where else ""
        raise UnsupportedError(f"{where}: {name} cannot be fused{at}: {refused.why}. {refused.step}", (refused.why,)) from refused
    except MLPError:
        raise
    except Exception as error:  # a function may do anything, and so may the mode that its declaration runs in
        said = (str(error).strip().splitlines() or [""])[0][:160]
        why = f"tracing it raises {type(error).__name__}: {said}"
        raise UnsupportedError(f"{where}: {name} cannot be fused: {why}. Use torch's elementwise operations.", (why,)) from error


def _trace(
    frozen: Callable[..., Any],
    derivative: Callable[..., Any] | None,
    inputs: tuple[str, ...],
    kinds: tuple[str, ...],
    snippets: tuple[tuple[str, tuple[str, ...]], ...],
    checked: bool,
    name: str,
    where: str,
) -> tuple[Function, str]:
    """The function, and what to warn of."""
    try:
        if derivative is None:
            value, by = trace(frozen, inputs)
            partials = list(by.values())
        else:
            (value,) = trace_value(frozen, inputs, 1)
            partials = trace_value(derivative, inputs, len(inputs))
    except Refused:
        if not snippets:
            raise
        return Function(inputs, kinds, "", (), snippets, name, frozen, derivative), ""
    for expr in (value, *partials):
        try:
            formula.check(expr)
        except ValueError as error:
            raise Refused(str(error), "Use finite numbers.", location(frozen)) from error
    try:
        agrees = soundness.agrees(frozen, derivative, inputs, [value, *partials])
    except Exception as error:
        why = f"called with float64 tensors it raises {type(error).__name__}: {str(error).strip()[:120]}"
        step = "It must take any floating dtype and number of rows: PyTorch runs it in the spec's."
        raise Refused(why, step, location(frozen)) from error
    if not agrees:
        why = "what was traced does not give what the function gives: it draws random numbers, or reads what changes"
        step = (
            "Pass such values as operands of an epilogue; if it does neither, mlpdsl reads an operation wrongly: please report it."
        )
        raise Refused(why, step, location(frozen))
    warning = _judge(frozen, derivative, inputs, [value, *partials], name, where) if checked else ""
    texts = [formula.to_text(e, inputs) for e in (value, *partials)]
    return Function(inputs, kinds, texts[0], tuple(texts[1:]), snippets, name, frozen, derivative), warning


def _judge(
    frozen: Callable[..., Any],
    derivative: Callable[..., Any] | None,
    inputs: tuple[str, ...],
    results: list[Expr],
    name: str,
    where: str,
) -> str:
    """Raises `SpecError` for a formula that breaks in float32; returns the warning about one that loses digits."""
    found = [p for p in soundness.problems(frozen, None, inputs, results) if p.kind != "faint"]
    if not found:
        return ""
    worst = min(found, key=lambda p: p.kind != "broken")
    stable = soundness.suggestions(results[0])
    step = f"Stable: {'; '.join(stable)}." if stable else "Rewrite it without overflow or cancellation."
    line = location(frozen)
    if derivative is not None and worst.what != "the value":
        message = f"{where}: {name}{f' ({line})' if line else ''}: {worst.what} you gave disagrees with torch's: {worst}"
        raise SpecError(f"{message}. If that is meant (a straight-through estimator), pass check=False.")
    message = f"{where}: {name}{f' ({line})' if line else ''} is unstable: {worst}. {step}"
    if worst.kind == "broken":
        raise SpecError(f"{message} To use it as it is, pass mlpdsl.{where.rpartition('.')[2]}(fn, check=False).")
    return message


def _outside() -> int:
    """How far up the stack the caller is, outside mlpdsl."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("mlpdsl"):
        level, frame = level + 1, frame.f_back
    return level - 1


def accept(value: object, where: str, *, on_output: bool = False) -> Function | str:
    """What stands in a spec for a callable, or for the JSON form of one: a registered name where it is that, else a `Function`."""
    if isinstance(value, Function):
        made = _held_to_the_grammar(value, where, on_output)
    elif type(value) is dict:
        made = from_plain(value, where, on_output)
    elif callable(value):
        made = epilogue(value) if on_output else activation(value)
    else:
        raise SpecError(describe(where, value, "a function", f"Got {shorten(value)}."))
    return canonical_name(made) or made


def _held_to_the_grammar(function: Function, where: str, on_output: bool) -> Function:
    """The function with its texts as its JSON form has them: somebody may have put it together by hand, or renamed its input."""
    try:
        read = _read_back(function, on_output)
        same = (read.inputs, read.kinds) == (function.inputs, function.kinds)
    except (SpecError, TypeError, AttributeError):  # not in the grammar, or fields of other types
        same = False
    if not same:
        step = "Pass the function itself to one of them."
        raise SpecError(describe(where, function, "what mlpdsl.activation or mlpdsl.epilogue returns", step))
    return replace(function, value=read.value, partials=read.partials, snippets=read.snippets)


@functools.lru_cache(maxsize=4096)
def _read_back(function: Function, on_output: bool) -> Function:
    return from_plain(function.to_plain(), "function", on_output)
