"""From a Python function of torch tensors to an `Expr` and its derivatives: `make_fx` over `torch.func.vjp`.

Torch differentiates; this module only reads what it recorded, operation by operation, through the table of `aten`. What cannot be
read is `Refused`, with the reason and the user's own line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import aten
from .graph import Expr, call, const, substitute, symbol, walk
from .refusal import Refused, calls_of, location, raised_at

if TYPE_CHECKING:
    from torch import Tensor, fx

MAX_OPERATIONS = 600
"""Operations of value and derivatives together; a longer one would not be a faster kernel."""

_SHAPE = (2, 6)  # of the examples: even, so that chunk() and its like get as far as an honest reason


def trace(function: Callable[..., Any], names: Sequence[str]) -> tuple[Expr, dict[str, Expr]]:
    """The function's value over the inputs `names`, and its partial derivative by each of them. Raises `Refused`."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    def value_and_pullback(cotangent: Tensor, *inputs: Tensor) -> Any:
        value, pullback, *_ = torch.func.vjp(function, *inputs)
        with torch.no_grad():  # else torch records its twice-differentiable formulas, which are less stable
            return (value, *pullback(cotangent))

    examples = _examples(len(names))
    _try(function, examples)
    try:
        traced = make_fx(value_and_pullback)(torch.ones(_SHAPE), *examples)
    except Exception as error:
        raise _explained(error, function) from error
    results = _read(traced, ("cotangent", *names), function, examples)
    value, pulled = results[0], results[1:]
    one = {"cotangent": const(1.0)}
    partials = {name: substitute(p, one) for name, p in zip(names, pulled, strict=True)}
    count = sum(1 for node in walk(value, *partials.values()) if node.args)
    if count > MAX_OPERATIONS:
        why = f"it and its derivative have {count} operations; at most {MAX_OPERATIONS} are fused"
        raise Refused(why, "Apply it outside the MLP.", location(function))
    return value, partials


def trace_value(function: Callable[..., Any], names: Sequence[str], outputs: int) -> list[Expr]:
    """The function's values alone: one, or a tuple of `outputs`. It need not be differentiable."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def values(*inputs: Tensor) -> Any:
        result = function(*inputs)
        result = result if isinstance(result, (tuple, list)) else (result,)
        return tuple(r + inputs[0] * 0.0 if not hasattr(r, "shape") else r for r in result)

    examples = _examples(len(names))
    try:
        traced = make_fx(values)(*examples)
    except Exception as error:
        raise _explained(error, function) from error
    found = _read(traced, names, function, examples)
    if len(found) != outputs:
        why = f"it returns {len(found)} results where {outputs} are needed, one for each of {', '.join(names)}"
        raise Refused(why, "Return a tensor, or a tuple of tensors in the order of the inputs.", location(function))
    return found


def _examples(count: int) -> list[Tensor]:
    import torch

    # Different values for each, so that nothing is accidentally equal; none of them special.
    return [torch.linspace(-1.1, 1.3, 12).reshape(_SHAPE) + 0.01 * i for i in range(count)]


def _try(function: Callable[..., Any], examples: Sequence[Tensor]) -> None:
    """Run it once as it is, and look at what comes out."""
    import torch

    copies = [e.clone() for e in examples]
    state = torch.get_rng_state()
    try:
        result = function(*copies)
    except Exception as error:
        where = raised_at(error.__traceback__) or location(function)
        why = f"called with {len(examples)} tensors it raises {type(error).__name__}: {_first_line(error)}"
        raise Refused(why, "It must take float32 tensors of one shape, and return one of that shape.", where) from error
    finally:
        torch.set_rng_state(state)
    changed = any(not torch.equal(a, b) for a, b in zip(copies, examples, strict=True))
    if changed:
        raise Refused("it changes its input in place", "Return a new tensor.", location(function))
    step = "A function maps each element on its own: it returns one tensor of its inputs' shape."
    if not isinstance(result, torch.Tensor):
        raise Refused(f"it returns a {type(result).__name__}, not a tensor", step, location(function))
    if result.shape != examples[0].shape:
        why = f"a shape change: it makes {tuple(result.shape)} of {tuple(examples[0].shape)}"
        raise Refused(why, f"{step} For act(gate)·up write gated=True and a function of (gate, up).", location(function))
    if result.dtype != torch.float32:
        why = f"it returns {result.dtype} for float32; complex, integer and other types have no printing"
        raise Refused(why, step, location(function))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _explained(error: Exception, function: Callable[..., Any]) -> Refused:
    """What an exception of the tracer means."""
    where = raised_at(error.__traceback__) or location(function)
    text = str(error)
    if isinstance(error, Refused):
        return error
    if "value out of a tracing tensor" in text or "data-dependent" in text or "Boolean value" in text:
        why = "control flow, or a Python number, that depends on the data"
        return Refused(why, "Choose element by element with torch.where(condition, a, b).", where)
    if "numpy()" in text:
        return Refused(
            "it calls numpy on a tensor, which cannot be traced: control flow outside torch", "Use torch's operations.", where
        )
    if "is not implemented" in text or "does not require grad" in text:
        why = f"torch has no derivative for it: {_first_line(error)}"
        return Refused(why, "Give one: mlpdsl.activation(fn, derivative=your_derivative).", where)
    if "in-place" in text:
        return Refused("it changes its input in place", "Return a new tensor.", where)
    if "autograd.Function" in text or "setup_context" in text:
        why = "a torch.autograd.Function hides its derivative from the trace"
        return Refused(why, "Pass the plain function and mlpdsl.activation(fn, derivative=your_derivative).", where)
    return Refused(f"tracing it raises {type(error).__name__}: {_first_line(error)}", "Use torch's elementwise operations.", where)


_RANDOM = ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "bernoulli", "native_dropout", "normal",
           "uniform", "multinomial", "exponential", "random", "poisson", "randperm", "cauchy", "geometric")  # fmt: skip
_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "a reduction over elements, and a kernel sees one tile": (
        ("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "linalg_vector_norm", "_softmax", "softmax",
         "_log_softmax", "logsumexp", "cumsum", "cumprod", "sort", "topk", "kthvalue", "median", "argmax", "argmin", "any", "all",
         "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "var_mean", "std_mean", "mm", "matmul",
         "bmm", "addmm", "dot", "count_nonzero", "unique", "histc", "logcumsumexp", "cummax", "cummin"),
        "Reduce outside the MLP, and pass the result as an operand of an epilogue."),
    "a shape change": (
        ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "cat", "stack", "slice", "select", "index",
         "unsqueeze", "squeeze", "chunk", "split", "split_with_sizes", "unbind", "flip", "roll", "gather", "scatter", "repeat",
         "as_strided", "unfold", "pad", "constant_pad_nd", "glu", "tril", "triu", "diag", "arange", "index_select", "narrow",
         "movedim", "flatten", "unflatten", "slice_scatter", "select_scatter", "index_put", "masked_select", "nonzero"),
        "Each element is mapped on its own. For packed gate and up write gated=True and a function of (gate, up)."),
    "randomness": (
        (*_RANDOM, "rrelu_with_noise"),
        "Draw the mask outside, and pass it as an operand of an epilogue (kind 'tile', or 'row' for stochastic depth)."),
    "an integer or bit operation": (
        ("bitwise_xor", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift",
         "frexp", "ldexp", "nextafter", "signbit", "gcd", "lcm"),
        "Only real arithmetic is printed."),
    "complex arithmetic": (
        ("_conj", "complex", "view_as_real", "view_as_complex", "real", "imag", "angle", "polar", "_conj_physical", "conj"),
        "Only real arithmetic is printed."),
}  # fmt: skip


def _refused(name: str, overload: str, function: Callable[..., Any], examples: Sequence[Tensor]) -> Refused:
    where = calls_of(function, tuple(examples), name) or location(function)
    if name == "view" and overload == "dtype":
        return Refused("an integer or bit operation (aten.view to another type)", "Only real arithmetic is printed.", where)
    plain = name.rstrip("_") or name
    for kind, (names, step) in _KINDS.items():
        if name in names or plain in names:
            return Refused(f"{kind} (aten.{name})", step, where)
    if name.endswith("_") and plain in aten.ATEN:
        return Refused(f"an in-place operation (aten.{name})", f"Write the one that returns a new tensor: {plain}.", where)
    step = "Write it in other operations, or give Triton's text: mlpdsl.activation(fn, triton=(value, derivative))."
    return Refused(f"torch recorded aten.{name}, which has no scalar printing", step, where)


_IGNORED = ("layout", "device", "pin_memory", "memory_format", "non_blocking")


def _read(traced: fx.GraphModule, names: Sequence[str], function: Callable[..., Any], examples: Sequence[Tensor]) -> list[Expr]:
    """The expressions that a recorded graph returns."""
    known: dict[Any, Any] = {}
    inputs = iter(names)

    def look_up(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [look_up(a) for a in argument]
        return known[argument] if hasattr(argument, "op") and hasattr(argument, "graph") else argument

    for node in traced.graph.nodes:
        name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
        if node.op == "call_function" and name in _RANDOM:  # before what stands around it: dropout also changes shapes
            raise _refused(name, "", function, examples)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            known[node] = symbol(next(inputs))
        elif node.op == "output":
            return [_as_number(look_up(a)) for a in node.args[0]]
        elif node.op == "get_attr":
            known[node] = _constant(getattr(traced, str(node.target)), function)
        elif node.target is operator.getitem:
            known[node] = look_up(node.args[0])[node.args[1]]
        else:
            written = None
            target, _, overload = str(node.target).removeprefix("aten.").partition(".")
            kwargs = {k: look_up(v) for k, v in node.kwargs.items() if k not in _IGNORED and v is not None}
            args = look_up(node.args)
            if target in ("empty_like", "new_empty", "empty"):
                known[node] = None  # the noise of a random function; a read of it is refused there
                continue
            if target.endswith("_") and target.rstrip("_") in aten.ATEN and _is_fresh(node.args[0]):
                target = target.rstrip("_")
                written = node.args[0]
            if target == "_to_copy":
                known[node] = _cast(args[0], kwargs.get("dtype"), function, examples)
                continue
            kwargs.pop("dtype", None)
            if target not in aten.ATEN:
                raise _refused(target, overload, function, examples)
            if target not in aten.TAKES_BOOLEANS:
                args = [_as_number(a) if isinstance(a, Expr) else a for a in args]
            elif target == "where":
                args = [args[0], *(_as_number(a) for a in args[1:])]
            try:
                known[node] = aten.ATEN[target](*args, **kwargs)
                if written is not None:
                    known[written] = known[node]
            except (TypeError, NotImplementedError, ValueError, OverflowError, AttributeError) as error:
                where = calls_of(function, tuple(examples), target) or location(function)
                if str(error) == "randomness" or None in args:
                    raise _refused("bernoulli", "", function, examples) from error
                raise Refused(
                    f"aten.{target} with these arguments has no printing: {error}", "Write it in others.", where
                ) from error
    raise AssertionError("a traced graph without an output")


def _is_fresh(node: Any) -> bool:
    """Whether a tensor that is written in place is one that torch has just made: no input, and nothing shares its memory."""
    if node.op != "call_function" or str(node.target).startswith(("aten.detach", "aten.alias")):
        return False
    return not any(str(user.target).startswith(("aten.detach", "aten.alias")) for user in node.users)


def _as_number(value: Any) -> Any:
    return call("where", value, 1.0, 0.0) if isinstance(value, Expr) and value.op in aten.BOOLEAN else value


def _constant(tensor: Any, function: Callable[..., Any]) -> Expr:
    """A tensor of one element made inside the function (`torch.tensor(2.0)`); `capture` has refused those from outside."""
    if tensor.numel() != 1 or tensor.requires_grad:
        why = f"a captured tensor of shape {tuple(tensor.shape)}"
        raise Refused(why, "Pass it as an operand of an epilogue: mlpdsl.epilogue(fn, name=kind).", location(function))
    return const(float(tensor.detach()))


def _cast(value: Expr, dtype: Any, function: Callable[..., Any], examples: Sequence[Tensor]) -> Expr:
    import torch

    if dtype in (None, torch.float32):
        known: Expr = _as_number(value)
        return known
    if dtype is torch.bool:
        return value if value.op in aten.BOOLEAN else call("ne", value, 0.0)
    where = calls_of(function, tuple(examples), "_to_copy") or location(function)
    if not dtype.is_floating_point:
        raise Refused(f"a cast to {dtype}: an integer or complex operation", "Use torch.floor, or only real arithmetic.", where)
    step = "Everything inside is float32, and rounded once at the end: leave the cast out."
    raise Refused(f"a cast to {dtype} in the middle", step, where)
