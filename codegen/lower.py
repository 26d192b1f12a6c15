"""From a spec to a plan: which expressions, which stages, what is saved and whose gradient is whose."""

from __future__ import annotations

from functools import cache

from mlpdsl.errors import UnsupportedError
from mlpdsl.function import Function
from mlpdsl.names import EPILOGUE_OPERANDS
from mlpdsl.spec import MLPSpec
from mlpdsl.target import Target

from .expr import formula, snippet
from .expr.graph import Expr, const, differentiating, handwritten, substitute, symbol, symbols
from .expr.registered import activation
from .plan import Epilogue, Hidden, Linear, Operand, Plan

_GRAD = symbol("grad")
_TILE = symbol("tile")


def lower(spec: MLPSpec, target: Target, language: str = "triton") -> Plan:
    """The plan of `spec` on `target`; the same plan object for equal arguments. `language` is the one whose hand-written text goes
    before a function's formulas. Raises `UnsupportedError` where a function has neither."""
    return _lower(spec, target, language)


@cache
def _lower(spec: MLPSpec, target: Target, language: str) -> Plan:
    return Plan(
        name=spec.short_name,
        spec_json=spec.to_json(),
        target=target,
        dtype=spec.dtype,
        precision=spec.precision,
        linears=_linears(spec),
        hidden=_hidden(spec, language) if len(spec.dims) > 2 else None,
        epilogue=_epilogue(spec, language),
    )


def _linears(spec: MLPSpec) -> tuple[Linear, ...]:
    stages = []
    position = 0
    for index, (width_in, width_out) in enumerate(zip(spec.dims, spec.dims[1:], strict=False)):
        planes = 2 if spec.gated and index == 0 else 1
        step = 2 if spec.bias else 1
        weights = tuple(position + step * p for p in range(planes))
        biases = tuple(w + 1 for w in weights) if spec.bias else ()
        stages.append(Linear(width_in, width_out, weights, biases))
        position += step * planes
    return tuple(stages)


def _times(grad: Expr, by: Expr) -> Expr:
    """The chain rule. A derivative that is 0 everywhere stays 0, whatever the gradient."""
    with differentiating():
        return const(0.0) if by.is_const(0.0) else grad * by


def expressions(function: Function, language: str = "triton") -> tuple[Expr, list[Expr]]:
    """Value and derivative by each input of a user's function, over its inputs; hand-written text goes before the formulas."""
    texts = dict(function.snippets).get(language)
    if not texts and not function.value:
        reason = f"{function!r} is hand-written for {', '.join(dict(function.snippets))} and has no formula to print anew"
        raise UnsupportedError(f"no text of a function for {language!r}", [reason])
    if texts:
        inputs = [symbol(name) for name in function.inputs]
        value, *partials = (handwritten(snippet.positional(text, function.inputs), inputs) for text in texts)
    else:
        value, *partials = (formula.parse(text, function.inputs) for text in (function.value, *function.partials))
    return value, partials


def text_of(function: Function) -> str:
    """The formula for people, or what stands for it."""
    return function.value or dict(function.snippets)["triton"][0]


def _hidden(spec: MLPSpec, language: str) -> Hidden:
    act = spec.activation
    if isinstance(act, Function):
        value, partials = expressions(act, language)
        text, name = text_of(act), "a function of your own"
        if len(act.inputs) == 2:
            return Hidden(text, act.inputs, value, tuple(_times(_GRAD, p) for p in partials))
        derivative = partials[0]
    else:
        value, derivative = activation(str(act))
        text = name = f"{act}(x)"
    if not spec.gated:
        return Hidden(text, ("x",), value, (_times(_GRAD, derivative),))
    gate, up = {"x": symbol("gate")}, symbol("up")
    at_gate = substitute(value, gate)
    if name == text:
        text = f"{act}(gate) * up"
    elif value.op == "snippet":
        text = f"f(gate) * up; f(x) = {text}"
    else:
        text = formula.to_text(at_gate * up)
    by_gate = _times(_GRAD * up, substitute(derivative, gate))
    return Hidden(text, ("gate", "up"), at_gate * up, (by_gate, _GRAD * at_gate))


def _entry(entry: object, language: str) -> tuple[Expr, Expr, dict[str, Expr]]:
    """One epilogue entry over `tile` and its operands: value, d/d tile, and d/d operand by name."""
    if isinstance(entry, Function):
        value, (by_tile, *others) = expressions(entry, language)
        return value, by_tile, dict(zip(entry.inputs[1:], others, strict=True))
    name = str(entry)
    if name == "residual":
        return _TILE + symbol(name), const(1.0), {name: const(1.0)}
    if name in EPILOGUE_OPERANDS:  # layer_scale and scale: a product
        return _TILE * symbol(name), symbol(name), {name: _TILE}
    value, derivative = (substitute(e, {"x": _TILE}) for e in activation(name))
    return value, derivative, {}


def _entry_text(entry: object, of: str, index: int) -> str:
    if isinstance(entry, Function):
        return f"f{index}({', '.join([of, *entry.inputs[1:]])})"
    if entry == "residual":
        return f"{of} + {entry}"
    if entry in EPILOGUE_OPERANDS:
        return f"({of}) * {entry}" if " + " in of and not of.endswith(")") else f"{of} * {entry}"
    return f"{entry}({of})"


def _epilogue(spec: MLPSpec, language: str) -> Epilogue:
    """Compose the entries forward, then apply the chain rule backward from `grad`."""
    value: Expr = _TILE
    text = "tile"
    steps = []
    notes = []
    for index, declared in enumerate(spec.epilogue):
        entry = _entry(declared, language)
        steps.append((value, entry))
        value = substitute(entry[0], {"tile": value})
        text = _entry_text(declared, text, index)
        if isinstance(declared, Function):
            notes.append(f"f{index}({', '.join(declared.inputs)}) = {text_of(declared)}")
    grad: Expr = _GRAD
    grads: dict[str, Expr] = {}
    for before, (_, by_tile, by_operand) in reversed(steps):
        for name, by in by_operand.items():
            grads[name] = _times(grad, substitute(by, {"tile": before}))
        grad = _times(grad, substitute(by_tile, {"tile": before}))
    operands = tuple(Operand(name, kind) for name, kind in spec.operands().items())
    operand_grads = tuple(grads[o.name] for o in operands)
    return Epilogue(
        text=text,
        notes=tuple(notes),
        entries=tuple(f"fn{e.digest}" if isinstance(e, Function) else str(e) for e in spec.epilogue),
        operands=operands,
        value=value,
        tile_grad=grad,
        operand_grads=operand_grads,
        tile_needed="tile" in symbols(grad, *operand_grads),
        same_as=tuple(_same(o, g, grad) for o, g in zip(operands, operand_grads, strict=True)),
    )


def _same(operand: Operand, operand_grad: Expr, tile_grad: Expr) -> str:
    if operand.kind != "tile":
        return ""
    return "grad" if operand_grad is _GRAD else "tile" if operand_grad is tile_grad else ""
