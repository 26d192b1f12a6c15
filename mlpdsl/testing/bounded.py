"""float64 tensors with an error bound each, and the arithmetic of both: the oracle's own number type.

Each operation computes in float64, and adds to the bound what a kernel may lose that does the same in float32. With
u = 2⁻²⁴, e a bound on the step's own input, and 1.05 for the second-order terms:

    x·Wᵀ + b        (|e|·|W|ᵀ + 1.05·((K + 8)·u + t)·(|x|·|W|ᵀ + |b|)), t = 0 ieee, 2·2⁻¹⁰ tf32, 4·2⁻²² tf32x3
    f(p)            1.05·sup|f'|·e + 4.2·u·(|f(p)| + |p·f'(p)|), the sup over five samples of [p − e, p + e]
    f'(p)           1.05·(max|f'(s) − f'(p)| + ¼·sup|f''|·e) + 12.6·u·(|f'(p)| + |p·f''(p)|), s the same samples
                    (laplace, a function of p − μ: |p| + μ for |p| in these)
    a∘b, a + b      the product and sum rules + 1.05·u·|result|
    Σ of n terms    Σe + 1.05·(n + 8)·u·Σ|terms|
    rounding        e + 1.05·(u_dtype·|v| + half the dtype's subnormal step), u_dtype = 2⁻⁸ bf16, 2⁻¹¹ fp16, 2⁻²⁴ fp32

Bounds are relative to the values everywhere: the only absolute terms are subnormal steps, and 2⁻¹²⁶ for float32, whose
subnormals GPUs may flush.

Infinities and NaN are asked for where every correct kernel has them: what exceeds a dtype's range becomes inf as the cast makes it,
and a NaN that is certain makes one of all that it enters. The bound is inf, and nothing is asked, where correct kernels may differ:

    rounding        the bound does not tell whether the dtype's range is exceeded (`settled`)
    Σ, x·Wᵀ         some order of the terms overflows and another does not, or to the other side (`_order_decides`)
    x·Wᵀ in tf32    an input above tf32's largest number, which rounds to inf
    a∘b, x·Wᵀ       inf times what may be 0, because 0 is within its bound or a subnormal may be flushed (`_may_vanish`)
    a∘b∘c           the product of those factors that exceed 1 overflows, and the whole does not for certain (`_reach`)
    g·f'            the chain rule, where f' may be 0 and g or another derivative is inf or NaN, or an overflow of theirs comes
                    before it: a gate that is shut ends them, a factor of 0 makes NaN (`chained`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlpdsl.testing.functions import FUNCTIONS

__all__ = ["UNIT", "Bounded", "activation", "add", "chained", "exact", "matmul", "mul", "rounded", "settled", "slope", "total"]

U32 = 2.0**-24
TINY32 = 2.0**-126
MAX32 = torch.finfo(torch.float32).max
MAX_TF32 = (2 - 2.0**-10) * 2.0**127
SLACK = 1.05
UNIT = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_STEP = {torch.float32: TINY32, torch.float16: 2.0**-25, torch.bfloat16: TINY32}
INPUT_ERROR = {"ieee": 0.0, "tf32": 2 * 2.0**-10, "tf32x3": 4 * 2.0**-22}
VALUE_ULPS, SLOPE_ULPS = 6, 12  # the closed forms, in float32, need 5.3 (gelu near its minimum) and 8.2 (gelu_tanh')
SAMPLES = (-1.0, -0.5, 0.5, 1.0)
CHUNK = 1 << 23


@dataclass(frozen=True)
class Bounded:
    """A float64 tensor and, of the same shape, how far a correct result may be from each element.

    A bound of inf asks nothing. Where the value is NaN or inf and the bound finite, the result must be just that.
    """

    value: Tensor
    bound: Tensor
    dtype: torch.dtype | None = None
    """The dtype that the result must have; None for intermediate tensors."""

    @property
    def T(self) -> Bounded:
        """The transpose of a matrix."""
        return Bounded(self.value.T, self.bound if self.is_exact else self.bound.T)

    @property
    def is_exact(self) -> bool:
        """Whether this is an input, with no error at all (kept as one zero)."""
        return self.bound.ndim < self.value.ndim


def exact(tensor: Tensor) -> Bounded:
    value = tensor.detach().to(torch.float64)
    return Bounded(value, value.new_zeros(()))


def settled(value: Tensor, bound: Tensor, *sources: Bounded, dtype: torch.dtype = torch.float32) -> Bounded:
    """(value, bound) after what lies beyond the dtype's range: inf where that is certain, no bound where it may be."""
    info = torch.finfo(dtype)
    limit = info.max * (1 + UNIT[dtype] / 2)  # halfway to what would be the next power of two
    bound = bound.expand(value.shape).nan_to_num(nan=torch.inf, posinf=torch.inf)
    magnitude = value.abs()
    over = magnitude - bound >= limit
    value = torch.where(over, torch.copysign(torch.full_like(value, torch.inf), value), value)
    bound = torch.where(~over & (magnitude + bound >= limit), torch.inf, bound)
    bound = torch.where(value.isfinite(), bound, 0.0)
    for source in sources:
        bound = torch.where(source.bound == torch.inf, torch.inf, bound)
    return Bounded(value, bound)


def rounded(b: Bounded, dtype: torch.dtype, replay: bool = False) -> Bounded:
    """b rounded once to dtype.

    With `replay` the value itself is rounded, and the bound is how far the ends of [v − e, v + e] round from it: mostly
    nothing, because e is far smaller than the step of a 16-bit dtype, and one step where a tie lies between them. That
    is many times sharper, and holds only for a kernel that does round here.
    """
    error = SLACK * (UNIT[dtype] * b.value.abs() + HALF_STEP[dtype])
    loose = settled(b.value, b.bound + error, b, dtype=dtype)
    if not replay:
        return Bounded(loose.value, loose.bound, dtype)

    def cast(value: Tensor) -> Tensor:
        return value.to(torch.float32).to(dtype).to(torch.float64)

    e = b.bound + UNIT[torch.float32] * b.value.abs()  # cast() itself rounds twice
    value = cast(b.value)
    bound = torch.maximum((cast(b.value + e) - value).abs(), (cast(b.value - e) - value).abs())
    bound = bound + (0.0 if dtype == torch.float16 else TINY32)
    known = loose.bound.isfinite() & loose.value.isfinite()
    return Bounded(torch.where(known, value, loose.value), torch.where(known, bound, loose.bound), dtype)


def _may_vanish(b: Bounded) -> Tensor:
    """Where a kernel may have 0 or the other sign: within the bound of 0, or a subnormal, which may be flushed. An exact 0 is 0."""
    size = b.value.abs()
    return ((size <= b.bound) | (size < TINY32)) & ~((size == 0) & (b.bound == 0))


def _certain_nan(b: Bounded) -> Tensor:
    return (b.value.isnan() & (b.bound < torch.inf)).expand(b.value.shape)


def _asked(b: Bounded, unknown: Tensor, nan: Tensor) -> Bounded:
    """b with nothing asked where `unknown`, but NaN where that is certain, whatever comes beside it."""
    bound = b.bound.masked_fill(unknown, torch.inf).masked_fill(nan, 0.0)
    return Bounded(b.value.masked_fill(nan, torch.nan), bound)


def _order_decides(value: Tensor, bound: Tensor, size: Tensor, beside: Tensor) -> Tensor:
    """Where it depends on the order of a sum in float32 whether it overflows, and to which side.

    `value` is the sum of its finite terms, `size` that of their magnitudes. No partial sum is above the sum of the positive terms,
    or below that of the negative ones. Where infinite terms stand `beside` them, any overflow may make a NaN of these.
    """
    up, down = (size + value) / 2 + bound > MAX32, (size - value) / 2 + bound > MAX32
    certain = (value.abs() - bound > MAX32) & ~beside
    return torch.where(certain, up & down, up | down)


def _finite(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def matmul(a: Bounded, b: Bounded, precision: str, bias: Bounded | None = None) -> Bounded:
    """a·b + bias accumulated in float32; a is (m, k), b is (k, n)."""
    depth = a.value.shape[1]
    rounding = SLACK * (depth + 8) * U32
    size_a, size_b = a.value.abs(), b.value.abs()
    value = a.value @ b.value
    bound = (a.bound + (rounding + SLACK * INPUT_ERROR[precision]) * size_a) @ size_b
    if not b.is_exact:
        bound = bound + (size_a + a.bound) @ b.bound
    if bias is not None:
        value = value + bias.value
        bound = bound + rounding * bias.value.abs()
    bound = bound + (depth + 8) * TINY32
    result = settled(value, bound)
    if not depth or not value.numel():
        return result
    unknown = a.bound.isinf().expand(size_a.shape).any(1, keepdim=True) | b.bound.isinf().expand(size_b.shape).any(0, keepdim=True)
    most = _largest(size_a + a.bound) * _largest(size_b + b.bound) * depth
    if most + (0.0 if bias is None else _largest(bias.value.abs())) > MAX32:
        left, right = _finite(a.value), _finite(b.value)
        sums, sizes = left @ right, left.abs() @ right.abs()
        losses = (_finite(a.bound) + (rounding + SLACK * INPUT_ERROR[precision]) * left.abs()) @ right.abs()
        if not b.is_exact:
            losses = losses + (left.abs() + _finite(a.bound)) @ _finite(b.bound)
        if bias is not None:
            sums, sizes = sums + _finite(bias.value), sizes + _finite(bias.value).abs()
        beside = a.value.isinf().any(1, keepdim=True) | b.value.isinf().any(0, keepdim=True)
        unknown = unknown | _order_decides(sums, losses, sizes, beside)
    if precision != "ieee" and max(_largest(size_a), _largest(size_b)) > MAX_TF32:  # the largest numbers become infinite
        unknown = unknown | (_finite(size_a) > MAX_TF32).any(1, keepdim=True) | (_finite(size_b) > MAX_TF32).any(0, keepdim=True)
    if a.value.isinf().any():
        unknown = unknown | (a.value.isinf().double() @ _may_vanish(b).double() > 0)
    if b.value.isinf().any():
        unknown = unknown | (_may_vanish(a).double() @ b.value.isinf().double() > 0)
    return _asked(result, unknown, _certain_nan(a).any(1, keepdim=True) | _certain_nan(b).any(0, keepdim=True))


def _largest(magnitude: Tensor) -> float:
    return float(_finite(magnitude).amax())


def add(a: Bounded, b: Bounded) -> Bounded:
    value = a.value + b.value
    result = settled(value, a.bound + b.bound + SLACK * U32 * value.abs() + TINY32, a, b)
    return _asked(result, result.bound.isinf(), _certain_nan(a) | _certain_nan(b))


def mul(*factors: Bounded) -> Bounded:
    """The product of two or more in float32; the order is the kernel's."""
    value = ends = least = torch.ones_like(factors[0].value)
    infinite = faint = nan = torch.zeros_like(value, dtype=torch.bool)
    for f in factors:
        size = f.value.abs()
        value, ends = value * f.value, ends * (size + f.bound)
        least = least * torch.where(f.value.isfinite(), size.clamp(max=1.0), 1.0)
        infinite, faint, nan = infinite | f.value.isinf(), faint | _may_vanish(f), nan | _certain_nan(f)
    reach = _reach(factors) if len(factors) > 2 else torch.ones_like(value)
    loss = SLACK * (len(factors) - 1) * U32 * ends + TINY32 * reach
    result = settled(value, ends - value.abs() + loss, *factors)
    certain = result.value.isinf() & (result.bound == 0)
    faint = faint | ((least > 0) & (least < TINY32))  # what comes on the way
    return _asked(result, ((reach > MAX32) & ~certain) | (infinite & faint), nan)


def _reach(factors: Sequence[Bounded]) -> Tensor:
    """The product of the factors of more than 1, infinities left out: nothing that comes on the way to the whole is larger."""
    reach = torch.ones_like(factors[0].value)
    for f in factors:
        reach = reach * torch.where(f.value.isfinite(), (f.value.abs() + f.bound).clamp(min=1.0), 1.0)
    return reach


def chained(gradient: Bounded, *by: Bounded) -> Bounded:
    """The chain rule: gradient times derivatives. One that is 0 may be a shut gate, behind which inf and NaN end, or a factor."""
    result = mul(gradient, *by)
    shut = torch.zeros_like(result.value, dtype=torch.bool)
    wild = ~gradient.value.isfinite() | (_reach((gradient, *by)) > MAX32)
    for f in by:
        shut = shut | (f.value.abs() <= f.bound) | (f.value.abs() < TINY32)
        wild = wild | ~f.value.isfinite()
    return Bounded(result.value, result.bound.masked_fill(shut & wild, torch.inf))


def total(b: Bounded, dims: Sequence[int]) -> Bounded:
    """Sums in float32, each dimension after the other, so that no chain of additions is longer than their lengths."""
    dims = tuple(dims)
    if 0 in b.value.shape:
        return exact(b.value.sum(dims))
    length = sum(b.value.shape[dim] for dim in dims) + 8
    error = (b.bound + SLACK * length * U32 * b.value.abs() + TINY32).expand(b.value.shape)
    value, bound = b.value.sum(dims), error.sum(dims)
    result = settled(value, bound, Bounded(value, b.bound.expand(b.value.shape).sum(dims)))
    terms, beside = _finite(b.value), b.value.isinf().sum(dims) > 0
    unknown = _order_decides(terms.sum(dims), _finite(error).sum(dims), terms.abs().sum(dims), beside)
    return _asked(result, unknown | result.bound.isinf(), _certain_nan(b).sum(dims) > 0)


def _elementwise(rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], p: Bounded) -> Bounded:
    """rule(value, bound) -> (value, bound) in chunks, so that its temporaries stay small."""
    values, bounds = p.value.reshape(-1), p.bound.expand(p.value.shape).reshape(-1)
    starts = range(0, max(values.numel(), 1), CHUNK)
    parts = [rule(values[at : at + CHUNK], bounds[at : at + CHUNK]) for at in starts]
    value, bound = (torch.cat(each).reshape(p.value.shape) for each in zip(*parts, strict=True))
    return settled(value, bound, p)


def activation(name: str, p: Bounded) -> Bounded:
    """f(p) in float32."""
    f = FUNCTIONS[name]

    def rule(at: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = f.value(at), f.derivative(at).abs()
        steepest, span = slope, torch.zeros_like(slope)
        for step in SAMPLES:
            near = at + step * error
            steepest = torch.maximum(steepest, f.derivative(near).abs())
            # Where the samples straddle a slope without touching it (relu6, with a large error), the values tell.
            span = torch.maximum(span, (f.value(near) - value).abs().nan_to_num(nan=0.0))
        rounding = VALUE_ULPS * U32 * (value.abs() + ((at.abs() + f.center) * slope).nan_to_num(nan=0.0, posinf=0.0))
        flushed = 4 * TINY32 * (1 + at.abs().nan_to_num(posinf=0.0))
        return value, SLACK * (torch.maximum(steepest * error, span) + rounding) + flushed

    return _elementwise(rule, p)


def slope(name: str, z: Bounded) -> Bounded:
    """f'(z) in float32."""
    f = FUNCTIONS[name]

    def rule(at: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        slope, bend = f.derivative(at), f.curvature(at).abs()
        jump, sharpest = torch.zeros_like(slope), bend
        for step in SAMPLES:
            near = at + step * error
            jump = torch.maximum(jump, (f.derivative(near) - slope).abs().nan_to_num(nan=0.0))
            sharpest = torch.maximum(sharpest, f.curvature(near).abs())
        rounding = SLOPE_ULPS * U32 * (slope.abs() + ((at.abs() + f.center) * bend).nan_to_num(nan=0.0, posinf=0.0))
        flushed = 4 * TINY32 * (1 + at.abs().nan_to_num(posinf=0.0))
        bound = SLACK * (jump + 0.25 * sharpest * error + rounding) + flushed
        if f.any_at_nan:
            bound = torch.where(at.isnan(), torch.inf, bound)
        return slope, bound

    return _elementwise(rule, z)
