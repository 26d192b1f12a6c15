"""Calls that need no gradient, past torch's dispatcher, once an equal call has gone the whole way.

The first calls of a kind are checked in full and go through `mlpdsl::forward`. If they leave a recording, everything that was
checked is remembered: of each tensor type, dtype, device, shape and strides, and the address of weights. While a call agrees in
that, and nothing listens or transforms, the recording is repeated. Anything else takes the whole way again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlpdsl import dispatch, ops
from mlpdsl.agreement import GRANULE, hooked, twins

if TYPE_CHECKING:
    from mlpdsl.tape import Tape

__all__ = ["Shortcut"]

_SHAPES = 4096
"""Shapes of x, each with a first weight, that are remembered."""

_TYPES = (Tensor, torch.nn.Parameter)
_DEVICES = ("cuda", "cpu")

_KINDS = 8
"""Kinds of calls remembered for one shape of x and first weight: other strides, other second weights."""


def _signature(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What was checked of a call's tensors. Raises RuntimeError for one without strides."""
    return [(type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg()) for t in tensors]


def _plain(device: str) -> bool:
    """Whether a call means what it says: nothing casts, transforms, traces or listens."""
    return device in _DEVICES and not (
        torch.is_autocast_enabled(device)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or hooked()
    )


class _Kind:
    """One kind of call, and its recording."""

    def __init__(self, tape: Tape, tensors: Sequence[Tensor], varying: int) -> None:
        self.tape = tape
        self.signature = _signature(tensors)
        addresses = [t.data_ptr() for t in tensors]
        self.varying = varying
        self.fixed = addresses[varying:]
        self.twins = twins(addresses[:varying])
        self.aligned = [at % GRANULE for at in addresses[:varying]]
        x = tensors[0]
        self.device = x.device.index if x.is_cuda else None
        self.shape = (*x.shape[:-1], -1)

    def call(self, tensors: list[Tensor], addresses: list[int]) -> Tensor | None:
        """The result for tensors of this signature, or None where this is another kind of call."""
        varying = addresses[: self.varying]
        if (
            addresses[self.varying :] != self.fixed
            or [at % GRANULE for at in varying] != self.aligned
            or twins(varying) != self.twins
        ):
            return None
        if self.device is None:
            with ops.interpreter_lock():
                results = self.tape.replay(tensors, addresses)
        elif torch._C._cuda_getDevice() == self.device:
            results = self.tape.replay(tensors, addresses)
        else:
            return None
        if results is None:
            return None
        y: Tensor = results[0]
        if len(self.shape) == 2:
            return y
        with torch._C._AutoDispatchBelowADInplaceOrView():  # a tensor of its own, which may be written to
            return y.view(self.shape)


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
        if not params or type(params[0]) not in _TYPES or not self._kinds:
            return None
        try:
            kinds = self._kinds.get((x.shape, params[0].data_ptr()))
            if kinds is None or self._generation != dispatch.generation or not _plain(x.device.type):
                return None
            tensors = [x, *operands, *params]
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return None
            signature = _signature(tensors)
        except (AttributeError, RuntimeError):  # no tensor, or none with strides
            return None
        alike = [kind for kind in kinds if kind.signature == signature]
        if not alike:
            return None
        addresses = [t.data_ptr() for t in tensors]
        if 0 in addresses:  # zeros that are not written out
            return None
        for kind in alike:
            y = kind.call(tensors, addresses)
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
        tensors = [x, *operands, *params]
        if any(type(t) not in _TYPES or t.is_neg() for t in tensors):  # asked themselves, or of memory that means the opposite
            return
        tape = tapes.find(self._word, [x, *operands], params)
        if tape is None:
            return
        at = (x.shape, params[0].data_ptr())
        if at not in self._kinds and len(self._kinds) >= _SHAPES:
            self._kinds.clear()
        kinds = self._kinds.setdefault(at, [])
        if any(kind.tape is tape for kind in kinds):  # of a call on a device that was not the current one
            return
        if len(kinds) >= _KINDS:
            kinds.clear()
        kinds.append(_Kind(tape, tensors, 1 + len(operands)))
