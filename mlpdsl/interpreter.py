"""Puts right what Triton's CPU interpreter (`TRITON_INTERPRET=1`) gets wrong about floats narrower than 32 bits.

The interpreter keeps bfloat16 as uint16 and fp8 as uint8, and mostly computes with those integers: a dot multiplies bit
patterns, an addition adds them, float32 to bfloat16 truncates, int32 to bfloat16 copies the integer, fp8 casts mangle
inf and NaN. After `install()`:

* a cast rounds once, to nearest even (or toward zero where asked to), and knows subnormals, inf and NaN;
* arithmetic decodes to float32, computes, and rounds the result to the operands' type, as the compiled kernel does; a
  fused multiply-add rounds once;
* a dot decodes its operands and accumulates in the accumulator's type; float32 operands are rounded to tf32 where
  `input_precision` says "tf32", so that a kernel that forgot "ieee" is seen to have done so; every element is one sum in the
  order of K, as on a GPU, where numpy's product depends on where in the matrix it stands;
* sums and scans of bfloat16 round at every step, max and min compare values;
* `reciprocal`, a generated kernel's one line of inline assembly, is computed;
* max, min and clamp without NaN propagation drop a NaN, as the GPU does (triton before 3.9 propagated it).

A cast to fp8 saturates, as the GPU's `cvt.rn.satfinite` does: 1e6 becomes 448 in e4m3 and 57344 in e5m2, inf likewise.
That differs from `torch.Tensor.to`, which gives NaN and inf. float16 is numpy's own and was right, but for fma.

Works on triton 3.6.0 to 3.9.0, whose `InterpreterBuilder` it changes in place. It imports triton, so import it only
where kernels are interpreted; nothing here runs in compiled mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from mlpdsl import interpreter_speed

__all__ = ["Format", "install", "is_installed"]

Array = npt.NDArray[Any]
Handle = Any  # triton_interpreter.TensorHandle: .data is a numpy array, .dtype a triton type

_ir = triton_interpreter._ir

RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"
"""The inline assembly of `reciprocal` in templates/triton/module.py.jinja."""


@dataclass(frozen=True)
class Format:
    """A binary float format of at most 16 bits, and its codec by table.

    A code is sign, exponent, mantissa from the top bit down. With bias b = 2^(exponent−1) − 1 and m mantissa bits, the
    code with exponent field E and mantissa field T stands for

        (−1)^sign · T · 2^(1−b−m)                 where E = 0,
        (−1)^sign · (2^m + T) · 2^(E−b−m)         otherwise,

    except at the top: with `ieee`, the last E is inf (T = 0) and NaN; else (OCP e4m3) only the last code is NaN.
    """

    name: str
    exponent: int
    mantissa: int
    ieee: bool = True
    saturates: bool = False
    """Whether a value too large becomes the largest finite one (fp8 on NVIDIA GPUs) rather than inf."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def code_type(self) -> type[np.unsignedinteger[Any]]:
        """The numpy integer that holds one code."""
        return np.uint16 if self.bits == 16 else np.uint8

    @cached_property
    def magnitudes(self) -> Array:
        """float64 value of every code without sign, in code order; strictly rising, as if there were no inf or NaN."""
        codes = np.arange(1 << (self.bits - 1))
        exponent, mantissa = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        significand = np.where(exponent > 0, mantissa + (1 << self.mantissa), mantissa).astype(np.float64)
        bias = (1 << (self.exponent - 1)) - 1
        magnitudes: Array = np.ldexp(significand, np.maximum(exponent, 1) - bias - self.mantissa)
        return magnitudes

    @cached_property
    def first_special(self) -> int:
        """The code after the largest finite one: inf with `ieee`, else NaN."""
        return ((1 << self.exponent) - 1) << self.mantissa if self.ieee else (1 << (self.bits - 1)) - 1

    @cached_property
    def values(self) -> Array:
        """float32 value of every code; exact, since each format here is a subset of float32."""
        positive = self.magnitudes.copy()
        positive[self.first_special :] = np.nan
        if self.ieee:
            positive[self.first_special] = np.inf
        return np.concatenate([positive, -positive]).astype(np.float32)

    def decode(self, codes: Array) -> Array:
        """The float32 values of codes, whose array may be of any type of the right width."""
        return self.values[np.asarray(codes).view(self.code_type)]

    def encode(self, values: Array, toward_zero: bool = False) -> Array:
        """The codes of numbers of any numpy type: rounded once, to nearest even or toward zero."""
        with np.errstate(invalid="ignore"):  # widening a signalling NaN
            values = np.asarray(values).astype(np.float64)
        magnitude = np.abs(values)
        # The neighbours below and above are consecutive codes; beyond the largest finite one, the table goes on as if
        # the exponent did, so that rounding up from there gives the first special code.
        below = np.searchsorted(self.magnitudes[: self.first_special], magnitude, side="right") - 1
        codes = below
        if not toward_zero:
            with np.errstate(invalid="ignore"):  # inf and NaN, which are settled below
                gap_below = magnitude - self.magnitudes[below]
                gap_above = self.magnitudes[below + 1] - magnitude
            codes = below + ((gap_above < gap_below) | ((gap_above == gap_below) & (below % 2 == 1)))
            codes = np.where(magnitude == np.inf, self.first_special, codes)
        elif self.ieee and not self.saturates:
            codes = np.where(magnitude == np.inf, self.first_special, codes)
        if self.saturates:
            codes = np.minimum(codes, self.first_special - 1)
        quiet_nan = (1 << (self.bits - 1)) - 1  # all ones: the GPU's canonical NaN in bf16 (0x7fff) and fp8
        codes = np.where(np.isnan(values), quiet_nan, codes)
        sign = np.where(np.signbit(values) & ~np.isnan(values), 1 << (self.bits - 1), 0)
        return (codes | sign).astype(self.code_type)


BF16 = Format("bf16", exponent=8, mantissa=7)
FP16 = Format("fp16", exponent=5, mantissa=10)
FP8E5 = Format("fp8e5", exponent=5, mantissa=2, saturates=True)
FP8E4NV = Format("fp8e4nv", exponent=4, mantissa=3, ieee=False, saturates=True)

_ENCODED = {each.name: each for each in (BF16, FP8E5, FP8E4NV)}
"""Formats that the interpreter keeps as integers, by triton's name."""


def _encoded(handle: Handle) -> Format | None:
    """The format of a tensor whose data are codes. Masks carry the compared type with bool data: they are not."""
    if handle.data.dtype not in (np.uint8, np.uint16):
        return None
    return _ENCODED.get(handle.dtype.scalar.name)


def _decoded(handle: Handle) -> Handle:
    """The tensor as float32 where its data are codes, else itself."""
    narrow = _encoded(handle)
    if narrow is None:
        return handle
    return triton_interpreter.TensorHandle(narrow.decode(handle.data), tl.float32)


def _rounded_to(narrow: Format, handle: Handle, dtype: Any) -> Handle:
    """A computed tensor as codes of type `dtype`; a mask stays a mask."""
    if handle.data.dtype == np.bool_:
        return triton_interpreter.TensorHandle(handle.data, tl.int1)
    return triton_interpreter.TensorHandle(narrow.encode(handle.data), dtype.scalar)


def _in_float32(method: Callable[..., Handle], arity: int) -> Callable[..., Handle]:
    """`method(self, *tensors, ...)` of the builder, computed in float32 where the first `arity` tensors are codes."""

    def computed(self: Any, *args: Any) -> Handle:
        narrow = _encoded(args[0])
        with np.errstate(all="ignore"):
            if narrow is None:
                return method(self, *args)
            result = method(self, *map(_decoded, args[:arity]), *args[arity:])
        return _rounded_to(narrow, result, args[0].dtype)

    return computed


def _cast(original: Callable[..., Handle]) -> Callable[..., Handle]:
    """Casts from and to code formats, between floats and with integers; others are left to the interpreter."""

    def cast_impl(self: Any, src: Handle, dst_type: Any) -> Handle:
        target = _ENCODED.get(dst_type.scalar.name)
        with np.errstate(all="ignore"):
            if target is None and _encoded(src) is None:
                return original(self, src, dst_type)
            values = _decoded(src).data
            data = target.encode(values) if target else values.astype(triton_interpreter._get_np_dtype(dst_type))
        return triton_interpreter.TensorHandle(data, dst_type.scalar)

    return cast_impl


def _float_to_float(original: Callable[..., Handle]) -> Callable[..., Handle]:
    """`create_fp_to_fp`: fp8 casts, and float casts with a rounding mode of their own."""
    formats = {**_ENCODED, "fp16": FP16}

    def create_fp_to_fp(self: Any, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        if rounding_mode == _ir.ROUNDING_MODE.RTZ and dst_type.scalar.name in formats:
            codes = formats[dst_type.scalar.name].encode(_decoded(src).data, toward_zero=True)
            return triton_interpreter.TensorHandle(codes.view(triton_interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        known = {*formats, "fp32", "fp64"}
        if rounding_mode != _ir.ROUNDING_MODE.RTZ and {src.dtype.scalar.name, dst_type.scalar.name} <= known:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _to_tf32(values: Array) -> Array:
    """float32 values rounded to nearest even at 10 mantissa bits; inf and NaN as they are."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def _dot(self: Any, a: Handle, b: Handle, d: Handle, input_precision: Any, max_imprecise: Any) -> Handle:
    """`create_dot` on decoded operands; float32 ones at the input precision asked for; every element summed in the order of K."""
    left, right = _decoded(a).data, _decoded(b).data
    if input_precision == _ir.INPUT_PRECISION.TF32 and left.dtype == right.dtype == np.float32:
        left, right = _to_tf32(left), _to_tf32(right)
    total = d.data.copy()
    left, right = left.astype(total.dtype), right.astype(total.dtype)
    with np.errstate(all="ignore"):
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., k, None, :]
    return triton_interpreter.TensorHandle(total, d.dtype.scalar)


def _fma(original: Callable[..., Handle]) -> Callable[..., Handle]:
    """`create_fma` with one rounding for 16-bit floats, whose product is exact in float64."""

    def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        narrow = _encoded(z)
        if narrow is None and z.data.dtype != np.float16:
            return original(self, x, y, z)
        exact = [_decoded(each).data.astype(np.float64) for each in (x, y, z)]
        with np.errstate(all="ignore"):
            total = exact[0] * exact[1] + exact[2]
            data = total.astype(np.float16) if narrow is None else narrow.encode(total)
        return triton_interpreter.TensorHandle(data, z.dtype.scalar)

    return create_fma


def _clamp(self: Any, value: Handle, low: Handle, high: Handle, propagate_nans: Any) -> Handle:
    """`create_clampf`: min(max(value, low), high); a NaN value stays NaN only where propagation is asked for."""
    propagates = propagate_nans == _ir.PROPAGATE_NAN.ALL
    maximum, minimum = (np.maximum, np.minimum) if propagates else (np.fmax, np.fmin)
    return self.binary_op(self.binary_op(value, low, maximum), high, minimum)


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ReduceOps.apply_impl` for codes: a sum halves the axis, rounding each time; max and min compare the values."""
    standard = tl.standard
    comparing = (standard._elementwise_max, standard._elementwise_min)

    def apply_impl(self: Any, tensors: tuple[Any, ...]) -> Any:
        narrow = _encoded(tensors[0].handle)
        if narrow is None or self.combine_fn not in (standard._sum_combine, *comparing):
            return original(self, tensors)
        dtype, values = tensors[0].dtype, narrow.decode(tensors[0].handle.data)
        if self.combine_fn in comparing:
            extreme = original(self, (self.to_tensor(values, tl.float32),))
            codes = narrow.encode(extreme.handle.data)
            return self.to_tensor(codes if extreme.type.is_block() else codes[0], dtype)
        axis = self.axis
        if axis is None:
            values, axis = values.reshape(-1), 0
        values = np.moveaxis(values, axis, 0)
        while len(values) > 1:  # lengths are powers of two
            half = len(values) // 2
            values = narrow.decode(narrow.encode(values[:half] + values[half:]))
        total = narrow.encode(values[0])
        if self.keep_dims:
            ndim = tensors[0].handle.data.ndim
            total = np.expand_dims(total, axis) if self.axis is not None else total.reshape((1,) * ndim)
        return self.to_tensor(total if total.ndim else total[()], dtype)

    return apply_impl


def _scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ScanOps.apply_impl` for codes: running sums and products that round at every step."""
    steps = {tl.standard._sum_combine: np.add, tl.standard._prod_combine: np.multiply}

    def apply_impl(self: Any, tensors: tuple[Any, ...]) -> Any:
        narrow = _encoded(tensors[0].handle)
        if narrow is None or self.combine_fn not in steps:
            return original(self, tensors)
        values = np.moveaxis(narrow.decode(tensors[0].handle.data), self.axis, 0)
        values = values[::-1].copy() if self.reverse else values.copy()
        for i in range(1, len(values)):
            values[i] = narrow.decode(narrow.encode(steps[self.combine_fn](values[i - 1], values[i])))
        values = values[::-1] if self.reverse else values
        return [self.to_tensor(narrow.encode(np.moveaxis(values, 0, self.axis)), tensors[0].dtype)]

    return apply_impl


def _refuse_atomic(original: Callable[..., Handle]) -> Callable[..., Handle]:
    """`create_atomic_rmw`, which would add codes as integers: an error beats a wrong number."""

    def create_atomic_rmw(self: Any, op: Any, ptr: Handle, value: Handle, mask: Handle, *rest: Any) -> Handle:
        if _encoded(value) is not None and op != _ir.ATOMIC_OP.XCHG:
            raise NotImplementedError(f"atomic {op} on {value.dtype.scalar} is not interpreted; accumulate in float32")
        return original(self, op, ptr, value, mask, *rest)

    return create_atomic_rmw


@dataclass(frozen=True)
class _Results:
    """What `create_inline_asm` returns: the outputs, by number."""

    handles: tuple[Handle, ...]

    def get_result(self, index: int) -> Handle:
        return self.handles[index]


def _inline_asm(self: Any, asm: str, constraints: str, values: list[Handle], *_: Any) -> _Results:
    """The one instruction that generated kernels have; float64 where a test has made everything so."""
    if asm != RECIPROCAL:
        raise NotImplementedError(f"inline assembly {asm!r} is not interpreted")
    (x,) = values
    with np.errstate(divide="ignore"):
        return _Results((triton_interpreter.TensorHandle(np.reciprocal(x.data), x.dtype.scalar),))


def _get_bf16(self: Any, value: float) -> Handle:
    """A bfloat16 constant, which triton before 3.9 cannot make."""
    return triton_interpreter.TensorHandle(BF16.encode(np.array([value], dtype=np.float32)), tl.bfloat16)


_installed = False


def is_installed() -> bool:
    """Whether `install()` has run in this process."""
    return _installed


def install() -> None:
    """Change triton's interpreter in place, for this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    builder: Any = triton_interpreter.InterpreterBuilder
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _float_to_float(builder.create_fp_to_fp)
    builder.binary_op = _in_float32(builder.binary_op, arity=2)
    builder.unary_op = _in_float32(builder.unary_op, arity=1)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_clampf = _clamp
    builder.create_fma = _fma(builder.create_fma)
    builder.create_dot = _dot
    builder.create_atomic_rmw = _refuse_atomic(builder.create_atomic_rmw)
    builder.get_bf16 = _get_bf16
    builder.create_inline_asm = _inline_asm
    reductions: Any = triton_interpreter.ReduceOps
    reductions.apply_impl = _reduce(reductions.apply_impl)
    scans: Any = triton_interpreter.ScanOps
    scans.apply_impl = _scan(scans.apply_impl)
    interpreter_speed.install()
    _installed = True
