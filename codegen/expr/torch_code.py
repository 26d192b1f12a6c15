"""Expressions as torch functions: what eager PyTorch runs for a function of which only the formula is known, and what checks use.

The function is printed as Python source and compiled, so that torch.compile can trace it; the source is made of fixed words,
checked names and numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .graph import Expr, walk

if TYPE_CHECKING:
    from torch import Tensor

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
          "both": "&", "either": "|"}  # fmt: skip
_TORCH = ("abs", "exp", "log", "sqrt", "sin", "cos", "erf", "floor", "sigmoid", "tanh", "expm1", "log1p", "sinh", "cosh", "tan",
          "asin", "acos", "atan", "asinh", "acosh", "atanh", "rsqrt", "exp2", "log2", "log10", "atan2", "hypot",
          "logaddexp", "erfc")  # fmt: skip


def functions() -> dict[str, Callable[..., Any]]:
    """What printed code calls: torch's own function of each operation, or a few of them."""
    import torch
    import torch.nn.functional as F

    def where(like: Tensor, condition: Any, yes: Any, no: Any) -> Tensor:
        if not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor):
            yes = torch.full_like(like, yes)  # two numbers alone would be float32
        chosen: Tensor = torch.where(condition, yes, no)
        return chosen

    def maximum(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            a, b = b, a
        return torch.maximum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, min=b)

    def minimum(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            a, b = b, a
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, max=b)

    def sigmoid_grad(x: Tensor) -> Tensor:
        slope: Tensor = torch.sigmoid(x) * torch.sigmoid(-x)
        return slope

    def tanh_softplus(x: Tensor) -> Tensor:
        return torch.tanh(F.softplus(x))

    return {
        **{name: getattr(torch, name) for name in _TORCH},
        "where": where,
        "max": maximum,
        "min": minimum,
        "pow": torch.pow,
        "softplus": lambda x: F.softplus(x, threshold=40.0),
        "log_sigmoid": F.logsigmoid,
        "normal_cdf": lambda x: 0.5 * torch.erfc(x * -math.sqrt(0.5)),
        "normal_pdf": lambda x: torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi)),
        "sigmoid_grad": sigmoid_grad,
        "tanh_grad": lambda x: 4.0 * sigmoid_grad(2.0 * x),
        "tanh_softplus": tanh_softplus,
        "tanh_softplus_grad": lambda x: 4.0 * sigmoid_grad(2.0 * F.softplus(x)) * torch.sigmoid(x),
    }


@lru_cache(maxsize=4096)
def to_torch(results: tuple[Expr, ...], inputs: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """`f(*inputs) -> results`: each result has the shape and dtype of the first input, whatever it depends on."""
    names = {name: f"x{i}" for i, name in enumerate(inputs)}
    texts: dict[int, str] = {}
    lines: list[str] = []
    for node in walk(*results):
        if node.op == "symbol":
            texts[id(node)] = names[node.name]
            continue
        if node.op == "const":
            texts[id(node)] = f"({node.value!r})"
            continue
        args = [texts[id(a)] for a in node.args]
        if node.op in _INFIX:
            printed = f"{args[0]} {_INFIX[node.op]} {args[1]}"
        elif node.op == "neg":
            printed = f"-{args[0]}"
        elif node.op == "invert":
            printed = f"~{args[0]}"
        elif all(a.op == "const" for a in node.args):
            printed = f"f_{node.op}({', '.join(f'torch.full_like(x0, {a})' for a in args)})"
        elif node.op == "where":
            printed = f"f_where(x0, {', '.join(args)})"
        elif node.op in ("atan2", "hypot", "logaddexp", "pow"):
            tensors = [f"torch.full_like(x0, {a})" if e.op == "const" else a for a, e in zip(args, node.args, strict=True)]
            printed = f"f_{node.op}({', '.join(tensors)})"
        else:
            printed = f"f_{node.op}({', '.join(args)})"
        texts[id(node)] = f"t{len(lines)}"
        lines.append(f"    t{len(lines)} = {printed}\n")
    # A number, or an operand alone, becomes a tensor like the first input.
    whole = ", ".join(f"torch.zeros_like(x0) + {texts[id(r)]}" if not _depends_on(r, inputs[0]) else texts[id(r)] for r in results)
    source = f"def f({', '.join(names.values())}):\n{''.join(lines)}    return ({whole},)\n"
    import torch

    space: dict[str, Any] = {"torch": torch, **{f"f_{op}": f for op, f in functions().items()}}
    exec(compile(source, "<mlpdsl formula>", "exec"), space)
    made: Callable[..., tuple[Any, ...]] = space["f"]
    return made


def _depends_on(expr: Expr, name: str) -> bool:
    return any(node.op == "symbol" and node.name == name for node in walk(expr))
