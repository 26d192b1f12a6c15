"""The same MLPs in JAX: generated Pallas kernels where they can run, `jax.numpy` elsewhere. `pip install mlpdsl[jax]`.

    import mlpdsl, mlpdsl.jax

    spec = mlpdsl.MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16")
    mlp = mlpdsl.jax.compile(spec)          # a pure function: jit, grad, vmap and shard_map it
    y = mlp(x, gate_weight, up_weight, down_weight)

`import mlpdsl` never imports this package, and this package imports jax only with the first of its names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpdsl.jax.compiled import compile
    from mlpdsl.jax.convert import from_torch, to_torch
    from mlpdsl.jax.eager import reference

_WHERE = {"compile": "compiled", "from_torch": "convert", "reference": "eager", "to_torch": "convert"}

__all__ = ["compile", "from_torch", "reference", "to_torch"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mlpdsl.jax' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"mlpdsl.jax.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "jaxlib"):
            raise
        raise ModuleNotFoundError("mlpdsl.jax needs jax: pip install 'mlpdsl[jax]'", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
