"""Less time in Triton's interpreter for the same results: what its front end, written for compiling, does anew at every step of
each program of each launch. Beside `mlpdsl.interpreter_speed`, for users too; this is for tests, which run little else.

* An addition of integers is checked for overflow in six steps, whose verdict goes to an assertion that is off: not computed.
* The shape, size and name of a block, and the numpy type of an element, are the same for all blocks alike: kept.
* Operands of one shape need no broadcasting, and a type is equal to itself.
* Built-in functions are found once, and called without their wrappers.

`tests/interpreted/test_quick.py` holds each against what it stands for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

__all__ = ["install"]

core: Any = tl.core


def without_unread_checks(options: Any) -> Any:
    """The interpreter's options, where overflow is looked for only if an assertion would say so."""
    return replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)


def unwrapping(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_unwrap_if_constexpr`, which asks whether a thing is one of three kinds of list before it asks whether it is a constexpr."""
    lists = (list, tuple, core.tuple)

    def unwrap(o: Any) -> Any:
        if isinstance(o, core.constexpr):
            return o.value
        return original(o) if isinstance(o, lists) else o

    return unwrap


def equal_to_itself(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """`dtype.__eq__`."""

    def equal(self: Any, other: Any) -> bool:
        return self is other or original(self, other)

    return equal


def numpy_type(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype`, which makes a table of all types to look one of them up."""
    known: dict[str, Any] = {}

    def of(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return original(dtype)
        if scalar.name not in known:
            known[scalar.name] = original(dtype)
        return known[scalar.name]

    return of


def alike_blocks(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`block_type.__init__`: what follows from shape and element is kept."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([each.value if isinstance(each, core.constexpr) else each for each in shape])
        key = (element_ty.name, type(shape), sizes)
        if all(type(size) is int for size in sizes) and key in known:
            self.__dict__.update(known[key])
            self.element_ty = element_ty
            return
        original(self, element_ty, shape)
        known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}

    return init


def alike_tensors(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`tensor.__init__`: shape and size as constexpr are kept."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = known[sizes]
            return
        original(self, handle, type)
        known[sizes] = self.numel, self.shape

    return init


def broadcasting(original: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """`broadcast_impl_value`, where there is nothing to broadcast."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and list(left.shape) == list(right.shape):
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def splat(original: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """`create_splat`, with a shape that numpy reads without asking back for every number of it."""

    def create_splat(self: Any, block: Any, arg: Any) -> Any:
        return original(self, SimpleNamespace(shape=tuple(block.shape)), arg)

    return create_splat


_BUILTIN = core.builtin(lambda: None).__code__


def _called(member: Any) -> Callable[..., Any]:
    """What stands for a built-in function during a launch: itself without its wrapper, which asks only for `_semantic`."""
    function = member.__wrapped__ if getattr(member, "__code__", None) is _BUILTIN else member
    semantic = triton_interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return call


def patching() -> Callable[[Any, Any, Any], None]:
    """`_patch_builtin`, which looks through triton.language for its built-in functions at every launch."""
    known: dict[Any, tuple[int, list[tuple[str, Any, Callable[..., Any]]]]] = {}

    def patch(place: Any, builder: Any, scope: Any) -> None:
        size, members = known.get(place, (-1, []))
        if size != len(vars(place)) or any(getattr(place, name) is not member for name, member, _ in members):
            found = inspect.getmembers(place, core.is_builtin)
            members = [(name, member, _called(member)) for name, member in found]
            known[place] = len(vars(place)), members
        for name, _, call in members:
            scope.set_attr(place, name, call)

    return patch


def install() -> None:
    """Change triton's interpreter in place. To be called once a process."""
    module: Any = triton_interpreter
    module.interpreter_builder.options = without_unread_checks(module.interpreter_builder.options)
    core._unwrap_if_constexpr = unwrapping(core._unwrap_if_constexpr)
    core.dtype.__eq__ = equal_to_itself(core.dtype.__eq__)
    module._get_np_dtype = numpy_type(module._get_np_dtype)
    core.block_type.__init__ = alike_blocks(core.block_type.__init__)
    core.tensor.__init__ = alike_tensors(core.tensor.__init__)
    semantic: Any = TritonSemantic
    semantic.broadcast_impl_value = broadcasting(semantic.broadcast_impl_value)
    module.InterpreterBuilder.create_splat = splat(module.InterpreterBuilder.create_splat)
    module._patch_builtin = patching()
