"""Takes out of Triton's CPU interpreter what it does again and again: same results, less time. For `mlpdsl.interpreter`.

At every launch:
* triton.language is patched anew, by each device function, and looked through for its built-in functions: once.
* The source of a kernel is parsed and compiled, also where another spec's has the same text: once.

At every step of a program, in a front end that was written for compiling:
* An addition of integers is checked for overflow in six steps, whose verdict goes to an assertion that is off: not computed.
* The shape, size and name of a block, and the numpy type of an element, are the same for all blocks alike: kept.
* Operands of one type need no promotion, those of one shape no broadcasting, and a type is equal to itself.
* Built-in functions are found once, and called without their wrappers.

All of it is the process's: it goes for its other kernels too, which take turns with an MLP's. A function to which a later Triton
gives other parameters is left as it is.
tests/interpreted/test_interpreter_speed.py holds each change against what it stands for.
"""

from __future__ import annotations

import inspect
import linecache
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

from mlpdsl.backends import interpreter_lock
from mlpdsl.frames import with_room

__all__ = ["install"]

core: Any = tl.core


class _Unpatched:
    """The scope of a patch that was not needed."""

    def restore(self) -> None:
        """Nothing was changed."""


def _patched_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang`, which replaces triton.language's functions, once a launch. Triton's own does it anew, for good, at every
    call of a device function."""
    launch = threading.local()
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what any device function may see

    def patch_lang(fn: Any) -> Any:
        if getattr(launch, "patched", False):
            return _Unpatched()
        scope = original(everything)
        restore = scope.restore

        def restored() -> None:
            launch.patched = False
            restore()

        scope.restore, launch.patched = restored, True
        return scope

    return patch_lang


def _generated_text(fn: FunctionType) -> str:
    """The lines of a function of generated source, from its decorator to its end; "" for any other function."""
    entry = linecache.cache.get(fn.__code__.co_filename, ())
    if len(entry) != 4 or entry[1] is not None:
        return ""  # not put there by mlpdsl.loader
    lines = entry[2]
    first = end = fn.__code__.co_firstlineno - 1
    while not lines[end].startswith("def "):
        end += 1
    end += 1
    while end < len(lines) and lines[end][0] in " \n)":
        end += 1
    return "".join(lines[first:end])


def _rewritten_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`FunctionRewriter.rewrite_ast`, once for each text: what the source of one spec has in common with that of another is not
    parsed and compiled anew."""
    known: dict[str, tuple[FunctionType, int]] = {}

    def rewrite_ast(self: Any) -> Any:
        fn = self.fn
        text, line = _generated_text(fn), fn.__code__.co_firstlineno
        if text not in known:
            made = original(self)
            if text and made is not fn:
                known[text] = made, line
            return made
        made, its_line = known[text]
        code = made.__code__
        code = code.replace(co_filename=fn.__code__.co_filename, co_firstlineno=code.co_firstlineno + line - its_line)
        fn.__globals__.setdefault("interpreter_semantic", triton_interpreter.interpreter_semantic)
        again = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__)
        again.__annotations__ = fn.__annotations__
        return again

    return rewrite_ast


def _with_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InterpretedFunction.run`, a whole launch, one at a time and with room for its frames."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with interpreter_lock():
            return with_room(original, self, *args, **kwargs)

    return run


def without_unread_checks(original: Callable[..., None]) -> Callable[..., None]:
    """`binary_op_sanitize_overflow_impl`, where an assertion would say what it finds."""

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, binary_op)

    return check


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


def _plain(sizes: tuple[Any, ...]) -> bool:
    """Whether all are int and nothing that is only equal to one, as True is to 1."""
    return all([size.__class__ is int for size in sizes])


def alike_blocks(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`block_type.__init__`: what follows from shape and element is kept."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([each.value if isinstance(each, core.constexpr) else each for each in shape])
        if not _plain(sizes):
            original(self, element_ty, shape)
            return
        key = (element_ty.name, type(shape), sizes)
        if key in known:
            self.__dict__.update(known[key])
            self.element_ty = element_ty
            return
        original(self, element_ty, shape)
        known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}

    return init


def alike_tensors(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`tensor.__init__`: shape and size as constexpr are kept."""
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes in known and _plain(sizes):
            self.__dict__.update(known[sizes])
            self.handle, self.type, self.dtype = handle, type, type.scalar
            return
        original(self, handle, type)
        if _plain(sizes):
            known[sizes] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}

    return init


def broadcasting(original: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """`broadcast_impl_value`, where there is nothing to broadcast."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and list(left.shape) == list(right.shape):
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def same_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`binary_op_type_checking_impl`, where two tensors have one type that no operation promotes."""
    plain = {tl.float32.name, tl.int32.name, tl.int64.name}

    def check(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor) and lhs.dtype is rhs.dtype and lhs.dtype.name in plain:
            return self.broadcast_impl_value(lhs, rhs)
        return original(self, lhs, rhs, *args, **kwargs)

    return check


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
    known: dict[Any, tuple[dict[str, Any], list[tuple[str, Callable[..., Any]]]]] = {}

    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        there, calls = known.get(pkg, ({}, []))
        if vars(pkg) != there:
            calls = [(name, _called(member)) for name, member in inspect.getmembers(pkg, core.is_builtin)]
            known[pkg] = dict(vars(pkg)), calls
        for name, call in calls:
            scope.set_attr(pkg, name, call)

    return patch


def _change(place: Any, name: str, made: Callable[[Any], Any], *parameters: str) -> None:
    """Put `made` of what is there in its place, if that is a function of these parameters."""
    original = getattr(place, name, None)
    if callable(original) and tuple(inspect.signature(original).parameters) == parameters:
        setattr(place, name, made(original))


def front_end() -> None:
    """Change what every step of a program goes through."""
    module: Any = triton_interpreter
    semantic: Any = TritonSemantic
    _change(semantic, "binary_op_sanitize_overflow_impl", without_unread_checks, "self", "lhs", "rhs", "binary_op")
    _change(core, "_unwrap_if_constexpr", unwrapping, "o")
    _change(core.dtype, "__eq__", equal_to_itself, "self", "other")
    _change(module, "_get_np_dtype", numpy_type, "tt_dtype")
    _change(core.block_type, "__init__", alike_blocks, "self", "element_ty", "shape")
    _change(core.tensor, "__init__", alike_tensors, "self", "handle", "type")
    _change(semantic, "broadcast_impl_value", broadcasting, "self", "lhs", "rhs")
    flags = ("allow_lhs_ptr", "allow_rhs_ptr", "arithmetic_check", "div_or_mod")
    _change(semantic, "binary_op_type_checking_impl", same_type, "self", "lhs", "rhs", *flags)
    _change(module.InterpreterBuilder, "create_splat", splat, "self", "ret_ty", "arg")
    _change(module, "_patch_builtin", lambda _: patching(), "pkg", "builder", "scope")


def install() -> None:
    """Change triton's interpreter in place. To be called once a process."""
    module: Any = triton_interpreter
    module._patch_lang = _patched_once(module._patch_lang)
    functions: Any = triton_interpreter.InterpretedFunction
    functions.run = _with_room(functions.run)
    rewriter: Any = triton_interpreter.FunctionRewriter
    rewriter.rewrite_ast = _rewritten_once(rewriter.rewrite_ast)
    front_end()
