"""Does a call fit the spec? Everything is checked before anything is launched, and said in one sentence where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mlpdsl.errors import ShapeError, describe
from mlpdsl.spec import MLPSpec

__all__ = ["Signature", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called "float32", "float16" or "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Signature:
    """What a call of one spec must look like, worked out once: `Signature(spec).check(x, params, operands)`."""

    def __init__(self, spec: MLPSpec) -> None:
        self.dtype = torch_dtype(spec.dtype)
        self.shapes = tuple(spec.parameter_shapes().items())
        self.kinds = spec.operands()
        self.d_in, self.d_out = spec.d_in, spec.d_out

    def check(self, x: Tensor, params: Sequence[Tensor], operands: Mapping[str, Tensor]) -> None:
        """Raise `ShapeError` unless x (..., d_in), the parameters in order, and the operands by name fit the spec.

        Parameters and tile operands are of the spec's dtype; the other operands may be float32 too. All on x's device.
        """
        dtype = self.dtype
        if not isinstance(x, Tensor):
            _fail("x", x, f"a tensor (..., {self.d_in}) of {dtype}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            _fail("x.shape", tuple(x.shape), f"(..., {self.d_in})", "The last dimension is the MLP's input width.")
        _check_kind("x", x, x, (dtype,))
        if len(params) != len(self.shapes):
            names = ", ".join(name for name, _ in self.shapes[:8]) + (", …" if len(self.shapes) > 8 else "")
            step = "Pass them in the order of spec.parameter_shapes()."
            _fail("parameters", f"{len(params)} of them", f"{len(self.shapes)}: {names}", step)
        for param, (name, shape) in zip(params, self.shapes, strict=True):
            if not isinstance(param, Tensor):
                _fail(name, param, f"a tensor {shape} of {dtype}")
            if param.shape != shape:
                step = "Weights are (out_features, in_features), as in nn.Linear."
                _fail(f"{name}.shape", tuple(param.shape), str(shape), step)
            _check_kind(name, param, x, (dtype,))
        if operands.keys() != self.kinds.keys():
            _fail_names(operands, self.kinds)
        for name, kind in self.kinds.items():
            _check_operand(self.d_out, name, kind, operands[name], x, dtype)


def _check_operand(d_out: int, name: str, kind: str, operand: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(operand, Tensor):
        step = "Nothing was launched."
        if kind == "scalar":
            step = f"Wrap a number as torch.tensor(value, device={str(x.device)!r})."
        _fail(name, operand, f"a tensor (operand of kind {kind!r})", step)
    if kind == "scalar":
        if operand.numel() != 1:
            _fail(f"{name}.shape", tuple(operand.shape), "one element")
    else:
        shape = {"tile": (*x.shape[:-1], d_out), "row": (*x.shape[:-1], 1), "column": (d_out,)}[kind]
        if operand.shape != shape:
            step = "Operands do not broadcast; use .expand where that is meant."
            _fail(f"{name}.shape", tuple(operand.shape), str(tuple(shape)), step)
    _check_kind(name, operand, x, (dtype,) if kind == "tile" else (dtype, torch.float32))


def _check_kind(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        _fail(f"{name}.dtype", tensor.dtype, allowed, "Cast it, or declare the spec with this dtype.")
    if tensor.device != x.device:
        _fail(f"{name}.device", str(tensor.device), f"{x.device}, where x is")
    if tensor.layout != torch.strided:
        _fail(f"{name}.layout", tensor.layout, "torch.strided", "Call .to_dense() first.")


def _fail_names(operands: Mapping[str, Tensor], kinds: Mapping[str, str]) -> NoReturn:
    missing = [n for n in kinds if n not in operands]
    extra = [n for n in operands if n not in kinds]
    allowed = ", ".join(f"{n}= ({k})" for n, k in kinds.items()) or "none: the spec's epilogue has no operands"
    got = "; ".join(f"{word} {', '.join(names)}" for word, names in (("missing", missing), ("unexpected", extra)) if names)
    _fail("operands", got, allowed, "Operands are passed by keyword, one for each of the epilogue's entries.")


def _fail(where: str, got: object, allowed: str, step: str = "Nothing was launched.") -> NoReturn:
    raise ShapeError(describe(where, got, allowed, step))
