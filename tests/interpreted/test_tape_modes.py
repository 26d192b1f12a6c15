"""Recorded calls and everything else of torch: the same errors, types and operators that are heard of."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from triton import knobs

import mlpdsl
from mlpdsl import MLPSpec, dispatch, ops
from mlpdsl.agreement import hooked
from mlpdsl.tape import Recorder, Tape
from mlpdsl.testing.calls import Call, guarded_allocations, make_call, same_bits
from tests.recordings import (
    OPERANDS,
    Seen,
    anew,
    assert_same,
    compiled,
    negative,
    outcome,
    plain_gradients,
    plainly,
    unrecorded,
)

pytestmark = pytest.mark.usefixtures("no_recordings")


# After a kind of call was learnt, everything else is as it was


class _Logged(Tensor):
    """A tensor that hears of every function that it is given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


_heard: list[Any] = []


@pytest.fixture
def learnt(replays: list[Tape]) -> Iterator[tuple[Callable[..., Tensor], Call]]:
    """An MLP that repeats its calls, and such a call; what it gives for it is right then and afterwards."""
    call = make_call(OPERANDS, (4,), 0)
    wanted, mlp = plainly(call), compiled(OPERANDS)
    for _ in range(3):
        call.run(mlp)
    replays.clear()
    assert same_bits(call.run(mlp), wanted) and len(replays) == 1
    replays.clear()
    yield mlp, call
    replays.clear()
    assert same_bits(call.run(mlp), wanted)
    assert len(replays) == 1


def _other_calls(call: Call) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments that are not quite those that were learnt, by name."""
    x, params, operands = call.x, call.params, call.operands
    residual, scale = operands["residual"], operands["scale"]

    def given(*args: Any, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**operands, **changes}
        return args, {name: t for name, t in named.items() if t is not None}

    with torch.inference_mode():
        inference = x.clone()
    on_meta = given(*(t.to("meta") for t in (x, *params)), **{name: t.to("meta") for name, t in operands.items()})
    return {
        "x of float64": given(x.double(), *params),
        "x of float16": given(x.half(), *params),
        "x of integers": given(x.view(torch.int32), *params),
        "x too wide": given(torch.randn(4, 13), *params),
        "x of other rows": given(torch.randn(5, 12), *params),
        "x transposed": given(torch.randn(12, 4).t(), *params),
        "x on meta": given(x.to("meta"), *params),
        "all on meta": on_meta,
        "x sparse": given(x.to_sparse(), *params),
        "x sparse by rows": given(x.to_sparse_csr(), *params),
        "x nested": given(torch.nested.nested_tensor([x, x]), *params),
        "x in mkldnn's layout": given(x.to_mkldnn(), *params),
        "x a list": given(x.tolist(), *params),
        "x an array": given(x.numpy(), *params),
        "x None": given(None, *params),
        "x a parameter": given(nn.Parameter(x.clone()), *params),
        "x a parameter without gradient": given(nn.Parameter(x.clone(), False), *params),
        "x of a subclass": given(x.clone().as_subclass(_Logged), *params),
        "x of an inference": given(inference, *params),
        "x negative": given(negative(x), *params),
        "x zero without memory": given(torch._efficientzerotensor((4, 12)), *params),
        "x functional": given(torch._to_functional_tensor(x.clone()), *params),
        "x requires grad": given(x.clone().requires_grad_(), *params),
        "a weight of float16": given(x, params[0].half(), *params[1:]),
        "a weight on meta": given(x, params[0].to("meta"), *params[1:]),
        "a weight transposed": given(x, params[0].t(), *params[1:]),
        "a weight sparse": given(x, params[0].to_sparse(), *params[1:]),
        "a weight nested": given(x, torch.nested.nested_tensor([params[0], params[0]]), *params[1:]),
        "a bias nested": given(x, params[0], torch.nested.nested_tensor([params[1], params[1]]), *params[2:]),
        "a weight of a subclass": given(x, params[0].clone().as_subclass(_Logged), *params[1:]),
        "a weight of a subclass, at its place": given(x, params[0].as_subclass(_Logged), *params[1:]),
        "a weight negative": given(x, negative(params[0]), *params[1:]),
        "a weight zero without memory": given(x, torch._efficientzerotensor((12, 12)), *params[1:]),
        "a weight None": given(x, None, *params[1:]),
        "a weight an array": given(x, params[0].numpy(), *params[1:]),
        "a weight a parameter": given(x, nn.Parameter(params[0]), *params[1:]),
        "a bias as a row": given(x, params[0], params[1][None], *params[2:]),
        "too few parameters": given(x, *params[:-1]),
        "too many parameters": given(x, *params, params[-1]),
        "no parameter": given(x),
        "parameters in another order": given(x, *reversed(params)),
        "no residual": given(x, *params, residual=None),
        "no operands": ((x, *params), {}),
        "an unexpected operand": given(x, *params, gamma=x),
        "an operand of another name": given(x, *params, scale=None, factor=scale),
        "operands in another order": ((x, *params), dict(reversed(operands.items()))),
        "residual that would broadcast": given(x, *params, residual=torch.randn(12)),
        "residual of float64": given(x, *params, residual=residual.double()),
        "residual on meta": given(x, *params, residual=residual.to("meta")),
        "residual sparse": given(x, *params, residual=residual.to_sparse()),
        "residual nested": given(x, *params, residual=torch.nested.nested_tensor([residual, residual])),
        "residual of a subclass": given(x, *params, residual=residual.clone().as_subclass(_Logged)),
        "residual negative": given(x, *params, residual=negative(residual)),
        "residual requires grad": given(x, *params, residual=residual.clone().requires_grad_()),
        "scale a number": given(x, *params, scale=0.5),
        "scale of two": given(x, *params, scale=torch.ones(2)),
        "scale of another shape": given(x, *params, scale=scale.reshape(1, 1)),
        "scale of bfloat16": given(x, *params, scale=scale.bfloat16()),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR")
@pytest.mark.parametrize("name", _other_calls(make_call(OPERANDS, (4,), 0)))
def test_other_calls_after_one_was_learnt(name: str, learnt: tuple[Callable[..., Tensor], Call], replays: list[Tape]) -> None:
    """The same error in the same words, or the same result of the same type, the first time and when it too could be learnt."""
    mlp, call = learnt
    args, operands = _other_calls(call)[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _heard.clear()
            with unrecorded():
                wanted = outcome(lambda: compiled(OPERANDS)(*args, **operands))
            for _ in range(4 - grad):
                assert ("subclass" in name) == (ops.forward in _heard), "a subclass is asked each time"
                _heard.clear()
                assert outcome(lambda: mlp(*args, **operands)) == wanted
        if wanted[0] is mlpdsl.ShapeError:
            assert not replays


class _Asked(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, _Asked])
def test_modes_hear_of_the_operator(mode: Any, learnt: tuple[Callable[..., Tensor], Call], replays: list[Tape]) -> None:
    mlp, call = learnt
    with mode() as fresh:
        wanted = call.run(compiled(OPERANDS))
    heard = fresh.seen.count(ops.forward)
    assert heard == 1
    replays.clear()
    for _ in range(3):
        with mode() as now:
            assert same_bits(call.run(mlp), wanted)
        assert now.seen.count(ops.forward) == heard


def test_profilers_hear_of_the_operator(learnt: tuple[Callable[..., Tensor], Call]) -> None:
    mlp, call = learnt
    for profile in (
        partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU]),
        torch.autograd.profiler.profile,
    ):
        with profile() as profiler:
            call.run(mlp)
        assert [e.count for e in profiler.key_averages() if e.key == "mlpdsl::forward"] == [1]


def test_launch_hooks_are_not_passed_by(learnt: tuple[Callable[..., Tensor], Call], replays: list[Tape]) -> None:
    """While somebody is to be told of launches, they are Triton's own."""
    mlp, call = learnt
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        assert not hooked()
        hook = _ignored
        hooks.add(hook)
        try:
            assert hooked()
            assert same_bits(call.run(mlp), plainly(call))
            assert_same(call.gradients(mlp), plain_gradients(call))
            assert not replays
        finally:
            hooks.remove(hook)
    for _ in range(3):
        call.gradients(mlp)
    assert replays


def _ignored(metadata: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts(dtype: torch.dtype, learnt: tuple[Callable[..., Tensor], Call]) -> None:
    mlp, call = learnt
    for _ in range(4):
        with torch.autocast("cpu", dtype):
            wanted = outcome(lambda: call.run(compiled(OPERANDS)))
            assert wanted[2] == dtype
            assert outcome(lambda: call.run(mlp)) == wanted
        with torch.autocast("cpu", dtype, enabled=False):
            assert call.run(mlp).dtype == torch.float32


def _transforms(call: Call) -> dict[str, Callable[[Callable[..., Tensor]], Any]]:
    operands = call.operands

    def loss(mlp: Callable[..., Tensor], x: Tensor) -> Tensor:
        return mlp(x, *call.params, **operands).square().sum()

    def dual(mlp: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(call.x, torch.ones_like(call.x))
            return forward_ad.unpack_dual(mlp(x, *call.params, **operands)).tangent

    def in_a_level(mlp: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            return mlp(call.x, *call.params, **operands)

    def fake(mlp: Callable[..., Tensor]) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return mlp(call.x, *call.params, **operands)

    def mixed(mlp: Callable[..., Tensor]) -> Any:
        weight = FakeTensorMode().from_tensor(call.params[0])
        return mlp(call.x, weight, *call.params[1:], **operands)

    def stacked(mlp: Callable[..., Tensor]) -> Any:
        xs = torch.stack([call.x, call.x + 1])
        return torch.func.vmap(lambda x: mlp(x, *call.params, **operands))(xs)

    def over_weights(mlp: Callable[..., Tensor]) -> Any:
        weights = torch.stack([call.params[0], call.params[0] + 1])
        return torch.func.vmap(lambda w: mlp(call.x, w, *call.params[1:], **operands))(weights)

    def of_weight(mlp: Callable[..., Tensor]) -> Any:
        return torch.func.grad(lambda w: mlp(call.x, w, *call.params[1:], **operands).sum())(call.params[0])

    return {
        "vmap": stacked,
        "vmap over weights": over_weights,
        "grad": lambda mlp: torch.func.grad(partial(loss, mlp))(call.x),
        "grad of a weight": of_weight,
        "per sample": lambda mlp: torch.func.vmap(torch.func.grad(partial(loss, mlp)))(torch.stack([call.x, call.x + 1])),
        "vjp": lambda mlp: torch.func.vjp(partial(loss, mlp), call.x)[1](torch.tensor(1.0))[0],
        "jvp": lambda mlp: torch.func.jvp(partial(loss, mlp), (call.x,), (torch.ones_like(call.x),))[1],
        "functionalize": lambda mlp: torch.func.functionalize(lambda x: mlp(x, *call.params, **operands))(call.x),
        "dual": dual,
        "in a level of forward AD": in_a_level,
        "fake": fake,
        "fake weight": mixed,
    }


@pytest.mark.filterwarnings("error:Accessing the data pointer")
@pytest.mark.parametrize("name", _transforms(make_call(OPERANDS, (4,), 0)))
def test_transforms_are_what_they_were(name: str, learnt: tuple[Callable[..., Tensor], Call]) -> None:
    """Under each of them the result, or the error, of an MLP that has learnt nothing."""
    mlp, call = learnt
    transform = _transforms(call)[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = outcome(lambda: transform(compiled(OPERANDS)))
            for _ in range(3):
                assert outcome(lambda: transform(mlp)) == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_traces_the_operator(learnt: tuple[Callable[..., Tensor], Call]) -> None:
    mlp, call = learnt
    texts = []
    for each in (compiled(OPERANDS), mlp):
        traced = torch.jit.trace(lambda x, each=each: each(x, *call.params, **call.operands) + 1, (call.x,))
        texts.append(str(traced.inlined_graph).count("mlpdsl::forward"))
        assert same_bits(traced(call.x * 2), mlp(call.x * 2, *call.params, **call.operands) + 1)
    assert texts == [1, 1]
    assert [shape for shape, _ in mlp._shortcut._kinds] == [call.x.shape], (
        "sizes are tensors while torch traces, and nothing to remember"
    )


def test_torch_compile_after_a_kind_was_learnt(learnt: tuple[Callable[..., Tensor], Call]) -> None:
    """Without a graph break, with the operator in the graph, and no trace of what was learnt."""
    mlp, call = learnt
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    whole = torch.compile(mlp, fullgraph=True, backend=backend)
    for _ in range(3):
        assert same_bits(call.run(whole), call.run(mlp))
        with torch.no_grad():
            assert same_bits(call.run(whole), call.run(mlp))
    assert graphs and all(ops.forward in targets or torch.ops.mlpdsl.forward in targets for targets in graphs)
    assert_same(call.gradients(torch.compile(mlp, fullgraph=True, backend="eager")), plain_gradients(call))


def test_grad_mode_and_leaves(learnt: tuple[Callable[..., Tensor], Call], replays: list[Tape]) -> None:
    """Gradients that are asked for are recorded, by whichever tensor and mode; and no longer where they are not."""
    mlp, call = learnt
    for name in call.named():
        leaves = call.needing([name])
        for _ in range(3):
            assert leaves.run(mlp).requires_grad
            with torch.no_grad():
                assert not leaves.run(mlp).requires_grad
            with torch.inference_mode():
                y = leaves.run(mlp)
                assert y.is_inference() and not y.requires_grad
                with torch.inference_mode(False), torch.enable_grad():
                    assert leaves.run(mlp).requires_grad
        assert_same(replace(call, requires_grad=(name,)).gradients(mlp), plain_gradients(replace(call, requires_grad=(name,))))
    assert replays


def test_results_of_inference_stay_there(learnt: tuple[Callable[..., Tensor], Call]) -> None:
    mlp, call = learnt
    for _ in range(3):
        with torch.inference_mode():
            y = call.run(mlp)
        assert y.is_inference()
        assert not call.run(mlp).is_inference()


def test_guards_hold_while_a_call_is_repeated(learnt: tuple[Callable[..., Tensor], Call]) -> None:
    """The suites' guard zones see what a repeated call allocates."""
    mlp, call = learnt
    with guarded_allocations() as guards:
        call.run(mlp)
        assert guards.count >= 1


# A call in the middle of another


class _Interrupted:
    """After the `at`-th thing that a recording hears of, `then` is called, once."""

    def __init__(self, at: int, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.then = at, then
        for name in ("launched", "multiplied", "allocated"):
            monkeypatch.setattr(Recorder, name, self.wrapped(getattr(Recorder, name)))

    def wrapped(self, method: Callable[..., None]) -> Callable[..., None]:
        def heard(recorder: Recorder, *args: Any, **words: Any) -> None:
            method(recorder, *args, **words)
            self.left -= 1
            if self.left == 0:
                self.then()

        return heard


@pytest.mark.parametrize("strategy", ["generated", "library"])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_call_in_the_middle_of_one_that_is_recorded(
    at: int, strategy: str, replays: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler, say: of a kind that is recorded next itself. Each recording has its own launches, and all of them."""
    with dispatch.forcing(strategy):
        first = make_call(MLPSpec(dims=(16, 24, 16), activation="gelu", gated=True, bias=True), (5,), 0)
        other = make_call(MLPSpec(dims=(16, 8), activation="identity"), (3,), 1, requires_grad=())
        mlp, inner = compiled(first.spec), compiled(other.spec)
        inner_results: list[Tensor] = []
        anew(other, 0).run(inner)
        anew(first, 0).gradients(mlp)
        with monkeypatch.context() as patched:
            interrupted = _Interrupted(at, lambda: inner_results.append(anew(other, 1).run(inner)), patched)
            found = anew(first, 1).gradients(mlp)
        assert_same(found, plain_gradients(anew(first, 1)))
        assert interrupted.left <= 0 and same_bits(inner_results[0], plainly(anew(other, 1)))
        replays.clear()
        for seed in (2, 3):
            assert_same(anew(first, seed).gradients(mlp), plain_gradients(anew(first, seed)))
            assert same_bits(anew(other, seed).run(inner), plainly(anew(other, seed)))
        assert len(replays) == 6, "something was not recorded"
