"""The library's products on a GPU: summed in float32, however the tensors lie and whatever torch's flags say, and rounded once;
with a bias at most twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch, library
from mlpdsl.codegen import config as rule

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("x", LAYOUTS)
def test_two_products_as_one_batch(x: str, dtype: torch.dtype) -> None:
    """Over weights of two allocations, or of one, and in a graph; as exact as one product."""
    torch.manual_seed(0)
    for m, n, k in ((93, 128, 256), (65, 40, 136), (256, 512, 4096), (300, 37, 131)):
        both = torch.randn(3, n, k, device="cuda").mul_(k**-0.5).to(dtype)
        pairs = [sorted((torch.randn(n, k, device="cuda").mul_(k**-0.5).to(dtype) for _ in range(2)), key=Tensor.data_ptr)]
        pairs.append([both[0], both[2]])
        for low, high in pairs:
            if not library.fits_batch(low, high):
                assert both.stride(0) * 2 * dtype.itemsize % 16, "only rows of other widths may lie so"
                continue
            a = drawn(x, dtype, m, k)
            out = torch.empty(2, m, n, dtype=dtype, device="cuda")
            library.product_of_two(a, low, high, out)
            for y, weight in zip(out, (low, high), strict=True):
                exact = a.double() @ weight.double().t()
                if dtype == torch.float32:
                    bound = (k + 2) * 2.0**-24 * (a.double().abs() @ weight.double().abs().t())
                    assert bool(((y.double() - exact).abs() <= bound).all()), (m, n, k)
                else:
                    assert wrongly_rounded(y, exact) < 0.01, (m, n, k)
            wanted, graph = out.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                library.product_of_two(a, low, high, out)
            out.zero_()
            graph.replay()
            assert torch.equal(out, wanted), "the same kernel, the same bits"


def test_a_batch_looks_at_weights_as_they_are_now() -> None:
    """Nothing of what lies there is kept from an earlier product, nor alive."""
    low, high = sorted((torch.randn(64, 64, device="cuda") for _ in range(2)), key=Tensor.data_ptr)
    x, out = torch.randn(8, 64, device="cuda"), torch.empty(2, 8, 64, device="cuda")
    for _ in range(2):
        library.product_of_two(x, low, high, out)
        assert torch.allclose(out[0], x @ low.t(), atol=1e-3) and torch.allclose(out[1], x @ high.t(), atol=1e-3)
        low.normal_()
        high.zero_()
    before = torch.cuda.memory_allocated()
    size = low.untyped_storage().nbytes()
    del low, high
    assert torch.cuda.memory_allocated() <= before - 2 * size


@pytest.mark.parametrize("second_first", [False, True])
def test_a_gated_mlp_by_one_batched_product(second_first: bool) -> None:
    """Whichever weight lies first, with gradients and without, plainly and in a graph: the bits of two products and a pass."""
    spec = MLPSpec(dims=(256, 384, 128), activation="silu", gated=True, dtype="bfloat16")
    both = torch.randn(2, 384, 256, device="cuda").mul_(256**-0.5).bfloat16()
    gate, up = (both[1], both[0]) if second_first else (both[0], both[1])
    down = torch.randn(128, 384, device="cuda").mul_(384**-0.5).bfloat16()
    x = torch.randn(100, 256, device="cuda").bfloat16()
    config = rule.library("hidden", 100, 384, dtype="bfloat16", planes=2)
    assert config is not None
    calls: list[int] = []
    inner = launch.product_of_two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "product_of_two", lambda *args: (calls.append(1), inner(*args))[1])
        found: dict[bool, list[Tensor]] = {}
        for batched in (False, True):
            with dispatch.forcing_config("hidden", 100, 384, 256, replace(config, batched=batched)):
                mlp, results = mlpdsl.compile(spec), []
                with torch.no_grad():
                    for _ in range(3):  # the second call is recorded, the third repeats it
                        results.append(mlp(x, gate, up, down))
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        captured = mlp(x, gate, up, down)
                    graph.replay()
                    results.append(captured)
                leaves = [t.detach().clone().requires_grad_() for t in (x, down)]
                y = mlp(leaves[0], gate, up, leaves[1])
                y.float().square().sum().backward()
                found[batched] = [*results, y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert len(calls) == 2 + (not second_first), "two calls, of which the rest are repetitions; with gradients only gate's first"
    for results in found.values():
        assert all(torch.equal(y, results[0]) for y in results[1:4])
    exact = torch.nn.functional.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= 2.0**-6 * theirs.double().abs().max()
    assert (found[True][0].double() - exact @ down.double().t()).abs().max() < 0.05
