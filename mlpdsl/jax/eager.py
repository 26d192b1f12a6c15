"""The reference in JAX: the MLP of a spec in plain `jax.numpy`, in the spec's dtype. It is also what runs where no kernel can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from mlpdsl.codegen.expr.graph import Expr
from mlpdsl.codegen.expr.jax_code import to_jax
from mlpdsl.codegen.lower import expressions
from mlpdsl.function import Function
from mlpdsl.jax.checks import check
from mlpdsl.names import EPILOGUE_OPERANDS, RESIDUAL
from mlpdsl.spec import MLPSpec, check_spec

__all__ = ["reference"]


def _elementwise(value: Expr, partials: Sequence[Expr], inputs: Sequence[str]) -> Callable[..., Any]:
    """A function computed in float32 and rounded to its first input's dtype, with the formulas' derivatives."""
    run, slopes = to_jax([value], inputs), to_jax(partials, inputs)

    @jax.custom_jvp
    def wide(*arrays: Any) -> Any:
        return run(*arrays)[0]

    @wide.defjvp
    def wide_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        steps = (slope * tangent for slope, tangent in zip(slopes(*primals), tangents, strict=True))
        return wide(*primals), sum(steps, jnp.float32(0.0))

    def function(*arrays: Any) -> Any:
        spread = jnp.broadcast_arrays(*(a.astype(jnp.float32) for a in arrays))
        return wide(*spread).astype(arrays[0].dtype)

    return function


@cache
def _function(declared: Function | str) -> Callable[..., Any]:
    if isinstance(declared, Function):
        value, partials = expressions(declared, "pallas")
        return _elementwise(value, partials, declared.inputs)
    from mlpdsl.codegen.expr.registered import activation

    value, slope = activation(declared)
    return _elementwise(value, [slope], ("x",))


def _linear(x: Any, weight: Any, bias: Any | None) -> Any:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, weight.T, precision=precision, preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def reference(spec: MLPSpec) -> Callable[..., Any]:
    """The MLP in `jax.numpy`: a pure function `f(x, *params, **operands)`, arrays as for `mlpdsl.jax.compile`.

    Rounds to the spec's dtype after every linear, activation and epilogue entry, as eager PyTorch does; products accumulate in
    float32, functions are computed in it. Raises `SpecError`; the function raises `ShapeError`; `UnsupportedError` where a function
    of the spec is hand-written and has no formula.
    """
    check_spec(spec)
    act = spec.activation
    activate = _function(act if isinstance(act, Function) else str(act)) if len(spec.dims) > 2 else None
    entries = [_entry(entry) for entry in spec.epilogue]

    def mlp(x: Any, *params: Any, **operands: Any) -> Any:
        check(spec, x, params, operands)
        given = iter(params)

        def linear(h: Any) -> Any:
            weight = next(given)
            return _linear(h, weight, next(given) if spec.bias else None)

        h = x
        for layer in range(len(spec.dims) - 2):
            assert activate is not None
            if not (spec.gated and layer == 0):
                h = activate(linear(h))
                continue
            gate, up = linear(h), linear(h)
            h = activate(gate, up) if isinstance(act, Function) and len(act.inputs) == 2 else activate(gate) * up
        y = linear(h)
        for entry in entries:
            y = entry(y, operands)
        return y

    return mlp


def _entry(entry: Any) -> Callable[[Any, dict[str, Any]], Any]:
    """One epilogue entry: the output so far and the operands by name, to the output."""
    if isinstance(entry, Function):
        run, names = _function(entry), tuple(entry.operands)
        return lambda y, operands: run(y, *(_spread(operands[n], entry.operands[n], y) for n in names))
    if entry == RESIDUAL:
        return lambda y, operands: y + operands[RESIDUAL]
    if entry in EPILOGUE_OPERANDS:
        return lambda y, operands: (y * _spread(operands[entry], EPILOGUE_OPERANDS[entry], y)).astype(y.dtype)
    activated = _function(entry)
    return lambda y, operands: activated(y)


def _spread(operand: Any, kind: str, y: Any) -> Any:
    return operand.reshape(()) if kind == "scalar" else operand
