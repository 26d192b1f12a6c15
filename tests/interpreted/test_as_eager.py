"""What eager PyTorch does, and a program may rely on: whose memory gradients are, what backward keeps, which hooks run."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLP, MLPSpec, UnsupportedError
from mlpdsl.testing.calls import make_call, same_bits
from tests.recordings import compiled

pytestmark = pytest.mark.usefixtures("no_recordings")

SUMMED = mlpdsl.epilogue(lambda y, a, b: F.silu(y + a + b), a="tile", b="tile")
TWICE = MLPSpec(dims=(8, 12, 8), activation="gelu", epilogue=(SUMMED,))
ADDED = MLPSpec(dims=(8, 12, 8), activation="gelu", bias=True, epilogue=("layer_scale", "residual"))
FINISHED = MLPSpec(dims=(8, 12, 8), activation="gelu", epilogue=("silu",))

CALLS = 4
"""Checked, recorded, repeated, repeated."""


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_two_operands_of_one_gradient_have_memory_of_their_own(lead: tuple[int, ...]) -> None:
    """Autograd adds in place to what it took for its own."""
    mlp, call = compiled(TWICE), make_call(TWICE, lead, 0)

    def run(*operands: Tensor) -> Tensor:
        return mlp(call.x.detach(), *call.params, **dict(zip(call.operands, operands, strict=True)))

    for _ in range(CALLS):
        a, b = (t.detach().clone().requires_grad_() for t in call.operands.values())
        (once,) = torch.autograd.grad(run(a, b), a, call.dy)
        for _ in range(2):
            run(a, b).backward(call.dy)
        assert a.grad is not None and b.grad is not None and a.grad.data_ptr() != b.grad.data_ptr()
        torch.testing.assert_close(a.grad, 2 * once)
        assert same_bits(a.grad, b.grad)


@pytest.mark.parametrize("spec", [ADDED, FINISHED], ids=lambda spec: spec.short_name)
def test_a_hook_may_hand_over_what_was_saved_in_other_strides(spec: MLPSpec) -> None:
    def otherwise(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    mlp, call = compiled(spec), make_call(spec, (5,), 0).needing()
    wanted = call.gradients(mlp)
    for _ in range(CALLS):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), otherwise):
            found = call.gradients(mlp)
        for name, grad in wanted[1].items():
            assert same_bits(found[1][name], grad), name


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_of_the_result_is_no_gradient_of_a_parameter() -> None:
    """An optimizer leaves out what has none, and decays what has one of zeros."""
    layer, other = MLP(ADDED, backend="triton"), torch.ones(8, requires_grad=True)
    for _ in range(CALLS):
        y = layer(torch.randn(5, 8), layer_scale=torch.ones(8), residual=torch.zeros(5, 8))
        (_Stop.apply(y) + other).sum().backward()
        assert all(p.grad is None for p in layer.parameters())


def test_what_is_only_added_is_free_after_the_call() -> None:
    """A residual stream may be added to in place, a buffer be used for the next layer, and nothing keeps it."""
    mlp, call = compiled(ADDED), make_call(ADDED, (5,), 0)
    x, scale, residual = call.x.detach(), call.operands["layer_scale"].detach(), call.operands["residual"].detach()
    wanted = call.gradients(mlp)
    for _ in range(CALLS):
        given = residual.clone().requires_grad_()
        stream = given * 1.0
        params = [p.detach().clone().requires_grad_() for p in call.params]
        y = mlp(x, *params, layer_scale=scale, residual=stream)
        stream += 1.0
        y.backward(call.dy)
        assert given.grad is not None and same_bits(given.grad, call.dy)
        for p, name in zip(params, ADDED.parameter_shapes(), strict=True):
            assert same_bits(p.grad, wanted[1][name]), name
        buffer = residual.clone()
        gone = weakref.ref(buffer)
        y = mlp(x, *params, layer_scale=scale, residual=buffer)
        del buffer
        assert gone() is None
        y.backward(call.dy)


@pytest.mark.parametrize("change", ["backward hook", "backward pre-hook", "forward hook", "forward"])
def test_what_a_linear_would_do_beside_its_product_is_not_skipped(change: str) -> None:
    layer = MLP(FINISHED, backend="triton")
    linear = next(m for m in layer.modules() if isinstance(m, nn.Linear))
    if change == "forward":
        linear.forward = lambda x: x  # type: ignore[method-assign]
    else:
        words = {
            "backward hook": "full_backward_hook",
            "backward pre-hook": "full_backward_pre_hook",
            "forward hook": "forward_hook",
        }
        getattr(linear, f"register_{words[change]}")(lambda *_: None)
    with pytest.raises(UnsupportedError, match="would skip"):
        layer(torch.randn(5, 8))


def test_transforms_of_torchs_older_kind_are_told_of_the_newer() -> None:
    mlp, call = compiled(FINISHED), make_call(FINISHED, (3,), 0)
    for _ in range(CALLS):
        x = call.x.detach().requires_grad_()
        y = mlp(x, *call.params)
        with pytest.raises(UnsupportedError, match=r"torch\.func\.jacrev"):
            torch.autograd.grad(y, x, torch.ones(2, 3, 8), is_grads_batched=True)


def test_vmap_over_no_examples() -> None:
    mlp, call = compiled(FINISHED), make_call(FINISHED, (3,), 0)
    params = [p.detach() for p in call.params]
    assert torch.func.vmap(lambda x: mlp(x, *params))(torch.zeros(0, 3, 8)).shape == (0, 3, 8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_tensor_given_twice_to_a_compiled_call(backend: str) -> None:
    """As in mlp(x, residual=x), or with tied weights."""
    tied = MLPSpec(dims=(8, 8, 8), activation="silu", gated=True)
    for spec in (ADDED, tied):
        mlp, call = compiled(spec), make_call(spec, (5,), 0).needing()
        params = [call.params[0], call.params[0], call.params[2]] if spec == tied else call.params
        operands = {name: call.x if name == "residual" else t for name, t in call.operands.items()}
        leaves = [call.x, *dict.fromkeys(params)]
        whole = torch.compile(mlp, fullgraph=True, backend=backend)
        found, wanted = (torch.autograd.grad(f(call.x, *params, **operands), leaves, call.dy) for f in (whole, mlp))
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
