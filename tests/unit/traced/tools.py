"""What the tests of users' own functions share: a few functions, specs and calls of them, and a check of formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.function import Function

WARNED = {"squareplus", "polar_gate"}  # they cancel far out, where the test of soundness says so
IN_FLOAT32 = {"silu_upcast", "gelu_tensor_constant"}  # what they compute in float32 whatever they are given


def snake(x: Tensor) -> Tensor:
    return x + torch.sin(x).square()


def other(x: Tensor) -> Tensor:
    return x * torch.cos(x)


def scaled(x: Tensor, gamma: Tensor) -> Tensor:
    return x * torch.tanh(gamma)


def spec_of(act: Any = "relu", epilogue: Any = (), dims: tuple[int, ...] = (4, 5, 6), **fields: Any) -> MLPSpec:
    return MLPSpec(dims=dims, activation=act, epilogue=epilogue, **fields)


def call_of(spec: MLPSpec, seed: int = 0) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """x, parameters and operands of a call of three rows."""
    torch.manual_seed(seed)
    shapes = {"tile": (3, spec.d_out), "column": (spec.d_out,), "row": (3, 1), "scalar": ()}
    operands = {name: torch.randn(shapes[kind]) for name, kind in spec.operands().items()}
    return torch.randn(3, spec.d_in), [torch.randn(s) for s in spec.parameter_shapes().values()], operands


def reference(spec: MLPSpec) -> Tensor:
    x, params, operands = call_of(spec)
    return mlpdsl.reference(spec)(x, *params, **operands)


def as_json(act: object = "relu", epilogue: object = (), **fields: object) -> MLPSpec:
    return MLPSpec.from_json(json.dumps({"dims": [4, 5, 6], "activation": act, "epilogue": epilogue, **fields}))


def points(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 4.0, 15.0], dtype=torch.float64).repeat(64)
    return [torch.randn(256, dtype=torch.float64, generator=generator) * scale for _ in range(count)]


def by_torch(fn: Callable[..., Tensor], at: list[Tensor]) -> list[Tensor]:
    """The value and every derivative, by the function and autograd."""
    leaves = [t.clone().requires_grad_() for t in at]
    value = fn(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)]


def by_formula(function: Function, at: list[Tensor]) -> list[Tensor]:
    value, partials = plain_form.expressions(function)
    return list(to_torch((value, *partials), function.inputs)(*at))


def check_formulas(name: str, fn: Callable[..., Tensor], function: Function) -> None:
    at = points(len(function.inputs))
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-8
    for found, expected in zip(by_formula(function, at), by_torch(fn, at), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
