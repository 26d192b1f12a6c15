"""Calls past torch's dispatcher, once an equal call has gone the whole way.

The first calls of a kind are checked in full and go through `mlpdsl::forward` and `mlpdsl::backward`. If they leave a recording,
everything that was checked is remembered: of each tensor type, dtype, device, shape and strides, and the address of weights. While
a call agrees in that, and nothing listens or transforms, the recording is repeated. Anything else takes the whole way again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from mlpdsl import dispatch, ops
from mlpdsl.agreement import hooked
from mlpdsl.backends import interpreter_lock

if TYPE_CHECKING:
    from mlpdsl.straight import Replay
    from mlpdsl.tape import Tape

__all__ = ["Forward", "Shortcut"]

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

    def __init__(self, tape: Tape, tensors: Sequence[Tensor], varying: int, recorded: bool = False) -> None:
        from mlpdsl.straight import places

        self.tape = tape
        self.places = places(tensors, varying, _likeness(tensors), recorded)
        x = tensors[0]
        self.device = x.device.index if x.is_cuda else None

    def replay(self, tensors: tuple[Tensor, ...], addresses: Sequence[int], run: Replay | None = None) -> list[Any] | None:
        """What the recording leaves, for tensors that `places` found at `addresses`; None where it cannot be repeated now."""
        if self.device is None:
            with interpreter_lock():
                return self.tape.replay(tensors, addresses, run)
        if _C._cuda_getDevice() != self.device:
            return None
        return self.tape.replay(tensors, addresses, run)


class Forward(_Kind):
    """A kind of forward. `recorded`: with gradients; `backwards` are then its backward's kinds, by what was needed."""

    def __init__(self, tape: Tape, tensors: Sequence[Tensor], varying: int, recorded: bool = False) -> None:
        super().__init__(tape, tensors, varying, recorded)
        self.recorded = recorded
        self.generation = dispatch.generation
        self.backwards: dict[tuple[bool, ...], list[_Backward]] = {}
        # In more or fewer dimensions than two the result is made in its shape where it can be, else it is seen in it.
        x = tensors[0]
        self.lead = None if x.dim() == 2 else tuple(x.shape[:-1])
        self.run: Replay | None = None
        if self.lead is not None and tape.results[0] is not None:
            self.run = tape.in_shape((*self.lead, tape.results[0].shape[-1]))

    def results(self, tensors: tuple[Tensor, ...], addresses: Sequence[int]) -> list[Any] | None:
        """y in its shape, then what backward needs."""
        results = self.replay(tensors, addresses, self.run)
        if results is not None and self.lead is not None and self.run is None:
            with _C._AutoDispatchBelowADInplaceOrView():  # a tensor of its own, which may be written to
                results[0] = results[0].view((*self.lead, -1))
        return results

    def backward(self, needs: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> list[Tensor | None] | None:
        """The gradients of a call of this kind, as the operator returns them; None where its backward has to go the whole way.
        `tensors` are grad, x, operands, what was saved, and parameters."""
        if self.generation != dispatch.generation or not _undisturbed():
            return None
        for kind in self.backwards.get(needs, ()):
            addresses = kind.places(tensors)
            if addresses is not None:
                found = kind.replay(tensors, addresses)
                return None if found is None else kind.shaped(found)
        return None

    def learn(
        self,
        needs: tuple[bool, ...],
        spec: str,
        batch_invariant: bool,
        varying: Sequence[Tensor],
        parameters: Sequence[Tensor],
        operands: int,
    ) -> None:
        """After a backward that went the whole way. `varying`: grad, x, so many operands, and what was saved."""
        tensors = (*varying, *parameters)
        tapes = ops.recordings(spec, tensors[0].device)
        if self.generation != dispatch.generation or tapes is None or torch.is_grad_enabled() or not _remembers(tensors):
            return
        tape = tapes.find(("backward", needs, batch_invariant), varying, parameters)
        if tape is None:
            return
        kinds = self.backwards.setdefault(needs, [])
        if any(kind.tape is tape and kind.places(tensors) for kind in kinds):
            return
        if len(kinds) >= _KINDS:
            kinds.clear()
        inputs = [varying[1], *parameters, *varying[2 : 2 + operands]]
        wanted = ops.wanted(spec, needs, parameters)
        returned = [(i, inputs[i].shape) for i, view in enumerate(tape.results) if wanted[i] and view is not None]
        kinds.append(_Backward(tape, tensors, len(varying), returned))


class _Backward(_Kind):
    """A kind of backward. `returned`: of what it finds for each input, positions and shapes of what the operator returns."""

    def __init__(self, tape: Tape, tensors: Sequence[Tensor], varying: int, returned: list[tuple[int, torch.Size]]) -> None:
        super().__init__(tape, tensors, varying)
        self.returned = returned

    def shaped(self, results: list[Any]) -> list[Tensor | None]:
        return list(ops.in_shape([(results[i], shape) for i, shape in self.returned]))


def _remembers(tensors: Sequence[Tensor]) -> bool:
    """Whether a kind of call may be made of these: nobody but torch is asked of them, and they are memory as it is read."""
    try:
        # Others are asked themselves, or of memory that means the opposite, or zeros that are not written out.
        return _plain(tensors[0].device.type) and all(type(t) in _TYPES and not t.is_neg() and t.data_ptr() for t in tensors)
    except RuntimeError:  # one without memory, which torch unwraps for its operators: a transform's, after its end
        return False


Recorded = Callable[[Forward, Sequence[int], Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
"""From a kind of forward, the addresses that it found, x, parameters and operands to y, which knows its gradient."""


class Shortcut:
    """The remembered kinds of calls of one spec, by the shape of x and the first weight's address: one callable may serve every
    layer of a model."""

    def __init__(self, spec_json: str, batch_invariant: bool, recorded: Recorded) -> None:
        self._spec = spec_json
        self._batch_invariant = batch_invariant
        self._recorded = recorded
        self._kinds: dict[tuple[torch.Size, int], list[Forward]] = {}
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
            addresses = kind.places(tensors)
            if addresses is None:
                continue
            if kind.recorded:
                return self._recorded(kind, addresses, x, params, operands)
            results = kind.results(tensors, addresses)
            if results is not None:
                y: Tensor = results[0]
                return y
        return None

    def learn(self, x: Tensor, params: tuple[Tensor, ...], operands: tuple[Tensor, ...], recorded: bool) -> None:
        """After a call that went the whole way, and whose gradient was recorded or not: remember it, if it left a recording."""
        if self._generation != dispatch.generation:
            self._kinds.clear()
            self._generation = dispatch.generation
        tapes, tensors = ops.recordings(self._spec, x.device), (x, *operands, *params)
        if tapes is None or not _remembers(tensors):
            return
        tape = tapes.find(("forward", recorded, self._batch_invariant), [x, *operands], params)
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
        kinds.append(Forward(tape, tensors, 1 + len(operands), recorded))
