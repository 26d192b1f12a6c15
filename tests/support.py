"""What suites share: where they can run, and what two of them ask of the same law."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mlpdsl.testing.calls import Call

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NO_INTERPRETER = "needs TRITON_INTERPRET=1 set before triton is imported (make test sets it)"
NO_GPU = "needs a CUDA GPU"


@contextlib.contextmanager
def kept() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What autograd saves meanwhile: each tensor, and a copy of it as it was."""
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def outputs_in_order(call: Call, order: Tensor) -> tuple[Call, dict[str, int]]:
    """`call` with its outputs in another order: the last linear's rows, the columns of operands and of dy.

    And what follows that order, by name: the dimension of y, or of a gradient.
    """
    names = list(call.spec.parameter_shapes())
    follow = dict.fromkeys(names[-2:] if call.spec.bias else names[-1:], 0)
    params = [p[order] if name in follow else p for name, p in zip(names, call.params, strict=True)]
    follow |= {name: -1 for name, kind in call.spec.operands().items() if kind in ("tile", "column")}
    operands = {name: t[..., order] if name in follow else t for name, t in call.operands.items()}
    return replace(call, params=params, operands=operands, dy=call.dy[..., order], recipe={}), {"y": -1, **follow}
