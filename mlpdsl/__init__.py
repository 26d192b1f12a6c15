"""Declare an MLP; get the Triton kernels for it, forward and backward, generated, cached and readable.

    import mlpdsl

    spec = mlpdsl.MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16")
    mlp = mlpdsl.compile(spec)              # safe at import: no GPU touched, nothing compiled
    y = mlp(x, gate_weight, up_weight, down_weight)

Names are loaded when they are first used, so that importing mlpdsl imports neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlpdsl.version import __version__

if TYPE_CHECKING:
    from mlpdsl.compiled import compile
    from mlpdsl.eager import reference
    from mlpdsl.errors import MLPError, NotCompiledError, ShapeError, SpecError, UnstableWarning, UnsupportedError
    from mlpdsl.explanation import Explanation, explain
    from mlpdsl.function import Function
    from mlpdsl.fusing import fuse, unfuse
    from mlpdsl.module import MLP
    from mlpdsl.source import Generated, generate
    from mlpdsl.spec import MLPSpec
    from mlpdsl.traced import activation, epilogue, register_activation
    from mlpdsl.warming import warmup

_WHERE = {
    "MLPSpec": "spec",
    "compile": "compiled",
    "reference": "eager",
    "MLP": "module",
    "activation": "traced",
    "epilogue": "traced",
    "register_activation": "traced",
    "Function": "function",
    "fuse": "fusing",
    "unfuse": "fusing",
    "explain": "explanation",
    "Explanation": "explanation",
    "generate": "source",
    "Generated": "source",
    "warmup": "warming",
    "MLPError": "errors",
    "NotCompiledError": "errors",
    "SpecError": "errors",
    "ShapeError": "errors",
    "UnsupportedError": "errors",
    "UnstableWarning": "errors",
}

__all__ = [
    "MLP", "Explanation", "Function", "Generated", "MLPError", "MLPSpec", "NotCompiledError", "ShapeError", "SpecError",
    "UnstableWarning", "UnsupportedError", "__version__", "activation", "compile", "epilogue", "explain", "fuse", "generate",
    "reference", "register_activation", "unfuse", "warmup",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mlpdsl' has no attribute {name!r}")
    value = getattr(import_module(f"mlpdsl.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
