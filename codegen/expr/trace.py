"""From a Python function of torch tensors to an `Expr` and its derivatives: torch runs it once, and every operation is read.

The function and torch's own backward of it run on a small example under a dispatch mode, which sees what `make_fx` over
`torch.func.vjp` would record, knows the expression behind every tensor, and the user's line that asked for it. (make_fx itself
imports all of torch's compiler, one second or more at the import of whoever declares a function.) Torch differentiates; the table
of `aten` says what each operation means. What cannot be read is `Refused` if a result depends on it.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from . import aten
from .graph import BOOLEAN, Expr, call, const, differentiating, symbol, walk
from .reasons import reason
from .refusal import Refused, line_in, location, raised_at

if TYPE_CHECKING:
    from torch import Tensor

MAX_OPERATIONS = 600
"""Operations of value and derivatives together; a longer one would not be a faster kernel."""

_SHAPE = (2, 6)  # of the examples: even, so that chunk() and its like get as far as an honest reason
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "item")
_UNSET = ("empty", "empty_like", "new_empty")
_OVERWRITES = ("fill_", "zero_", "rrelu_with_noise", "rrelu_with_noise_backward")  # what they are given need have no meaning
_OF_TRUTHS = {"mul": "both", "add": "either", "minimum": "both", "maximum": "either"}  # torch's arithmetic of truth values
_IGNORED = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "generator")


# The default dtype, anomaly detection and the CPU's random numbers are the whole process's. Re-entrant, because the function that
# is traced may declare another.
_lock = threading.RLock()


@contextmanager
def neutral() -> Iterator[None]:
    """On the CPU, in float32, with gradients, without autocast, random numbers put back: whatever the program around it has set.

    One thread at a time. What others do meanwhile meets the default dtype float32, and random numbers that are drawn again.
    """
    with _lock, _neutral():
        yield


@contextmanager
def _neutral() -> Iterator[None]:
    import torch

    plain = (torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False))
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for each in (*plain, torch.random.fork_rng(devices=[]), torch.autograd.set_detect_anomaly(False)):
            stack.enter_context(each)
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def trace(function: Callable[..., Any], names: Sequence[str]) -> tuple[Expr, dict[str, Expr]]:
    """The function's value over the inputs `names`, and its partial derivative by each of them. Raises `Refused`."""
    with neutral():
        return _trace(function, names)


def _trace(function: Callable[..., Any], names: Sequence[str]) -> tuple[Expr, dict[str, Expr]]:
    import torch

    examples = _examples(len(names))
    _try(function, examples)
    leaves = [e.requires_grad_() for e in examples]
    ones = torch.ones(_SHAPE, dtype=torch.float32)
    recorder = recording(function)
    recorder.learn(ones, const(1.0))
    for leaf, name in zip(leaves, names, strict=True):
        recorder.learn(leaf, symbol(name))
    try:
        with recorder:
            value = function(*leaves)
            pulled: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad:
                seed = _seeded(value, ones)
                with differentiating():
                    pulled = torch.autograd.grad(seed, leaves, allow_unused=True)
    except Exception as error:
        raise _explained(error, function) from error
    results = [recorder.number(value), *(const(0.0) if p is None else recorder.number(p) for p in pulled)]
    count = sum(1 for node in walk(*results) if node.args)
    if count > MAX_OPERATIONS:
        why = f"it and its derivative have {count} operations; at most {MAX_OPERATIONS} are fused"
        raise Refused(why, "Apply it outside the MLP.", location(function))
    return results[0], dict(zip(names, results[1:], strict=True))


def _seeded(value: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient by `value` is that tensor: torch.autograd.grad, given one, imports sympy, a second and more."""
    import torch

    class Seed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.new_zeros(())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return gradient

    seed: Tensor = Seed.apply(value)  # type: ignore[no-untyped-call]
    return seed


def trace_value(function: Callable[..., Any], names: Sequence[str], outputs: int) -> list[Expr]:
    """The function's values alone: one, or a tuple of `outputs`. It need not be differentiable."""
    import torch

    with neutral():
        examples = _examples(len(names))
        _run(function, examples)
    recorder = recording(function)
    for example, name in zip(examples, names, strict=True):
        recorder.learn(example, symbol(name))
    try:
        with neutral(), torch.no_grad(), recorder:
            result = function(*examples)
    except Exception as error:
        raise _explained(error, function) from error
    found = list(result) if isinstance(result, (tuple, list)) else [result]
    if len(found) != outputs:
        why = f"it returns {len(found)} results where {outputs} are needed, one for each of {', '.join(names)}"
        raise Refused(why, "Return a tensor, or a tuple of tensors in the order of the inputs.", location(function))
    for r in found:
        if not isinstance(r, torch.Tensor) and not (type(r) in (int, float) and math.isfinite(r)):
            why = f"it returns a {type(r).__name__}, not a tensor"
            raise Refused(why, "Return a tensor for each input.", location(function))
    return [recorder.number(r) if isinstance(r, torch.Tensor) else const(r) for r in found]


def _examples(count: int) -> list[Tensor]:
    import torch

    # Different values for each, so that nothing is accidentally equal; none of them special.
    return [torch.linspace(-1.1, 1.3, 12, dtype=torch.float32).reshape(_SHAPE) + 0.01 * i for i in range(count)]


def _run(function: Callable[..., Any], examples: Sequence[Tensor]) -> Any:
    """Run it once as it is: it must take such tensors, and leave them alone."""
    import torch

    copies = [e.clone() for e in examples]
    try:
        result = function(*copies)
    except Exception as error:
        where = raised_at(error.__traceback__) or location(function)
        if "Boolean value of Tensor" in str(error) or "one element tensors" in str(error) or "Python scalar" in str(error):
            raise _depends_on_data(where) from error
        why = f"called with {len(examples)} tensors it raises {type(error).__name__}: {_first_line(error)}"
        raise Refused(why, "It must take float32 tensors of one shape, and return one of that shape.", where) from error
    if any(not torch.equal(a, b) for a, b in zip(copies, examples, strict=True)):
        raise Refused("it changes its input in place", "Return a new tensor.", location(function))
    return result


def _try(function: Callable[..., Any], examples: Sequence[Tensor]) -> None:
    """Run it once, and look at what comes out."""
    import torch

    result = _run(function, examples)
    step = "A function maps each element on its own: it returns one tensor of its inputs' shape."
    if not isinstance(result, torch.Tensor):
        raise Refused(f"it returns a {type(result).__name__}, not a tensor", step, location(function))
    if result.shape != examples[0].shape:
        why = f"a shape change: it makes {tuple(result.shape)} of {tuple(examples[0].shape)}"
        raise Refused(why, f"{step} For act(gate)·up write gated=True and a function of (gate, up).", location(function))
    if result.dtype != torch.float32:
        why = f"it returns {result.dtype} for float32: a cast, or complex or integer arithmetic, which has no printing"
        raise Refused(why, step, location(function))


def _depends_on_data(where: str) -> Refused:
    why = "control flow, or a Python number, that depends on the data"
    return Refused(why, "Choose element by element with torch.where(condition, a, b), and call torch's functions.", where)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _explained(error: Exception, function: Callable[..., Any]) -> Refused:
    """What an exception on the way means."""
    if isinstance(error, Refused):
        return error
    where, text = raised_at(error.__traceback__) or location(function), str(error)
    if "numpy()" in text:
        why = "it calls numpy on a tensor, which cannot be traced: control flow outside torch"
        return Refused(why, "Use torch's operations.", where)
    if "is not implemented" in text or "not differentiable" in text:
        why = f"torch has no derivative for it: {_first_line(error)}"
        return Refused(why, "Give one: mlpdsl.activation(fn, derivative=your_derivative).", where)
    if "in-place" in text or "inplace" in text:
        return Refused("it changes a tensor in place that the derivative needs", "Return a new tensor.", where)
    return Refused(f"tracing it raises {type(error).__name__}: {_first_line(error)}", "Use torch's elementwise operations.", where)


def recording(function: Callable[..., Any]) -> Any:
    """A dispatch mode that knows the expression behind every tensor. Made here, because its base class is torch's."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.where = ""
            self.known: dict[int, tuple[Tensor, Expr | Refused]] = {}  # with the tensor, so that its id stays its own

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # else torch imports its compiler only to keep out of it

        def learn(self, tensor: Tensor, meaning: Expr | Refused) -> None:
            self.known[id(tensor)] = tensor, meaning

        def number(self, tensor: Tensor) -> Expr:
            """The expression of a result. Raises `Refused` where it depends on what cannot be read."""
            meaning = self.meaning(tensor)
            if isinstance(meaning, Refused):
                raise meaning
            expr: Expr = _as_number(meaning)
            return expr

        def meaning(self, tensor: Tensor) -> Any:
            found = self.known.get(id(tensor))
            if found is not None:
                return found[1]
            if tensor.numel() == 1:  # torch.tensor(2.0), made inside: `capture` has refused those from outside
                return const(float(tensor.detach()))
            why = f"a tensor of shape {tuple(tensor.shape)} that torch did not make of the inputs: captured, or by way of numpy"
            step = "Pass it as an operand of an epilogue, mlpdsl.epilogue(fn, name=kind), or use torch's operations."
            return Refused(why, step, self.where or location(function))

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name, _, overload = str(op).removeprefix("aten.").partition(".")
            where = self.where = line_in(sys._getframe()) or location(function)
            if name in _READS and any(id(a) in self.known for a in args if isinstance(a, torch.Tensor)):
                raise _depends_on_data(where)
            in_place = name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor)
            if in_place and self.is_shared(args[0]):
                why = f"an in-place operation (aten.{name}) on memory that another tensor shares"
                raise Refused(why, "Return a new tensor.", where)
            try:
                meaning = self.read(name, overload, args, kwargs, where)
            except Refused as refused:
                meaning = refused
            result = op(*args, **kwargs)
            results = result if isinstance(result, (tuple, list)) else (result,)
            meanings = meaning if isinstance(meaning, tuple) else (meaning,) * len(results)
            for tensor, means in zip(results, meanings, strict=False):
                if isinstance(tensor, torch.Tensor):
                    self.learn(tensor, means)
            return result

        def read(self, name: str, overload: str, args: Any, kwargs: dict[str, Any], where: str) -> Any:
            """What an operation's result means. Raises `Refused`."""
            inner = [self.look_up(a) for a in args]
            named = {k: self.look_up(v) for k, v in kwargs.items() if k not in _IGNORED and v is not None}
            if name in _UNSET:
                raise Refused(*reason("bernoulli", ""), where)  # memory to be filled: by chance, as a rule
            for meaning in (*inner, *named.values()):
                if isinstance(meaning, Refused) and name not in _OVERWRITES:
                    raise meaning
            if name.endswith("_") and name.rstrip("_") in aten.ATEN:
                name = name.rstrip("_")
            if name == "_to_copy":
                return _cast(inner[0], named.get("dtype"), where)
            named.pop("dtype", None)
            if name not in aten.ATEN:
                raise Refused(*reason(name, overload), where)
            if name in _OF_TRUTHS and all(isinstance(a, Expr) and a.op in BOOLEAN for a in inner):
                return call(_OF_TRUTHS[name], *inner)
            if name not in aten.TAKES_BOOLEANS:
                inner = [_as_number(a) for a in inner]
            elif name.startswith("logical_"):
                inner = [_as_truth(a) for a in inner]
            elif name == "where":
                inner = [inner[0], *(_as_number(a) for a in inner[1:])]
            try:
                return aten.ATEN[name](*inner, **named)
            except (TypeError, NotImplementedError, ValueError, ArithmeticError) as error:
                if str(error) == "randomness" or "complex" in str(error):
                    raise Refused(*reason("bernoulli" if str(error) == "randomness" else "complex", ""), where) from error
                why = f"aten.{name} with these arguments has no printing: {error}"
                step = "Use a large finite number instead." if "finite" in str(error) else "Write it in other operations."
                raise Refused(why, step, where) from error

        def look_up(self, argument: Any) -> Any:
            return self.meaning(argument) if isinstance(argument, torch.Tensor) else argument

        def is_shared(self, written: Tensor) -> bool:
            place = written.untyped_storage().data_ptr()
            others = (t for t, _ in self.known.values() if t is not written)
            return any(t.untyped_storage().data_ptr() == place for t in others)

    return Recorder()


def _as_number(value: Any) -> Any:
    return call("where", value, 1.0, 0.0) if isinstance(value, Expr) and value.op in BOOLEAN else value


def _as_truth(value: Any) -> Any:
    return value if not isinstance(value, Expr) or value.op in BOOLEAN else call("ne", value, 0.0)


def _cast(value: Expr, dtype: Any, where: str) -> Expr:
    import torch

    if dtype in (None, torch.float32):
        known: Expr = _as_number(value)
        return known
    if dtype is torch.bool:
        return value if value.op in BOOLEAN else call("ne", value, 0.0)
    if not dtype.is_floating_point:
        raise Refused(f"a cast to {dtype}: an integer or complex operation", "Use torch.floor, or only real arithmetic.", where)
    step = "Everything inside is float32, and rounded once at the end: leave the cast out."
    raise Refused(f"a cast to {dtype} in the middle", step, where)
