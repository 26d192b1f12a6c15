"""Parameters between torch and JAX, by name; through dlpack without a copy where both can use the memory as it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.dlpack

from mlpdsl.errors import ShapeError, describe
from mlpdsl.spec import MLPSpec, check_spec

__all__ = ["from_torch", "to_torch"]


def from_torch(spec: MLPSpec, source: Any) -> dict[str, jax.Array]:
    """The parameters of a torch module, or of a state_dict, as JAX arrays under the names and in the order of
    `spec.parameter_shapes()`: `mlp(x, *mlpdsl.jax.from_torch(spec, layer).values())`.

    A dense tensor is shared where dlpack can, on a CPU and on a GPU that JAX sees: do not write to it afterwards. Others are
    copied. Raises `ShapeError` for a name that is missing, or a tensor of another shape or dtype.
    """
    check_spec(spec)
    state: Mapping[str, Any] = source if isinstance(source, Mapping) else source.state_dict()
    found = {}
    for name, shape in spec.parameter_shapes().items():
        if name not in state:
            step = f"It holds {', '.join(list(state)[:8]) or 'nothing'}."
            raise ShapeError(describe(name, "no such parameter", "a tensor of that name", step))
        tensor = state[name].detach()
        _check(name, tuple(tensor.shape), shape, str(tensor.dtype).removeprefix("torch."), spec.dtype)
        found[name] = jax.dlpack.from_dlpack(tensor.contiguous())
    return found


def to_torch(spec: MLPSpec, params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """JAX arrays by name as torch tensors, in the order of `spec.parameter_shapes()`: what `load_state_dict` takes.

    The tensors share memory with the arrays where dlpack can: JAX's arrays are constants, so clone what you would train. Raises
    `ShapeError` as `from_torch` does, and for an array on several devices.
    """
    from torch.utils.dlpack import from_dlpack

    check_spec(spec)
    found = {}
    for name, shape in spec.parameter_shapes().items():
        if name not in params:
            step = f"It holds {', '.join(list(params)[:8]) or 'nothing'}."
            raise ShapeError(describe(name, "no such parameter", "an array of that name", step))
        array = params[name]
        if len(array.sharding.device_set) > 1:
            step = "jax.device_put it onto one of them first."
            raise ShapeError(describe(f"{name}.sharding", f"on {len(array.sharding.device_set)} devices", "on one device", step))
        _check(name, array.shape, shape, str(array.dtype), spec.dtype)
        found[name] = from_dlpack(array)
    return found


def _check(name: str, got: tuple[int, ...], shape: tuple[int, ...], dtype: str, wanted: str) -> None:
    if got != shape:
        raise ShapeError(describe(f"{name}.shape", got, str(shape), "Weights are (out_features, in_features)."))
    if dtype != wanted:
        raise ShapeError(describe(f"{name}.dtype", dtype, wanted, "Cast it, or declare the spec with this dtype."))
