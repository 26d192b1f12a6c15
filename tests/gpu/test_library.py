"""The library's products on a GPU: summed in float32, however the tensors lie and whatever torch's flags say, and rounded once;
with a bias at most twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mlpdsl import library

FLAGS = torch.backends.cuda.matmul
NAMES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.fixture(autouse=True)
def _loose() -> Iterator[None]:
    before = [getattr(FLAGS, name) for name in NAMES]
    for name in NAMES:
        setattr(FLAGS, name, True)
    yield
    for name, value in zip(NAMES, before, strict=True):
        setattr(FLAGS, name, value)


def dense(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda")


def misaligned(*shape: int) -> Tensor:
    return torch.empty(torch.Size(shape).numel() + 1, device="cuda")[1:].view(shape)


def padded(*shape: int) -> Tensor:
    return torch.empty((*shape[:-1], shape[-1] + 3), device="cuda")[..., : shape[-1]]


def apart(*shape: int) -> Tensor:
    return torch.empty((*shape, 2), device="cuda")[..., 0]


LAYOUTS: dict[str, Callable[..., Tensor]] = {"dense": dense, "misaligned": misaligned, "padded": padded, "apart": apart}


def drawn(layout: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    made = LAYOUTS[layout](*shape)
    placed = torch.empty_strided(shape, made.stride(), dtype=dtype, device="cuda")
    if layout == "misaligned":
        placed = torch.empty(made.numel() + 1, dtype=dtype, device="cuda")[1:].view(shape)
    return placed.copy_(torch.randn(shape, device="cuda") * scale)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The step of 16-bit numbers there."""
    digits = 7 if dtype == torch.bfloat16 else 10
    return 2.0 ** (exact.abs().clamp_min(2.0**-14).log2().floor() - digits)


def wrongly_rounded(y: Tensor, exact: Tensor) -> float:
    """The share of elements that are not the float64 result rounded to nearest, without those close to a tie."""
    nearest = exact.to(y.dtype)
    certain = (exact - nearest.double()).abs() < 0.45 * ulp(exact, y.dtype)
    return float(((y != nearest) & certain).double().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [None, *LAYOUTS])
@pytest.mark.parametrize("x", LAYOUTS)
def test_rounded_once(x: str, bias: str | None, dtype: torch.dtype) -> None:
    """Without a bias; twice would be a quarter of the elements."""
    torch.manual_seed(0)
    for m, n, k in ((93, 128, 256), (200, 256, 128), (65, 37, 131), (300, 1, 64), (300, 64, 1), (256, 512, 4096)):
        for layout in ("dense", "padded"):
            a, weight = drawn(x, dtype, m, k), drawn(layout, dtype, n, k, scale=k**-0.5)
            b = None if bias is None else drawn("dense" if bias == "padded" else bias, dtype, n)
            out = torch.empty(m, n, dtype=dtype, device="cuda")
            library.product(a, weight.t(), out, b)
            exact = a.double() @ weight.double().t() + (0 if b is None else b.double())
            if b is None:
                assert wrongly_rounded(out, exact) < 0.01, (m, n, k, layout)
            else:  # the product may be rounded first; its sum in float32 is off by up to 1.8 of 2^-24 of all that it adds (H200)
                product = a.double() @ weight.double().t()
                summed = 3 * 2.0**-24 * (a.double().abs() @ weight.double().abs().t())
                steps = ulp(product, dtype) / 2 + ulp(exact, dtype) / 2 + summed
                assert bool(((out.double() - exact).abs() <= 1.01 * steps).all()), (m, n, k, layout)
                assert float((summed / (ulp(product, dtype) / 2)).median()) < 0.1  # what a third rounding would add stands out


def test_the_check_tells_two_roundings() -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(200, 200, device="cuda").bfloat16() for _ in range(3))
    once = (a.double() @ b.double() + c.double()).bfloat16()
    twice = ((a.double() @ b.double()).bfloat16().double() + c.double()).bfloat16()
    exact = a.double() @ b.double() + c.double()
    assert wrongly_rounded(once, exact) == 0.0 and wrongly_rounded(twice, exact) > 0.02
