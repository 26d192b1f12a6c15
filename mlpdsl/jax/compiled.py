"""`mlpdsl.jax.compile`: a spec in, a pure function of JAX arrays out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mlpdsl import source
from mlpdsl.backends import BACKENDS
from mlpdsl.codegen.blocks import block
from mlpdsl.codegen.lower import lower
from mlpdsl.errors import SpecError, UnsupportedError, describe
from mlpdsl.jax.checks import check
from mlpdsl.jax.eager import reference
from mlpdsl.jax.launch import varying
from mlpdsl.spec import MLPSpec, check_spec
from mlpdsl.target import TARGETS, Target, from_capability, parse_target

__all__ = ["compile", "target_here"]

_log = logging.getLogger("mlpdsl")

GPU_SINCE = (0, 10, 2)
"""The version of jax whose Mosaic GPU takes what the kernels for Hopper call."""


def target_here() -> Target | None:
    """The target of JAX's default device, or None where mlpdsl knows none like it. Initialises JAX's backend."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        return next((t for t in TARGETS.values() if t.kind == "tpu" and t.arch == device.device_kind), None)
    if device.platform in ("gpu", "cuda"):
        major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
        return from_capability(int(major), int(minor or 0)) if major.isdigit() and minor.isdigit() else None
    return TARGETS["cpu"] if device.platform == "cpu" else None


def compile(
    spec: MLPSpec, *, backend: str | None = None, target: str | Target | None = None, interpret: bool = False
) -> Callable[..., Any]:
    """Lower `spec` and return a pure function for it: `y = mlp(x, *params, **operands)`.

    x is (..., d_in); params come in the order of `spec.parameter_shapes()`, weights (out_features, in_features); operands (see
    `spec.operands()`) by keyword; y is (..., d_out). All are `jax.Array`s in the spec's dtype. The function has a `jax.custom_vjp`
    of generated kernels and works under `jit`, `grad`, `vmap` and `shard_map`; it is differentiable once, in reverse.

    `backend` is "pallas", "reference" (plain `jax.numpy`) or None: Pallas on a TPU where it can, else the reference, with one line
    in the log that says why. `target` names the architecture ("tpu_v5e", "sm_90"; default: JAX's first device, at the first call):
    with it, code is lowered for machines that are not here, as `jax.export` does. With `interpret`, Pallas interprets the kernels,
    on any device: slow, to test them; the target is then "cpu" unless given. Interpreted, and by the reference, float32 is
    multiplied as "ieee" whatever `precision` says.

    Raises `SpecError`; `UnsupportedError`, with every reason, where Pallas was asked for and cannot; the function, `ShapeError`.
    """
    check_spec(spec)
    if backend not in (None, "pallas", "reference"):
        raise SpecError(describe("backend", backend, "'pallas', 'reference' or None", "Leave it out to choose by device."))
    if type(interpret) is not bool:
        raise SpecError(describe("interpret", interpret, "True or False", "Leave it out for False."))
    if backend == "reference":
        return reference(spec)
    known = parse_target(target) if target is not None else TARGETS["cpu"] if interpret else None
    asked = backend == "pallas"
    if known is not None and (asked or not _reasons(spec, known, interpret, asked)):
        _kernels(spec, known, interpret)  # says now what it cannot, and writes the source

    def mlp(x: Any, *params: Any, **operands: Any) -> Any:
        check(spec, x, params, operands)
        function = _chosen(spec, backend, known, interpret)
        return function(x, params, {name: operands[name] for name in spec.operands()})

    mlp.__name__ = mlp.__qualname__ = f"mlp_{spec.short_name}".replace("-", "_")
    mlp.__doc__ = f"y (..., {spec.d_out}) = mlp(x (..., {spec.d_in}), {', '.join(spec.parameter_shapes())})."
    return mlp


def _reasons(spec: MLPSpec, target: Target, interpret: bool, asked: bool) -> list[str]:
    """Every reason why Pallas cannot run the spec's kernels on the target, or should not unless it was `asked` for."""
    if target.kind == "cpu" and not interpret:
        return ["on a CPU Pallas only interprets kernels, slowly: interpret=True does, or name the target to lower for"]
    if interpret and target.kind not in ("cpu", "tpu"):
        return [f"Pallas' interpreter does not know all that kernels for {target.name} call; target='cpu' is for it"]
    try:
        plan = lower(spec, target, "pallas")
    except UnsupportedError as error:
        return list(error.reasons)
    reasons = BACKENDS["pallas"].supports(plan, target)
    if target.kind == "cuda" and jax.__version_info__ < GPU_SINCE:
        reasons.append(f"its kernels for GPUs need jax {'.'.join(map(str, GPU_SINCE))} or later, and this is {jax.__version__}")
    if not reasons and not asked and target.kind == "cuda":
        reasons = ["XLA's products are as fast or faster where both were timed (an H200); backend='pallas' asks for the kernels"]
    return reasons


def _unknown_device() -> str:
    device = jax.devices()[0]
    return f"mlpdsl knows no target like JAX's first device, {device.device_kind!r} ({device.platform})"


@functools.lru_cache(maxsize=1024)
def _chosen(spec: MLPSpec, backend: str | None, known: Target | None, interpret: bool) -> Callable[..., Any]:
    """The function that runs: of generated kernels, or the reference."""
    target = known or target_here()
    reasons = [_unknown_device()] if target is None else _reasons(spec, target, interpret, backend == "pallas")
    if target is not None and not reasons:
        return _kernels(spec, target, interpret)
    if backend == "pallas":
        raise UnsupportedError(f"backend 'pallas' cannot run {spec.short_name}", reasons)
    level = logging.INFO if target is not None and target.kind == "cpu" else logging.WARNING
    _log.log(level, "mlpdsl.jax: jax.numpy runs %s: %s", spec.short_name, "; ".join(reasons))
    plain = reference(spec)
    return lambda x, params, operands: plain(x, *params, **operands)


@functools.lru_cache(maxsize=1024)
def _kernels(spec: MLPSpec, target: Target, interpret: bool) -> Callable[..., Any]:
    """`function(x, params, operands)` over the generated module."""
    reasons = _reasons(spec, target, interpret, asked=True)
    if reasons:
        raise UnsupportedError(f"backend 'pallas' cannot run {spec.short_name} on {target.name}", reasons)
    key, text, path = source.publish(spec, target, "pallas")
    module = BACKENDS["pallas"].load(path, text, key)
    blocks = functools.partial(block, lower(spec, target, "pallas"))
    kinds = tuple(spec.operands().values())
    call = _differentiable(module, blocks, interpret)

    def function(x: Any, params: Sequence[Any], operands: dict[str, Any]) -> Any:
        if interpret and any(map(varying, (x, *params, *operands.values()))):
            reason = "Pallas' interpreter knows nothing of varying mesh axes: jax.shard_map(…, check_vma=False)"
            raise UnsupportedError("interpret=True inside shard_map", [reason])
        lead = x.shape[:-1]
        shapes = {"tile": (-1, spec.d_out), "row": (-1, 1), "column": (1, -1), "scalar": (1, 1)}
        flat = [o.reshape(shapes[kind]) for o, kind in zip(operands.values(), kinds, strict=True)]
        arrays = _varying_alike([x.reshape(-1, spec.d_in), *params, *flat])
        if not isinstance(arrays[0].shape[0], int):
            reason = f"blocks follow the number of rows, which is symbolic here: {arrays[0].shape[0]}"
            raise UnsupportedError("Pallas kernels for a symbolic batch", [reason])
        if arrays[0].shape[0] == 0:
            return jnp.zeros((*lead, spec.d_out), x.dtype)
        count = 1 + len(params)
        return call(arrays[0], tuple(arrays[1:count]), tuple(arrays[count:])).reshape(*lead, spec.d_out)

    return function


def _varying_alike(arrays: Sequence[Any]) -> list[Any]:
    """Inside `shard_map`, arrays that vary over the same mesh axes: gradients of what was replicated are then summed over them."""
    axes = frozenset[Any]().union(*map(varying, arrays))
    return [jax.lax.pcast(a, tuple(axes - varying(a)), to="varying") if axes - varying(a) else a for a in arrays]


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses to be differentiated further."""
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        reason = "generated kernels have a first derivative, in reverse; mlpdsl.jax.reference(spec) has them all"
        raise UnsupportedError("a second derivative of a function of mlpdsl.jax.compile", [reason])

    return guarded


def _differentiable(module: ModuleType, blocks: Callable[..., Any], interpret: bool) -> Callable[..., Any]:
    """`call(x, params, operands)` for x (M, d_in) and operands of two dimensions, with the generated backward."""

    @jax.custom_vjp
    def call(x: Any, params: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
        return module.forward(x, params, operands, False, blocks, interpret)[0]

    @_once
    def keeping(x: Any, params: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
        return module.forward(x, params, operands, True, blocks, interpret)

    @_once
    def gradients(grad: Any, x: Any, params: tuple[Any, ...], operands: tuple[Any, ...], saved: list[Any]) -> Any:
        return module.backward(grad, x, params, operands, saved, blocks, interpret)

    def forward(x: Any, params: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
        y, saved = keeping(x, params, operands)
        return y, (x, params, operands, saved)

    def backward(kept: Any, grad: Any) -> Any:
        x, params, operands, saved = kept
        x_grad, param_grads, operand_grads = gradients(grad, x, params, operands, saved)
        params_found = tuple(g.astype(p.dtype) for g, p in zip(param_grads, params, strict=True))
        return x_grad, params_found, tuple(g.astype(o.dtype) for g, o in zip(operand_grads, operands, strict=True))

    call.defvjp(forward, backward)
    return call
