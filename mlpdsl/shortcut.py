"""Calls that need no gradient, past torch's dispatcher, once an equal call has gone the whole way.

The first calls of a kind are checked in full and go through `mlpdsl::forward`. If they leave a recording, everything that was
checked is remembered: of each tensor type, dtype, device, shape and strides, and the address of weights. While a call agrees in
that, and nothing listens or transforms, the recording is repeated. Anything else takes the whole way again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from mlpdsl import dispatch, ops
from mlpdsl.agreement import hooked

if TYPE_CHECKING:
    from mlpdsl.straight import Replay
    from mlpdsl.tape import Tape

__all__ = ["Shortcut", "repeated"]

_SHAPES = 4096
"""Shapes of x, each with a first weight, that are remembered."""

_TYPES = (Tensor, torch.nn.Parameter)
_DEVICES = ("cuda", "cpu")

_KINDS = 8
"""Kinds of calls remembered for one shape of x and first weight: other strides, other second weights."""


_modes, _function_modes = _C._len_torch_dispatch_stack, _C._is_torch_function_mode_enabled
_transforms, _profiled = _C._are_functorch_transforms_active, _C._autograd._profiler_enabled


def _undisturbed() -> bool:
    """Whether a call means what it says: nothing transforms, traces or listens. What casts, and what traces in torch's older way,
    is among the dispatch keys."""
    return not (_modes() or _function_modes() or _transforms() or _profiled() or forward_ad._current_level >= 0 or hooked())


def _plain(device: str) -> bool:
    """The same, where no tensor is there whose dispatch keys say the rest."""
    return device in _DEVICES and not torch.is_autocast_enabled(device) and not _C._get_tracing_state() and _undisturbed()


def repeated(word: tuple[Any, ...], varying: Sequence[Tensor], fixed: Sequence[Tensor], spec: str) -> list[Any] | None:
    """The recording of a call (as `Tapes.call` was given it), repeated past torch's dispatcher. None where there is none, or where
    somebody would hear of the operator, or would have done something to these tensors before it."""
    x = varying[0]
    tapes = ops.recordings(spec, x.device) if x.device.type in _DEVICES else None
    if tapes is None or not _undisturbed() or _C._get_tracing_state():
        return None
    for t in (*varying, *fixed):
        if type(t) not in _TYPES or t.is_neg() or not t.data_ptr():
            return None
    with ops.on_device(x):
        return tapes.repeat(word, varying, fixed)


def _signature(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What was checked of a call's tensors. Raises RuntimeError for one without strides."""
    return [(type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_neg()) for t in tensors]


def _likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """From as many tensors to whether each is like that of `tensors`, and torch does with them now what it did then.

    Like: of equal type, dtype, device, shape, strides, need of a gradient, and dispatch keys, this thread's counted in: they tell
    of autocast, tracing and inference, of negated and of unwritten memory. All that in one call of what torch.compile guards its
    graphs by, which takes no tensor twice: for calls with one, they are asked one by one.
    """
    guards: Any = getattr(_C._dynamo.guards, "TensorGuards", None)
    if guards is not None:
        alike: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if alike(*tensors):
            return alike
    wanted, device = _signature(tensors), tensors[0].device.type

    def one_by_one(*given: Tensor) -> bool:
        try:
            return _plain(device) and all(type(t) in _TYPES for t in given) and _signature(given) == wanted
        except RuntimeError:  # one without a shape or strides
            return False

    return one_by_one


class _Kind:
    """One kind of call, and its recording."""

    def __init__(self, tape: Tape, tensors: Sequence[Tensor], varying: int) -> None:
        from mlpdsl.straight import places

        self.tape = tape
        self.places = places(tensors, varying, _likeness(tensors))
        x = tensors[0]
        self.device = x.device.index if x.is_cuda else None
        # In more or fewer dimensions than two the result is made in its shape where it can be, else it is seen in it.
        self.lead = None if x.dim() == 2 else tuple(x.shape[:-1])
        self.run: Replay | None = None
        if self.lead is not None and tape.results[0] is not None:
            self.run = tape.in_shape((*self.lead, tape.results[0].shape[-1]))

    def call(self, tensors: tuple[Tensor, ...]) -> Tensor | None:
        """The result, or None where this is another kind of call."""
        addresses = self.places(tensors)
        if addresses is None:
            return None
        if self.device is None:
            with ops.interpreter_lock():
                results = self.tape.replay(tensors, addresses, self.run)
        elif _C._cuda_getDevice() == self.device:
            results = self.tape.replay(tensors, addresses, self.run)
        else:
            return None
        if results is None:
            return None
        y: Tensor = results[0]
        if self.lead is None or self.run is not None:
            return y
        with _C._AutoDispatchBelowADInplaceOrView():  # a tensor of its own, which may be written to
            return y.view((*self.lead, -1))


class Shortcut:
    """The remembered kinds of calls of one spec, by the shape of x and the first weight's address: one callable may serve every
    layer of a model."""

    def __init__(self, spec_json: str, batch_invariant: bool) -> None:
        self._spec = spec_json
        self._word = ("forward", False, batch_invariant)
        self._kinds: dict[tuple[torch.Size, int], list[_Kind]] = {}
        self._generation = dispatch.generation

    def call(self, x: Tensor, params: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> Tensor | None:
        """The result, or None where the call has to go the whole way."""
        if not params or type(params[0]) not in _TYPES:
            return None
        try:
            kinds = self._kinds.get((x.shape, params[0].data_ptr()))
        except (AttributeError, RuntimeError):  # one without a shape, or without memory
            return None
        if kinds is None or self._generation != dispatch.generation or not _undisturbed():
            return None
        tensors = (x, *operands, *params)
        for kind in kinds:
            y = kind.call(tensors)
            if y is not None:
                return y
        return None

    def learn(self, x: Tensor, params: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> None:
        """After a call that went the whole way without a gradient: remember it, if it was recorded."""
        if self._generation != dispatch.generation:
            self._kinds.clear()
            self._generation = dispatch.generation
        tapes = ops.recordings(self._spec, x.device)
        if tapes is None or not _plain(x.device.type):
            return
        tensors = (x, *operands, *params)
        if any(type(t) not in _TYPES or t.is_neg() for t in tensors):  # asked themselves, or of memory that means the opposite
            return
        if any(t.data_ptr() == 0 for t in tensors):  # zeros that are not written out
            return
        tape = tapes.find(self._word, [x, *operands], params)
        if tape is None:
            return
        at = (x.shape, params[0].data_ptr())
        if at not in self._kinds and len(self._kinds) >= _SHAPES:
            self._kinds.clear()
        kinds = self._kinds.setdefault(at, [])
        if any(kind.tape is tape and kind.places(tensors) for kind in kinds):  # of a call on a device that was not the current one
            return
        if len(kinds) >= _KINDS:
            kinds.clear()
        kinds.append(_Kind(tape, tensors, 1 + len(operands)))
