"""Autograd around the operators: skipped where no gradient is needed, once differentiable where one is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlpdsl import ops
from mlpdsl.errors import UnsupportedError

if TYPE_CHECKING:
    from mlpdsl.shortcut import Forward

__all__ = ["repeat", "run"]

Call = tuple[str, tuple[str, ...], bool]
"""Of a call: the spec as JSON, `same_as` of its plan for each operand, and whether it is batch-invariant."""


_ONCE = (
    "mlpdsl: an MLP's kernels are differentiable once, and a second derivative was asked for. "
    "Use backend='eager' (or mlpdsl.reference) where a gradient penalty or a Hessian is needed."
)
_LEGACY_BATCHED = (
    "mlpdsl: a batched backward of torch's older kind (is_grads_batched=True, or torch.autograd.functional with vectorize=True), "
    "which knows no operators but torch's. Use torch.func.jacrev, or torch.func.vmap over torch.func.vjp."
)
_TRANSFORM_IN_COMPILE = (
    "mlpdsl: a torch.func transform inside torch.compile loses the gradient of an autograd.Function (it would be zeros). "
    "Apply torch.compile to the MLP and the transform outside it, or call loss.backward() in the compiled function."
)


def _gradients(
    call: Call,
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    kind: Forward | None = None,
) -> list[Tensor | None]:
    """The gradients of x and of the inputs (parameters, then operands), None where not needed. `kind` is forward's, if it is one
    that is remembered."""
    spec, same_as, batch_invariant = call
    count = len(inputs) - len(same_as)
    parameters, operands = inputs[:count], inputs[count:]
    varying = (grad, x, *operands, *saved)
    if torch.compiler.is_compiling():
        kind = None
    given: Sequence[Tensor | None] | None = None if kind is None else kind.backward(tuple(needs), (*varying, *parameters))
    if given is None:
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
            raise UnsupportedError(_LEGACY_BATCHED)
        given = ops.backward(grad, x, parameters, operands, saved, needs, spec, batch_invariant)
        if kind is not None:
            kind.learn(tuple(needs), spec, batch_invariant, varying, parameters, len(operands))
    found = iter(given)
    # An operand that is only added has the output's gradient for its own: nothing is written for it.
    same = ("",) * (1 + count) + tuple(same_as)
    return [None if not need else grad if as_ == "grad" else next(found) for need, as_ in zip(needs, same, strict=True)]


class _FirstOnly(torch.autograd.Function):
    """First derivatives, passed on as they are; differentiating them raises.

    `once_differentiable` does not see to that: where the incoming gradient is a constant, as in `y.sum()`, it lets a gradient
    penalty lose its second derivative without a word. So the gradients are tied here to everything they depend on.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_ONCE)


def _once(grads: list[Tensor | None], depends_on: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which raise if they are differentiated. Free unless backward is being recorded (create_graph=True)."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled backwards refuse a second derivative themselves
        return grads
    given = [g for g in grads if g is not None]
    tied = iter(_FirstOnly.apply(len(given), *given, *depends_on))  # type: ignore[no-untyped-call]
    return [None if g is None else next(tied) for g in grads]


def _read(operands: Sequence[Tensor], same_as: Sequence[str]) -> list[Tensor]:
    """The operands that backward reads: of one that is only added, whose gradient is the output's, nothing is."""
    return [o for o, same in zip(operands, same_as, strict=True) if same != "grad"]


def _restored(
    tensors: Sequence[Tensor], count: int, same_as: Sequence[str], grad: Tensor
) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
    """x, the `count` inputs and what forward saved, from the tensors that were kept; grad, which has their shape, for operands that
    were not."""
    x, *rest = tensors
    parameters = count - len(same_as)
    kept = iter(rest[parameters:])
    operands = [grad if same == "grad" else next(kept) for same in same_as]
    return x, [*rest[:parameters], *operands], list(kept)


class _MLPFunction(torch.autograd.Function):
    """y = MLP(x, *parameters, *operands), keeping the preactivations for backward. `known`: the kind of call that it is, and where
    the tensors lie, if it is one that is remembered."""

    @staticmethod
    def forward(ctx: Any, call: Call, known: tuple[Forward, Sequence[int]] | None, x: Tensor, *inputs: Tensor) -> Tensor:
        spec, same_as, batch_invariant = call
        count = len(inputs) - len(same_as)
        parameters, operands = inputs[:count], inputs[count:]
        kind, results = None, None
        if known is not None:
            kind, addresses = known
            results = kind.results((x, *operands, *parameters), addresses)
        if results is None:
            results = ops.forward(x, parameters, operands, spec, True, batch_invariant)
        result: Tensor = results[0]
        ctx.save_for_backward(x, *parameters, *_read(operands, same_as), *results[1:])
        ctx.call, ctx.inputs, ctx.kind = call, len(inputs), kind
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing that was asked for depends on y
            return (None,) * len(ctx.needs_input_grad)
        x, inputs, saved = _restored(ctx.saved_tensors, ctx.inputs, ctx.call[1], grad)
        needs = ctx.needs_input_grad[2:]
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None:
            raise RuntimeError(_ONCE)
        if not torch.is_grad_enabled():
            return None, None, *_gradients(ctx.call, needs, grad, x, inputs, saved, ctx.kind)
        with torch.no_grad():
            grads = _gradients(ctx.call, needs, grad, x, inputs, saved)
        return None, None, *_once(grads, [grad, x, *inputs])


def repeat(
    call: Call,
    kind: Forward,
    addresses: Sequence[int],
    x: Tensor,
    parameters: tuple[Tensor, ...],
    operands: tuple[Tensor, ...],
) -> Tensor:
    """A call of a kind that is remembered, with its gradient. Nothing transforms it: torch's own `apply` would only ask that."""
    y: Tensor = super(torch.autograd.Function, _MLPFunction).apply(call, (kind, addresses), x, *parameters, *operands)  # type: ignore[no-untyped-call]
    return y


class _TransformedFunction(torch.autograd.Function):
    """The same for `torch.func` transforms, which want a `setup_context`; that costs 15 µs a call, so only they get it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: str, same_as: tuple[str, ...], batch_invariant: bool, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(inputs) - len(same_as)
        return tuple(ops.forward(x, inputs[:count], inputs[count:], spec, True, batch_invariant))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *call, x = inputs[:4]
        tensors = inputs[4:]
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.inputs = tuple(call), len(tensors)
        count = len(tensors) - len(ctx.call[1])
        ctx.save_for_backward(x, *tensors[:count], *_read(tensors[count:], ctx.call[1]), *saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, inputs, saved = _restored(ctx.saved_tensors, ctx.inputs, ctx.call[1], grad)
        with torch.no_grad():
            grads = _gradients(ctx.call, ctx.needs_input_grad[3:], grad, x, inputs, saved)
        return None, None, None, *_once(grads, [grad, x, *inputs])


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, and views of those that were there before: torch.compile takes no function that is given one tensor twice, as in
    mlp(x, residual=x)."""
    found: list[Tensor] = []
    for t in tensors:
        found.append(t.view_as(t) if any(t is other for other in found) else t)
    return found


def run(
    spec: str,
    same_as: tuple[str, ...],
    batch_invariant: bool,
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
) -> Tensor:
    """The MLP of a spec (as JSON) on checked arguments: (..., d_in) to (..., d_out). `same_as` is the plan's, for each operand."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise UnsupportedError(_TRANSFORM_IN_COMPILE)
        return _TransformedFunction.apply(spec, same_as, batch_invariant, x, *parameters, *operands)[0]  # type: ignore[no-any-return, no-untyped-call]
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in parameters) or any(o.requires_grad for o in operands)
    )
    # In forward mode too the function, which has no jvp and says so: the bare operator would drop the tangents.
    if recorded or forward_ad._current_level >= 0:
        if torch.compiler.is_compiling():
            x, *inputs = _apart([x, *parameters, *operands])
            parameters, operands = inputs[: len(parameters)], inputs[len(parameters) :]
        result: Tensor = _MLPFunction.apply((spec, same_as, batch_invariant), None, x, *parameters, *operands)  # type: ignore[no-untyped-call]
        return result
    y: Tensor = ops.forward(x, parameters, operands, spec, False, batch_invariant)[0]
    return y
