"""Expressions as functions of JAX arrays, operation by operation at the level of mathematics: what the reference computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .graph import Expr, walk


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """JAX's own function of each operation, or a few of them. Imports jax."""
    import jax
    import jax.numpy as jnp

    def sigmoid_grad(x: Any) -> Any:
        return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)

    named = ("exp", "log", "sqrt", "sin", "cos", "floor", "tanh", "expm1", "log1p", "sinh", "cosh", "tan", "exp2", "log2", "log10",
             "hypot", "logaddexp", "where")  # fmt: skip
    arcs = ("asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2")
    return {
        **{name: getattr(jnp, name) for name in named},
        **{name: getattr(jnp, name.replace("a", "arc", 1)) for name in arcs},
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
        "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "both": lambda a, b: a & b, "either": lambda a, b: a | b,
        "neg": lambda a: -a, "invert": lambda a: ~a, "abs": jnp.abs, "max": jnp.maximum, "min": jnp.minimum, "pow": jnp.power,
        "erf": jax.lax.erf, "erfc": jax.lax.erfc, "rsqrt": jax.lax.rsqrt, "sigmoid": jax.nn.sigmoid,
        "softplus": jax.nn.softplus, "log_sigmoid": jax.nn.log_sigmoid,
        "normal_cdf": lambda x: 0.5 * jax.lax.erfc(x * -math.sqrt(0.5)),
        "normal_pdf": lambda x: jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi)),
        "sigmoid_grad": sigmoid_grad,
        "tanh_grad": lambda x: 4.0 * sigmoid_grad(2.0 * x),
        "tanh_softplus": lambda x: jnp.tanh(jax.nn.softplus(x)),
        "tanh_softplus_grad": lambda x: 4.0 * sigmoid_grad(2.0 * jax.nn.softplus(x)) * jax.nn.sigmoid(x),
    }  # fmt: skip


def to_jax(results: Sequence[Expr], inputs: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """A function of one float32 array an input that returns one array of the broadcast shape for each expression."""
    nodes = tuple(walk(*results))
    if any(node.op == "snippet" for node in nodes):
        raise ValueError("an expression holds hand-written text, which no JAX function computes")

    def run(*arrays: Any) -> tuple[Any, ...]:
        import jax.numpy as jnp

        table, given, done = functions(), dict(zip(inputs, arrays, strict=True)), {}
        for node in nodes:
            if node.op == "symbol":
                done[id(node)] = given[node.name]
            elif node.op == "const":
                done[id(node)] = jnp.float32(node.value)
            else:
                done[id(node)] = table[node.op](*(done[id(a)] for a in node.args))
        shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
        return tuple(jnp.broadcast_to(done[id(r)], shape) for r in results)

    return run
