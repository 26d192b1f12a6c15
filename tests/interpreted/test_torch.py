"""The compiled MLP among torch's own machinery: modules, autocast, compile, export, fake tensors, torch.func, checkpoints."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import make_call, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import mlpdsl
from mlpdsl import MLP, MLPSpec, ShapeError, SpecError, UnsupportedError, ops
from mlpdsl.testing import oracle

GATED = MLPSpec(dims=(24, 40, 16), activation="silu", gated=True, bias=True)
PLAIN = MLPSpec(dims=(13, 33, 9), activation="gelu", bias=True, epilogue=("residual", "layer_scale", "scale"))
DEEP = MLPSpec(dims=(8, 16, 24, 8), activation="relu2", bias=True)
SINGLE = MLPSpec(dims=(8, 16), activation="identity", epilogue=("gelu",))
SPECS = [GATED, PLAIN, DEEP, SINGLE]
NAMES = ["gated", "plain", "deep", "single"]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=NAMES)


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def layer_of(spec: MLPSpec, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(spec, backend="triton")


def operands_of(spec: MLPSpec, *lead: int) -> dict[str, Tensor]:
    return make_call(spec, lead, 1).operands


# The module


@each_spec
def test_state_dict(spec: MLPSpec) -> None:
    layer = layer_of(spec)
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == spec.parameter_shapes()
    assert list(state) == list(spec.parameter_shapes())
    other = layer_of(spec, seed=1)
    x, operands = torch.randn(5, spec.d_in), operands_of(spec, 5)
    y = layer(x, **operands)
    assert not same_bits(other(x, **operands), y)
    assert other.load_state_dict(state).missing_keys == []
    assert same_bits(other(x, **operands), y)


@each_spec
def test_functional_and_module_agree(spec: MLPSpec) -> None:
    layer = layer_of(spec)
    x, operands = torch.randn(2, 5, spec.d_in), operands_of(spec, 2, 5)
    assert same_bits(layer(x, **operands), compiled(spec)(x, *layer.parameters(), **operands))


@each_spec
def test_copies(spec: MLPSpec, tmp_path: Path) -> None:
    layer = layer_of(spec)
    x, operands = torch.randn(5, spec.d_in), operands_of(spec, 5)
    y = layer(x, **operands)
    file = tmp_path / "layer.pt"
    torch.save(layer, file)
    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    memory.seek(0)
    from_state = layer_of(spec, seed=1)
    from_state.load_state_dict(torch.load(memory, weights_only=True))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), from_state]
    for other in copies:
        assert same_bits(other(x, **operands), y)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert same_bits(layer(x, **operands), y), "a copy shares parameters"
    mlp = compiled(spec)
    assert same_bits(pickle.loads(pickle.dumps(mlp))(x, *layer.parameters(), **operands), y)
    assert same_bits(copy.deepcopy(mlp)(x, *layer.parameters(), **operands), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_follows_its_parameters(dtype: torch.dtype) -> None:
    layer = layer_of(GATED)
    x = torch.randn(5, 24)
    before = layer(x)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    narrow = GATED.replace(dtype=dtype)
    oracle.check(y, oracle.forward(narrow, x.to(dtype), list(layer.parameters()), replay=True), "y")
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())
    with pytest.raises(ShapeError, match=r"x\.dtype"):
        layer(x)
    layer.float()
    assert layer(x).dtype == torch.float32 and before.dtype == torch.float32


def test_module_in_a_model_trains() -> None:
    """A few steps of SGD do what they do in eager PyTorch."""
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", bias=True)
    torch.manual_seed(0)
    ours = nn.Sequential(nn.LayerNorm(8), MLP(spec, backend="triton"), nn.Linear(8, 1))
    theirs = copy.deepcopy(ours)
    theirs[1] = MLP(spec, backend="eager")
    theirs[1].load_state_dict(ours[1].state_dict())
    x, wanted = torch.randn(32, 8), torch.randn(32, 1)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [GATED, PLAIN], ids=["gated", "plain"])
def test_autocast(spec: MLPSpec, dtype: torch.dtype) -> None:
    """float32 parameters, autocast's dtype in the kernels, float32 gradients of float32 tensors."""
    call = make_call(spec, (20,), 0).needing()
    mlp = compiled(spec)
    with torch.autocast("cpu", dtype):
        y = call.run(mlp)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == dtype
    narrow = spec.replace(dtype=dtype)
    x, *params = (t.detach().to(dtype) for t in (call.x, *call.params))
    operands = {name: t.detach().to(dtype) for name, t in call.operands.items()}
    oracle.check(y, oracle.forward(narrow, x, params, operands, replay=True), "y")
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = oracle.backward(narrow, x, params, operands, dy, replay=True)
    for name, t in call.named().items():
        assert t.grad is not None and t.grad.dtype == torch.float32
        oracle.check(t.grad.to(dtype), expected[name], f"gradient of {name}")


def test_autocast_like_linear() -> None:
    """Arguments of mixed dtypes are cast as nn.Linear's are; without gradients too; a 16-bit spec keeps its own dtype."""
    call = make_call(GATED, (5,), 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = compiled(GATED)(call.x.bfloat16(), *call.params)
        assert y.dtype == torch.bfloat16
        assert same_bits(y, compiled(GATED)(call.x, *(p.bfloat16() for p in call.params)))
        half = compiled(GATED.replace(dtype="float16"))(call.x.half(), *(p.half() for p in call.params))
        assert half.dtype == torch.float16
    layer = layer_of(GATED)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(call.x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# Calls that do not fit


def _calls_that_do_not_fit() -> dict[str, tuple[Callable[[], Tensor], str]]:
    mlp, call = compiled(PLAIN), make_call(PLAIN, (5,), 0)
    x, params, operands = call.x, call.params, call.operands

    def run(*args: object, **changes: object) -> Callable[[], Tensor]:
        named = {**operands, **changes}
        return lambda: mlp(*args, **{n: t for n, t in named.items() if t is not None})

    return {
        "width of x": (run(torch.randn(5, 14), *params), r"x\.shape"),
        "x without dimensions": (run(torch.tensor(1.0), *params), r"x\.shape"),
        "x is a list": (run([[1.0] * 13], *params), "x"),
        "dtype of x": (run(x.double(), *params), r"x\.dtype"),
        "integer x": (run(x.long(), *params), r"x\.dtype"),
        "sparse x": (run(x.to_sparse(), *params), r"x\.layout"),
        "device of a weight": (run(x, params[0].to("meta"), *params[1:]), r"fc1\.weight\.device"),
        "too few parameters": (run(x, *params[:-1]), "parameters"),
        "too many parameters": (run(x, *params, params[0]), "parameters"),
        "weight transposed": (run(x, params[0].T, *params[1:]), r"fc1\.weight\.shape"),
        "bias as a row": (run(x, params[0], params[1][None], *params[2:]), r"fc1\.bias\.shape"),
        "dtype of a bias": (run(x, params[0], params[1].half(), *params[2:]), r"fc1\.bias\.dtype"),
        "missing operand": (run(x, *params, residual=None), "missing residual"),
        "unexpected operand": (run(x, *params, gamma=x), "unexpected gamma"),
        "residual that would broadcast": (run(x, *params, residual=torch.randn(9)), r"residual\.shape"),
        "dtype of the residual": (run(x, *params, residual=operands["residual"].double()), r"residual\.dtype"),
        "layer_scale of one": (run(x, *params, layer_scale=torch.ones(1)), r"layer_scale\.shape"),
        "scale of two": (run(x, *params, scale=torch.ones(2)), r"scale\.shape"),
        "scale is a number": (run(x, *params, scale=2.0), "scale"),
    }


@pytest.mark.parametrize("name", list(_calls_that_do_not_fit()))
def test_shape_errors_before_any_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = _calls_that_do_not_fit()[name]

    def launched(*_: object) -> None:
        pytest.fail("a kernel was about to be launched")

    monkeypatch.setattr(ops, "runner", launched)
    with pytest.raises(ShapeError, match=message):
        call()


# torch.compile, export, fake tensors


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@each_spec
def test_torch_compile(spec: MLPSpec, backend: str) -> None:
    """Without graph breaks, forward and backward, with the same bits; other batch sizes recompile at most once."""
    mlp = compiled(spec)
    whole = torch.compile(mlp, fullgraph=True, backend=backend, dynamic=None)
    for rows in (5, 20, 33, 64, 7):
        call = make_call(spec, (rows,), rows)
        (y, grads), (y_whole, grads_whole) = call.gradients(mlp), call.gradients(whole)
        assert same_bits(y, y_whole)
        for name, grad in grads.items():
            assert same_bits(grad, grads_whole[name]), (name, rows)
    assert torch._dynamo.utils.counters["frames"]["total"] <= 3


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_around_other_operations(backend: str) -> None:
    layer = layer_of(GATED)

    def f(x: Tensor) -> Tensor:
        return layer(x * 2).sin().reshape(-1).sum()

    x = torch.randn(3, 7, 24, requires_grad=True)
    f(x).backward()
    wanted = [t.grad.clone() for t in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    torch.compile(f, fullgraph=True, backend=backend)(x).backward()
    for t, grad in zip((x, *layer.parameters()), wanted, strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_under_autocast(backend: str) -> None:
    layer = layer_of(GATED)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, whole = layer(x), torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert whole.dtype == torch.bfloat16 and same_bits(y, whole)
    whole.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


class Positional(nn.Module):
    """An MLP that takes its operands as a list: torch.export names no dynamic dimensions of `**operands`."""

    def __init__(self, layer: MLP) -> None:
        super().__init__()
        self.layer = layer
        self.names = tuple(layer.spec.operands())

    def forward(self, x: Tensor, operands: list[Tensor]) -> Tensor:
        return self.layer(x, **dict(zip(self.names, operands, strict=True)))


@each_spec
def test_export(spec: MLPSpec, tmp_path: Path) -> None:
    """torch.export, with a dynamic batch, saved and loaded: the spec travels in the program."""
    layer = Positional(layer_of(spec).requires_grad_(False))
    x, operands = torch.randn(6, spec.d_in), operands_of(spec, 6)
    rows = torch.export.Dim("rows", min=2, max=1024)
    dynamic = ({0: rows}, [{0: rows} if name == "residual" else None for name in operands])
    program = torch.export.export(layer, (x, list(operands.values())), dynamic_shapes=dynamic)
    assert ops.forward in [node.target for node in program.graph.nodes if node.op == "call_function"]
    torch.export.save(program, tmp_path / "mlp.pt2")
    loaded = torch.export.load(tmp_path / "mlp.pt2").module()
    for rows_now in (6, 33):
        x, operands = torch.randn(rows_now, spec.d_in), list(operands_of(spec, rows_now).values())
        assert same_bits(loaded(x, operands), layer(x, operands))


@each_spec
def test_fake_tensors(spec: MLPSpec) -> None:
    """Fake results have the shapes, dtypes and strides of real ones, with and without saving."""
    for lead in ((), (5,), (2, 3), (0,)):
        call = make_call(spec, lead, 0)
        json, operands = spec.to_json(), list(call.operands.values())
        for save in (False, True):
            real = ops.forward(call.x, call.params, operands, json, save)
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = ops.forward(call.x, call.params, operands, json, save)
            shape = [(t.shape, t.dtype, t.stride()) for t in real]
            assert shape == [(t.shape, t.dtype, t.stride()) for t in fake]
        needs = [True] * len(call.named())
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = ops.backward(call.dy, call.x, call.params, operands, real[1:], needs, json)
        grads = ops.backward(call.dy, call.x, call.params, operands, real[1:], needs, json)
        assert [(t.shape, t.dtype, t.stride()) for t in grads] == [(t.shape, t.dtype, t.stride()) for t in fake]


@each_spec
def test_make_fx(spec: MLPSpec) -> None:
    call = make_call(spec, (5,), 0)
    names = list(call.operands)

    def f(x: Tensor, params: list[Tensor], operands: list[Tensor]) -> Tensor:
        return compiled(spec)(x, *params, **dict(zip(names, operands, strict=True)))

    arguments = (call.x, call.params, list(call.operands.values()))
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*arguments)
        assert any(node.target is ops.forward for node in graph.graph.nodes), mode
        assert same_bits(graph(*arguments), f(*arguments))


# torch.func, checkpoints, gradients that must not be lost


def test_func_grad() -> None:
    layer_params = make_call(DEEP, (5,), 0)
    mlp = compiled(DEEP)
    x, params = layer_params.x, layer_params.params

    def loss(x: Tensor, *params: Tensor) -> Tensor:
        return mlp(x, *params).square().sum()

    grads = torch.func.grad(loss, argnums=tuple(range(1 + len(params))))(x, *params)
    leaves = layer_params.needing()
    loss(leaves.x, *leaves.params).backward()
    for grad, t in zip(grads, (leaves.x, *leaves.params), strict=True):
        assert grad.any()
        torch.testing.assert_close(grad, t.grad)


def test_func_vmap_is_loud_or_right() -> None:
    call = make_call(DEEP, (3, 5), 0)
    mlp = compiled(DEEP)
    try:
        y = torch.func.vmap(lambda x: mlp(x, *call.params))(call.x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(y, mlp(call.x, *call.params))


def test_per_sample_gradients_are_loud_or_right() -> None:
    call = make_call(DEEP, (5,), 0)
    mlp = compiled(DEEP)
    one = torch.func.grad(lambda w, x: mlp(x, w, *call.params[1:]).square().sum())
    wanted = torch.stack([one(call.params[0], x) for x in call.x])
    assert wanted.any()
    try:
        grads = torch.func.vmap(one, (None, 0))(call.params[0], call.x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(grads, wanted)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_func_grad_is_never_silently_zero(backend: str) -> None:
    call = make_call(DEEP, (5,), 0)
    mlp = compiled(DEEP)
    grad = torch.func.grad(lambda x: mlp(x, *call.params).square().sum())
    wanted = grad(call.x)
    try:
        found = torch.compile(grad, backend=backend)(call.x)
    except Exception:  # in whatever dynamo wraps it: it is loud
        return
    assert wanted.any()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transform", ["jvp", "hessian", "jacrev"])
def test_other_transforms_are_loud_or_right(transform: str) -> None:
    call = make_call(SINGLE, (2,), 0)
    mlp, eager = compiled(SINGLE), mlpdsl.reference(SINGLE)

    def apply(f: Callable[..., Tensor]) -> object:
        g = lambda x: f(x, *call.params).square().sum()  # noqa: E731
        if transform == "jvp":
            return torch.func.jvp(g, (call.x,), (torch.ones_like(call.x),))[1]
        return getattr(torch.func, transform)(g)(call.x)

    wanted = apply(eager)
    try:
        found = apply(mlp)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_loses_no_tangent(needs_grad: bool) -> None:
    call = make_call(DEEP, (5,), 0)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(call.x.detach().requires_grad_(needs_grad), torch.ones_like(call.x))
        try:
            y = compiled(DEEP)(x, *call.params)
        except (RuntimeError, NotImplementedError):
            return
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None, "the tangent was lost"


def test_gradient_penalty_raises() -> None:
    """The second derivative of y.sum() is not lost in silence."""
    call = make_call(DEEP, (5,), 0).needing()
    y = call.run(compiled(DEEP))
    (grad,) = torch.autograd.grad(y.sum(), call.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_the_bare_op_does_not_lose_gradients() -> None:
    """torch.ops.mlpdsl.forward called by hand on tensors that require grad: an error or a gradient, never a detached result."""
    call = make_call(DEEP, (5,), 0).needing()
    try:
        y = ops.forward(call.x, call.params, [], DEEP.to_json(), False)[0]
        y.sum().backward()
    except (RuntimeError, NotImplementedError):
        return
    assert call.x.grad is not None and call.x.grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    layer = layer_of(GATED)
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = [t.grad.clone() for t in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for t, grad in zip((x, *layer.parameters()), wanted, strict=True):
        assert same_bits(t.grad, grad)


def test_selective_checkpoint_sees_the_op() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    layer = layer_of(GATED)
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = x.grad.clone()
    x.grad = None
    seen: list[object] = []

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> object:
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op in ops.OPS else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    y.square().sum().backward()
    assert ops.forward in seen
    assert same_bits(x.grad, wanted)


def test_inference_mode_and_inference_tensors() -> None:
    call = make_call(GATED, (5,), 0)
    mlp = compiled(GATED)
    y = call.run(mlp)
    with torch.inference_mode():
        assert same_bits(call.run(mlp), y)
        x = call.x.clone()
    assert same_bits(mlp(x, *call.params), y)


def test_hooks_and_accumulation() -> None:
    """Parameter hooks run, and gradients accumulate over two backward passes."""
    layer = layer_of(GATED)
    seen: list[str] = []
    for name, p in layer.named_parameters():
        p.register_hook(lambda grad, name=name: seen.append(name))
    x = torch.randn(5, 24)
    layer(x).sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    layer(x).sum().backward()
    assert sorted(seen) == sorted(2 * [name for name, _ in layer.named_parameters()])
    for p, grad in zip(layer.parameters(), once, strict=True):
        assert same_bits(p.grad, grad * 2)


# Backends


def test_backend_by_argument_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(GATED, (5,), 0)
    launched: list[str] = []
    real = ops.runner
    monkeypatch.setattr(ops, "runner", lambda *args: launched.append("triton") or real(*args))
    eager = mlpdsl.reference(GATED)
    wanted = call.run(eager)
    assert same_bits(call.run(mlpdsl.compile(GATED, backend="eager")), wanted) and not launched
    monkeypatch.setenv("MLPDSL_BACKEND", "eager")
    assert same_bits(call.run(mlpdsl.compile(GATED)), wanted) and not launched
    call.run(mlpdsl.compile(GATED, backend="triton"))
    assert launched, "an argument outranks the variable"
    launched.clear()
    monkeypatch.delenv("MLPDSL_BACKEND")
    call.run(mlpdsl.compile(GATED))
    assert launched, "the interpreter makes triton the default on a CPU"
    monkeypatch.setenv("MLPDSL_BACKEND", "")
    mlpdsl.compile(GATED)


def test_invalid_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("tritn", "", 3, b"triton", None):
        if wrong is not None:
            with pytest.raises(SpecError, match=r"backend.*'triton', 'pallas', 'eager'"):
                mlpdsl.compile(GATED, backend=wrong)
    monkeypatch.setenv("MLPDSL_BACKEND", "tritn")
    with pytest.raises(SpecError, match=r"MLPDSL_BACKEND.*Did you mean 'triton'"):
        mlpdsl.compile(GATED)


def test_unsupported_says_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(GATED, (5,), 0)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match=r"backend 'triton' cannot run on cpu") as error:
        call.run(mlpdsl.compile(GATED, backend="triton"))
    assert len(error.value.reasons) == 1 and "TRITON_INTERPRET=1" in error.value.reasons[0]
    assert same_bits(call.run(mlpdsl.compile(GATED)), call.run(mlpdsl.reference(GATED))), "by itself it falls back"
    with pytest.raises(UnsupportedError) as error:
        mlpdsl.compile(GATED, save="input", batch_invariant=True, backend="eager")
    assert len(error.value.reasons) == 2
    with pytest.raises(UnsupportedError, match=r"backend 'triton' cannot run on cpu"):  # and never by eager PyTorch
        call.run(mlpdsl.compile(GATED, batch_invariant=True))
    with pytest.raises(SpecError, match="save"):
        mlpdsl.compile(GATED, save="nothing")
    with pytest.raises(SpecError, match="batch_invariant"):
        mlpdsl.compile(GATED, batch_invariant=1)
    with pytest.raises(SpecError, match="MLPSpec"):
        mlpdsl.compile(GATED.to_json())


@each_spec
def test_eager_backend_is_within_the_oracle(spec: MLPSpec) -> None:
    """The reference itself, in float32: forward and every gradient; and it differentiates twice."""
    call = make_call(spec, (9,), 0)
    y, grads = call.gradients(mlpdsl.compile(spec, backend="eager"))
    oracle.check(y, oracle.forward(spec, call.x, call.params, call.operands), "y")
    for name, wanted in oracle.backward(spec, call.x, call.params, call.operands, call.dy).items():
        oracle.check(grads[name], wanted, name)


def test_warmup_and_explain() -> None:
    mlpdsl.warmup(GATED, m=(0, 1, 5), backward=True)
    with pytest.raises(ShapeError):
        mlpdsl.warmup(GATED, m=(-1,))
    text = str(mlpdsl.explain(GATED, m=5))
    assert "m=5" in text and GATED.short_name in text
