"""Users' own functions in the oracle: the function itself in float64, with a bound from an analysis of its formula's roundings.

The value of f(p), and of its derivatives, is what the Python function gives in float64 (with torch's autograd, or the user's own
derivative): nothing of it comes from the traced formula. The bound has two parts. How far the inputs' own errors e carry f is seen
from samples in the box p ± e. What evaluating it in float32 may lose is a running error analysis of the printed, elementary
formula at p, operation by operation, with u = 2⁻²⁴:

    a + b, a − b        e_a + e_b + u·|v|                   a·b         |a|·e_b + |b|·e_a + e_a·e_b + u·|v|
    a/b                 (e_a + |v|·e_b)/(|b| − e_b) + 3u·|v|
    exp a               |v|·(expm1(e_a) + (5 + 1.5·|a|)·u)   log a       e_a/(|a| − e_a) + 3u·|v|
    √a                  |√(a ± e_a) − v| + 4u·|v|             sin, cos    e_a + 5u·|v|            erf     1.13·e_a + 6u·|v|
    max, min, where     of the branch taken; of the worse one, and their distance, where e leaves open which
    floor               how far floor(a ± e_a) is from it       a constant  u·|c|

Multiply-adds that a compiler fuses round less. Where the float32 formula itself leaves the range of numbers, and the true value
does not, no bound is given: declaring such a function is refused, unless the user insists. Nor is one where torch's float64
gives NaN at an infinity, nor for a derivative at NaN: kernels take limits, and which branch NaN takes is nobody's promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from mlpdsl import plain
from mlpdsl.codegen.expr.graph import Expr, walk
from mlpdsl.codegen.expr.soundness import truth
from mlpdsl.codegen.expr.stable import expand
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.codegen.lower import expressions
from mlpdsl.function import Function
from mlpdsl.testing.bounded import SAMPLES, SLACK, TINY32, U32, Bounded, settled

__all__ = ["partials", "value"]

LARGEST = torch.finfo(torch.float32).max
HANDWRITTEN_ULPS = 32


def value(function: Function, inputs: Sequence[Bounded]) -> Bounded:
    """f(inputs) in float32. The inputs broadcast."""
    return _results(function, inputs)[0]


def partials(function: Function, inputs: Sequence[Bounded]) -> list[Bounded]:
    """The derivative by each input, in the inputs' common shape."""
    return _results(function, inputs)[1:]


def _results(function: Function, inputs: Sequence[Bounded]) -> list[Bounded]:
    at = [t.contiguous() for t in torch.broadcast_tensors(*(p.value for p in inputs))]
    shape = at[0].shape
    errors = [p.bound.expand(p.value.shape).broadcast_to(shape) for p in inputs]
    exact = [p.is_exact for p in inputs]
    here, doubt = _evaluated(function, at)
    spread = [torch.zeros(shape, dtype=torch.float64, device=at[0].device) for _ in here]
    steps = [(0.0,) if e else SAMPLES for e in exact]
    for moved in product(*steps):
        if any(moved):
            there, doubts = _evaluated(function, [t + s * e for t, s, e in zip(at, moved, errors, strict=True)])
            doubt = [torch.maximum(a, b) for a, b in zip(doubt, doubts, strict=True)]
            for index, (near, middle) in enumerate(zip(there, here, strict=True)):
                both = (near == middle) | (near.isnan() & middle.isnan())
                spread[index] = torch.maximum(spread[index], torch.where(both, 0.0, (near - middle).abs()))
    lost = roundings(function, at, here)
    # Torch's own float64 has inf·0 where kernels have the limit, and derivatives of a branch at NaN are either branch's.
    nan = torch.stack([t.isnan() for t in at]).any(0)
    unknown = [v.isnan() & ~nan if i == 0 else v.isnan() | nan for i, v in enumerate(here)]
    found = [
        settled(v, SLACK * (s + r + d) + 4 * TINY32 * (1 + sum(t.abs().nan_to_num(posinf=0.0) for t in at)), *inputs)
        for v, s, r, d in zip(here, spread, lost, doubt, strict=True)
    ]
    return [Bounded(f.value, f.bound.masked_fill(u, torch.inf)) for f, u in zip(found, unknown, strict=True)]


def _evaluated(function: Function, at: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Value and derivatives in float64, and how far each may be off: torch's y·(1 - y) has few digits where y is nearly 1, and the
    formula's own functions have them."""
    here = truth(*_meaning(function), at)
    if not function.value:
        return here, [torch.zeros_like(at[0]) for _ in here]
    size = 1.0 + torch.stack([t.abs().nan_to_num(posinf=0.0) for t in at]).sum(0)
    again = _in_float64(function)(*at)
    return here, [torch.minimum((a - h).abs().nan_to_num(0.0), 1e-13 * size) for a, h in zip(again, here, strict=True)]


@lru_cache(maxsize=256)
def _in_float64(function: Function) -> Callable[..., tuple[Tensor, ...]]:
    """The formulas of value and derivatives, unexpanded, by torch's own functions."""
    formula, by = plain.expressions(function)
    return to_torch((formula, *by), function.inputs)


def _meaning(function: Function) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]] | None]:
    """The function in float64, and its derivative where torch's is not meant. From the formula only where there is nothing else."""
    return (function.call, function.derivative) if function.call is not None else _of_formula(function)


@lru_cache(maxsize=256)
def _of_formula(function: Function) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    assert function.value, f"{function} was read from JSON as text of a backend: it has no meaning in float64"
    formula, by = plain.expressions(function)
    run = to_torch((formula,), function.inputs)
    return lambda *inputs: run(*inputs)[0], to_torch(tuple(by), function.inputs)


def roundings(function: Function, at: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """What float32 may lose in the value and in each derivative, at exact inputs."""
    formula, by = expressions(function)
    if formula.op == "snippet":
        reach = sum((g * t).abs().nan_to_num(nan=0.0, posinf=0.0) for g, t in zip(results[1:], at, strict=True))
        return [HANDWRITTEN_ULPS * U32 * (r.abs() + (reach if i == 0 else r.abs())) for i, r in enumerate(results)]
    known = dict(zip(function.inputs, at, strict=True))
    return [_lost(expand(e), known, want) for e, want in zip((formula, *by), results, strict=True)]


def _lost(root: Expr, inputs: Mapping[str, Tensor], want: Tensor) -> Tensor:
    """The running error analysis of one elementary formula."""
    like = next(iter(inputs.values()))
    values: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    for node in walk(root):
        if node.op == "symbol":
            v, e = inputs[node.name], torch.zeros_like(like)
        elif node.op == "const":
            v = torch.full_like(like, node.value)
            e = (v - v.float().double()).abs()
        else:
            args = [values[id(a)] for a in node.args]
            v, e = _step(node.op, args, [errors[id(a)] for a in node.args])
        if v.dtype != torch.bool:
            over = v.abs() - e > LARGEST
            e = torch.where(over, 0.0, torch.where(v.abs() + e > LARGEST, torch.inf, e).nan_to_num(nan=torch.inf))
            v = torch.where(over, torch.copysign(torch.full_like(v, torch.inf), v), v)
        values[id(node)], errors[id(node)] = v, e
    found, lost = values[id(root)], errors[id(root)]
    known = found.isfinite() | ~want.isfinite() | (want.abs() > LARGEST)  # beyond float32 an infinity is right
    return torch.where(known, lost, torch.inf).expand(like.shape)


def _step(op: str, args: list[Tensor], e: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Value and error of one operation. A comparison's error is 1 where it is open, else 0."""
    a, ea = args[0], e[0]
    b, eb = (args[1], e[1]) if len(args) > 1 else (a, ea)
    if op in ("add", "sub"):
        v = a + b if op == "add" else a - b
        return v, ea + eb + U32 * v.abs()
    if op == "mul":
        v = a * b
        return v, (a.abs() * eb).nan_to_num(0.0) + (b.abs() * ea).nan_to_num(0.0) + ea * eb + U32 * v.abs() + TINY32
    if op == "div":
        v = a / b
        loss = (ea + v.abs() * eb) / (b.abs() - eb) + 3 * U32 * v.abs() + TINY32  # div.full scales: as exact above 2¹²⁶
        return v, torch.where(eb >= b.abs(), torch.where(ea + eb == 0, 0.0, torch.inf), torch.where(b.isinf(), TINY32, loss))
    if op in ("neg", "abs"):
        return (-a if op == "neg" else a.abs()), ea
    if op in ("lt", "le", "gt", "ge", "eq", "ne"):
        v = getattr(torch, op)(a, b)
        return v, ((a - b).abs() <= ea + eb).double() * ((ea + eb) > 0)
    if op in ("both", "either", "invert"):
        v = ~a if op == "invert" else a & b if op == "both" else a | b
        return v, torch.maximum(ea, eb)
    if op in ("max", "min"):
        v = torch.maximum(a, b) if op == "max" else torch.minimum(a, b)
        is_open = (a - b).abs() <= ea + eb
        return v, torch.where(is_open, torch.maximum(ea, eb), torch.where(v == a, ea, eb))
    if op == "where":
        condition, yes, no = args
        v = torch.where(condition, yes, no)
        apart = torch.where(yes == no, 0.0, (yes - no).abs())
        return v, torch.where(e[0] > 0, torch.maximum(e[1], e[2]) + apart, torch.where(condition, e[1], e[2]))
    if op == "floor":
        v = torch.floor(a)
        return v, torch.maximum((torch.floor(a + ea) - v).abs(), (torch.floor(a - ea) - v).abs())
    if op == "exp":
        v = torch.exp(a)
        return v, (v * (torch.expm1(ea) + (5 + 1.5 * a.abs()) * U32)).nan_to_num(0.0, posinf=torch.inf) + TINY32
    if op == "log":
        v = torch.log(a)
        return v, torch.where(ea < a.abs(), ea / (a.abs() - ea), torch.inf) + 3 * U32 * v.abs() + TINY32
    if op == "sqrt":
        v = torch.sqrt(a)
        reach = torch.maximum(torch.sqrt(a + ea) - v, v - torch.sqrt((a - ea).clamp(min=0.0)))
        return v, reach + 4 * U32 * v + (a < 2 * TINY32) * (a > 0) * TINY32**0.5
    if op in ("sin", "cos"):
        v = getattr(torch, op)(a)
        return v, ea.clamp(max=2.0) + 5 * U32 * v.abs() + TINY32
    assert op == "erf", op
    v = torch.erf(a)
    return v, 1.13 * ea + 6 * U32 * v.abs() + TINY32
