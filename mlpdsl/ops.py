"""The torch operators `mlpdsl::forward` and `mlpdsl::backward`: what torch.compile, export and fake tensors see.

Both take the spec as its JSON, so a saved program means the same in another process. They are defined by `torch.library`'s
define and impl, which cost a third of a `custom_op`; autograd stands outside, in `autograd`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlpdsl.backends import interpreter_lock
from mlpdsl.dispatch import Runner, known_runner, plan_of, runner
from mlpdsl.errors import ShapeError

if TYPE_CHECKING:
    from mlpdsl.tape import Tapes

__all__ = ["OPS", "backward", "forward", "on_device", "recordings", "wanted"]

_library = torch.library.Library("mlpdsl", "DEF")
_library.define(
    "forward(Tensor x, Tensor[] parameters, Tensor[] operands, str spec, bool save, bool batch_invariant=False) -> Tensor[]"
)
_library.define(
    "backward(Tensor grad, Tensor x, Tensor[] parameters, Tensor[] operands, Tensor[] saved, bool[] needs, str spec, "
    "bool batch_invariant=False) -> Tensor[]"
)


def on_device(t: Tensor) -> Any:
    """The context in which kernels for t are launched: its device is the current one. Interpreted kernels run one at a time."""
    return torch.cuda.device(t.device) if t.is_cuda else interpreter_lock()


def recordings(spec: str, device: torch.device) -> Tapes | None:
    """The recorded calls of a spec on a device; None before its first call there."""
    return None if known_runner(spec, device) is None else runner(spec, device).tapes


def _alike(spec: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters as kernels read them: vectors dense, gate and up with equal strides. Copies only what is not."""
    tensors = [p if p.dim() == 2 else p.contiguous() for p in parameters]
    linears = plan_of(spec).linears
    if linears[0].planes == 2:
        gate, up = linears[0].weights
        if tensors[gate].stride() != tensors[up].stride():
            tensors[gate], tensors[up] = tensors[gate].contiguous(), tensors[up].contiguous()
    from mlpdsl.tape import recorder  # not before the first call

    recording = recorder()
    if recording is not None and any(t.data_ptr() != p.data_ptr() for t, p in zip(tensors, parameters, strict=True)):
        # Kernels may be told of a copy by its distance from another weight alone.
        recording.known = False
    return tensors


def _flat(t: Tensor) -> Tensor:
    """(..., n) as (M, n), without a copy where strides allow."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _rows(t: Tensor, run: Runner, batch_invariant: bool) -> Tensor:
    """x, a tile or a gradient as (M, n). Where batch-invariant, copied unless descriptors fit it: which of the two paths runs
    may depend on the weights, which are the same for every batch, and on nothing else."""
    flat = _flat(t)
    if not batch_invariant or not run.plan.uses_tma or flat.shape[-1] % 8:
        return flat
    from mlpdsl.launch import fits_tma

    return flat if fits_tma(flat) else flat.clone(memory_format=torch.contiguous_format)


def _flat_operands(operands: Sequence[Tensor], run: Runner, batch_invariant: bool) -> list[Tensor]:
    kinds = [o.kind for o in run.plan.epilogue.operands]
    return [
        _rows(o, run, batch_invariant) if kind == "tile" else o.reshape(-1).contiguous()
        for o, kind in zip(operands, kinds, strict=True)
    ]


def _check_shapes(x: Tensor, parameters: Sequence[Tensor], operands: Sequence[Tensor], spec: str) -> None:
    """What keeps a kernel inside its tensors, for those who call the operator itself; `compile` has checked more, and said more."""
    shapes = _shapes_of(spec)
    if x.shape[-1:] != shapes[0][:1] or [p.shape for p in parameters] != shapes[1] or len(operands) != shapes[2]:
        got = [tuple(t.shape) for t in (x, *parameters)]
        raise ShapeError(
            f"mlpdsl::forward: got x and parameters of shapes {got}, and {len(operands)} operands; not those of {spec}"
        )
    _check_memory((x, *parameters, *operands))


def _check_memory(tensors: Sequence[Tensor]) -> None:
    """Raises `ShapeError` for a tensor that reaches beyond its storage: a weight, say, whose memory was given back (FSDP's)."""
    for t in tensors:
        last = t.storage_offset() + sum((extent - 1) * stride for extent, stride in zip(t.shape, t.stride(), strict=True))
        held = t.untyped_storage().nbytes()
        if t.numel() and (last + 1) * t.element_size() > held:
            raise ShapeError(
                f"mlpdsl: a tensor of shape {tuple(t.shape)} has {held} bytes of memory left, too few. Nothing was launched."
            )


@functools.lru_cache(maxsize=4096)
def _shapes_of(spec: str) -> tuple[torch.Size, list[torch.Size], int]:
    linears = plan_of(spec).linears
    shapes: dict[int, torch.Size] = {}
    for linear in linears:
        shapes.update((i, torch.Size((linear.width_out, linear.width_in))) for i in linear.weights)
        shapes.update((i, torch.Size((linear.width_out,))) for i in linear.biases)
    return torch.Size((linears[0].width_in,)), [shapes[i] for i in sorted(shapes)], len(plan_of(spec).epilogue.operands)


def _forward(
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
    spec: str,
    save: bool,
    batch_invariant: bool = False,
) -> list[Tensor]:
    if x.numel() == 0:
        return _forward_fake(x, parameters, operands, spec, save)  # no rows: every result is empty
    _check_shapes(x, parameters, operands, spec)
    run = runner(spec, x.device)

    def launch() -> list[Any]:
        found: list[Any] = run.module.forward(
            _rows(x, run, batch_invariant),
            _alike(spec, parameters),
            _flat_operands(operands, run, batch_invariant),
            save,
            run.picker(batch_invariant),
        )
        return found

    with on_device(x):
        results = run.tapes.call(("forward", save, batch_invariant), [x, *operands], parameters, launch)
    if x.dim() != 2:
        with torch._C._AutoDispatchBelowADInplaceOrView():  # no view, which autograd would let nobody write to
            results[0] = results[0].view(*x.shape[:-1], results[0].shape[-1])
    return results


def _forward_fake(
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
    spec: str,
    save: bool,
    batch_invariant: bool = False,
) -> list[Tensor]:
    plan = plan_of(spec)
    rows = x.numel() // x.shape[-1]
    results = [x.new_empty((*x.shape[:-1], plan.linears[-1].width_out))]
    if save:
        results += [x.new_empty((linear.planes, rows, linear.width_out)) for linear in plan.linears[:-1]]
        if plan.epilogue.tile_needed:
            results.append(x.new_empty((1, rows, plan.linears[-1].width_out)))
    return results


def wanted(spec: str, needs: Sequence[bool], parameters: Sequence[Tensor]) -> list[bool]:
    """Which gradients `backward` returns: those needed, but for operands whose gradient is the output's own."""
    same_as = plan_of(spec).epilogue.same_as
    first = 1 + len(parameters)
    return [need and not (i >= first and same_as[i - first] == "grad") for i, need in enumerate(needs)]


def _backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    spec: str,
    batch_invariant: bool = False,
) -> list[Tensor]:
    if x.numel() == 0:
        # A sum over no rows is zero.
        return [g.zero_() for g in _backward_fake(grad, x, parameters, operands, saved, needs, spec)]
    _check_memory((grad, x, *parameters, *operands, *saved))
    saved = [t.contiguous() for t in saved]  # as it was saved, unless a hook hands over something else that is equal
    run = runner(spec, x.device)

    def launch() -> list[Any]:
        found: list[Any] = run.module.backward(
            _rows(grad, run, batch_invariant),
            _flat(x),
            _alike(spec, parameters),
            _flat_operands(operands, run, batch_invariant),
            list(saved),
            list(needs),
            run.picker(batch_invariant),
        )
        return found

    with on_device(x):
        word = ("backward", tuple(needs), batch_invariant)
        grads = run.tapes.call(word, [grad, x, *operands, *saved], parameters, launch)
    asked = wanted(spec, needs, parameters)
    inputs = [x, *parameters, *operands]
    return in_shape([(g, i.shape) for g, i, want in zip(grads, inputs, asked, strict=True) if want and g is not None])


def in_shape(given: Sequence[tuple[Tensor, torch.Size]]) -> list[Tensor]:
    """Gradients in the shapes of their inputs. One that several inputs have is one tensor here too: autograd copies what is
    there twice, and of two views of one memory it would not see it."""
    views: dict[tuple[int, torch.Size], Tensor] = {}
    for g, shape in given:
        if g.shape != shape and (id(g), shape) not in views:
            views[id(g), shape] = g.view(shape)
    return [g if g.shape == shape else views[id(g), shape] for g, shape in given]


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    spec: str,
    batch_invariant: bool = False,
) -> list[Tensor]:
    inputs = [x, *parameters, *operands]
    asked = wanted(spec, needs, parameters)
    return [t.new_empty(t.shape) for t, want in zip(inputs, asked, strict=True) if want]


def _untraced(function: Any) -> Any:
    """The function with torch.compile kept out of it: after a graph break it would else trace Triton's launcher, frame by frame.

    `torch.compiler.disable` imports all of dynamo, so it is asked only in a process that already has.
    """
    disabled: list[Any] = []

    def call(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments)

    return call


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _untraced(_forward), _key)
    _library.impl("backward", _untraced(_backward), _key)


class _Unrecorded(torch.autograd.Function):
    """The operator's result where a gradient would be recorded: as it is, and an error if the gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *depends_on: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "mlpdsl::forward, which an exported program calls, records no gradient. "
            "Train through mlpdsl.compile(spec) or mlpdsl.MLP."
        )


def _forward_recorded(
    x: Tensor,
    parameters: Sequence[Tensor],
    operands: Sequence[Tensor],
    spec: str,
    save: bool,
    batch_invariant: bool = False,
) -> list[Tensor]:
    """Autograd stands outside the operator: called where a gradient would be recorded, it must not lose it without a word."""
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = forward(x, parameters, operands, spec, save, batch_invariant)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        depends_on = [t for t in (x, *parameters, *operands) if t.requires_grad]
        if depends_on:
            results[0] = _Unrecorded.apply(results[0], *depends_on)  # type: ignore[no-untyped-call]
    return results


_library.impl("forward", _forward_recorded, "Autograd")
# torch notes the line that registers, for which `inspect` looks at every module that there is, unless it remembers this one's: that
# takes a fifth of the import of twenty MLPs.
getattr(inspect, "modulesbyfile", {}).setdefault(__file__, __name__)
torch.library.register_fake("mlpdsl::forward", _forward_fake, lib=_library)
torch.library.register_fake("mlpdsl::backward", _backward_fake, lib=_library)


def _each(arguments: Sequence[Any], in_dims: Sequence[Any], size: int, call: Any) -> tuple[list[Tensor], list[int]]:
    """vmap by a loop: the operator on every example, results stacked. `arguments` are tensors, lists of tensors, or values."""

    def at(i: int, argument: Any, dims: Any) -> Any:
        if isinstance(argument, (list, tuple)) and isinstance(dims, (list, tuple)):
            return [at(i, a, d) for a, d in zip(argument, dims, strict=True)]
        if dims is None or not isinstance(argument, Tensor):
            return argument
        return argument.select(dims, i) if size else argument.new_zeros(argument.movedim(dims, 0).shape[1:])

    if size == 0:  # no examples: what one of zeros has the shapes of
        shapes = call(*(at(0, a, d) for a, d in zip(arguments, in_dims, strict=True)))
        return [t.new_empty((0, *t.shape)) for t in shapes], [0] * len(shapes)
    results = [call(*(at(i, a, d) for a, d in zip(arguments, in_dims, strict=True))) for i in range(size)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])


def _forward_vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    return _each(arguments, in_dims, info.batch_size, forward)


def _backward_vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    return _each(arguments, in_dims, info.batch_size, backward)


torch.library.register_vmap("mlpdsl::forward", _forward_vmap, lib=_library)
torch.library.register_vmap("mlpdsl::backward", _backward_vmap, lib=_library)

forward = torch.ops.mlpdsl.forward.default
backward = torch.ops.mlpdsl.backward.default

OPS = (forward, backward)
"""The operators, in the form that selective activation checkpointing compares with (`op.default`, not the packet)."""
