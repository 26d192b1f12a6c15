"""`mlpdsl.MLP`: the compiled MLP as an `nn.Module` whose parameters are those of ordinary `nn.Linear` children."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlpdsl.checks import torch_dtype
from mlpdsl.compiled import compile
from mlpdsl.errors import UnsupportedError
from mlpdsl.function import Function
from mlpdsl.spec import MLPSpec

__all__ = ["MLP"]


class MLP(nn.Module):
    """y = MLP(x): the spec's linears as `nn.Linear` children, run by the generated kernels.

    The keys of `state_dict()` are those of `spec.parameter_shapes()`, initialised as `nn.Linear` does. `forward` takes
    x (..., d_in), and the epilogue's operands by keyword; it runs in the dtype the parameters have now, so that
    `layer.bfloat16()` changes the kernels too. `compile_options` go to `mlpdsl.compile`.
    """

    def __init__(self, spec: MLPSpec, device: torch.device | str | None = None, **compile_options: Any) -> None:
        super().__init__()
        self._mlp = compile(spec, **compile_options)
        self.spec = spec
        shapes = spec.parameter_shapes()
        for name, shape in shapes.items():
            if len(shape) == 2:
                linear = nn.Linear(shape[1], shape[0], bias=spec.bias, device=device, dtype=torch_dtype(spec.dtype))
                self._attach(name.removesuffix(".weight"), linear)
        self._linears = tuple(name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2)

    def _attach(self, name: str, linear: nn.Linear) -> None:
        parent, _, leaf = name.rpartition(".")
        if parent and not hasattr(self, parent):
            setattr(self, parent, nn.ModuleList())
        if parent:
            getattr(self, parent).append(linear)
        else:
            setattr(self, leaf, linear)

    def forward(self, x: Tensor, **operands: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out). Raises `ShapeError` where x or an operand does not fit."""
        params: list[Tensor] = []
        for name in self._linears:
            linear = self._modules.get(name) or self.get_submodule(name)
            if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
                raise UnsupportedError(
                    f"{name} is now a {type(linear).__name__}; mlpdsl.MLP reads weights, and would skip its forward"
                )
            if not torch.compiler.is_compiling() and "forward" in linear.__dict__:
                raise UnsupportedError(f"{name} has a forward of its own; mlpdsl.MLP reads weights, and would skip it")
            if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
                raise UnsupportedError(f"{name} has hooks; mlpdsl.MLP reads weights, and would skip them. Hook the MLP itself.")
            if (linear.bias is not None) != self.spec.bias:
                has = "a bias" if linear.bias is not None else "no bias"
                raise UnsupportedError(f"{name} has {has}, and the spec says bias={self.spec.bias}; declare a spec that fits")
            params.append(linear.weight)
            if self.spec.bias:
                params.append(linear.bias)
        return self._mlp.with_dtype(params[0].dtype)(x, *params, **operands)

    def extra_repr(self) -> str:
        act = self.spec.activation
        return self.spec.short_name + (f", activation={act!r}" if isinstance(act, Function) else "")
