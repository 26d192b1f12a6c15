"""Is a user's formula sound in float32? Value and derivatives against the function itself in float64, over a sweep with extremes.

The sweep holds every magnitude from 1e-18 to 65504 (the largest float16) and zero. A result that is infinite or NaN where the true
one is finite is *broken*. One that has lost more than 16 of its 24 bits, beyond what rounding its inputs excuses, is *imprecise*
where the error is over 2⁻¹⁴, and *faint* where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import formula, stable
from .graph import Expr, walk
from .torch_code import to_torch
from .trace import neutral

if TYPE_CHECKING:
    from torch import Tensor

_LOST = 2.0**-8
_NOTICED = 2.0**-14
_FAINT = 1e-13  # below, the float64 result may itself be what is off
_LARGEST = 3.4e38
_FEW = (0.75, -1.25, 0.0, 30.0, -30.0)
_OPERAND = (0.75, -1.25, 2.0)


@dataclass(frozen=True)
class Problem:
    """One result that does not hold, at one input."""

    kind: str
    """"broken", "imprecise" or "faint"."""
    what: str
    at: Mapping[str, float]
    got: float
    expected: float

    def __str__(self) -> str:
        where = ", ".join(f"{name} = {value:g}" for name, value in self.at.items())
        true = "the value is a number" if math.isnan(self.expected) else f"{self.expected:g} is true"
        return f"{self.what} at {where} is {self.got:g} in float32, where {true}"


def sweep() -> Tensor:
    """The points, in float64 but each a float32, by growing magnitude."""
    import torch

    parts = [
        torch.logspace(-18, -2, 60, dtype=torch.float64),
        torch.logspace(-2, math.log10(20.0), 400, dtype=torch.float64),
        torch.linspace(20.0, 110.0, 181, dtype=torch.float64),
        torch.logspace(math.log10(110.0), math.log10(65504.0), 60, dtype=torch.float64),
    ]
    points = torch.cat(parts).float().double()
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.stack([points, -points], 1).reshape(-1)])


def points_for(inputs: Sequence[str]) -> list[Tensor]:
    """A tensor (points, 1) of float64 for each input: sweeps of the first (and of up), combined with a few values of the others."""
    import torch

    points = sweep()
    if len(inputs) == 1:
        return [points.unsqueeze(1)]
    few = torch.tensor(_FEW if tuple(inputs) == ("gate", "up") else _OPERAND, dtype=torch.float64)
    columns = [points.repeat_interleave(len(few))]
    columns += [few.roll(i).repeat(len(points)) for i in range(len(inputs) - 1)]
    if tuple(inputs) == ("gate", "up"):
        columns = [torch.cat(pair) for pair in (columns, columns[::-1])]
    return [c.unsqueeze(1) for c in columns]


def truth(function: Callable[..., Any], derivative: Callable[..., Any] | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Value and partial derivatives in float64, by the function itself and autograd (or the user's own derivative)."""
    import torch

    with torch.enable_grad(), _no_casts():
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        value = function(*leaves)
        if derivative is not None:
            with torch.no_grad():
                given = derivative(*inputs)
            found = list(given) if isinstance(given, (tuple, list)) else [given]
            whole = [torch.zeros_like(inputs[0]) + g for g in found]
        elif value.requires_grad:
            partials = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            whole = [torch.zeros_like(t) if g is None else g for g, t in zip(partials, leaves, strict=True)]
        else:
            whole = [torch.zeros_like(t) for t in leaves]
    return [value.detach(), *whole]


def _no_casts() -> Any:
    """x.float() inside a function means "no 16-bit arithmetic here", and must not cost the float64 result its digits."""
    import torch

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
                if func is torch.Tensor.float:
                    return args[0]
                if func in (torch.Tensor.to, torch.Tensor.type):
                    wide = {torch.float32: torch.float64}
                    args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
                    kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
            return func(*args, **kwargs)

    return Mode()


def problems(
    function: Callable[..., Any],
    derivative: Callable[..., Any] | None,
    inputs: Sequence[str],
    results: Sequence[Expr],
) -> list[Problem]:
    """What does not hold of `results`, the value and the derivative by each input: of each the worst kind, nearest to zero."""
    with neutral():
        return _problems(function, derivative, inputs, results)


def agrees(
    function: Callable[..., Any], derivative: Callable[..., Any] | None, inputs: Sequence[str], results: Sequence[Expr]
) -> bool:
    """Whether the formulas, in float64, are the function at all: one that draws numbers or keeps state is not what was traced.

    A few points may differ, where a rounding moves a step (floor).
    """
    import torch

    with neutral():
        at = points_for(inputs)
        found = to_torch(tuple(results), tuple(inputs))(*at)
        expected = truth(function, derivative, at)
        for got, want in zip(found, expected, strict=True):
            same = (got - want).abs() <= 1e-6 * (1.0 + want.abs())
            judged = got.isfinite() & want.isfinite() & (torch.stack([t.abs() for t in at]).amax(0) <= 20.0)
            if float((judged & ~same).sum()) > 0.02 * float(judged.sum()):
                return False
    return True


def _problems(
    function: Callable[..., Any],
    derivative: Callable[..., Any] | None,
    inputs: Sequence[str],
    results: Sequence[Expr],
) -> list[Problem]:
    import torch

    at = points_for(inputs)
    printed = to_torch(tuple(stable.expand(r) for r in results), tuple(inputs))
    with torch.no_grad():
        found = [r.double() for r in printed(*(t.float() for t in at))]
    expected = truth(function, derivative, at)
    # What rounding the inputs to float32 once more would change: nothing can be asked beyond it.
    slopes = sum((g.abs() * t.abs()).nan_to_num(nan=0.0, posinf=0.0) for g, t in zip(expected[1:], at, strict=True))
    names = ["the value", *(f"the derivative by {name}" if len(inputs) > 1 else "the derivative" for name in inputs)]
    reported = []
    for index, (name, got, want) in enumerate(zip(names, found, expected, strict=True)):
        judged = want.isfinite() & (want.abs() < _LARGEST)
        broken = judged & ~got.isfinite()
        # NaN in float64 too, but not beyond the edge of a domain: a hole in the value, or a derivative where there is a value.
        broken |= _holes(got, at) if index == 0 else got.isnan() & want.isnan() & expected[0].isfinite()
        reach = want.abs() + (slopes if index == 0 else _bends(function, derivative, at, index - 1))
        error = torch.where(judged & got.isfinite(), (got - want).abs(), 0.0)
        lost = error > _LOST * reach
        largest = torch.stack([t.abs() for t in at]).amax(0).clamp(min=1.0)
        for kind, mask in (
            ("broken", broken),
            ("imprecise", lost & (error > _NOTICED)),
            ("faint", lost & (error > _FAINT * largest)),
        ):
            if mask.any():
                first = int(mask.int().argmax())  # points grow in magnitude
                where = {n: float(t[first]) for n, t in zip(inputs, at, strict=True)}
                reported.append(Problem(kind, name, where, float(got[first]), float(want[first])))
                break
    return reported


def _holes(got: Tensor, at: Sequence[Tensor]) -> Tensor:
    """NaN at zero alone, with numbers on both sides: zeros are common, so this is no edge of a domain."""
    hole = got.isnan() & (at[0] == 0.0)
    if len(at) > 1 or (hole.any() and not (got[1].isfinite() and got[2].isfinite())):
        hole[:] = False
    return hole


def _bends(function: Callable[..., Any], derivative: Callable[..., Any] | None, at: Sequence[Tensor], index: int) -> Tensor:
    """Σ |input|·|second derivative| for one partial: how much of its error rounding the inputs excuses. By differences."""
    import torch

    total = torch.zeros_like(at[0])
    here = truth(function, derivative, at)[1 + index]
    for moved in range(len(at)):
        near = [t * (1 + 2.0**-24) if i == moved else t for i, t in enumerate(at)]
        there = truth(function, derivative, near)[1 + index]
        total = total + ((there - here) * 2.0**24).abs().nan_to_num(nan=0.0, posinf=0.0)
    return total


# Stable forms


def suggestions(value: Expr) -> list[str]:
    """Torch's stable function for each part of an expression that is known to break, as `what to write for what`."""
    found: dict[str, None] = {}
    for node in walk(value):
        for text in _known(node):
            found[text] = None
    return list(found)


def _parts(node: Expr, op: str) -> Iterator[tuple[Expr, Expr]]:
    """The two operands of a node of that operation; both ways round where the order does not matter."""
    if node.op == op:
        a, b = node.args
        yield a, b
        if op in ("add", "mul"):
            yield b, a


def _one_plus(node: Expr) -> Iterator[Expr]:
    """b, where the node is 1 + b."""
    for a, b in _parts(node, "add"):
        if b.is_const(1.0):
            yield a


def _known(node: Expr) -> Iterator[str]:
    write = formula.to_text
    for top, bottom in _parts(node, "div"):
        for e in _one_plus(bottom):
            if e.op != "exp":
                continue
            b = e.args[0]
            if top is e:
                yield f"torch.sigmoid({write(b)}) for exp(b)/(1 + exp(b))"
            elif top is -b:
                yield f"torch.nn.functional.silu({write(top)}) for b/(1 + exp(-b))"
            else:
                yield f"torch.sigmoid({write(-b)}) for 1/(1 + exp(-b))"
        exps = {id(a) for a in (*top.args, *bottom.args)} if top.op == "sub" and bottom.op == "add" else set()
        if len(exps) == 2 and all(a.op == "exp" for a in (*top.args, *bottom.args)):
            a, b = (e.args[0] for e in top.args)
            if a is -b:
                yield f"torch.tanh({write(a)}) for (exp(b) - exp(-b))/(exp(b) + exp(-b))"
            else:
                yield f"torch.tanh of half of {write(a - b)}"
    if node.op == "log":
        for e in _one_plus(node.args[0]):
            known = e.op == "exp"
            yield f"torch.nn.functional.softplus({write(e.args[0])}) for log(1 + exp(b))" if known else f"torch.log1p({write(e)})"
        if node.args[0].op == "sigmoid":
            yield f"torch.nn.functional.logsigmoid({write(node.args[0].args[0])}) for log(sigmoid(b))"
    for e in _one_plus(node):
        if e.op == "erf":
            yield f"torch.special.erfc({write(-e.args[0])}) for 1 + erf(b) (gelu: torch.nn.functional.gelu)"
        if e.op == "tanh":
            yield f"2·torch.sigmoid({write(2.0 * e.args[0])}) for 1 + tanh(b)"
    for e, one in _parts(node, "sub"):
        if e.op == "exp" and one.is_const(1.0):
            yield f"torch.expm1({write(e.args[0])}) for exp(b) - 1"
    if node.op == "sqrt":
        for a, b in _parts(node.args[0], "mul"):
            if a is b:
                yield f"torch.abs({write(a)}) for sqrt(b·b)"
                break
        for a, b in _parts(node.args[0], "add"):
            if a.op == "mul" and a.args[0] is a.args[1]:
                yield f"torch.hypot({write(a.args[0])}, sqrt({write(b)})) for sqrt(b·b + c)"
                break
