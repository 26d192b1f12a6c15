"""A recording as one Python function without a loop: allocate, add offsets, launch, let go.

The function's text names its constants (shapes, grids, addresses of weights, compiled kernels) c0, c1, …, so recordings of other
shapes and layers share it, and each differs in what the names stand for. Nothing else goes into the text but slots' numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlpdsl.agreement import GRANULE, twins

if TYPE_CHECKING:
    from mlpdsl.tape import Described, Product, Step, View

__all__ = ["Encoded", "Pointer", "Replay", "encoded", "places", "starter", "straight"]

MOST_MAPS = 256
"""Encoded descriptors kept for one argument: torch's allocator comes back to the same few addresses."""

Replay = Callable[[Sequence[Tensor], Sequence[int]], "list[Any] | None"]


class Pointer(NamedTuple):
    """An argument: the address of a slot's memory, `offset` bytes on."""

    slot: int
    offset: int


class Encoded(NamedTuple):
    """An argument: the descriptor of what lies there, as the C launcher takes it."""

    slot: int
    offset: int
    maps: Maps


class Maps(dict[int, Any]):
    """Encoded descriptors by address; `encode` makes those that are not there yet."""

    def __init__(self, encode: Callable[[int], Any]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, address: int) -> Any:
        if len(self) >= MOST_MAPS:
            self.clear()
        found = self[address] = self.encode(address)
        return found


class _Address:
    """What an encoder of descriptors asks of a tensor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def encoded(described: Described, meta: Any) -> Maps:
    """Descriptors like this one, by address, as Triton's own encoder makes them."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    from mlpdsl.launch import descriptor

    def encode(address: int) -> Any:
        of = descriptor(_Address(address), described.shape, described.strides, described.block)  # type: ignore[arg-type]
        return make_tensordesc_arg(of, meta)[0]

    return Maps(encode)


class Starter(NamedTuple):
    """How Triton's C launcher is called: `before` and `after` the stream, then the kernel's arguments, `flat` or as a tuple."""

    function: Any
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    flat: bool


def starter(compiled: Any, grid: tuple[int, ...]) -> Starter | None:
    """The C launcher of a compiled kernel. None where it is not the one that is known.

    `CudaLauncher` allocates scratch, encodes descriptors and tells hooks before it calls it; here there is nothing to allocate
    and nobody to tell, and descriptors are encoded already. Pointers are integers, which it takes as they are: of an object it
    would ask the driver too.
    """
    launcher = compiled.run
    start = getattr(launcher, "launch", None)
    if inspect.isfunction(start):  # the wrapper that encodes descriptors
        start = inspect.getclosurevars(start).nonlocals.get("launcher")
    meta = getattr(compiled.metadata, "tensordesc_meta", None) or []
    scratch = [getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if start is None or inspect.isfunction(start) or scratch != [0, 0] or None in meta:
        return None
    before = (*grid, 1, 1)[:3]
    how = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    packed = compiled.packed_metadata
    if hasattr(launcher, "arg_annotations"):  # Triton 3.7
        kinds = (launcher.arg_annotations, launcher.kernel_signature)
        return Starter(start, before, (*how, packed, None, None, None, None, None, *kinds), False)
    return Starter(start, before, (*how, None, None, packed, None, None, None), True)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return tuple(reversed(strides[: len(shape)]))


NEW_EMPTY = torch._C.TensorBase.new_empty
"""Torch's own. Where somebody has put another in its place, recordings allocate by that one."""


REINTERPRET: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", None)
"""A plain tensor's memory in another shape and other strides, so many elements on, past torch's dispatcher."""


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """`empty_strided` past torch's dispatcher, on the current device; a third of its cost."""
    guards = torch._C._dynamo.guards
    found: Callable[..., Tensor] | None = getattr(guards, f"_empty_strided_{device.type}", None)
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))


class _Text:
    """Lines of a function, and what the names in them stand for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: list[Any] = []

    def name(self, value: Any) -> str:
        if value is None or value is True or value is False:
            return str(value)
        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def names(self, values: Sequence[Any]) -> str:
        return ", ".join(self.name(value) for value in values)

    def function(self, parameters: str) -> Callable[..., Any]:
        names = ", ".join(f"c{i}" for i in range(len(self.constants)))
        body = "\n".join(f"        {line}" for line in self.lines)
        made: Callable[..., Any] = _maker(f"def make({names}):\n    def run({parameters}):\n{body}\n    return run\n")(
            *self.constants
        )
        return made


@lru_cache(maxsize=512)
def _maker(text: str) -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec(compile(text, "<a recorded call of mlpdsl>", "exec"), space)
    make: Callable[..., Any] = space["make"]
    return make


def straight(
    inputs: int,
    steps: Sequence[Step | Product],
    results: Sequence[View | None],
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> Replay | None:
    """The function that repeats the steps of a call with so many inputs on `device`. Every step can be launched directly.

    Of its `pointers` those to fixed tensors are not looked at, and may be left out. With `shape`, the first result is made in it,
    or None returned: where that is no allocation, as it was made.
    """
    from mlpdsl import library
    from mlpdsl.tape import Product

    text, made = _Text(), {slot: (extents, dtype) for step in steps for slot, extents, dtype in step.allocations}
    add, name = text.lines.append, text.name
    whole = {v.slot for v in results if v is not None and v.slot in made and _is_whole(v, *made[v.slot])}
    if shape is not None:
        if results[0] is None or results[0].slot not in whole:
            return None
        made[results[0].slot] = shape, results[0].dtype

    def tensor(slot: int) -> str:
        return f"inputs[{slot}]" if slot < inputs else f"t{slot}"

    def address(slot: int, offset: int) -> str:
        start = f"pointers[{slot}]" if slot < inputs else f"a{slot}"
        return f"{start} + {name(offset)}" if offset else start

    def seen(view: View | None) -> str:
        return "None" if view is None else f"{name(view)}.over({tensor(view.slot)})"

    def operand(view: View | None) -> str:
        """A view that nobody but a product gets to see."""
        if view is None:
            return "None"
        extents, dtype = made.get(view.slot, ((), None))
        base = view.base or (tuple(extents), _contiguous(extents), dtype)
        if (view.offset, view.shape, view.strides, view.dtype) == (0, *base):
            return tensor(view.slot)
        if REINTERPRET is None or view.dtype != base[2]:
            return seen(view)
        start = view.offset // view.dtype.itemsize
        return f"{name(REINTERPRET)}({tensor(view.slot)}, {name(view.shape)}, {name(view.strides)}, {name(start)})"

    if made:
        add("like = inputs[0]")
        add(f"plain = type(like).new_empty is {name(NEW_EMPTY)}")
        empty = name(_allocator(device))
    if any(not isinstance(step, Product) for step in steps):
        add(f"stream = {name(torch._C)}._cuda_getCurrentRawStream({name(device.index)})")
    for step in steps:
        for slot, *_ in step.allocations:
            extents, dtype = made[slot]
            size, kind = name(extents), name(dtype)
            quickly = f"{empty}({size}, {name(_contiguous(extents))}, {kind})"
            add(f"t{slot} = {quickly} if plain else like.new_empty({size}, dtype={kind})")
            add(f"a{slot} = t{slot}.data_ptr()")
            add(f"if a{slot} % {GRANULE}: return None")
        if isinstance(step, Product):
            words = ", tf32=True" if step.tf32 else ""
            add(f"{name(library)}.{step.function}({', '.join(operand(view) for view in step.views)}{words})")
        else:
            assert step.starter is not None and step.flat is not None
            start, before, after, flat = step.starter
            args = ", ".join(
                address(a.slot, a.offset) if isinstance(a, Pointer)
                else f"{name(a.maps)}[{address(a.slot, a.offset)}]" if isinstance(a, Encoded)
                else name(a)
                for a in step.flat
            )  # fmt: skip
            add(f"{name(start)}({text.names(before)}, stream, {text.names(after)}, {args if flat else f'({args},)'})")
        for slot in step.frees:
            add(f"del t{slot}")
    # In another shape it is no longer what a second result may be a view of: that one is then laid over it.
    shown = [
        tensor(v.slot) if v is not None and v.slot in whole and (i == 0 or shape is None) else seen(v)
        for i, v in enumerate(results)
    ]
    add(f"return [{', '.join(shown)}]")
    return text.function("inputs, pointers")


def _is_whole(view: View, extents: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a result is an allocation as it was made."""
    return view.offset == 0 and view.dtype == dtype and view.shape == tuple(extents) and view.strides == _contiguous(extents)


def places(
    tensors: Sequence[Tensor], varying: int, alike: Callable[..., bool], recorded: bool = False
) -> Callable[[Sequence[Tensor]], tuple[int, ...] | None]:
    """From the tensors of a call to the addresses of the first `varying` of them, the first being one that has a shape.

    None where they are not as many as here or not `alike`; where a gradient would be recorded and not `recorded`, or the other way
    round; where one after the first few lies elsewhere than here, or one of the first few is aligned otherwise, or not the same of
    them begin at one address.
    """
    text, addresses, count = _Text(), [t.data_ptr() for t in tensors], range(len(tensors))
    given, here = [f"t{i}" for i in count], [f"a{i}" for i in range(varying)]
    add, name = text.lines.append, text.name
    add(f"if len(tensors) != {len(tensors)}: return None")
    add(f"{', '.join(given)}, = tensors")
    if given[1:]:  # asked of one of torch's older nested tensors, what is `alike` would end the process
        add(f"try: nested = {' or '.join(f'{t}.is_nested' for t in given[1:])}")
        add("except AttributeError: return None")
        add("if nested: return None")
    add(f"if not {name(alike)}({', '.join(given)}): return None")
    if any(t.requires_grad for t in tensors):
        add(f"if {'not ' if recorded else ''}{name(torch.is_grad_enabled)}(): return None")
    elsewhere = " or ".join(f"t{i}.data_ptr() != {name(addresses[i])}" for i in count[varying:])
    add(f"if {elsewhere or False}: return None")
    for i, at in enumerate(here):
        add(f"{at} = t{i}.data_ptr()")
        add(f"if not {at} or {at} % {GRANULE} != {addresses[i] % GRANULE}: return None")
    if len(set(addresses[:varying])) < varying:
        add(f"if {name(twins)}([{', '.join(here)}]) != {name(twins(addresses[:varying]))}: return None")
    elif varying > 1:
        add(f"if len({{{', '.join(here)}}}) < {varying}: return None")
    add(f"return ({', '.join(here)},)")
    return text.function("tensors")
