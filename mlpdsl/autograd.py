"""Autograd around the operators: skipped where no gradient is needed, once differentiable where one is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlpdsl import ops
from mlpdsl.dispatch import plan_of

__all__ = ["run"]


class _MLPFunction(torch.autograd.Function):
    """y = MLP(x, *parameters, *operands), keeping the preactivations for backward."""

    @staticmethod
    def forward(ctx: Any, spec: str, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        y, *saved = ops.forward(x, tensors[:count], tensors[count:], spec, True)
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.spec, ctx.count, ctx.inputs = spec, count, len(tensors)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.inputs], rest[ctx.inputs :]
        needs = ctx.needs_input_grad[2:]
        found = iter(ops.backward(grad, x, tensors[: ctx.count], tensors[ctx.count :], saved, needs, ctx.spec))
        # An operand that is only added has the output's gradient for its own: nothing is written for it.
        same_as = ("",) * (1 + ctx.count) + plan_of(ctx.spec).epilogue.same_as
        grads = (None if not need else grad if same == "grad" else next(found) for need, same in zip(needs, same_as, strict=True))
        return None, None, *grads


def run(spec: str, x: Tensor, parameters: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
    """The MLP of a spec (as JSON) on checked arguments: (..., d_in) to (..., d_out)."""
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in parameters) or any(o.requires_grad for o in operands)
    ):
        result: Tensor = _MLPFunction.apply(spec, len(parameters), x, *parameters, *operands)  # type: ignore[no-untyped-call]
        return result
    y: Tensor = ops.forward(x, parameters, operands, spec, False)[0]
    return y
