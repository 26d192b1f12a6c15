"""Torch's calls through functions of JAX arrays: forward and all gradients, and what the oracle says of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import torch
from hypothesis import Phase, settings
from torch import Tensor

import mlpdsl.jax
from mlpdsl import MLPSpec
from mlpdsl.codegen import blocks
from mlpdsl.jax import compiled
from mlpdsl.testing.calls import Call, Verdict, bits, judge, same_bits

__all__ = [
    "Function",
    "arrays",
    "check",
    "drawing",
    "gradients",
    "interpreted",
    "of_named",
    "run",
    "small_blocks",
    "to_jax",
    "to_torch",
]

Function = Callable[..., Any]
"""`y = f(x, *params, **operands)`, of JAX arrays."""

drawing = functools.partial(settings, phases=(Phase.explicit, Phase.generate, Phase.shrink))
"""Hypothesis's settings. It explains a failure by tracing every line, which takes JAX minutes."""

torch.set_num_threads(1)


def to_jax(tensor: Tensor) -> jax.Array:
    """The same bits as an array, dense."""
    array: jax.Array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
    return array


def to_torch(array: jax.Array) -> Tensor:
    """The same bits as a tensor."""
    tensor: Tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]
    return tensor


def arrays(call: Call) -> dict[str, jax.Array]:
    """x, parameters and operands by name, as `call.named()` has them."""
    return {name: to_jax(t) for name, t in call.named().items()}


def interpreted(spec: MLPSpec) -> Function:
    """The generated kernels, interpreted on the CPU."""
    function: Function = mlpdsl.jax.compile(spec, backend="pallas", interpret=True)
    return function


def of_named(spec: MLPSpec, mlp: Function) -> Callable[[dict[str, jax.Array]], Any]:
    """`mlp` as a function of everything by name."""
    order, operands = ("x", *spec.parameter_shapes()), tuple(spec.operands())
    return lambda named: mlp(*(named[n] for n in order), **{n: named[n] for n in operands})


def gradients(spec: MLPSpec, mlp: Function) -> Function:
    """`y, grads = f(dy, named)`: the result and the gradients of everything in `named`, by name."""

    def both(dy: jax.Array, named: dict[str, jax.Array]) -> Any:
        y, back = jax.vjp(of_named(spec, mlp), named)
        return y, back(dy)[0]

    return both


def run(call: Call, mlp: Function | None = None, *, jit: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and every gradient of a torch call, in the order of `call.named()`; of the interpreted kernels unless given."""
    function = gradients(call.spec, mlp or interpreted(call.spec))
    y, grads = (jax.jit(function) if jit else function)(to_jax(call.dy), arrays(call))
    return to_torch(y), {name: to_torch(grads[name]) for name in call.named()}


def check(call: Call, mlp: Function | None = None, *, jit: bool = True, eager: bool = True, alone: bool = True) -> Verdict:
    """Hold a call against the oracle, which replays the roundings: forward alone (not without `alone`, which takes a third of the
    time), and forward and backward. It writes no input.

    Raises `AssertionError`, and what the call itself raises.
    """
    before = [bits(b).clone() for b in call.buffers]
    mlp = mlp or interpreted(call.spec)
    forward, both = of_named(call.spec, mlp), gradients(call.spec, mlp)

    def everything(dy: jax.Array, named: dict[str, jax.Array]) -> Any:
        made = both(dy, named)
        return forward(named) if alone else made[0], made

    y_alone, (y, grads) = (jax.jit(everything) if jit else everything)(to_jax(call.dy), arrays(call))
    assert all(torch.equal(bits(b), was) for b, was in zip(call.buffers, before, strict=True)), "an input was written"
    if not same_bits(to_torch(y_alone), to_torch(y)):  # XLA fuses one as it does not the other
        judge(call, to_torch(y_alone), {}, eager=eager)
    return judge(call, to_torch(y), {name: to_torch(grads[name]) for name in call.named()}, eager=eager)


@contextlib.contextmanager
def small_blocks(rows: int, columns: int, depth: int) -> Iterator[None]:
    """Inside, no block is larger than this, and multiples of 8 will do, so that small products have several, and remainders.

    Such blocks are for the interpreter: a TPU's tiles are larger.
    """
    caches = (blocks.block, compiled._kernels, compiled._chosen)
    try:
        with (
            mock.patch.dict(blocks._LARGEST, rows=rows, columns=columns, sum=depth),
            mock.patch.multiple(blocks, ROWS=8, LANES=8),
        ):
            for cached in caches:
                cached.cache_clear()
            yield
    finally:
        for cached in caches:
            cached.cache_clear()
