"""The registered activations: each one a function of one torch tensor, traced once and shipped as formulas.

`registered.json` holds value and derivative of every name, so that declaring an MLP traces nothing. After a change here or in
`aten`, run `python -m mlpdsl.codegen.expr.registered` to write it anew; a test compares it with a fresh trace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from . import formula
from .graph import Expr

SHIPPED = Path(__file__).with_name("registered.json")

VALUES = {"quick_gelu": "max(x, -200.0) * sigmoid(x * 1.702)"}
"""Values with the factors of a definition cancelled by hand: as traced, 1.702·x/1.702 would overflow before x does."""


def definitions() -> dict[str, Callable[[Any], Any]]:
    """Name → the torch function that defines it (imports torch)."""
    import torch
    import torch.nn.functional as F

    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_10": lambda x: torch.clamp(F.gelu(x), -10.0, 10.0),
        # x·sigmoid(1.702·x), written so that torch's own silu carries the limits at infinity.
        "quick_gelu": lambda x: F.silu(1.702 * x) / 1.702,
        "silu": F.silu,
        "relu": torch.relu,
        "relu2": lambda x: torch.square(torch.relu(x)),
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softplus": F.softplus,
        "mish": F.mish,
        "hardswish": F.hardswish,
        # transformers' LaplaceActivation, by erfc because 1 + erf cancels.
        "laplace": lambda x: 0.5 * torch.special.erfc((0.707107 - x) / (0.282095 * math.sqrt(2.0))),
        "identity": lambda x: x,
    }


@cache
def _shipped() -> dict[str, dict[str, str]]:
    loaded: dict[str, dict[str, str]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return loaded


@cache
def activation(name: str) -> tuple[Expr, Expr]:
    """Value and derivative of a registered activation, over the symbol `x`."""
    text = _shipped()[name]
    return formula.parse(text["value"], ("x",)), formula.parse(text["derivative"], ("x",))


def retrace() -> dict[str, dict[str, str]]:
    """What `registered.json` should hold, traced anew by the installed torch."""
    from .trace import trace

    table = {}
    for name, function in definitions().items():
        value, partials = trace(function, ("x",))
        table[name] = {"value": VALUES.get(name, formula.to_text(value)), "derivative": formula.to_text(partials["x"])}
    return table


if __name__ == "__main__":
    SHIPPED.write_text(json.dumps(retrace(), indent=1) + "\n", encoding="utf-8")
