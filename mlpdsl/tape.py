"""Calls recorded as launches, and repeated with other pointers.

An entry point of generated code decides a path, a config, grids and descriptors, and allocates. All of that follows from shapes,
strides, alignment and the weights' addresses. So the second call that agrees with an earlier one in these is recorded, and from
then on only what can differ is done: allocate, put pointers in, launch. A recording holds no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlpdsl.agreement import GRANULE, hooked, twins
from mlpdsl.straight import Encoded, Pointer, Replay, Starter, encoded, starter, straight

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Recorder", "Tape", "Tapes", "recorder", "unheard"]

C_LAUNCHER = True
"""Whether recordings call Triton's C launcher themselves, with descriptors encoded before."""

_MOST = 4096
"""Recordings kept for one spec and device: a server may see every batch size there is, and a model has many layers."""

_local = threading.local()


def recorder() -> Recorder | None:
    """What this thread's launches and allocations are told to, if a call is being recorded."""
    found: Recorder | None = getattr(_local, "recorder", None)
    return found


@contextmanager
def unheard() -> Iterator[None]:
    """Meanwhile launches and allocations of this thread go into no recording: they are not of the call that is being recorded."""
    before, _local.recorder = recorder(), None
    try:
        yield
    finally:
        _local.recorder = before


class View(NamedTuple):
    """A tensor of a call: where it lies in the memory of the input or allocation `slot`, `offset` bytes from its first element."""

    slot: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    base: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None
    """Shape, strides and dtype of the input that lies in the slot, which are the same at every repetition; of allocations None."""

    def of(self, buffers: Sequence[Tensor | None]) -> Tensor:
        base = buffers[self.slot]
        assert base is not None
        return self.over(base)

    def over(self, base: Tensor) -> Tensor:
        """The view, where `base` is what lies in its slot now."""
        if self.offset == 0 and self.dtype == base.dtype and base.shape == self.shape and base.stride() == self.strides:
            return base
        start = base.storage_offset() + self.offset // base.element_size()
        return base.as_strided(self.shape, self.strides, start)


class Described(NamedTuple):
    """A descriptor of a call: of this view, in these tiles."""

    view: View
    shape: list[int]
    strides: list[int]
    block: list[int]

    def of(self, buffers: Sequence[Tensor | None]) -> TensorDescriptor:
        from mlpdsl.launch import descriptor

        return descriptor(self.view.of(buffers), self.shape, self.strides, self.block)


class Step:
    """One launch: what is allocated before it, its arguments, and what is let go after it."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], compiled: Any, args: list[Any]) -> None:
        self.kernel, self.grid, self.options, self.compiled, self.args = kernel, grid, options, compiled, args
        self.allocations: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.frees: list[int] = []
        self.flat: list[Any] | None = None
        """The arguments as Triton's C launcher takes them, where it can be called directly: values, `Pointer`s and `Encoded`."""
        self.starter: Starter | None = None

    def slots(self) -> set[int]:
        return {a.slot if isinstance(a, View) else a.view.slot for a in self.args if isinstance(a, (View, Described))}

    def flatten(self, fixed: dict[int, int]) -> None:
        """Prepare for the C launcher. `fixed` are slots that always lie at one address."""
        self.starter = starter(self.compiled, self.grid)
        encodings = getattr(self.compiled.metadata, "tensordesc_meta", None) or []
        if self.starter is None or len(encodings) != sum(isinstance(a, Described) for a in self.args):
            return
        meta = iter(encodings)
        flat: list[Any] = []
        for a in self.args:
            if isinstance(a, View):
                flat.append(fixed[a.slot] + a.offset if a.slot in fixed else Pointer(a.slot, a.offset))
            elif isinstance(a, Described):
                maps, slot, offset = encoded(a, next(meta)), a.view.slot, a.view.offset
                flat.append(maps[fixed[slot] + offset] if slot in fixed else Encoded(slot, offset, maps))
                flat += [*a.shape, *a.strides]
            else:
                flat.append(a)
        self.flat = flat


class Product:
    """One call of `function` in `mlpdsl.library` on these, in TF32 or not, and what is allocated before it and let go after it."""

    def __init__(self, function: str, views: list[View | None], tf32: bool) -> None:
        self.function, self.views, self.tf32 = function, views, tf32
        self.allocations: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.frees: list[int] = []

    def slots(self) -> set[int]:
        return {view.slot for view in self.views if view is not None}

    def run(self, buffers: Sequence[Tensor | None]) -> None:
        from mlpdsl import library

        views = (None if view is None else view.of(buffers) for view in self.views)
        getattr(library, self.function)(*views, tf32=self.tf32)


class Tape:
    """One recorded call. Its results are views of inputs and allocations, or None. `direct`: by Triton's C launcher, where every
    launch can be."""

    def __init__(
        self,
        inputs: int,
        count: int,
        steps: list[Step | Product],
        results: list[View | None],
        direct: bool,
        device: torch.device,
    ) -> None:
        self.inputs, self.count, self.steps, self.results, self.device = inputs, count, steps, results, device
        self.direct = direct and all(isinstance(step, Product) or step.flat is not None for step in steps)
        self._run: Replay | None = straight(inputs, steps, results, device) if self.direct else None

    def in_shape(self, shape: tuple[int, ...]) -> Replay | None:
        """What `replay` may be given to make its first result, which is contiguous, in this shape."""
        return straight(self.inputs, self.steps, self.results, self.device, shape) if self.direct else None

    def replay(self, inputs: Sequence[Tensor], pointers: Sequence[int], run: Replay | None = None) -> list[Any] | None:
        """The results for these inputs, which lie at `pointers`. The current device is theirs; nothing is checked. None where an
        allocation lies where those of the recording did not, at no multiple of 16 bytes."""
        run = run or self._run
        if run is not None:
            return run(inputs, pointers)
        return self._replay_indirectly([*inputs, *[None] * (self.count - self.inputs)], inputs[0])

    def _replay_indirectly(self, buffers: list[Tensor | None], like: Tensor) -> list[Any]:
        """The same where Triton's own launcher has to be asked: interpreted, on AMD GPUs, or where its C launcher is another."""
        from mlpdsl import launch

        for step in self.steps:
            for slot, shape, dtype in step.allocations:
                buffers[slot] = like.new_empty(shape, dtype=dtype)
            if isinstance(step, Product):
                step.run(buffers)
            else:
                args = [a.of(buffers) if isinstance(a, (View, Described)) else a for a in step.args]
                launch.run(step.kernel, step.grid, step.options, *args)
                del args  # or they would outlive their last use
            for slot in step.frees:
                buffers[slot] = None
        return [None if view is None else view.of(buffers) for view in self.results]


class Recorder:
    """Listens to one call: `allocated` and `launched` are told in order, `tape` makes the recording, or None where it cannot."""

    def __init__(self, varying: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        self.inputs = [*varying, *fixed]
        self.fixed = {len(varying) + i: t.data_ptr() for i, t in enumerate(fixed)}
        self.steps: list[Step | Product] = []
        self.allocations: list[Tensor] = []
        self._waiting: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        # Which input an argument belongs to is told by its memory, so no two that may move apart may share theirs.
        apart = {t.data_ptr(): _memory(t) for t in varying}
        self.known = len(set(apart.values())) == len(apart) and not {*apart.values()} & {_memory(t) for t in fixed}

    def allocated(self, t: Tensor) -> None:
        self.known = self.known and t.data_ptr() % GRANULE == 0
        self._waiting.append((len(self.inputs) + len(self.allocations), tuple(t.shape), t.dtype))
        self.allocations.append(t)

    def launched(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], compiled: Any, args: Sequence[Any]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        recorded: list[Any] = []
        for a in args:
            if isinstance(a, TensorDescriptor):
                view = self._view(a.base)
                a = view and Described(view, list(a.shape), list(a.strides), list(a.block_shape))
            elif isinstance(a, Tensor):
                a = self._view(a)
            self.known = self.known and a is not None
            recorded.append(a)
        self._add(Step(kernel, grid, options, compiled, recorded))

    def multiplied(self, a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None, *, tf32: bool) -> None:
        self._multiplied("multiply", a, b, out, addend, tf32=tf32)

    def multiplied_two(self, x: Tensor, low: Tensor, high: Tensor, out: Tensor, *, tf32: bool) -> None:
        self._multiplied("multiply_two", x, low, high, out, tf32=tf32)

    def _multiplied(self, function: str, *tensors: Tensor | None, tf32: bool) -> None:
        views = [None if t is None else self._view(t) for t in tensors]
        self.known = self.known and all(view is not None or t is None for view, t in zip(views, tensors, strict=True))
        self._add(Product(function, views, tf32))

    def _add(self, step: Step | Product) -> None:
        step.allocations, self._waiting = self._waiting, []
        self.steps.append(step)

    def _view(self, t: Tensor) -> View | None:
        """Where t lies; None where it is neither an input's memory nor allocated by the call (a copy that torch made)."""
        all_of_them = [*self.inputs, *self.allocations]
        same = [i for i, base in enumerate(all_of_them) if _memory(base) == _memory(t)]
        # Of weights that share one allocation, the one that begins there; of what begins there, what is of this dtype.
        same.sort(key=lambda i: (all_of_them[i].data_ptr() != t.data_ptr(), all_of_them[i].dtype != t.dtype))
        if not same:
            return None
        slot, base = same[0], all_of_them[same[0]]
        known = (tuple(base.shape), tuple(base.stride()), base.dtype) if slot < len(self.inputs) else None
        return View(slot, t.data_ptr() - base.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype, known)

    def tape(self, results: Sequence[Tensor | None], direct: bool) -> Tape | None:
        """The recording of a call that returned `results`."""
        if not self.known or not self.steps:
            return None
        views = [None if t is None else self._view(t) for t in results]
        if any(v is None and t is not None for v, t in zip(views, results, strict=True)):
            return None
        self.steps[-1].allocations += self._waiting  # what no launch writes
        kept = {v.slot for v in views if v is not None}
        first, count = len(self.inputs), len(self.inputs) + len(self.allocations)
        for slot in range(first, count):
            used = [step for step in self.steps if slot in step.slots()]
            if slot not in kept and used:
                used[-1].frees.append(slot)
            elif slot not in kept:
                for step in self.steps:
                    step.allocations = [made for made in step.allocations if made[0] != slot]
        if direct:
            for step in self.steps:
                if isinstance(step, Step):
                    step.flatten(self.fixed)
        return Tape(first, count, self.steps, views, direct, self.inputs[0].device)


class Tapes:
    """The recordings of one spec on one device."""

    def __init__(self, direct: bool) -> None:
        self._direct = direct
        self._known: dict[tuple[Any, ...], Tape | bool] = {}
        """The recording; True where the call came once; False where it came again and cannot be recorded."""

    def call(
        self, word: tuple[Any, ...], varying: Sequence[Tensor], fixed: Sequence[Tensor], make: Callable[[], list[Any]]
    ) -> list[Any]:
        """`make()`, or its recording. `word` is what it depends on beside tensors; `fixed` are those that tend to stay where they
        are (weights), `varying` all others. The current device is theirs."""
        if recorder() is None:
            return self._call(word, varying, fixed, make)
        with unheard():  # a signal handler, or a finaliser, in the middle of another call
            return self._call(word, varying, fixed, make)

    def _call(
        self, word: tuple[Any, ...], varying: Sequence[Tensor], fixed: Sequence[Tensor], make: Callable[[], list[Any]]
    ) -> list[Any]:
        key = self.key(word, varying, fixed)
        known = self._known.get(key)
        if isinstance(known, Tape) and not hooked():
            inputs = [*varying, *fixed]
            results = known.replay(inputs, [t.data_ptr() for t in inputs])
            return make() if results is None else results
        if known is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = True
        if known is not True or _capturing(varying[0]):
            return make()
        _local.recorder = heard = Recorder(varying, fixed)
        try:
            results = make()
        finally:
            _local.recorder = None
        self._known[key] = heard.tape(results, self._direct) or False
        return results

    def find(self, word: tuple[Any, ...], varying: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tape | None:
        """The recording that `call` would repeat, if there is one."""
        known = self._known.get(self.key(word, varying, fixed))
        return known if isinstance(known, Tape) else None

    @staticmethod
    def key(word: tuple[Any, ...], varying: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Any, ...]:
        """Everything that a call's decisions follow from."""
        addresses = [t.data_ptr() for t in varying]
        of_varying = [(t.shape, t.stride(), t.dtype, at % GRANULE) for t, at in zip(varying, addresses, strict=True)]
        return word, twins(addresses), *of_varying, *[(t.data_ptr(), t.stride(), t.dtype) for t in fixed]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _capturing(t: Tensor) -> bool:
    """Whether a CUDA graph is being captured, where a decision may be for this once."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()
