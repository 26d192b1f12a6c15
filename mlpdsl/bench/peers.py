"""The candidates: mlpdsl and what it is compared with, each a function of the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mlpdsl
from mlpdsl.bench.suites import Row
from mlpdsl.bench.timer import Call
from mlpdsl.checks import torch_dtype
from mlpdsl.eager import Evaluation
from mlpdsl.function import Function
from mlpdsl.spec import MLPSpec

__all__ = [
    "CANDIDATES",
    "AbsentError",
    "Factory",
    "Tensors",
    "difference",
    "launches",
    "make_tensors",
    "plain",
    "step",
    "surroundings",
    "tolerance",
]


class AbsentError(Exception):
    """A candidate that cannot be had for a spec, or is not installed; the message is the reason."""


Forward = Callable[..., Tensor]
Factory = Callable[[MLPSpec], Forward]
"""From a spec to y = f(x, *params, **operands). Raises `AbsentError`."""


@dataclass(frozen=True)
class Tensors:
    """What a call gets: x (m, d_in), parameters, operands; and the gradient of y (m, d_out) in training, else None."""

    x: Tensor
    params: tuple[Tensor, ...]
    operands: Mapping[str, Tensor]
    dy: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *self.params, *self.operands.values()]

    def again(self) -> Tensors:
        """The same memory in tensors of their own. A graph is captured from these: autograd remembers the stream of a tensor's
        first use, and one outside the capture would end it."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(t.requires_grad)

        operands = {name: leaf(t) for name, t in self.operands.items()}
        return Tensors(leaf(self.x), tuple(map(leaf, self.params)), operands, self.dy)


def make_tensors(row: Row, device: str, seed: int) -> Tensors:
    """Normal random numbers; weights and biases over the square root of their last length, so that nothing grows with depth."""
    spec, train = row.spec, row.passes == "train"
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float = 1.0, grad: bool = train) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=torch_dtype(spec.dtype))
        return made.mul_(scale).requires_grad_(grad)

    shapes = {"tile": (row.m, spec.d_out), "column": (spec.d_out,), "row": (row.m, 1), "scalar": ()}
    params = tuple(draw(shape, shape[-1] ** -0.5) for shape in spec.parameter_shapes().values())
    operands = {name: draw(shapes[kind]) for name, kind in spec.operands().items()}
    return Tensors(draw((row.m, spec.d_in)), params, operands, draw((row.m, spec.d_out), grad=False) if train else None)


def step(function: Forward, tensors: Tensors) -> Call:
    """One call: forward, or forward and every gradient where there is a gradient of y."""
    forward = partial(function, tensors.x, *tensors.params, **tensors.operands)
    if tensors.dy is None:
        return forward
    inputs, dy = tensors.inputs, tensors.dy
    return lambda: torch.autograd.grad(forward(), inputs, dy)


def launches(spec: MLPSpec, train: bool) -> int:
    """About how many kernels eager PyTorch launches for a call: no fewer."""
    forward = 2 * (len(spec.parameter_shapes()) // (2 if spec.bias else 1)) + 2 * len(spec.epilogue)
    return forward * 6 if train else forward


@contextlib.contextmanager
def surroundings(row: Row) -> Iterator[None]:
    """What holds for every candidate alike: no gradients in forward, float32 products as the spec wants them."""
    flag = torch.backends.cuda.matmul
    before = flag.fp32_precision
    flag.fp32_precision = "tf32" if row.spec.precision == "tf32" else "ieee"
    try:
        with torch.set_grad_enabled(row.passes == "train"):
            yield
    finally:
        flag.fp32_precision = before


def difference(result: Any, expected: Any) -> float:
    """The largest ‖a - b‖/‖b‖ over the tensors of two results, one tensor or several; infinite where one is not finite."""
    a, b = ((r,) if isinstance(r, Tensor) else tuple(r) for r in (result, expected))
    largest = 0.0
    for got, wanted in zip(a, b, strict=True):
        if got.shape != wanted.shape:
            return float("inf")
        norm = torch.linalg.vector_norm(wanted, dtype=torch.float32)
        off = torch.linalg.vector_norm(got - wanted, dtype=torch.float32) / norm.clamp_min(torch.finfo(torch.float32).tiny)
        largest = max(largest, float(off) if bool(off.isfinite()) else float("inf"))
    return largest


def tolerance(row: Row) -> float:
    """How far two right candidates may be apart, by `difference`: loose, to tell one that computes something else."""
    spec = row.spec
    forward = {"bfloat16": 0.05, "float16": 0.02}.get(spec.dtype, 1e-3 if spec.precision == "ieee" else 0.02)
    return 3 * forward if row.passes == "train" else forward


def plain(spec: MLPSpec) -> Forward:
    """The MLP as one writes it in PyTorch, with none of the checks of `mlpdsl.reference`."""
    parts = Evaluation(spec)
    activation, entries, stride = parts.activation, parts.entries, 2 if spec.bias else 1
    traced = isinstance(spec.activation, Function)

    def finish(y: Tensor, operands: dict[str, Tensor]) -> Tensor:
        for function, kinds in entries:
            by = [operands[name].reshape(()) if kind == "scalar" else operands[name] for name, kind in kinds.items()]
            y = function(y, *by).to(y.dtype)
        return y

    def gated(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        gate, up = F.linear(x, *params[:stride]), F.linear(x, *params[stride : 2 * stride])
        h = activation(gate, up) if parts.of_gate_and_up else activation(gate) * up
        return finish(F.linear(h.to(gate.dtype) if traced else h, *params[2 * stride :]), operands)

    def deep(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        last = len(params) - stride
        for i in range(0, last, stride):
            z = F.linear(x, *params[i : i + stride])
            x = activation(z).to(z.dtype) if traced else activation(z)
        return finish(F.linear(x, *params[last:]), operands)

    return gated if spec.gated else deep


def _mlpdsl(spec: MLPSpec) -> Forward:
    return mlpdsl.compile(spec, backend="triton")


def _compiled(spec: MLPSpec, mode: str | None) -> Forward:
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor import config

        config.autotune_num_choices_displayed = 0  # a table of choices for each product would drown the progress
    # A graph break, or too many compilations, raises: nothing falls back to eager without a word.
    compiled: Forward = torch.compile(plain(spec), dynamic=False, fullgraph=True, mode=mode)
    return compiled


def _liger(spec: MLPSpec) -> Forward:
    if not spec.gated or spec.activation not in ("silu", "gelu_tanh") or spec.epilogue:
        raise AbsentError("Liger has silu(gate)·up and tanh-gelu(gate)·up, without an epilogue")
    try:
        if spec.activation == "silu":
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Multiply
        else:
            from liger_kernel.ops.geglu import LigerGELUMulFunction as Multiply
    except ImportError as error:
        raise AbsentError(f"liger_kernel cannot be imported ({error}): pip install liger-kernel") from error
    multiply, stride = Multiply.apply, 2 if spec.bias else 1

    def run(x: Tensor, *params: Tensor) -> Tensor:
        gate, up = F.linear(x, *params[:stride]), F.linear(x, *params[stride : 2 * stride])
        return F.linear(multiply(gate, up), *params[2 * stride :])

    return run


CANDIDATES: dict[str, Factory] = {
    "mlpdsl": _mlpdsl,
    "eager": plain,
    "compile": partial(_compiled, mode=None),
    "max-autotune": partial(_compiled, mode="max-autotune-no-cudagraphs"),
    "liger": _liger,
}
"""Every candidate by name. `compile` and `max-autotune` are torch.compile, once for each row, for its number of rows alone."""
