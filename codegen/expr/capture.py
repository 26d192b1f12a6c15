"""What a user's function reads besides its arguments, found before it is traced.

A trace bakes in whatever the function reads: numbers are fine, a tensor or an object that can change is not. `capture` walks
closure, globals, defaults, helper functions, modules and methods, refuses what has no fingerprint, and returns a copy of the
function bound to the values it saw: what is declared stays what it was, whatever happens to a global afterwards.
"""

from __future__ import annotations

import copy
import dis
import enum
import functools
import numbers
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .refusal import Refused, location

_OF_CHANCE = ("random", "secrets", "time", "uuid")
_UNCHANGING = ("torch", "math", "cmath", "numpy", "operator", "_operator", "functools", "builtins", "typing", "types", "_pytest")
"""Top-level modules that no program changes: what they hold is read as it is, and goes by its name. (Pytest's rewritten asserts
name its module.)"""

_OF_EVERY_CLASS = ("__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
                   "__parameters__", "__static_attributes__", "__firstlineno__", "__repr__", "extra_repr")  # fmt: skip

_READS_THE_WORLD = ("open", "input", "eval", "exec", "compile", "__import__", "globals", "locals", "vars", "id", "hash")

Frozen = tuple[Any, object]
"""A value that nothing outside can change, and a hashable fingerprint of it."""


def capture(function: Callable[..., Any]) -> tuple[Callable[..., Any], object]:
    """A copy of the function that nothing outside can change, and a hashable fingerprint of it. Raises `Refused`."""
    return _Walk().function(function, getattr(function, "__name__", type(function).__name__))


class _Walk:
    def __init__(self) -> None:
        self.seen: dict[int, types.FunctionType] = {}

    # What can be called

    def function(self, f: Any, name: str) -> Frozen:
        import torch

        f = getattr(f, "_torchdynamo_orig_callable", f)  # what torch.compile was given
        if isinstance(f, functools.partial):
            inner, mark = self.function(f.func, name)
            args, kwargs = self.values(enumerate(f.args), f.func, "argument"), self.values(f.keywords.items(), f.func, "argument")
            frozen = functools.partial(inner, *(v for v, _ in args.values()), **{k: v for k, (v, _) in kwargs.items()})
            return frozen, ("partial", mark, _marks(args), _marks(kwargs))
        if isinstance(f, torch.nn.Module):
            return self.torch_module(f)
        if isinstance(f, torch.jit.ScriptFunction):
            return f, ("script", f.code)
        if isinstance(f, types.FunctionType) and not _is_trusted(f):
            return self.python(f)
        if isinstance(f, types.MethodType) and not _is_trusted(f.__func__):
            why = f"{name} is a method of an object whose attributes can change, so it has no fingerprint"
            raise Refused(why, "Write a function, with the numbers it needs as closure or default arguments.", location(f.__func__))
        if isinstance(f, type):
            raise Refused(f"{name} is a class", f"Pass an instance: {name}().", "")
        if _is_trusted(f):
            return f, ("torch", getattr(f, "__module__", ""), getattr(f, "__qualname__", repr(f)))
        why = f"a {type(f).__name__} object has state that can change, so it has no fingerprint"
        raise Refused(why, "Pass a plain Python function, or one of torch's.", "")

    def python(self, f: types.FunctionType) -> Frozen:
        if id(f) in self.seen:  # a helper met before, or recursion
            return self.seen[id(f)], ("seen", list(self.seen).index(id(f)))
        names = {"__builtins__": f.__globals__.get("__builtins__"), "__name__": f.__module__}
        cells = tuple(types.CellType() for _ in f.__closure__ or ())
        made = types.FunctionType(f.__code__, names, f.__name__, None, cells or None)
        self.seen[id(f)] = made
        loaded = _globals_of(f.__code__)
        reads = [n for n in loaded if n in _READS_THE_WORLD and n not in f.__globals__]
        reads += [f"import {n}" for n in _named(f.__code__, ("IMPORT_NAME",)) if n.split(".")[0] not in _UNCHANGING]
        if reads:
            why = f"it calls {reads[0]}" if "import" not in reads[0] else f"it does {reads[0]} inside"
            raise Refused(f"{why}, which can give another answer later", "Read the numbers outside, and capture them.", location(f))
        found = self.values(((n, f.__globals__[n]) for n in loaded if n in f.__globals__), f, "global")
        names.update({str(k): v for k, (v, _) in found.items()})
        closed: dict[Any, Frozen] = {}
        for cell, new, name in zip(f.__closure__ or (), cells, f.__code__.co_freevars, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that the enclosing function has not assigned yet
                why = f"the closure {name!r} has no value yet"
                raise Refused(why, "Declare the MLP after it is assigned.", location(f)) from None
            if name == "__class__":
                why = "super() reaches methods that can change, so it has no fingerprint"
                raise Refused(why, "Pass a plain function of tensors.", location(f))
            closed |= self.values([(name, content)], f, "closure")
            new.cell_contents = closed[name][0]
        positional = self.values(enumerate(f.__defaults__ or ()), f, "default")
        by_name = self.values((f.__kwdefaults__ or {}).items(), f, "default")
        made.__defaults__ = tuple(v for v, _ in positional.values()) or None
        made.__kwdefaults__ = {str(k): v for k, (v, _) in by_name.items()} or None
        made.__qualname__, made.__doc__ = f.__qualname__, f.__doc__
        return made, ("function", _code_mark(f.__code__), tuple(map(_marks, (found, closed, positional, by_name))))

    def torch_module(self, module: Any) -> Frozen:
        held = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        if held:
            why = f"the module {type(module).__name__} holds captured tensors ({', '.join(held[:4])})"
            step = "On the output, make them operands: mlpdsl.epilogue(fn, name=kind). Between layers there are no learned values."
            raise Refused(why, step, "")
        made = copy.deepcopy(module)
        return made, (
            "module",
            tuple(self.one_module(m, frozen) for m, frozen in zip(module.modules(), made.modules(), strict=True)),
        )

    def one_module(self, module: Any, made: Any) -> object:
        """The fingerprint of one module without its children. What its class's methods read is bound to the copy."""
        import torch

        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(f"the module {kind.__name__} has forward hooks", "Pass a plain function.", location(kind.forward))
        inner = (*(n for n in vars(torch.nn.Module()) if n != "training"), *module._modules)
        attributes = {n: v for n, v in vars(module).items() if n not in inner}
        if _is_trusted(kind):
            replaced = [n for n, v in attributes.items() if isinstance(v, (types.FunctionType, types.MethodType))]
            if replaced:
                why = f"{replaced[0]} of the module {kind.__name__} was replaced, so it has no fingerprint"
                raise Refused(why, "Pass a plain function.", location(attributes[replaced[0]]))
            return kind.__qualname__, repr(sorted((n, repr(v)) for n, v in attributes.items()))
        own = [c for c in kind.__mro__ if not _is_trusted(c) and c is not object]
        held = {n: v for c in reversed(own) for n, v in vars(c).items() if n not in _OF_EVERY_CLASS}
        plain = {n: getattr(v, "__func__", v) for n, v in held.items()}  # a staticmethod holds its function
        methods = {n: f for n, f in plain.items() if isinstance(f, types.FunctionType) and not isinstance(held[n], classmethod)}
        shared = self.values(((n, v) for n, v in held.items() if n not in methods), kind.forward, "class attribute")
        made.__dict__.update({str(n): v for n, (v, _) in shared.items()})
        bound = {n: v.__name__ for n, v in attributes.items() if isinstance(v, types.MethodType) and v.__self__ is module}
        rest = self.values(((n, v) for n, v in attributes.items() if n not in bound), kind.forward, "attribute")
        marks: list[object] = [kind.__qualname__, _marks(shared), _marks(rest), tuple(bound.items())]
        for name, method in methods.items():
            frozen, mark = self.python(method)
            made.__dict__[name] = frozen if isinstance(held[name], staticmethod) else types.MethodType(frozen, made)
            marks.append((name, mark))
        made.__dict__.update({n: made.__dict__[method] for n, method in bound.items() if method in methods})
        return tuple(marks)

    def autograd_function(self, kind: type) -> Frozen:
        """A torch.autograd.Function, with static methods bound to what they read."""
        names = ("forward", "backward", "setup_context")
        methods = {n: f for n in names if isinstance(f := getattr(kind, n, None), types.FunctionType) and not _is_trusted(f)}
        found = {n: self.python(f) for n, f in methods.items()}
        return type(kind.__name__, (kind,), {n: staticmethod(f) for n, (f, _) in found.items()}), ("autograd", _marks(found))

    # What is read

    def values(self, named: Iterable[tuple[Any, Any]], owner: Any, kind: str) -> dict[Any, Frozen]:
        return {name: self.value(name, value, owner, kind) for name, value in named}

    def value(self, name: object, value: Any, owner: Any, kind: str) -> Frozen:
        import torch

        if type(value) in (bool, int, str, bytes, type(None), type(Ellipsis), complex) or isinstance(value, enum.Enum):
            return value, (type(value).__qualname__, repr(value))
        if isinstance(value, (int, float)):  # numpy's too; a subclass may print as it likes
            number = float(value) if isinstance(value, float) else int(value)
            return number, (type(number).__qualname__, number.hex() if isinstance(number, float) else number)
        if isinstance(value, numbers.Number):
            return value, (type(value).__qualname__, repr(value))
        if isinstance(value, (tuple, frozenset)) and type(value) in (tuple, frozenset):
            inner = [self.value(name, v, owner, kind) for v in value]
            return type(value)(v for v, _ in inner), tuple(m for _, m in inner)
        if isinstance(value, types.ModuleType):
            return self.module(value, owner, f"the {kind} {name!r}")
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return value, repr(value)
        if isinstance(value, torch.Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "shape")):
            why = f"the {kind} {name!r} is a captured tensor of shape {tuple(value.shape)}"
            step = "Make it an operand, mlpdsl.epilogue(fn, name=kind); if it is a constant, write a Python float."
            raise Refused(why, step, location(owner))
        if isinstance(value, type):
            if issubclass(value, torch.autograd.Function):
                return self.autograd_function(value)
            if _is_trusted(value):
                return value, ("type", value.__module__, value.__qualname__)
        elif callable(value) and not _is_of_chance(value):
            plain = (types.FunctionType, functools.partial, torch.nn.Module, torch.jit.ScriptFunction)
            if isinstance(value, plain) or _is_trusted(value):
                return self.function(value, str(name))
        elif callable(value):
            raise Refused(f"the {kind} {name!r} gives random or changing numbers", "Pass them as an operand.", location(owner))
        why = f"the {kind} {name!r} is a {type(value).__name__}, which can change and so has no fingerprint"
        raise Refused(why, "Capture the numbers themselves, for example as default arguments.", location(owner))

    def module(self, module: types.ModuleType, owner: Any, called: str) -> Frozen:
        """A module that no program changes, as it is; of any other, a namespace of the attributes that the function names."""
        if module.__name__.split(".")[0] in _OF_CHANCE or module.__name__.startswith("numpy.random"):
            why = f"{called} is the module {module.__name__}: random or changing numbers would be baked into the kernel"
            raise Refused(why, "Draw the numbers outside, and pass them as an operand of an epilogue.", location(owner))
        if module.__name__.split(".")[0] in _UNCHANGING:
            return module, ("import", module.__name__)
        read = [n for n in _attributes_of(owner.__code__) if n in vars(module)]
        found = self.values(((n, vars(module)[n]) for n in read), owner, f"attribute of {module.__name__}")
        return types.SimpleNamespace(**{n: v for n, (v, _) in found.items()}), ("import", module.__name__, _marks(found))


def _marks(found: dict[Any, Frozen]) -> tuple[object, ...]:
    return tuple((name, mark) for name, (_, mark) in found.items())


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and that of lambdas and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(code: types.CodeType, start: tuple[str, ...]) -> list[str]:
    found = (i for c in _codes(code) for i in dis.get_instructions(c) if i.opname.startswith(start))
    return list(dict.fromkeys(str(i.argval) for i in found))


def _globals_of(code: types.CodeType) -> list[str]:
    return _named(code, ("LOAD_GLOBAL", "LOAD_NAME"))


def _attributes_of(code: types.CodeType) -> list[str]:
    return _named(code, ("LOAD_ATTR", "LOAD_METHOD"))


def _code_mark(code: types.CodeType) -> tuple[object, ...]:
    constants = tuple(_code_mark(c) if isinstance(c, types.CodeType) else (type(c).__qualname__, repr(c)) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames[: code.co_argcount], constants


def _is_trusted(f: Any) -> bool:
    """Whether it is part of torch or of another library that no program changes."""
    module = getattr(f, "__module__", None)
    if module is None:  # torch's own method descriptors and builtins have none
        owner = getattr(f, "__objclass__", None) or getattr(f, "__self__", None)
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", "")
    return str(module).split(".")[0] in _UNCHANGING


def _is_of_chance(value: Any) -> bool:
    modules = (getattr(value, "__module__", None), type(getattr(value, "__self__", None)).__module__)
    return any(str(m).split(".")[0] in _OF_CHANCE or str(m).startswith("numpy.random") for m in modules)
