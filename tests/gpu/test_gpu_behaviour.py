"""What only a GPU has: streams, graphs, devices, memory beyond 2³¹ elements, TF32 flags, Inductor."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLP, MLPSpec, dispatch, launch
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import check_call, judge, make_call, same_bits
from tests.gpu_calls import call_on_gpu, compiled, gradients, run_python

GATED = MLPSpec(dims=(128, 256, 128), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",))
ODD = MLPSpec(dims=(67, 131, 37), activation="gelu", bias=True, dtype="float16")
FULL = MLPSpec(dims=(96, 160, 64), activation="gelu", bias=True, epilogue=("layer_scale",))
each_spec = pytest.mark.parametrize("spec", [GATED, ODD, FULL], ids=["gated-bf16", "odd-fp16", "fp32"])


def library_of(spec: MLPSpec, rows: int) -> frozenset[str]:
    """The stages that the library multiplies."""
    return dispatch.library_stages(spec.to_json(), torch.device("cuda", torch.cuda.current_device()), rows)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert same_bits(a, b), f"result {i} of {len(wanted)}"


# Determinism, streams, graphs, threads


@each_spec
def test_same_bits_every_time(spec: MLPSpec) -> None:
    """Also for long sums over rows, and while something else keeps the GPU busy."""
    mlp = compiled(spec)
    noise, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for rows in (1, 93, 5000):
        call = call_on_gpu(spec, rows)
        first = gradients(call, mlp)
        for _ in range(5):
            with torch.cuda.stream(side):
                noise @ noise
            assert_same(gradients(call, mlp), first)


@each_spec
def test_side_stream(spec: MLPSpec) -> None:
    """Kernels run on the current stream: they wait there for what was queued before them."""
    call, other = call_on_gpu(spec, 200), call_on_gpu(spec, 200, seed=1)
    mlp = compiled(spec)
    wanted, stale = gradients(call, mlp), gradients(other, mlp)
    assert not same_bits(wanted[0], stale[0])
    late = other.needing()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for t, value in zip(late.named().values(), call.named().values(), strict=True):
            t.data.copy_(value)
        late.dy.copy_(call.dy)
        found = gradients(late, mlp)
    side.synchronize()
    assert_same(found, wanted)


@each_spec
def test_cuda_graph(spec: MLPSpec) -> None:
    """Forward alone, and forward with backward: captured once, replayed on new values, with the same bits."""
    mlp = compiled(spec)
    call = call_on_gpu(spec, 93).needing()

    def step() -> list[Tensor]:
        return gradients(call, mlp)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [call.run(mlp)]

    for run in (forward, step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        for seed in (1, 2):
            fresh = call_on_gpu(spec, 93, seed)
            with torch.no_grad():
                for t, value in zip((*call.named().values(), call.dy), (*fresh.named().values(), fresh.dy), strict=True):
                    t.copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert_same(results, [fresh.run(mlp)] if run is forward else gradients(fresh, mlp))


@each_spec
def test_two_graphs_at_once(spec: MLPSpec) -> None:
    """Two graphs, each captured and replayed on a stream of its own, do not share memory they write. On one stream they would share
    torch's workspace for cuBLAS, with or without mlpdsl."""
    mlp = compiled(spec)
    calls = [call_on_gpu(spec, 3000, seed) for seed in (1, 2)]
    wanted = [gradients(call, mlp) for call in calls]
    graphs, results, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for call, stream in zip(calls, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results.append(gradients(call, mlp))
        graphs.append(graph)
    for _ in range(20):
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(results, wanted, strict=True):
            assert_same(found, expected)


def test_another_graph_keeps_its_workspace() -> None:
    """A graph of torch's own products, captured on a warm stream, writes into the workspace that torch keeps for it; capturing an
    MLP on that stream must not give it back."""
    a, b = torch.randn(96, 9000, device="cuda"), torch.randn(9000, 160, device="cuda")  # few tiles of a long sum: it is split
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.mm(a, b)
    with torch.cuda.graph(graph, stream=stream):
        product = torch.mm(a, b)
    graph.replay()
    torch.cuda.synchronize()
    wanted, mlp, call = product.clone(), compiled(FULL), call_on_gpu(FULL, 3000)
    assert library_of(FULL, 3000)
    call.run(mlp)
    ours, held = torch.cuda.CUDAGraph(), torch.cuda.memory_allocated()
    with torch.cuda.graph(ours, stream=stream):
        call.run(mlp)
    assert torch.cuda.memory_allocated() >= held, "something that was not ours was given back"
    with torch.cuda.stream(stream):  # whose freed memory only allocations on it get
        ones = [torch.ones(2**20, dtype=torch.uint8, device="cuda") for _ in range(256)]
    torch.cuda.synchronize()
    product.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same([product, *ones], [wanted, *map(torch.ones_like, ones)])


def test_threads() -> None:
    """The first call from eight threads at once."""
    spec = MLPSpec(dims=(40, 72, 24), activation="mish", gated=True, dtype="bfloat16")
    mlp = compiled(spec)
    call = call_on_gpu(spec, 50)
    results: list[list[Tensor]] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        results.append(gradients(call, mlp))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for found in results:
        assert_same(found, results[0])


# Memory


def test_misaligned_after_aligned() -> None:
    """Kernels specialised on aligned pointers are not run on others."""
    for spec in (GATED, FULL, MLPSpec(dims=(64, 128, 64), activation="relu", dtype="float16")):
        for lies in ("dense", "offset", "dense", "padded", "ragged", "dense"):
            check_call(call_on_gpu(spec, 93, x=lies, weights="dense", operands=lies, dy=lies))
            check_call(call_on_gpu(spec, 93, weights=lies))


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("fields", [
    dict(dims=(64, 64, 64), activation="silu", gated=True),
    dict(dims=(65, 65, 65), activation="gelu", bias=True, epilogue=("residual",)),
], ids=["descriptors", "masked"])  # fmt: skip
def test_beyond_two_to_the_31_elements(fields: dict) -> None:
    """x, the hidden tensor and y each have more than 2³¹ elements.

    dy is zero but for rows at the start, around the elements 2³⁰ and 2³¹, and at the end: gradients of parameters depend on these
    rows alone, so the oracle need not see the others.
    """
    if torch.cuda.mem_get_info()[0] < 75 * 2**30:
        pytest.skip("needs 75 GiB of free GPU memory")
    spec = MLPSpec(dtype="bfloat16", **fields)
    width = spec.d_in
    rows = 2**31 // width + 67
    params = [p * 1.0 for p in make_call(spec, (1,), 0, device="cuda").params]
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    operands = {"residual": x} if spec.operands() else {}
    middles = [2**30 // width, 2**31 // width // 3, 2**31 // width]
    spans = [torch.arange(70), *(torch.arange(m - 40, m + 40) for m in middles), torch.arange(rows - 70, rows)]
    picked = torch.cat(spans).unique().cuda()
    dy = torch.zeros_like(x)
    dy[picked] = torch.randn(len(picked), width, device="cuda").bfloat16()
    leaves = [t.detach().requires_grad_() for t in (x, *params)]
    y = compiled(spec)(leaves[0], *leaves[1:], **operands)
    grads = torch.autograd.grad(y, leaves, dy)
    few = {name: t[picked] for name, t in operands.items()}
    oracle.check(y.detach()[picked], oracle.forward(spec, x[picked], params, few, replay=True), "y")
    del y
    expected = oracle.backward(spec, x[picked], params, few, dy[picked], replay=True)
    oracle.check(grads[0][picked], expected["x"], "gradient of x")
    for name, grad in zip(spec.parameter_shapes(), grads[1:], strict=True):
        wanted = expected[name]
        # The sum runs over many more rows, all zero, in another order; the bound of the rows that count is still right.
        oracle.check(grad, wanted, f"gradient of {name}")
    grads[0][picked] = 0
    assert not any(bool(part.any()) for part in grads[0].split(2**24))


# Modules, autocast, torch.compile


def test_two_dtypes_of_one_module() -> None:
    torch.manual_seed(0)
    layer = MLP(MLPSpec(dims=(64, 128, 64), activation="gelu", bias=True), device="cuda")
    x = torch.randn(50, 64, device="cuda")
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        copy = MLP(layer.spec, device="cuda")
        copy.load_state_dict(layer.state_dict())
        copy.to(dtype)
        y = copy(x.to(dtype))
        spec = layer.spec.replace(dtype=dtype)
        expected = oracle.forward(spec, x.to(dtype), list(copy.parameters()), replay=True, library=library_of(spec, 50))
        oracle.check(y, expected, f"y in {dtype}")
        assert dtype not in results or same_bits(results[dtype], y)
        results[dtype] = y.detach()
    layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.float()
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    call = call_on_gpu(FULL, 93).needing()
    with torch.autocast("cuda", dtype):
        y = call.run(compiled(FULL))
    assert y.dtype == dtype
    y.backward(call.dy.to(dtype))
    narrow = FULL.replace(dtype=dtype)
    x, *params = (t.detach().to(dtype) for t in (call.x, *call.params))
    operands = {name: t.detach().to(dtype) for name, t in call.operands.items()}
    by = library_of(narrow, 93)
    oracle.check(y, oracle.forward(narrow, x, params, operands, replay=True, library=by), "y")
    expected = oracle.backward(narrow, x, params, operands, call.dy.to(dtype), replay=True, library=by)
    for name, t in call.named().items():
        assert t.grad is not None and t.grad.dtype == torch.float32
        oracle.check(t.grad.to(dtype), expected[name], name)


@each_spec
def test_inductor(spec: MLPSpec) -> None:
    """torch.compile without graph breaks, forward and backward, over changing batch sizes."""
    torch._dynamo.reset()
    mlp = compiled(spec)
    whole = torch.compile(mlp, fullgraph=True)
    for rows in (93, 64, 1, 300):
        call = call_on_gpu(spec, rows)
        y, grads = call.gradients(whole)
        judge(call, y, grads, library=library_of(spec, rows))
        assert_same([y, *grads.values()], gradients(call, mlp))


def test_inductor_around_a_module() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    spec = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), MLP(spec, device="cuda"), torch.nn.Linear(64, 8)).to("cuda", torch.bfloat16)
    x = torch.randn(4, 33, 64, device="cuda", dtype=torch.bfloat16)
    model(x).float().square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).float().square().mean().backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        error = (p.grad.double() - grad.double()).norm() / grad.double().norm()
        assert error < 0.02, error


# Precision


@pytest.fixture
def _flags_put_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_flags_put_back")
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_is_the_specs(precision: str, backend: str) -> None:
    """Whatever torch's global flag says: float32 where float32 was declared, TF32 where that was; from kernels the same bits."""
    spec = MLPSpec(dims=(512, 1024, 256), activation="gelu", bias=True, precision=precision)
    mlp = mlpdsl.compile(spec, backend=backend)
    call = call_on_gpu(spec, 300)
    runs = {}
    for flag in ("highest", "high"):
        torch.set_float32_matmul_precision(flag)
        runs[flag] = gradients(call, mlp)
        assert torch.get_float32_matmul_precision() == flag, "the flag was not put back"
    if backend == "triton":
        assert_same(runs["high"], runs["highest"])
    exact = spec.replace(precision="ieee")
    y = oracle.forward(exact, call.x, call.params).value
    by_weight = oracle.backward(exact, call.x, call.params, {}, call.dy)["fc1.weight"].value
    low, high = (0.0, 2e-6) if precision == "ieee" else (2e-5, 2e-3)
    for results in runs.values():
        for found, wanted in ((results[0], y), (results[2], by_weight)):
            error = float((found.double() - wanted).norm() / wanted.norm())
            assert low < error < high, error


@pytest.mark.parametrize(
    "setting", ["torch.backends.fp32_precision = 'tf32'", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"]
)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_precision_under_torchs_newer_flags(setting: str, backend: str) -> None:
    """The flags by their newer names, in a process of its own: torch refuses to mix them with the older."""
    code = f"""
import torch, mlpdsl
{setting}
spec = mlpdsl.MLPSpec(dims=(256, 256, 64), activation="relu")
x, *params = (torch.randn(s, device="cuda") / 16 for s in ((64, 256), *spec.parameter_shapes().values()))
y = mlpdsl.compile(spec, backend={backend!r})(x, *params)
exact = (x.double() @ params[0].double().T).relu() @ params[1].double().T
error = float((y.double() - exact).norm() / exact.norm())
assert error < 2e-6, error
"""
    run_python(code)


def test_eager_backend() -> None:
    for spec in (GATED, ODD, FULL):
        call = call_on_gpu(spec, 93)
        y, grads = call.gradients(mlpdsl.compile(spec, backend="eager"))
        oracle.check(y, oracle.forward(spec, call.x, call.params, call.operands), "y")
        assert all(g is not None and g.shape == t.shape for g, t in zip(grads.values(), call.named().values(), strict=True))


def test_random_numbers_are_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the first call of a gated MLP, which tries out a descriptor over two weights."""
    monkeypatch.setattr(launch, "_proved", {})
    before = torch.cuda.get_rng_state()
    call_on_gpu(GATED, 256).run(compiled(GATED))
    call = call_on_gpu(GATED, 256)
    torch.cuda.set_rng_state(before)
    launch._proved.clear()
    call.run(compiled(GATED))
    assert launch._proved and torch.equal(torch.cuda.get_rng_state(), before)
