"""What the suites that run kernels share: what is drawn, and (from `mlpdsl.testing.calls`) how calls are made and checked.

`draw_spec` and `draw_call` take `pick`, a function that chooses one of a sequence: Hypothesis's `data.draw(sampled_from(…))`, or
`random.Random(seed).choice` where Hypothesis is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from mlpdsl import MLPSpec
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.calls import (
    BITS,
    GUARD,
    LAYOUTS,
    PAIRS,
    WEIGHT_LAYOUTS,
    Call,
    Guards,
    Verdict,
    bits,
    check_call,
    guarded_allocations,
    judge,
    make_call,
    place,
    same_bits,
)

__all__ = [
    "ALIGNED_WIDTHS", "BITS", "DTYPES", "GUARD", "INTERPRETING", "LAYOUTS", "NO_GPU", "NO_INTERPRETER", "PAIRS", "ROWS",
    "WEIGHT_LAYOUTS", "WIDTHS", "Call", "Guards", "Pick", "Verdict", "bits", "check_call", "draw_call", "draw_epilogue", 
    "draw_lead", "draw_spec", "guarded_allocations", "judge", "make_call", "place", "same_bits",
]  # fmt: skip

Pick = Callable[[Sequence[Any]], Any]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NO_INTERPRETER = "needs TRITON_INTERPRET=1 set before triton is imported (make test sets it)"
NO_GPU = "needs a CUDA GPU"

WIDTHS = (1, 2, 3, 5, 7, 9, 13, 15, 17, 20, 31, 33, 47, 50, 65, 71)
ALIGNED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72)
DTYPES = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 33, 40, 50, 64, 65, 70, 100, 129, 150)


def draw_spec(pick: Pick, **fixed: Any) -> MLPSpec:
    """Any spec of small widths: half of them odd, half multiples of 8 (for TMA); `fixed` are fields not to be drawn."""
    gated = fixed.get("gated", pick((False, True)))
    widths = pick((WIDTHS, ALIGNED_WIDTHS))
    depth = 2 if gated else pick((2, 1, 3, 4))
    dims = tuple(pick(widths) for _ in range(depth + 1))
    dtype, precision = pick(DTYPES)
    drawn = {"dims": dims, "gated": gated, "bias": pick((False, True)), "dtype": dtype, "precision": precision}
    drawn["epilogue"] = draw_epilogue(pick)
    drawn.update(fixed)
    drawn["activation"] = fixed.get("activation", pick(ACTIVATIONS)) if len(drawn["dims"]) > 2 else "identity"
    return MLPSpec(**drawn)


def draw_epilogue(pick: Pick) -> tuple[str, ...]:
    entries: list[str] = []
    for _ in range(pick((0, 1, 2, 3, 4))):
        used = set(entries)
        entries.append(pick([n for n in ("residual", "layer_scale", "scale", *ACTIVATIONS) if n in ACTIVATIONS or n not in used]))
    return tuple(entries)


def draw_lead(pick: Pick, rows: Sequence[int] = ROWS) -> tuple[int, ...]:
    """Leading dimensions of x: none, one, two or three."""
    kind = pick(("rows", "rows", "rows", "batch", "deep", "none"))
    if kind == "none":
        return ()
    if kind == "rows":
        return (pick(rows),)
    if kind == "batch":
        return (pick((1, 2, 3, 5)), pick((1, 2, 7, 16, 21)))
    return (pick((1, 2)), pick((1, 3)), pick((1, 4, 9)))


def draw_call(pick: Pick, spec: MLPSpec, lead: Sequence[int], seed: int, **fixed: Any) -> Call:
    """A call with any layout of x, parameters, operands and gradient."""
    drawn = {
        "x": pick(tuple(LAYOUTS)),
        "swap": pick((False, True)),
        "weights": pick(WEIGHT_LAYOUTS),
        "pair": pick(PAIRS),
        "operands": pick(tuple(LAYOUTS)),
        "dy": pick(tuple(LAYOUTS)),
        "values": pick(("normal", "tiny", "huge", "zeros", "specials")),
        "wide_operands": pick((False, True)),
    }
    return make_call(spec, lead, seed, **{**drawn, **fixed})
