"""From a spec to a plan: which expressions, which stages, what is saved and whose gradient is whose."""

from __future__ import annotations

from functools import cache

from mlpdsl.names import EPILOGUE_OPERANDS
from mlpdsl.spec import MLPSpec
from mlpdsl.target import Target

from .expr.graph import Expr, const, substitute, symbol, symbols
from .expr.registered import activation
from .plan import Epilogue, Hidden, Linear, Operand, Plan

_GRAD = symbol("grad")
_TILE = symbol("tile")


@cache
def lower(spec: MLPSpec, target: Target) -> Plan:
    """The plan of `spec` on `target`; the same plan object for equal arguments."""
    return Plan(
        name=spec.short_name,
        spec_json=spec.to_json(),
        target=target,
        dtype=spec.dtype,
        precision=spec.precision,
        linears=_linears(spec),
        hidden=_hidden(spec) if len(spec.dims) > 2 else None,
        epilogue=_epilogue(spec),
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


def _hidden(spec: MLPSpec) -> Hidden:
    value, derivative = activation(spec.activation)
    if not spec.gated:
        return Hidden(f"{spec.activation}(x)", ("x",), value, (_GRAD * derivative,))
    gate, up = {"x": symbol("gate")}, symbol("up")
    act = substitute(value, gate)
    return Hidden(
        f"{spec.activation}(gate) * up", ("gate", "up"), act * up, (_GRAD * up * substitute(derivative, gate), _GRAD * act)
    )


def _entry(name: str) -> tuple[Expr, Expr, Expr | None]:
    """One epilogue entry over `tile` and its operand: value, d/d tile, d/d operand."""
    if name == "residual":
        return _TILE + symbol(name), const(1.0), const(1.0)
    if name in EPILOGUE_OPERANDS:  # layer_scale and scale: a product
        return _TILE * symbol(name), symbol(name), _TILE
    value, derivative = (substitute(e, {"x": _TILE}) for e in activation(name))
    return value, derivative, None


def _entry_text(name: str, of: str) -> str:
    if name == "residual":
        return f"{of} + {name}"
    if name in EPILOGUE_OPERANDS:
        return f"({of}) * {name}" if " + " in of and not of.endswith(")") else f"{of} * {name}"
    return f"{name}({of})"


def _epilogue(spec: MLPSpec) -> Epilogue:
    """Compose the entries forward, then apply the chain rule backward from `grad`."""
    value: Expr = _TILE
    text = "tile"
    steps = []
    for name in spec.epilogue:
        entry = _entry(name)
        steps.append((name, value, entry))
        value = substitute(entry[0], {"tile": value})
        text = _entry_text(name, text)
    grad: Expr = _GRAD
    grads: dict[str, Expr] = {}
    for name, before, (_, by_tile, by_operand) in reversed(steps):
        if by_operand is not None:
            grads[name] = grad * substitute(by_operand, {"tile": before})
        grad = grad * substitute(by_tile, {"tile": before})
    operands = tuple(Operand(name, kind) for name, kind in spec.operands().items())
    operand_grads = tuple(grads[o.name] for o in operands)
    return Epilogue(
        text=text,
        entries=spec.epilogue,
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
