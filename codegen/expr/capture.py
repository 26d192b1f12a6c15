"""What a user's function reads besides its arguments, found before it is traced.

A trace bakes in whatever the function reads: numbers are fine, a tensor or an object that can change is not. `capture` walks
closure, globals, defaults and helper functions, refuses what has no fingerprint, and returns a copy of the function bound to the
values it saw: what is declared stays what it was, whatever happens to a global afterwards.
"""

from __future__ import annotations

import enum
import functools
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any

from .refusal import Refused, location

_MODULES_OF_CHANCE = ("random", "secrets", "time", "uuid")


def capture(function: Callable[..., Any]) -> tuple[Callable[..., Any], object]:
    """A copy of the function that nothing outside can change, and a hashable fingerprint of it. Raises `Refused`."""
    return _Walk().function(function, getattr(function, "__name__", type(function).__name__))


class _Walk:
    def __init__(self) -> None:
        self.seen: dict[int, types.FunctionType] = {}

    def function(self, f: Any, name: str) -> tuple[Callable[..., Any], object]:
        """The frozen callable and its fingerprint."""
        if isinstance(f, functools.partial):
            inner, mark = self.function(f.func, name)
            args, kwargs = self.values(enumerate(f.args), f, name), self.values(f.keywords.items(), f, name)
            frozen = functools.partial(inner, *(v for v, _ in args.values()), **{k: v for k, (v, _) in kwargs.items()})
            return frozen, ("partial", mark, _marks(args), _marks(kwargs))
        if _is_module(f):
            return self.torch_module(f)
        if isinstance(f, types.FunctionType) and not _from_torch(f):
            return self.python(f)
        if isinstance(f, types.MethodType) and not _from_torch(f.__func__):
            why = f"{name} is a method of an object whose attributes can change, so it has no fingerprint"
            raise Refused(why, "Write a function, with the numbers it needs as closure or default arguments.", location(f.__func__))
        if isinstance(f, type):
            raise Refused(f"{name} is a class", f"Pass an instance: {name}().", "")
        if _from_torch(f):
            return f, ("torch", getattr(f, "__module__", ""), getattr(f, "__qualname__", repr(f)))
        why = f"a {type(f).__name__} object has state that can change, so it has no fingerprint"
        raise Refused(why, "Pass a plain Python function, or one of torch's.", "")

    def torch_module(self, module: Any) -> tuple[Callable[..., Any], object]:
        import copy

        name = type(module).__name__
        held = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        if held:
            why = f"the module {name} holds captured tensors ({', '.join(held[:4])})"
            raise Refused(why, "A learned value is an operand of an epilogue: mlpdsl.epilogue(fn, name='scalar').", "")
        marks = tuple(self.module_mark(m) for m in module.modules())
        return copy.deepcopy(module), ("module", marks)

    def module_mark(self, module: Any) -> object:
        """The fingerprint of one module without its children: what its forward does, and its attributes."""
        kind = type(module)
        if kind.__module__.startswith("torch.nn."):
            return kind.__qualname__, repr(module)
        inner = ("training", *module._modules)
        attributes = [(n, v) for n, v in vars(module).items() if not n.startswith("_") and n not in inner]
        forward = self.python(kind.forward)[1]
        return kind.__qualname__, _marks(self.values(attributes, kind.forward, "attribute")), forward

    def python(self, f: types.FunctionType) -> tuple[Callable[..., Any], object]:
        if id(f) in self.seen:  # a helper met before, or recursion
            return self.seen[id(f)], ("seen", f.__qualname__)
        names = {"__builtins__": f.__globals__.get("__builtins__"), "__name__": f.__module__}
        cells = tuple(types.CellType() for _ in f.__closure__ or ())
        copy = types.FunctionType(f.__code__, names, f.__name__, None, cells or None)
        self.seen[id(f)] = copy
        found = self.values(_globals_read(f), f, "global")
        names.update({str(k): v for k, (v, _) in found.items()})
        closed: dict[Any, Any] = {}
        for cell, new, name in zip(f.__closure__ or (), cells, f.__code__.co_freevars, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that the enclosing function has not assigned yet
                raise Refused(
                    f"the closure {name!r} has no value yet", "Declare the MLP after it is assigned.", location(f)
                ) from None
            closed |= self.values([(name, content)], f, "closure")
            new.cell_contents = closed[name][0]
        positional = self.values(enumerate(f.__defaults__ or ()), f, "default")
        by_name = self.values((f.__kwdefaults__ or {}).items(), f, "default")
        copy.__defaults__ = tuple(v for v, _ in positional.values()) or None
        copy.__kwdefaults__ = {str(k): v for k, (v, _) in by_name.items()} or None
        copy.__qualname__, copy.__doc__ = f.__qualname__, f.__doc__
        marks = tuple(_marks(each) for each in (found, closed, positional, by_name))
        return copy, ("function", _code_mark(f.__code__), marks)

    def values(self, named: Any, owner: Any, kind: str) -> dict[Any, tuple[Any, object]]:
        return {name: self.value(name, value, owner, kind) for name, value in named}

    def value(self, name: object, value: Any, owner: Any, kind: str) -> tuple[Any, object]:
        """A value that the function reads, frozen, with its fingerprint."""
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, str, bytes, enum.Enum)):
            return value, (type(value).__qualname__, repr(value))
        numpy_scalar = type(value).__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__")
        if isinstance(value, numbers.Number) or numpy_scalar:
            return value, (type(value).__qualname__, repr(value))
        if isinstance(value, (tuple, frozenset)):
            inner = [self.value(name, v, owner, kind) for v in value]
            return type(value)(v for v, _ in inner) if type(value) in (tuple, frozenset) else value, tuple(m for _, m in inner)
        if isinstance(value, types.ModuleType):
            if value.__name__ in _MODULES_OF_CHANCE or value.__name__.startswith("numpy.random"):
                why = f"the {kind} {name!r} is the module {value.__name__}: random numbers would be baked into the kernel"
                raise Refused(why, "Draw the numbers outside, and pass them as an operand of an epilogue.", location(owner))
            return value, ("import", value.__name__)
        if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device", "layout", "memory_format"):
            return value, repr(value)
        if _is_tensor(value):
            shape = tuple(value.shape)
            why = f"the {kind} {name!r} is a captured tensor of shape {shape}"
            step = "Make it an operand of an epilogue, mlpdsl.epilogue(fn, name=kind); a constant, a Python float."
            raise Refused(why, step, location(owner))
        if callable(value) and (
            _from_torch(value) or isinstance(value, (types.FunctionType, functools.partial)) or _is_module(value)
        ):
            return self.function(value, str(name))
        if isinstance(value, types.BuiltinFunctionType):
            if getattr(value, "__module__", "") in _MODULES_OF_CHANCE or _is_method_of_chance(value):
                raise Refused(f"the {kind} {name!r} gives random or changing numbers", "Pass them as an operand.", location(owner))
            return value, ("builtin", value.__module__, value.__qualname__)
        if isinstance(value, type) and _is_autograd_function(value):
            methods = [self.python(f)[1] for f in _static_methods(value)]
            return value, ("autograd", value.__qualname__, tuple(methods))
        if isinstance(value, type) and value.__module__ in ("builtins", "torch"):
            return value, ("type", value.__qualname__)
        why = f"the {kind} {name!r} is a {type(value).__name__}, which can change and so has no fingerprint"
        raise Refused(why, "Capture the numbers themselves, for example as default arguments.", location(owner))


def _marks(found: dict[Any, tuple[Any, object]]) -> tuple[object, ...]:
    return tuple((name, mark) for name, (_, mark) in found.items())


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals_read(f: types.FunctionType) -> list[tuple[str, Any]]:
    """The globals that the code may name, those of lambdas and comprehensions inside it too."""
    names = {name: None for code in _codes(f.__code__) for name in code.co_names}
    return [(name, f.__globals__[name]) for name in names if name in f.__globals__]


def _code_mark(code: types.CodeType) -> tuple[object, ...]:
    constants = tuple(_code_mark(c) if isinstance(c, types.CodeType) else (type(c).__qualname__, repr(c)) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames[: code.co_argcount], constants


def _from_torch(f: Any) -> bool:
    """Whether it is part of torch (or of the standard mathematics), which no program changes."""
    module = getattr(f, "__module__", None)
    if module is None:  # torch's own method descriptors and builtins have none
        owner = getattr(f, "__objclass__", None) or getattr(f, "__self__", None)
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", "")
    return str(module).split(".")[0] in ("torch", "math", "_operator", "operator") and not isinstance(f, types.ModuleType)


def _is_module(f: Any) -> bool:
    import torch

    return isinstance(f, torch.nn.Module)


def _static_methods(kind: type) -> list[types.FunctionType]:
    found = (getattr(kind, name, None) for name in ("forward", "backward", "setup_context"))
    return [f for f in found if isinstance(f, types.FunctionType) and not _from_torch(f)]


def _is_autograd_function(value: type) -> bool:
    import torch

    return issubclass(value, torch.autograd.Function)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or (type(value).__module__ == "numpy" and type(value).__name__ == "ndarray")


def _is_method_of_chance(value: Any) -> bool:
    return type(getattr(value, "__self__", None)).__module__ in _MODULES_OF_CHANCE
