"""Does a call fit the spec? In JAX arrays; said in one sentence where it does not, before anything is traced further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from mlpdsl.errors import ShapeError, describe
from mlpdsl.spec import MLPSpec

__all__ = ["check"]


def check(spec: MLPSpec, x: Any, params: Sequence[Any], operands: Mapping[str, Any]) -> None:
    """Raise `ShapeError` unless x (..., d_in), the parameters in order, and the operands by name fit the spec.

    Parameters and tile operands are of the spec's dtype; the other operands may be float32 too. Operands do not broadcast.
    """
    dtype = jnp.dtype(spec.dtype)
    _check_array("x", x, (dtype,))
    if x.ndim == 0 or x.shape[-1] != spec.d_in:
        _fail("x.shape", x.shape, f"(..., {spec.d_in})", "The last dimension is the MLP's input width.")
    shapes = spec.parameter_shapes()
    if len(params) != len(shapes):
        step = "Pass them in the order of spec.parameter_shapes()."
        _fail("parameters", f"{len(params)} of them", f"{len(shapes)}: {', '.join(list(shapes)[:8])}", step)
    for param, (name, shape) in zip(params, shapes.items(), strict=True):
        _check_array(name, param, (dtype,))
        if param.shape != shape:
            _fail(f"{name}.shape", param.shape, str(shape), "Weights are (out_features, in_features), as in torch.")
    kinds = spec.operands()
    if operands.keys() != kinds.keys():
        allowed = ", ".join(f"{n}= ({k})" for n, k in kinds.items()) or "none: the spec's epilogue has no operands"
        _fail("operands", ", ".join(operands) or "none", allowed, "Operands are passed by keyword.")
    for name, kind in kinds.items():
        _check_array(name, operands[name], (dtype,) if kind == "tile" else (dtype, jnp.dtype("float32")))
        shape = {"tile": (*x.shape[:-1], spec.d_out), "row": (*x.shape[:-1], 1), "column": (spec.d_out,), "scalar": ()}[kind]
        if operands[name].shape != shape and not (kind == "scalar" and operands[name].size == 1):
            _fail(f"{name}.shape", operands[name].shape, str(shape), "Operands do not broadcast; use jnp.broadcast_to.")


def _check_array(name: str, array: Any, dtypes: tuple[Any, ...]) -> None:
    if not isinstance(array, jax.Array):
        _fail(name, array, "a jax.Array", "Use jnp.asarray, or mlpdsl.jax.from_torch.")
    if array.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        _fail(f"{name}.dtype", array.dtype, allowed, "Cast it, or declare the spec with this dtype.")


def _fail(where: str, got: object, allowed: str, step: str) -> NoReturn:
    raise ShapeError(describe(where, got, allowed, step))
