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
from mlpdsl.testing.calls import judge, make_call

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


def pair_of(how: str, dtype: torch.dtype, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Two weights (n, k) of equal strides, the lower address first."""

    def fill(t: Tensor) -> Tensor:
        return t.copy_(torch.randn(t.shape, device="cuda") * k**-0.5)

    if how == "tied":
        one = fill(torch.empty(n, k, dtype=dtype, device="cuda"))
        return one, one
    if how == "apart":
        made = [fill(torch.empty(n, k, dtype=dtype, device="cuda")) for _ in range(2)]
    elif how == "halves":
        made = list(fill(torch.empty(2, n, k, dtype=dtype, device="cuda")))
    elif how == "interleaved":  # row by row
        made = list(fill(torch.empty(n, 2, k, dtype=dtype, device="cuda")).unbind(1))
    elif how == "padded":
        made = [fill(torch.empty(n, k + 8, dtype=dtype, device="cuda")[:, :k]) for _ in range(2)]
    else:  # transposed
        made = [fill(torch.empty(k, n, dtype=dtype, device="cuda").t()) for _ in range(2)]
    low, high = sorted(made, key=Tensor.data_ptr)
    return low, high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["apart", "halves", "interleaved", "padded", "transposed", "tied"])
@pytest.mark.parametrize("x", LAYOUTS)
def test_two_products_as_one_batch(x: str, how: str, dtype: torch.dtype) -> None:
    """However the weights lie, and in a graph that is the first to multiply by them; as exact as one product."""
    torch.manual_seed(0)
    for m, n, k in ((93, 128, 256), (65, 40, 136), (256, 512, 4096), (301, 37, 131)):
        low, high = pair_of(how, dtype, n, k)
        if not library.fits_batch(low, high):
            assert (high.data_ptr() - low.data_ptr()) % 16
            continue
        a = drawn(x, dtype, m, k)
        out, replayed = (launch.empty_pair(a, m, n) for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.product_of_two(a, low, high, replayed)
        library.product_of_two(a, low, high, out)
        graph.replay()
        assert torch.equal(out, replayed), "the same kernel, the same bits"
        for y, weight in zip(out, (low, high), strict=True):
            exact = a.double() @ weight.double().t()
            if dtype == torch.float32:
                bound = (k + 2) * 2.0**-24 * (a.double().abs() @ weight.double().abs().t())
                assert bool(((y.double() - exact).abs() <= bound).all()), (m, n, k)
            else:
                assert wrongly_rounded(y, exact) < 0.01, (m, n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(65, 8448, 8192), (65, 8448, 16384), (192, 4352, 16384), (512, 2176, 16384)])
def test_long_sums_of_a_batch(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The rule's smallest batches of long sums: no parts of one are added in 16 bits, though the flags, loose here, allow it. Of
    so many the sum in float32 is itself off by enough to round a few wrongly; two halves in 16 bits would a quarter."""
    spec = MLPSpec(dims=(k, n, 8), activation="silu", gated=True, dtype=str(dtype).removeprefix("torch."))
    assert mlpdsl.explain(spec, m, "sm_90").config["hidden[0]"].batched
    torch.manual_seed(0)
    a, (low, high) = drawn("dense", dtype, m, k), pair_of("apart", dtype, n, k)
    out = torch.empty(2, m, n, dtype=dtype, device="cuda")
    library.product_of_two(a, low, high, out)
    for y, weight in zip(out, (low, high), strict=True):
        exact = a.double() @ weight.double().t()
        halves = [a[:, i::2].double() @ weight[:, i::2].double().t() for i in range(2)]
        shared = (halves[0].to(dtype).float() + halves[1].to(dtype).float()).to(dtype)
        assert wrongly_rounded(y, exact) < 0.3 * wrongly_rounded(shared, exact)


def test_a_batch_looks_at_weights_as_they_are_now() -> None:
    """Nothing of what lies there is kept from an earlier product, nor alive."""
    low, high = pair_of("apart", torch.float32, 64, 64)
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("k", [256, 4096])
def test_a_gated_mlp_by_one_batched_product(k: int, dtype: str, bias: bool) -> None:
    """Whichever weight lies first, with gradients and without, plainly, repeated and in a graph: the same bits, and right ones."""
    spec = MLPSpec(dims=(k, 384, 128), activation="silu", gated=True, bias=bias, dtype=dtype)
    config = rule.library("hidden", 100, 384, dtype=dtype, planes=2)
    assert config is not None
    calls: list[int] = []
    inner = library.multiply_two
    found: list[list[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "multiply_two", lambda *args, **words: (calls.append(1), inner(*args, **words))[1])
        with dispatch.forcing_config("hidden", 100, 384, k, replace(config, batched=True)):
            mlp = mlpdsl.compile(spec)
            for pair in ("stacked", "up_first"):
                call, results = make_call(spec, (100,), 0, pair=pair, device="cuda"), []
                with torch.no_grad():
                    for _ in range(3):  # the second call is recorded, the third repeats it
                        results.append(call.run(mlp))
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        captured = call.run(mlp)
                    graph.replay()
                y, grads = call.gradients(mlp)
                judge(call, y, grads, library=dispatch.library_stages(spec.to_json(), y.device, 100) | {"hidden[0]"})
                found.append([*results, captured, y, *grads.values()])
                assert len(calls) == 5 * len(found)
    for results in found:
        assert all(torch.equal(y, results[0]) for y in results[1:5])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "bits follow no address"


@pytest.mark.parametrize("said", ["ieee", "tf32"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x", LAYOUTS)
def test_tf32_where_a_spec_says_so(x: str, bias: bool, said: str) -> None:
    """Whatever the flag says, and however tensors lie: within TF32's bounds, and not exact; on copies the same."""
    torch.manual_seed(0)
    before, FLAGS.fp32_precision = FLAGS.fp32_precision, said
    try:
        for m, n, k in ((93, 128, 256), (200, 37, 131), (512, 1021, 1031), (1024, 1024, 1022)):
            a, weight = drawn(x, torch.float32, m, k), drawn("dense", torch.float32, n, k, scale=k**-0.5)
            b = drawn("dense", torch.float32, n) if bias else None
            exact = a.double() @ weight.double().t() + (0 if b is None else b.double())
            sizes = a.double().abs() @ weight.double().abs().t()
            for tf32, least, most in ((False, 0.0, k * 2.0**-24), (True, 2.0**-17, 2.1 * 2.0**-10)):
                out = torch.empty(m, n, device="cuda")
                library.product(a, weight.t(), out, b, tf32=tf32)
                off = ((out.double() - exact).abs() - 2.0**-23 * exact.abs()).clamp_min(0) / sizes
                assert least <= float(off.max()) <= most, (m, n, k, tf32)
    finally:
        FLAGS.fp32_precision = before


@pytest.mark.parametrize("words", [{}, {"gated": True}, {"epilogue": ("gelu", "residual")}], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize(("dims", "rows"), [
    ((768, 3072, 768), 64), ((1021, 1031, 1027), 600), ((333, 1111, 577), 127), ((768, 3072, 768), 7), ((333, 1111, 577), 13),
], ids=str)  # fmt: skip
def test_float32_by_the_rule(dims: tuple[int, ...], rows: int, precision: str, words: dict[str, object]) -> None:
    """Biases in passes, copies, other tiles: the same bits with gradients and without, repeated and in a graph, and right ones."""
    spec = MLPSpec(**{"dims": dims, "activation": "gelu", "bias": True, "dtype": "float32", "precision": precision, **words})
    mlp = mlpdsl.compile(spec)
    call = make_call(spec, (rows,), 0, device="cuda")
    with torch.no_grad():
        results = [call.run(mlp) for _ in range(3)]  # the second call is recorded, the third repeats it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(call.run(mlp))
        graph.replay()
    y, grads = call.gradients(mlp)
    judge(call, y, grads, library=dispatch.library_stages(spec.to_json(), y.device, rows))
    assert all(torch.equal(result, y) for result in results)
