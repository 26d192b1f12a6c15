"""The law of `batch_invariant=True`, for the interpreter and for a GPU: some rows of a call, alone and in another order, have the
bits that they have in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlpdsl
from mlpdsl.testing.calls import Call, place, same_bits


def rows_of(call: Call, chosen: Sequence[int], layout: str) -> Call:
    """The call of the chosen rows of x (M, d_in), of tiles, of row operands and of dy, lying as `layout` says."""
    kinds = call.spec.operands()
    index = list(chosen)
    operands = {
        name: place(t[index], layout) if kinds[name] == "tile" else t[index] if kinds[name] == "row" else t
        for name, t in call.operands.items()
    }
    return replace(call, x=place(call.x[index], layout), operands=operands, dy=place(call.dy[index], layout), recipe={})


def differing(call: Call, chosen: Sequence[int], layout: str) -> list[str]:
    """The results that differ in some bit of the chosen rows: "y", and by name the gradients that have rows."""
    mlp = mlpdsl.compile(call.spec, backend="triton", batch_invariant=True)
    kinds = call.spec.operands()
    whole_y, whole = call.gradients(mlp)
    part_y, part = rows_of(call, chosen, layout).gradients(mlp)
    index = list(chosen)
    found = [] if same_bits(part_y, whole_y[index]) else ["y"]
    for name in ("x", *(name for name, kind in kinds.items() if kind in ("tile", "row"))):
        if not same_bits(part[name], whole[name][index]):
            found.append(name)
    return found
