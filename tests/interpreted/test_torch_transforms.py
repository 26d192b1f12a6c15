"""The compiled MLP under torch.compile, export, fake tensors, torch.func and checkpoints."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import make_call, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import mlpdsl
from mlpdsl import MLP, MLPSpec, ops
from tests.layers import DEEP, GATED, SINGLE, compiled, each_spec, layer_of, operands_of

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
