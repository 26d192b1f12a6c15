"""Recorded calls whose gradients are needed go past torch's dispatcher: the same bits, and everybody who listens is heard."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from mlpdsl import ops
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
)

pytestmark = pytest.mark.usefixtures("no_recordings")


def _stop(*_: Any, **__: Any) -> Any:
    raise AssertionError("the operator was asked")


def no_operator() -> Any:
    """Inside, a call that goes through torch's dispatcher fails."""
    return mock.patch.multiple(ops, forward=_stop, backward=_stop)


def learnt(call: Call, **options: Any) -> Callable[..., Tensor]:
    mlp = compiled(call.spec, **options)
    for _ in range(2):
        call.gradients(mlp)
    return mlp


@pytest.mark.parametrize("lead", LEADS, ids=str)
@each_spec
def test_the_third_step_asks_no_operator(spec: Any, lead: tuple[int, ...], replays: list[Tape]) -> None:
    first = make_call(spec, lead, 1)
    mlp = learnt(first)
    for seed in (2, 3):
        call = anew(first, seed)
        with no_operator():
            found = call.gradients(mlp)
        assert_same(found, plain_gradients(call))
        found[0].detach().add_(1.0)  # it may be written to
    assert len(replays) == 4


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


def _grads(call: Call, mlp: Callable[..., Tensor], of_y: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.named().items()}
    count = 1 + len(call.params)
    tensors = list(leaves.values())
    y = mlp(*tensors[:count], **dict(list(leaves.items())[count:]))
    return list(torch.autograd.grad(y, tensors, of_y(y)))


class _Sub(Tensor):
    pass


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
def test_gradients_that_are_no_plain_memory(name: str) -> None:
    recorded, of_y = GRADIENTS[name]
    call = make_call(EPILOGUE, (5,), 1)
    mlp = compiled(call.spec)
    for given in (recorded, recorded, recorded, of_y, of_y, of_y):
        found = _grads(call, mlp, given)
        wanted = _grads(call, mlp, lambda y, given=given: given(y).as_subclass(Tensor).resolve_neg() + 0.0)
        assert all(same_bits(a + 0.0, b + 0.0) for a, b in zip(found, wanted, strict=True))


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


def test_threads_of_autograd() -> None:
    """Backward of a graph that another thread runs."""
    import threading

    call = make_call(EPILOGUE, (5,), 1)
    mlp = learnt(call)
    wanted = plain_gradients(call)
    found: list[Any] = []
    thread = threading.Thread(target=partial(lambda: found.append(call.gradients(mlp))))
    thread.start()
    thread.join()
    assert_same(found[0], wanted)
