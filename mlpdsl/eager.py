"""The reference: the MLP of a spec in plain eager PyTorch, in the spec's dtype. It is also what runs where no kernel can."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlpdsl import precision
from mlpdsl.checks import Signature
from mlpdsl.errors import UnsupportedError
from mlpdsl.function import Function
from mlpdsl.names import EPILOGUE_OPERANDS
from mlpdsl.spec import MLPSpec, check_spec

__all__ = ["reference"]


@cache
def _registered(name: str) -> Callable[[Tensor], Tensor]:
    # The functions that were traced into the kernels are the reference: there is no second list to drift from.
    from mlpdsl.codegen.expr.registered import definitions

    return definitions()[name]


class _Derived(torch.autograd.Function):
    """A function with a derivative that is not torch's own: the user's, or the formulas of one read from JSON."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Callable[..., Tensor], partials: Callable[..., Any], *inputs: Tensor) -> Tensor:
        return value(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.partials, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = ctx.partials(*inputs)
        by = found if isinstance(found, (tuple, list)) else (found,)
        return None, None, *((grad * p).sum_to_size(t.shape) for p, t in zip(by, inputs, strict=True))


def _of_function(function: Function) -> Callable[..., Tensor]:
    """A user's function in eager PyTorch: itself where there is it, else its formulas."""
    value, derivative = function.call, function.derivative
    if value is not None and derivative is None:
        return value
    if value is None:
        if not function.value:
            return _only_text(function)
        from mlpdsl.codegen.expr.torch_code import to_torch
        from mlpdsl.plain import expressions

        formula, partials = expressions(function)
        run = to_torch((formula,), function.inputs)
        value, derivative = (lambda *inputs: run(*inputs)[0]), to_torch(tuple(partials), function.inputs)

    def derived(*inputs: Tensor) -> Tensor:
        result: Tensor = _Derived.apply(value, derivative, *torch.broadcast_tensors(*inputs))  # type: ignore[no-untyped-call]
        return result

    return derived


def _only_text(function: Function) -> Callable[..., Tensor]:
    backends = ", ".join(backend for backend, _ in function.snippets)

    def refuse(*inputs: Tensor) -> Tensor:
        step = "Declare it again in this process, or run a backend that it has text for."
        raise UnsupportedError(f"{function} was read from JSON, as text for {backends} only. {step}")

    return refuse


def _activation(declared: object) -> Callable[..., Tensor]:
    return _of_function(declared) if isinstance(declared, Function) else _registered(str(declared))


def _runs_tf32() -> bool:
    """Whether torch's global flags say that float32 products on CUDA are TF32 now.

    Not asked through allow_tf32: torch refuses to read that flag once a program has set the newer one. "none" inherits.
    """
    word = torch.backends.cuda.matmul.fp32_precision
    everywhere: str = getattr(torch.backends, "fp32_precision", "none")
    return bool((everywhere if word == "none" else word) == "tf32")


_runs_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def _matmul_precision(tf32: bool) -> Iterator[None]:
    """float32 products on CUDA in float32, or in TF32, whatever torch's global flag says; the flag is put back."""
    matmul = torch.backends.cuda.matmul
    with precision.lock:  # autograd has threads of its own
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            precision.said_again(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), before)


class _PreciseLinear(torch.autograd.Function):
    """F.linear whose three products, forward and backward, keep the spec's precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
        with _matmul_precision(tf32):
            return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.tf32 = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        with _matmul_precision(ctx.tf32):
            by_x = grad @ weight if ctx.needs_input_grad[0] else None
            by_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


def _linear(spec: MLPSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # tf32x3 has no counterpart in eager PyTorch: full float32 is the more exact way to do it.
    tf32 = spec.precision == "tf32"
    if spec.dtype == "float32" and x.is_cuda and _runs_tf32() != tf32:
        result: Tensor = _PreciseLinear.apply(x, weight, bias, tf32)  # type: ignore[no-untyped-call]
        return result
    return F.linear(x, weight, bias)


class Evaluation:
    """The formula of `MLPSpec`, one eager operation after the other, for arguments already checked.

    All functions are found here, once, so that a call, and torch.compile's trace of it, looks nothing up.
    """

    def __init__(self, spec: MLPSpec) -> None:
        self.spec = spec
        self.activation = _activation(spec.activation)
        self.of_gate_and_up = isinstance(spec.activation, Function) and len(spec.activation.inputs) == 2
        self.entries = tuple(_entry(entry) for entry in spec.epilogue)

    def __call__(self, x: Tensor, params: tuple[Tensor, ...], operands: dict[str, Tensor]) -> Tensor:
        spec, step = self.spec, 2 if self.spec.bias else 1
        linears = [(params[i], params[i + 1] if spec.bias else None) for i in range(0, len(params), step)]
        if spec.gated:
            gate, up = (_linear(spec, x, *linear) for linear in linears[:2])
            x = (self.activation(gate, up) if self.of_gate_and_up else self.activation(gate) * up).to(gate.dtype)
        else:
            for linear in linears[:-1]:
                z = _linear(spec, x, *linear)
                x = self.activation(z).to(z.dtype)
        y = _linear(spec, x, *linears[-1])
        for function, kinds in self.entries:
            by = [operands[n].reshape(()) if kind == "scalar" else operands[n] for n, kind in kinds.items()]
            y = function(y, *(o.to(y.dtype) for o in by)).to(y.dtype).expand(y.shape)  # it may read operands alone
        return y


def _entry(declared: object) -> tuple[Callable[..., Tensor], dict[str, str]]:
    """A function of the output and its operands, and their kinds by name."""
    if isinstance(declared, Function):
        return _of_function(declared), declared.operands
    name = str(declared)
    if name in EPILOGUE_OPERANDS:
        return (operator.add if name == "residual" else operator.mul), {name: EPILOGUE_OPERANDS[name]}
    return _registered(name), {}


def reference(spec: MLPSpec) -> Callable[..., Tensor]:
    """The MLP in eager PyTorch: `reference(spec)(x, *params, **operands)`, with the signature of `compile(spec)`.

    x is (..., dims[0]), the result (..., dims[-1]), all in the spec's dtype and on one device. Raises `ShapeError`.
    """
    check_spec(spec)
    signature, evaluation = Signature(spec), Evaluation(spec)

    def run(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        signature.check(x, params, operands)
        return evaluation(x, params, operands)

    return run
