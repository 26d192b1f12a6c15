"""What generated Pallas source calls, and what differs between versions of JAX."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["like", "varying"]


def varying(x: Any) -> frozenset[Any]:
    """The mesh axes of a `shard_map` that an array varies over; empty outside one."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10 and newer
    axes: frozenset[Any] = kind.vma if manual is None else manual.varying
    return axes


def like(x: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output: it varies over the mesh axes that `x` varies over."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    more = {"vma": varying(x)} if manual is None else {"manual_axis_type": manual}
    return jax.ShapeDtypeStruct(shape, dtype, **more)  # type: ignore[no-untyped-call]
