"""Narrow floats in Triton's CPU interpreter, through real kernels, against torch's own casts and float32 arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set before triton is imported (make sets it)", allow_module_level=True)

import triton
import triton.language as tl

from mlpdsl import interpreter

interpreter.install()

NARROW = [torch.bfloat16, torch.float16]
BLOCK = 1 << 16


@triton.jit
def cast_kernel(src, dst, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(dst + at, tl.load(src + at, mask=inside).to(dst.dtype.element_ty), mask=inside)


@triton.jit
def cast_toward_zero_kernel(src, dst, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(src + at, mask=inside).to(dst.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(dst + at, value, mask=inside)


@triton.jit
def binary_kernel(a, b, dst, count, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(a + at, mask=inside)
    y = tl.load(b + at, mask=inside)
    if OP == "add":
        value = x + y
    elif OP == "sub":
        value = x - y
    elif OP == "mul":
        value = x * y
    elif OP == "neg":
        value = -x
    elif OP == "abs":
        value = tl.abs(x)
    elif OP == "scaled":
        value = x * 1.7 + 0.3
    elif OP == "where":
        value = tl.where(x < y, x, y)
    elif OP == "where_and":
        value = tl.where((x < y) & (x > -1.0), x, y)
    elif OP == "maximum":
        value = tl.maximum(x, y)
    elif OP == "maximum_all":
        value = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        value = tl.clamp(x, -0.5, 0.75)
    else:
        value = tl.fma(x, y, x)
    tl.store(dst + at, value, mask=inside)


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    x = tl.load(a + row * N + column)
    y = tl.load(b + row * N + column)
    tl.store(c + row * N + column, tl.dot(x, tl.trans(y), input_precision=PRECISION))


@triton.jit
def reduce_kernel(src, dst, N: tl.constexpr, OP: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    x = tl.load(src + row * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        tl.store(dst + tl.arange(0, N), tl.sum(x, axis=1))
    elif OP == "max":
        tl.store(dst + tl.arange(0, N), tl.max(x, axis=1))
    elif OP == "sum_keep":
        tl.store(dst + row, tl.sum(x, axis=1, keep_dims=True))
    else:
        tl.store(dst, tl.sum(x))


def cast(source: torch.Tensor, dtype: torch.dtype, kernel: Any = cast_kernel) -> torch.Tensor:
    out = torch.empty(source.shape, dtype=dtype)
    kernel[(triton.cdiv(source.numel(), BLOCK),)](source, out, source.numel(), BLOCK=BLOCK)
    return out


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def float32_sample() -> torch.Tensor:
    """Random bit patterns, every neighbourhood of a tie in bf16 and fp16, and the extremes."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=generator)
    halves = (all_codes(torch.bfloat16).view(torch.int16).long() << 16) + (1 << 15)
    halfway = torch.cat([halves + offset for offset in (-1, 0, 1)])
    # Ties of fp16 lie in the middle between consecutive fp16 values: exact in float32, subnormals included.
    codes = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    middle = torch.cat([(codes[:-1] + codes[1:]) / 2, torch.tensor([65519.999, 65520.0, 65536.0]).double()]).float()
    near = torch.cat([middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))])
    extreme = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4e38, 1e-45, -1e-45, 1e-40])
    bits = torch.cat([random, halfway]).to(torch.int32).view(torch.float32)
    return torch.cat([bits, near, -near, extreme])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except that any NaN is any other."""
    assert actual.dtype == expected.dtype
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    different = (actual.view(integer) != expected.view(integer)) & ~nan
    assert not different.any(), f"{int(different.sum())} differ, first at {int(different.nonzero()[0])}"


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", NARROW)
def test_every_16_bit_code_casts_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    codes = all_codes(source)
    assert_same_bits(cast(codes, target), codes.to(target))


@pytest.mark.parametrize("target", NARROW)
def test_float32_rounds_to_nearest_even(target: torch.dtype) -> None:
    sample = float32_sample()
    assert_same_bits(cast(sample, target), sample.to(target))


@pytest.mark.parametrize("target", NARROW)
def test_rounding_toward_zero_truncates(target: torch.dtype) -> None:
    sample = float32_sample()
    actual, magnitude = cast(sample, target, cast_toward_zero_kernel), sample.abs()
    nearest = sample.to(target)
    smaller = nearest.abs().nextafter(torch.zeros((), dtype=target))
    expected = torch.where(nearest.float().abs() > magnitude, smaller.copysign(nearest), nearest)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("source", [torch.int32, torch.int8, torch.bool, torch.float64])
def test_other_types_cast_to_bf16(source: torch.dtype) -> None:
    values = torch.arange(-1000, 1000).to(source)
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_bf16_casts_to_integers() -> None:
    values = torch.arange(-256, 256).to(torch.bfloat16) * 0.75
    assert torch.equal(cast(values, torch.int32), values.to(torch.int32))


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", FP8)
def test_every_fp8_code_casts_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(source)
    assert_same_bits(cast(codes, target), codes.float().to(target))


@pytest.mark.parametrize("source", [torch.float32, *NARROW])
@pytest.mark.parametrize("target", FP8)
def test_to_fp8_rounds_as_torch_does_and_saturates_as_the_gpu_does(source: torch.dtype, target: torch.dtype) -> None:
    values = float32_sample() if source is torch.float32 else all_codes(source)
    largest = torch.finfo(target).max
    assert_same_bits(cast(values, target), values.float().clamp(-largest, largest).to(target))


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": lambda x, y: 0 - x,
    "abs": lambda x, y: x.abs(),
    "where": lambda x, y: torch.where(x < y, x, y),
    "where_and": lambda x, y: torch.where((x < y) & (x > -1.0), x, y),
    "maximum": torch.fmax,
    "maximum_all": torch.maximum,
    "fma": lambda x, y: x.double() * y.double() + x.double(),
}


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(4096, generator=generator).to(dtype) for _ in range(2))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-5, -6e4]).to(dtype)
    x[:49], y[:49] = special.repeat(7), special.repeat_interleave(7)
    return x, y


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtype", NARROW)
def test_arithmetic_is_float32_rounded_once(op: str, dtype: torch.dtype) -> None:
    x, y = operands(dtype)
    out = torch.empty_like(x)
    binary_kernel[(1,)](x, y, out, x.numel(), OP=op, BLOCK=4096)
    expected = BINARY[op](x.float(), y.float()).to(dtype)
    if op in ("maximum", "maximum_all", "neg"):  # the sign of max(0, -0) is open, and triton < 3.9 negates by 0 - x
        out, expected = out + 0, expected + 0
    assert_same_bits(out, expected)


def test_constants_and_clamp_in_bf16() -> None:
    x, y = operands(torch.bfloat16)
    out = torch.empty_like(x)
    binary_kernel[(1,)](x, y, out, x.numel(), OP="scaled", BLOCK=4096)
    steps = (x.float() * torch.tensor(1.7).bfloat16().float()).bfloat16()
    assert_same_bits(out, (steps.float() + torch.tensor(0.3).bfloat16().float()).bfloat16())
    binary_kernel[(1,)](x, y, out, x.numel(), OP="clamp", BLOCK=4096)
    expected = x.float().fmax(torch.tensor(-0.5)).fmin(torch.tensor(0.75)).bfloat16()
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8])
def test_dot_multiplies_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, N=32, PRECISION="ieee")
    exact = a.double() @ b.double().T
    bound = 32 * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    assert ((out.double() - exact).abs() <= bound).all()


def test_dot_shows_tf32() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(32, 32, generator=generator) for _ in range(2))
    exact, errors = a.double() @ b.double().T, {}
    for precision in ("ieee", "tf32", "tf32x3"):
        out = torch.empty(32, 32)
        dot_kernel[(1,)](a, b, out, N=32, PRECISION=precision)
        errors[precision] = float((out.double() - exact).abs().max())
    assert errors["ieee"] < 1e-5 and errors["tf32x3"] < 1e-5
    assert 1e-4 < errors["tf32"] < 2e-2


def test_reductions_of_bf16() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 32, generator=generator).bfloat16()
    out = torch.empty(32, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, N=32, OP="max")
    assert torch.equal(out, x.max(dim=1).values)
    for op in ("sum", "sum_keep"):
        out = torch.empty(32, dtype=torch.bfloat16)
        reduce_kernel[(1,)](x, out, N=32, OP=op)
        bound = 5 * 2.0**-8 * x.double().abs().sum(1)
        assert ((out.double() - x.double().sum(1)).abs() <= bound).all()
    reduce_kernel[(1,)](x, out, N=32, OP="total")
    assert abs(out[0].item() - x.double().sum().item()) <= 10 * 2.0**-8 * x.double().abs().sum().item()


def test_install_twice_changes_nothing() -> None:
    before = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    interpreter.install()
    assert interpreter.is_installed()
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == before


def test_importing_mlpdsl_does_not_import_it() -> None:
    probe = "import sys, mlpdsl.spec, mlpdsl; print('mlpdsl.interpreter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_was_rewritten_once_stands_where_its_own_source_does() -> None:
    """Two specs share the text of a device function: each runs it in its own module, under its own file and line."""
    from mlpdsl.backends import BACKENDS
    from mlpdsl.source import publish
    from mlpdsl.spec import MLPSpec
    from mlpdsl.target import parse_target

    target, found = parse_target("sm_80"), []
    specs = (
        MLPSpec(dims=(8, 16, 8), activation="relu"),
        MLPSpec(dims=(8, 8), activation="identity"),
    )  # unequal docstrings
    for spec in specs:
        key, text, path = publish(spec, target, "triton")
        jitted = BACKENDS["triton"].load(path, text, key).tile_order
        rewritten = jitted.rewrite()
        line = text.splitlines().index("def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):") + 1
        assert (rewritten.__code__.co_filename, rewritten.__code__.co_firstlineno) == (str(path), line)
        assert rewritten.__globals__ is jitted.fn.__globals__ and "GROUP_M" in rewritten.__annotations__
        found.append(rewritten)
    assert found[0].__code__.co_code == found[1].__code__.co_code and found[0] is not found[1]
    assert found[0].__code__.co_firstlineno != found[1].__code__.co_firstlineno
