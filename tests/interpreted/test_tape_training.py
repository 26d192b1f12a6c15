"""Recorded calls whose gradients are needed go past torch's dispatcher: the same bits, and everybody who listens is heard."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import threading
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from mlpdsl import ShapeError, dispatch, ops
from mlpdsl.tape import Tape
from mlpdsl.testing.calls import Call, make_call, same_bits
from tests.recordings import (
    EPILOGUE,
    LEADS,
    Seen,
    anew,
    assert_same,
    compiled,
    each_spec,
    negative,
    plain_gradients,
    plainly,
    unrecorded,
)

pytestmark = pytest.mark.usefixtures("no_recordings")


def _stop(*_: Any, **__: Any) -> Any:
    raise AssertionError("the operator was asked")


def no_operator() -> Any:
    """Inside, a call that goes through torch's dispatcher fails."""
    return mock.patch.multiple(ops, forward=_stop, backward=_stop)


def learnt(call: Call, **options: Any) -> Callable[..., Tensor]:
    mlp = compiled(call.spec, **options)
    for _ in range(3):
        call.gradients(mlp)
    return mlp


@pytest.mark.parametrize("lead", LEADS, ids=str)
@each_spec
def test_the_fourth_step_asks_no_operator(spec: Any, lead: tuple[int, ...], replays: list[Tape]) -> None:
    first = make_call(spec, lead, 1)
    mlp = learnt(first)
    for seed in (2, 3):
        call = anew(first, seed)
        with no_operator():
            found = call.gradients(mlp)
        assert_same(found, plain_gradients(call))
        found[0].detach().add_(1.0)  # it may be written to
    assert len(replays) == 6  # the third step's too


def test_batch_invariant_steps_too() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call, batch_invariant=True)
    with no_operator():
        found = call.gradients(mlp)
    assert_same(found, plain_gradients(call, batch_invariant=True))


def test_modes_hear_of_both_operators() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    wanted = plain_gradients(call)
    with Seen() as heard:
        assert_same(call.gradients(mlp), wanted)
    assert [heard.seen.count(op) for op in ops.OPS] == [1, 1]


def test_profilers_hear_of_both_operators() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call.gradients(mlp)
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert counts["mlpdsl::forward"] == counts["mlpdsl::backward"] == 1


def test_launch_hooks_are_heard() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    hook = _stop
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        with pytest.raises(AssertionError, match="the operator was asked"), no_operator():
            call.gradients(mlp)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@pytest.mark.parametrize("listener", ["mode", "profiler", "hook"])
def test_whoever_begins_to_listen_after_forward_hears_of_backward(listener: str) -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp, tensors = learnt(call), [t.requires_grad_() for t in call.named().values()]
    wanted = torch.autograd.grad(call.run(mlp), tensors, torch.ones_like(call.dy))
    y, grad = call.run(mlp), torch.ones_like(call.dy)
    if listener == "mode":
        with Seen() as heard:
            found = torch.autograd.grad(y, tensors, grad)
        assert heard.seen.count(ops.backward) == 1
    elif listener == "profiler":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            found = torch.autograd.grad(y, tensors, grad)
        assert "mlpdsl::backward" in {e.key for e in profiler.key_averages()}
    else:
        heard_of: list[Any] = []
        knobs.runtime.launch_enter_hook.add(heard_of.append)
        try:
            with pytest.raises(AssertionError, match="the operator was asked"), no_operator():
                torch.autograd.grad(y, tensors, grad, retain_graph=True)
        finally:
            knobs.runtime.launch_enter_hook.remove(heard_of.append)
        found = torch.autograd.grad(y, tensors, grad)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_was_saved_and_comes_back_elsewhere() -> None:
    """Hooks may hand other tensors to backward: weights that lie elsewhere, x without its alignment."""
    call = make_call(EPILOGUE, (5,), 1)
    mlp, tensors = learnt(call), [t.requires_grad_() for t in call.named().values()]
    wanted = torch.autograd.grad(call.run(mlp), tensors, call.dy)

    def moved(t: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=t.dtype), t.detach().flatten()])[1:].view(t.shape)

    for unpack in (lambda t: t.detach().clone(), moved, lambda t: t.detach().to(torch.float64).to(t.dtype).t().contiguous().t()
                   if t.dim() == 2 else t):  # fmt: skip
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = call.run(mlp)
        found = torch.autograd.grad(y, tensors, call.dy)
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_is_forgotten_is_not_repeated_by_a_backward_under_way() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp, tensors = learnt(call), [t.requires_grad_() for t in call.named().values()]
    wanted = torch.autograd.grad(call.run(mlp), tensors, call.dy)
    y = call.run(mlp)
    dispatch.forget()
    with pytest.raises(AssertionError, match="the operator was asked"), no_operator():
        torch.autograd.grad(y, tensors, call.dy, retain_graph=True)
    for _ in range(3):
        found = torch.autograd.grad(y, tensors, call.dy, retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("at", ["x", "a bias"])
def test_a_tensor_that_outlived_its_transform(at: str) -> None:
    """It has no memory that can be asked for; torch's operators unwrap it."""
    call = make_call(EPILOGUE, (5,), 1)
    mlp, params, kept = compiled(call.spec), list(call.params), list[Tensor]()
    torch.func.grad(lambda t: (kept.append(t), t.sum())[1])(call.x if at == "x" else params[1])
    x = kept[0] if at == "x" else call.x
    params[1] = kept[0] if at != "x" else params[1]
    params[0].requires_grad_()
    for _ in range(4):
        assert same_bits(mlp(x, *params, **call.operands).detach(), plainly(call))


def test_a_weight_whose_memory_was_given_back() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    call.x.requires_grad_()
    params = [p.detach().clone() for p in call.params]
    params[0].untyped_storage().resize_(0)
    with pytest.raises(ShapeError, match="0 bytes of memory left"):
        mlp(call.x, *params, **call.operands)
    y = mlp(call.x, *call.params, **call.operands)
    call.params[0].untyped_storage().resize_(0)
    with pytest.raises(ShapeError, match="0 bytes of memory left"):
        torch.autograd.grad(y, call.x, torch.ones_like(y))


def test_a_tangent_of_the_gradient_is_not_lost() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    call.x.requires_grad_()
    y, dy = call.run(compiled(call.spec)), torch.ones_like(call.dy)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y, call.x, torch.autograd.forward_ad.make_dual(dy, dy))


def test_weights_that_move_between_steps() -> None:
    """As an optimiser that makes new ones moves them: the step is another kind, and right."""
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    for seed in (2, 3):
        other = make_call(EPILOGUE, (5,), seed)
        assert_same(other.gradients(mlp), plain_gradients(other))


class _Sub(Tensor):
    """A tensor that hears of every function that it is given to."""

    heard: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def _every_other(t: Tensor) -> Tensor:
    """What lies as `negative(t)` does, and means what it holds."""
    return torch.view_as_complex(torch.stack([torch.zeros_like(t), t], -1)).imag


def _varied(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "negative": (lambda y: _every_other(_varied(y)), lambda y: negative(_varied(y))),
    "zero without memory": (_varied, lambda y: torch._efficientzerotensor(y.shape, dtype=y.dtype)),
    "subclass": (_varied, lambda y: _varied(y).as_subclass(_Sub)),
    "expanded": (_varied, lambda y: torch.ones((), dtype=y.dtype).expand(y.shape)),
    "transposed": (_varied, lambda y: _varied(y.t()).t()),
}
"""A gradient of y that is recorded, and another that lies like it or not, for which the dispatcher may have something to do."""


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_no_plain_memory(name: str, replays: list[Tape]) -> None:
    recorded, of_y = GRADIENTS[name]
    call = make_call(EPILOGUE, (5,), 1)
    mlp, tensors = compiled(call.spec), [t.requires_grad_() for t in call.named().values()]

    def grads(of_y: Callable[[Tensor], Tensor], mlp: Callable[..., Tensor] = mlp) -> list[Tensor]:
        y = call.run(mlp)
        return list(torch.autograd.grad(y, tensors, of_y(y)))

    for _ in range(4):
        grads(recorded)
    assert len(replays) == 4, "forward and backward are known"
    for _ in range(3):
        found = grads(of_y)
        with unrecorded():
            wanted = grads(lambda y: of_y(y).as_subclass(Tensor).resolve_neg() + 0.0, compiled(call.spec))
        assert all(same_bits(a + 0.0, b + 0.0) for a, b in zip(found, wanted, strict=True))


def test_a_subclass_hears_of_the_operator() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp, tensors = compiled(call.spec), [t.requires_grad_() for t in call.named().values()]
    for make in (_varied, _varied, _varied, _varied, lambda y: _varied(y).as_subclass(_Sub)):
        y = call.run(mlp)
        _Sub.heard.clear()
        torch.autograd.grad(y, tensors, make(y))
    assert _Sub.heard.count(ops.backward) == 1


def test_a_negative_x() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp, alike = compiled(call.spec), _every_other(call.x.detach()).requires_grad_()
    for _ in range(3):
        mlp(alike, *call.params, **call.operands)
    x = negative(call.x.detach()).requires_grad_()
    wanted = mlp(x.detach().resolve_neg().clone().requires_grad_(), *call.params, **call.operands)
    assert same_bits(mlp(x, *call.params, **call.operands), wanted)


def test_second_derivatives_still_raise() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    x = call.x.detach().clone().requires_grad_()
    y = mlp(x, *call.params, **call.operands)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), x)


def test_compiled_steps_hold_both_operators() -> None:
    """torch.compile traces the operators, whatever was recorded before."""
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    step = torch.compile(mlp, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))
    leaves = [t.detach().clone().requires_grad_() for t in (call.x, *call.params)]
    step(*leaves, **call.operands).sum().backward()
    assert [seen.count(op) for op in ops.OPS] == [1, 1]
    torch.compiler.reset()


def test_in_another_thread() -> None:
    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    wanted = plain_gradients(call)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call.gradients(mlp)))
    thread.start()
    thread.join()
    assert_same(found[0], wanted)
