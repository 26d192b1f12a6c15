"""Recorded calls and memory: none is held, none is taken for another, and weights may move."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLP, MLPSpec, dispatch, launch, shortcut, tape
from mlpdsl.tape import Tape
from mlpdsl.testing.calls import Call, make_call, same_bits
from tests.recordings import (
    DEEP,
    GATED,
    OPERANDS,
    SINGLE,
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


# What a recording holds


def _own(t: Tensor, watched: list[weakref.ref[Any]]) -> Tensor:
    """The values in memory of which `watched` knows whether anything holds it."""
    array = t.numpy().copy()
    watched.append(weakref.ref(array))
    return torch.from_numpy(array)


@each_spec
def test_a_recording_holds_no_tensor(spec: MLPSpec, replays: list[Tape]) -> None:
    """Arguments, results and gradients are freed, though recordings know where they were."""
    made, watched, results = make_call(spec, (4,), 0, guard=0), [], []
    call = replace(
        made,
        x=_own(made.x, watched),
        params=[_own(p, watched) for p in made.params],
        operands={name: _own(t, watched) for name, t in made.operands.items()},
        dy=_own(made.dy, watched),
    )
    mlp = compiled(spec)
    with mock.patch.object(torch.Tensor, "new_empty", _counting_memory(results), create=True):
        for _ in range(3):
            call.run(mlp)
            call.gradients(mlp)
    assert len(replays) == 3 and len(results) > 10
    gc.collect()  # Triton's interpreter leaves cycles
    assert all(ref() is not None for ref in watched)
    assert not any(ref() is not None for ref in results)
    del call
    assert not any(ref() is not None for ref in watched)


def _counting_memory(made: list[weakref.ref[Any]], peak: list[int] | None = None) -> Callable[..., Tensor]:
    """`Tensor.new_empty` for float32, of whose memory `made` knows whether it is alive; `peak` is the most that was at once."""
    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # Triton's interpreter, which looks at our memory through another tensor
            return plain(self, *size, dtype=dtype, **rest)
        array = np.full(size[0] if not isinstance(size[0], int) else size, np.nan, np.float32)
        made.append(weakref.ref(array))
        if peak is not None:
            peak[0] = max(peak[0], sum(a.size for ref in made if (a := ref()) is not None))
        return torch.from_numpy(array)

    return new_empty


@pytest.fixture
def launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels do nothing, and Triton's interpreter holds no tensor in a cycle."""

    def run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
        recording = tape.recorder()
        if recording is not None:
            recording.launched(kernel, grid, options, None, args)

    monkeypatch.setattr(launch, "run", run)


@pytest.mark.usefixtures("launches_nothing")
@pytest.mark.parametrize("strategy", [None, "library"])
@pytest.mark.parametrize("needs", [None, ("x",), (1,), (-1,), ()], ids=["all", "x", "first weight", "last", "none"])
@pytest.mark.parametrize(
    "spec",
    [
        MLPSpec(dims=(8, *[32] * 5, 8), activation="gelu", bias=True),
        MLPSpec(dims=(8, *[32] * 5, 8), activation="gelu", bias=True, epilogue=("tanh", "layer_scale", "residual")),
        MLPSpec(dims=(8, 32, 8), activation="silu", gated=True, bias=True, epilogue=("residual", "scale")),
    ],
    ids=["deep", "epilogue", "gated"],
)
def test_temporaries_are_let_go(spec: MLPSpec, needs: tuple[Any, ...] | None, strategy: str | None, replays: list[Tape]) -> None:
    """A forward and a backward, repeated, never hold more at once than in the ordinary way."""
    call, mlp = make_call(spec, (32,), 0), compiled(spec)
    names = list(call.named())
    call = replace(call, requires_grad=None if needs is None else tuple(n if n == "x" else names[n] for n in needs))

    def peaks() -> list[int]:
        found = []
        for run in (call.run, call.gradients):
            peak = [0]
            with mock.patch.object(torch.Tensor, "new_empty", _counting_memory([], peak), create=True):
                run(mlp)
            found.append(peak[0])
        return found

    with dispatch.forcing(strategy) if strategy else nullcontext():
        with unrecorded():
            ordinary = peaks()
        for _ in range(2):
            peaks()
        replays.clear()
        repeated = peaks()
    assert replays and repeated[0] > 0
    assert all(ours <= plain for ours, plain in zip(repeated, ordinary, strict=True)), (repeated, ordinary)


def test_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch, replays: list[Tape]) -> None:
    """More shapes, more weights and more kinds of x than are kept: right, and no more of them than that."""
    monkeypatch.setattr(tape, "_MOST", 5)
    monkeypatch.setattr(shortcut, "_SHAPES", 3)
    monkeypatch.setattr(shortcut, "_KINDS", 2)
    mlp = compiled(SINGLE)
    weights = [make_call(SINGLE, (1,), seed).params for seed in range(4)]

    def hold(call: Call) -> None:
        assert same_bits(call.run(mlp), plainly(call))
        assert len(dispatch.runner(SINGLE.to_json(), torch.device("cpu")).tapes._known) <= 5
        assert len(mlp._shortcut._kinds) <= 3
        assert all(len(kinds) <= 2 for kinds in mlp._shortcut._kinds.values())

    for rows in (*range(1, 9), 1, 2, 1):
        for _ in range(3):
            hold(replace(make_call(SINGLE, (rows,), rows), params=weights[rows % 2]))
    for turn in range(16):
        hold(replace(make_call(SINGLE, (4,), turn), params=weights[turn % 4]))
    assert replays
    replays.clear()
    for turn in range(4):  # and there is room again
        hold(replace(make_call(SINGLE, (4,), turn), params=weights[0]))
    assert len(replays) >= 2


# Tensors that share memory


def _aliasing(seed: int, params: list[Tensor]) -> tuple[dict[str, dict[str, Tensor]], ...]:
    """x, residual and scale that lie apart, or in one another's memory, or in a weight's: as halves of wider rows, and dense."""
    torch.manual_seed(seed)
    wide, apart, scale = torch.randn(6, 24), torch.randn(4, 24)[:, :12], torch.randn(())
    x, dense, other = wide[:4, :12], torch.randn(4, 12), torch.randn(4, 12)
    weight = params[0].detach()  # (12, 12)
    return {
        "apart": {"x": x, "residual": apart, "scale": scale},
        "the same": {"x": x, "residual": x, "scale": scale},
        "side by side": {"x": x, "residual": wide[:4, 12:], "scale": scale},
        "overlapping": {"x": x, "residual": wide[1:5, 4:16], "scale": scale},
        "at one address, other strides": {"x": x, "residual": wide.as_strided((4, 12), (12, 1)), "scale": scale},
        "an expanded row": {"x": x, "residual": x[:1].expand(4, 12), "scale": scale},
        "scale where x begins": {"x": x, "residual": apart, "scale": x[0, 0]},
        "scale in x": {"x": x, "residual": apart, "scale": x[1, 4]},
    }, {
        "apart": {"x": dense, "residual": other, "scale": scale},
        "the same": {"x": dense, "residual": dense.view(4, 12), "scale": scale},
        "the same, with scale": {"x": dense, "residual": dense, "scale": dense[2, 4]},
        "x where a weight begins": {"x": weight[:4], "residual": other, "scale": scale},
        "x in a weight": {"x": weight[4:8], "residual": other, "scale": weight[1, 0]},
        "x and residual in a weight": {"x": weight[4:8], "residual": weight[4:8], "scale": scale},
        "residual in a weight": {"x": dense, "residual": weight[8:12], "scale": scale},
        "both in a weight": {"x": weight[:4], "residual": weight[8:12], "scale": weight[0, 0]},
    }  # fmt: skip


@pytest.mark.parametrize("group", [0, 1], ids=["halves", "dense"])
def test_aliasing_in_any_order(group: int, replays: list[Tape]) -> None:
    """Whichever of them came before, plain ones or others: no recording takes one tensor for another."""
    layer_scale, params = torch.randn(12), make_call(OPERANDS, (4,), 0, guard=0).params
    mlp, dice = compiled(OPERANDS), random.Random(group)
    for turn in range(80):
        if turn % 8 == 0:
            dispatch.forget()
            names = dice.sample(list(_aliasing(0, params)[group]), k=2)
            backward = dice.random() < 0.4
        name = dice.choice(names)
        tensors = _aliasing(turn, params)[group][name]
        operands = {"residual": tensors["residual"], "layer_scale": layer_scale, "scale": tensors["scale"]}
        call = Call(OPERANDS, tensors["x"], params, operands, torch.randn(4, 12))
        if backward:
            assert_same(call.gradients(mlp), plain_gradients(call))
        else:
            assert same_bits(call.run(mlp), plainly(call)), name
    assert len(replays) > 15


def test_a_wide_scalar_at_the_address_of_x(replays: list[Tape]) -> None:
    """A float32 operand in the memory of a bfloat16 x, beginning where x does."""
    spec = MLPSpec(dims=(8, 8), activation="identity", epilogue=("scale",), dtype="bfloat16")
    mlp, params = compiled(spec), make_call(spec, (4,), 0).params
    for seed in range(5):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
        call = Call(spec, x, params, {"scale": x.view(torch.float32)[0, 0]}, x)
        assert same_bits(call.run(mlp), plainly(call))
    assert len(replays) == 3


def test_one_gradient_for_two(replays: list[Tape]) -> None:
    """The incoming gradient is x itself, or the residual, and again a tensor of its own."""
    first, mlp = make_call(OPERANDS, (4,), 0), compiled(OPERANDS)
    for turn in range(9):
        call = anew(first, turn)
        call = replace(call, dy=(call.dy, call.x, call.operands["residual"])[turn % 3])
        assert_same(call.gradients(mlp), plain_gradients(call))
    assert replays


# Weights that move


@pytest.mark.parametrize("spec", [GATED, OPERANDS], ids=["gated", "operands"])
def test_parameters_move_and_change(spec: MLPSpec, replays: list[Tape]) -> None:
    torch.manual_seed(0)
    layer = MLP(spec, backend="triton")
    first = make_call(spec, (4,), 0)

    def hold(seed: int) -> None:
        call = replace(anew(first, seed), params=list(layer.parameters()))
        with torch.no_grad():
            assert same_bits(layer(call.x, **call.operands), plainly(call))
        if seed % 2 == 0:
            assert_same(call.gradients(layer._mlp), plain_gradients(call))

    for seed in (0, 2, 4):
        hold(seed)
    replays.clear()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    hold(6)
    assert len(replays) == 3, "values may change in place"
    old = [p.data for p in layer.parameters()]
    for p in layer.parameters():
        p.data = p.data.clone() * 2
    hold(8)
    for p in old:
        p.fill_(torch.nan)
    for seed in (10, 11, 12):
        hold(seed)
    for p, before in zip(layer.parameters(), old, strict=True):
        p.data = before.copy_(p.data)
    hold(14)


def test_square_weight_transposed_where_it_lies(replays: list[Tape]) -> None:
    spec = MLPSpec(dims=(16, 16), activation="identity")
    call, mlp = make_call(spec, (4,), 0), compiled(spec)
    dense = call.params[0]
    for turn in range(9):
        turned = (dense, dense.t(), dense.as_strided((16, 16), (1, 1)))[turn % 3]
        again = replace(call, params=[turned])
        assert same_bits(again.run(mlp), plainly(again))
        assert_same(again.gradients(mlp), plain_gradients(again))
    p = nn.Parameter(dense.clone())
    for _ in range(6):
        p.data = p.data.t()
        again = replace(call, params=[p])
        with torch.no_grad():
            assert same_bits(again.run(mlp), plainly(again))
    assert len(replays) >= 3 * 3 + 2


def test_memory_that_is_used_again(replays: list[Tape]) -> None:
    """Weights that come and go, so that allocators hand out the same addresses for others."""
    mlp, x = compiled(GATED), torch.randn(4, 8)
    for seed in range(9):
        call = make_call(GATED, (4,), seed, guard=0, pair="stacked" if seed % 3 == 0 else "apart")
        call = replace(call, params=[p.clone() if seed % 3 else p for p in call.params], x=x)
        for _ in range(3):
            assert same_bits(call.run(mlp), plainly(call))
    assert replays


def test_another_shape_at_the_same_address() -> None:
    call, mlp = make_call(DEEP, (4,), 0), compiled(DEEP)
    for _ in range(3):
        call.run(mlp)
        call.gradients(mlp)
    for wrong in (call.params[0][:15], call.params[0][:, :7], call.params[0].view(8, 16), call.params[0].view(torch.int32)):
        for args in ((call.x, wrong, *call.params[1:]), (call.x.requires_grad_(), wrong, *call.params[1:])):
            with pytest.raises(mlpdsl.ShapeError, match=r"layers\.0\.weight"):
                mlp(*args)


def test_negative_x_after_one_that_lies_alike(replays: list[Tape]) -> None:
    """Same strides, same alignment, same weights; but its memory means the opposite."""
    call, mlp = make_call(SINGLE, (4,), 0), compiled(SINGLE)
    pairs = torch.view_as_complex(torch.randn(4, 8, 2)).imag
    for t in (pairs, negative(call.x), pairs, negative(call.x), negative(call.params[0])):
        weight = t.shape == call.params[0].shape
        again = replace(call, params=[t, *call.params[1:]]) if weight else replace(call, x=t)
        for _ in range(4):
            assert same_bits(again.run(mlp), plainly(again))
        assert_same(again.gradients(mlp), plain_gradients(again))
    assert replays
