"""Calls repeated from a recording, and past torch's dispatcher: the same bits, the same errors, and nothing kept alive."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import Call, check_call, guarded_allocations, make_call, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import mlpdsl
from mlpdsl import MLP, MLPSpec, dispatch, launch, ops, shortcut, tape
from mlpdsl.agreement import hooked
from mlpdsl.tape import Described, Step, Tape, Tapes

GATED = MLPSpec(dims=(8, 16, 8), activation="silu", gated=True, bias=True)
PLAIN = MLPSpec(dims=(13, 9, 5), activation="gelu")
DEEP = MLPSpec(dims=(8, 16, 8, 8), activation="relu2", bias=True)
SINGLE = MLPSpec(dims=(8, 16), activation="identity", epilogue=("gelu",))
EPILOGUE = MLPSpec(dims=(12, 16, 12), activation="gelu", bias=True, epilogue=("residual", "layer_scale", "scale"))
OPERANDS = MLPSpec(dims=(12, 12), activation="identity", bias=True, epilogue=EPILOGUE.epilogue)
"""The same with one layer, for tests of many calls."""
SPECS = {"gated": GATED, "plain": PLAIN, "deep": DEEP, "single": SINGLE, "epilogue": EPILOGUE}
DTYPES = ("float32", "float16", "bfloat16")
LEADS = ((4,), (2, 3), ())
LAYOUTS = ("dense", "strided", "offset", "transposed", "expanded")
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def compiled(spec: MLPSpec, **options: Any) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton", **options)


@pytest.fixture(autouse=True)
def _no_recordings() -> None:
    dispatch.forget()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every recording that is repeated, as often as it is."""
    seen: list[Tape] = []
    real = Tape.replay

    def counting(self: Tape, *args: Any) -> list[Any]:
        seen.append(self)
        return real(self, *args)

    monkeypatch.setattr(Tape, "replay", counting)
    return seen


def unrecorded() -> AbstractContextManager[Any]:
    """Inside, every call of a new `CompiledMLP` is made in the ordinary way, and none is recorded."""
    return mock.patch.object(Tapes, "call", lambda self, word, varying, fixed, make: make())


def plainly(call: Call, **options: Any) -> Tensor:
    with unrecorded():
        return call.run(compiled(call.spec, **options))


def plain_gradients(call: Call, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with unrecorded():
        return call.gradients(compiled(call.spec, **options))


def assert_same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert same_bits(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert same_bits(found[1][name], grad), name


def anew(call: Call, seed: int) -> Call:
    """Other values in other memory that lies alike, with the same parameters."""
    other = make_call(call.spec, **{**call.recipe, "seed": seed})
    return replace(other, params=call.params, buffers=[*call.buffers, *other.buffers], recipe={})


# Repeated, and right


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_the_third_call_is_replayed(name: str, layout: str, replays: list[Tape]) -> None:
    """Without a gradient, then with saving and backward: inside guard zones, within the oracle, with the bits of a plain call."""
    i, j = list(SPECS).index(name), LAYOUTS.index(layout)
    spec = SPECS[name].replace(dtype=DTYPES[(i + j) % 3])
    operands = "dense" if layout == "strided" else layout  # a strided column would be copied
    first = make_call(spec, LEADS[(i - j) % 3], 1, x=layout, dy=layout, operands=operands, requires_grad=None)
    mlp = compiled(spec)
    for backward, each in ((False, 1), (True, 2)):
        for count in range(2):
            call = anew(first, count)
            _ = call.gradients(mlp) if backward else call.run(mlp)
        assert not replays
        check_call(anew(first, 2), mlp, backward=backward, eager=False)
        assert len(replays) == each
        replays.clear()
    call = anew(first, 3)
    assert same_bits(call.run(mlp), plainly(call))
    assert_same(call.gradients(mlp), plain_gradients(call))
    assert len(replays) == 3


def test_both_paths_are_replayed(replays: list[Tape]) -> None:
    """What is tested here replays descriptors as well as pointers."""
    kinds = set()
    for spec in (GATED.replace(dtype="bfloat16"), PLAIN):
        call, mlp = make_call(spec, (4,), 0), compiled(spec)
        for _ in range(3):
            call.gradients(mlp)
        steps = [step for recording in replays for step in recording.steps if isinstance(step, Step)]
        kinds.add(any(isinstance(a, Described) for step in steps for a in step.args))
        replays.clear()
    assert kinds == {True, False}


@each_spec
def test_products_of_the_library_are_replayed(spec: MLPSpec, replays: list[Tape]) -> None:
    """They are steps of a recording like launches."""
    with dispatch.forcing("library"):
        first, mlp = make_call(spec, (4,), 1), compiled(spec)
        for count in range(2):
            call = anew(first, count)
            call.gradients(mlp)
            assert same_bits(call.run(mlp), plainly(call))
        call = anew(first, 2)
        check_call(call, mlp, eager=False)
        assert same_bits(call.run(mlp), plainly(call))
        assert any(not isinstance(step, Step) for recording in replays for step in recording.steps)
        replays.clear()
        assert_same(call.gradients(mlp), plain_gradients(call))
        assert len(replays) == 2
    assert same_bits(call.run(mlp), plainly(call))
    assert len(replays) == 2, "outside, decided anew"


@pytest.mark.parametrize("spec", [GATED, EPILOGUE], ids=["gated", "epilogue"])
def test_gradients_that_are_needed_change(spec: MLPSpec, replays: list[Tape]) -> None:
    """Each subset has a recording of its own: none gives another's gradients, in whatever order they are asked for."""
    first, mlp = make_call(spec, (4,), 1), compiled(spec)
    names = list(first.named())
    weights, biases = names[1:2], [n for n in names if n.endswith("bias")]
    subsets: list[tuple[str, ...]] = [tuple(names), ("x",), tuple(names[1:]), tuple(weights)]
    subsets += [tuple(s) for s in (biases[:1], biases[-1:], list(spec.operands())[1:]) if s]
    for names_now in subsets:
        for count in range(2):
            replace(anew(first, count), requires_grad=names_now).gradients(mlp)
    replays.clear()
    order = subsets + random.Random(0).choices(subsets, k=3)
    for count, names_now in enumerate(order):
        call = replace(anew(first, 10 + count), requires_grad=names_now)
        assert_same(call.gradients(mlp), plain_gradients(call))
    assert len(replays) == 2 * len(order)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GATED, {"pair": "unlike"}),
        (GATED, {"weights": "transposed", "pair": "unlike"}),
        (GATED, {"weights": "strided"}),
        (GATED, {"lead": (2, 3), "x": "padded", "dy": "padded", "swap": True}),
        (EPILOGUE, {"weights": "strided"}),
        (EPILOGUE, {"operands": "strided"}),
        (EPILOGUE, {"lead": (2, 3), "x": "padded", "dy": "padded", "operands": "padded", "swap": True}),
    ],
)
def test_calls_that_torch_copies_for(spec: MLPSpec, words: dict[str, Any]) -> None:
    """Gate and up that lie differently, a vector with strides, rows that cannot be merged: right, recorded or not."""
    first, mlp = make_call(spec, **{"lead": (4,), "seed": 1, **words}), compiled(spec)
    ballast = []
    for count in range(4):
        call = anew(first, count)
        assert_same(call.gradients(mlp), plain_gradients(call))
        ballast.append(first.params[0].clone())  # so that a copy lies elsewhere each time
        assert same_bits(call.run(mlp), plainly(call))
        ballast.append(first.params[0].clone())
    check_call(call, mlp, eager=False)
    with torch.no_grad():  # and nothing of a copy is remembered
        for p in first.params:
            p.mul_(-2)
    assert same_bits(call.run(mlp), plainly(call))
    assert_same(call.gradients(mlp), plain_gradients(call))


@pytest.mark.parametrize("pair", ["stacked", "up_first", "tied"])
def test_gate_and_up_in_any_order(pair: str, replays: list[Tape]) -> None:
    first, mlp = make_call(GATED, (4,), 1, pair=pair), compiled(GATED)
    swapped = replace(first, params=[first.params[2], first.params[3], first.params[0], first.params[1], *first.params[4:]])
    for turn in range(6):
        call = (first, swapped)[turn % 2]
        assert same_bits(call.run(mlp), plainly(call))
        assert_same(call.gradients(mlp), plain_gradients(call))
    assert len(replays) == 3 * (4 if pair == "tied" and same_bits(first.params[1], first.params[3]) else 2)


def test_batch_invariant_calls_have_recordings_of_their_own(replays: list[Tape]) -> None:
    """Of the same tensors, by the same loaded module."""
    mlps = {invariant: compiled(SINGLE, batch_invariant=invariant) for invariant in (False, True)}
    first = make_call(SINGLE, (33,), 1)
    for count in range(3):
        call = anew(first, count)
        for invariant, mlp in mlps.items():
            assert same_bits(call.run(mlp), plainly(call, batch_invariant=invariant))
            assert_same(call.gradients(mlp), plain_gradients(call, batch_invariant=invariant))
    assert len(replays) == len({id(recording) for recording in replays}) == 2 * 3


def test_eager_calls_stay_eager(replays: list[Tape]) -> None:
    """An MLP with the eager backend is not taken past it by what another one with the same weights has recorded."""
    call, mlp, eager = make_call(DEEP, (4,), 0), compiled(DEEP), mlpdsl.compile(DEEP, backend="eager")
    wanted = call.run(mlpdsl.reference(DEEP))
    for _ in range(3):
        call.run(mlp)
    replays.clear()
    for _ in range(3):
        assert same_bits(call.run(eager), wanted)
    assert not replays


def test_misaligned_after_aligned(replays: list[Tape]) -> None:
    """What was decided for aligned tensors is not done to others, and again for the first."""
    spec = GATED.replace(dtype="bfloat16")
    calls = [make_call(spec, (4,), 1, x=x, dy=x) for x in ("dense", "offset", "padded", "dense")]
    calls = [replace(call, params=calls[0].params, recipe={}) for call in calls]
    mlp, wanted = compiled(spec), [(plainly(call), plain_gradients(call)) for call in calls]
    for _ in range(3):
        for call, (y, gradients) in zip(calls, wanted, strict=True):
            assert same_bits(call.run(mlp), y)
            assert_same(call.gradients(mlp), gradients)
    assert len(replays) == 3 * (4 + 1 + 1)


@pytest.mark.parametrize("lead", LEADS)
def test_results_are_what_plain_calls_give(lead: tuple[int, ...]) -> None:
    """Fresh memory each time, and the same in everything that a tensor is."""
    call, mlp = make_call(SINGLE, lead, 0), compiled(SINGLE)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            wanted = _outcome(lambda: plainly(call))
            results = [call.run(mlp) for _ in range(4)]
            assert all(_outcome(lambda y=y: y) == wanted for y in results)
        assert len({y.data_ptr() for y in results}) == 4


@pytest.mark.parametrize("lead", LEADS)
def test_results_may_be_written_to(lead: tuple[int, ...]) -> None:
    """As those of nn.Linear: also where the writing is recorded and the call was not, and the other way round."""
    call, mlp = make_call(SINGLE, lead, 0), compiled(SINGLE)
    factor = torch.randn(SINGLE.d_out, requires_grad=True)
    for tensors, mode in (
        (call, nullcontext),
        (call, torch.no_grad),
        (call.needing(), torch.no_grad),
        (call.needing(), nullcontext),
    ):
        for _ in range(3):
            grads = []
            for in_place in (False, True):
                with mode():
                    y = tensors.run(mlp)
                kept = y.detach().clone()
                z = y.mul_(factor.detach()) if in_place else y * factor.detach()
                assert same_bits(z.detach(), kept * factor.detach())
                z *= factor
                leaves = [t for t in (tensors.x, *tensors.params, factor) if t.requires_grad]
                grads.append(torch.autograd.grad(z.sum(), leaves, allow_unused=True, materialize_grads=True))
            assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_zero_rows() -> None:
    mlp, full = compiled(OPERANDS), make_call(OPERANDS, (4,), 0)
    for _ in range(3):
        for lead in ((0,), (2, 0), (4,)):
            call = replace(make_call(OPERANDS, lead, 1), params=full.params)
            assert_same(call.gradients(mlp), plain_gradients(call))
            y = call.run(mlp)
            assert y.shape == (*lead, 12) and same_bits(y, plainly(call))


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


# After a kind of call was learnt, everything else is as it was


class _Logged(Tensor):
    """A tensor that hears of every function that it is given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


_heard: list[Any] = []


def _outcome(run: Callable[[], Any]) -> tuple[Any, ...]:
    """Everything that can be told of what a call gives: the error, or the result and its bits."""
    try:
        y = run()
    except Exception as error:
        return type(error), str(error)
    about = (type(y), y.shape, y.dtype, y.device, y.stride(), y.requires_grad, y.is_leaf, y.is_inference(), y._is_view())
    if y.device.type == "meta" or type(y).__name__ == "FakeTensor":
        return about
    grad = type(y.grad_fn).__name__
    return *about, grad, bytes(y.detach().contiguous().as_subclass(Tensor).view(torch.uint8).numpy())


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


def _negative(t: Tensor) -> Tensor:
    """A view that means -t: its memory holds t."""
    pairs = torch.stack([torch.zeros_like(t), t], -1)
    found = torch.view_as_complex(pairs).conj().imag
    assert found.is_neg()
    return found


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
        "x in mkldnn's layout": given(x.to_mkldnn(), *params),
        "x a list": given(x.tolist(), *params),
        "x an array": given(x.numpy(), *params),
        "x None": given(None, *params),
        "x a parameter": given(nn.Parameter(x.clone()), *params),
        "x a parameter without gradient": given(nn.Parameter(x.clone(), False), *params),
        "x of a subclass": given(x.clone().as_subclass(_Logged), *params),
        "x of an inference": given(inference, *params),
        "x negative": given(_negative(x), *params),
        "x zero without memory": given(torch._efficientzerotensor((4, 12)), *params),
        "x functional": given(torch._to_functional_tensor(x.clone()), *params),
        "x requires grad": given(x.clone().requires_grad_(), *params),
        "a weight of float16": given(x, params[0].half(), *params[1:]),
        "a weight on meta": given(x, params[0].to("meta"), *params[1:]),
        "a weight transposed": given(x, params[0].t(), *params[1:]),
        "a weight sparse": given(x, params[0].to_sparse(), *params[1:]),
        "a weight of a subclass": given(x, params[0].clone().as_subclass(_Logged), *params[1:]),
        "a weight of a subclass, at its place": given(x, params[0].as_subclass(_Logged), *params[1:]),
        "a weight negative": given(x, _negative(params[0]), *params[1:]),
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
        "residual of a subclass": given(x, *params, residual=residual.clone().as_subclass(_Logged)),
        "residual negative": given(x, *params, residual=_negative(residual)),
        "residual requires grad": given(x, *params, residual=residual.clone().requires_grad_()),
        "scale a number": given(x, *params, scale=0.5),
        "scale of two": given(x, *params, scale=torch.ones(2)),
        "scale of another shape": given(x, *params, scale=scale.reshape(1, 1)),
        "scale of bfloat16": given(x, *params, scale=scale.bfloat16()),
    }


@pytest.mark.parametrize("name", _other_calls(make_call(OPERANDS, (4,), 0)))
def test_other_calls_after_one_was_learnt(name: str, learnt: tuple[Callable[..., Tensor], Call], replays: list[Tape]) -> None:
    """The same error in the same words, or the same result of the same type, the first time and when it too could be learnt."""
    mlp, call = learnt
    args, operands = _other_calls(call)[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _heard.clear()
            with unrecorded():
                wanted = _outcome(lambda: compiled(OPERANDS)(*args, **operands))
            for _ in range(4 - grad):
                assert ("subclass" in name) == (ops.forward in _heard), "a subclass is asked each time"
                _heard.clear()
                assert _outcome(lambda: mlp(*args, **operands)) == wanted
        if wanted[0] is mlpdsl.ShapeError:
            assert not replays


def test_negative_x_after_one_that_lies_alike(replays: list[Tape]) -> None:
    """Same strides, same alignment, same weights; but its memory means the opposite."""
    call, mlp = make_call(SINGLE, (4,), 0), compiled(SINGLE)
    pairs = torch.view_as_complex(torch.randn(4, 8, 2)).imag
    for t in (pairs, _negative(call.x), pairs, _negative(call.x), _negative(call.params[0])):
        weight = t.shape == call.params[0].shape
        again = replace(call, params=[t, *call.params[1:]]) if weight else replace(call, x=t)
        for _ in range(4):
            assert same_bits(again.run(mlp), plainly(again))
        assert_same(again.gradients(mlp), plain_gradients(again))
    assert replays


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Asked(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Seen, _Asked])
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
            wanted = _outcome(lambda: call.run(compiled(OPERANDS)))
            assert wanted[2] == dtype
            assert _outcome(lambda: call.run(mlp)) == wanted
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
            wanted = _outcome(lambda: transform(compiled(OPERANDS)))
            for _ in range(3):
                assert _outcome(lambda: transform(mlp)) == wanted


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


def test_interrupted_calls_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, replays: list[Tape]) -> None:
    """A launch that fails while it is recorded, or repeated, fails once."""
    call, mlp = make_call(DEEP, (4,), 0), compiled(DEEP)
    wanted, real = plainly(call), launch.run
    for failing_turn in (1, 2, 3, 5):
        dispatch._runners.clear()
        mlp = compiled(DEEP)
        for turn in range(7):
            left = [2]

            def run(*args: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise MemoryError("no more")
                real(*args)

            if turn == failing_turn:
                monkeypatch.setattr(launch, "run", run)
                with pytest.raises(MemoryError):
                    call.run(mlp)
                monkeypatch.setattr(launch, "run", real)
                assert tape.recorder() is None
            else:
                assert same_bits(call.run(mlp), wanted)
    assert replays


# Threads


def test_threads(replays: list[Tape]) -> None:
    """Eight at once, each with its own tensors, of shapes that meet and that do not, with and without gradients."""
    mlp, weights = compiled(OPERANDS), make_call(OPERANDS, (4,), 0).params
    calls = [[replace(make_call(OPERANDS, (3 + i % 3,), 10 * i + j), params=weights) for j in range(4)] for i in range(8)]
    wanted = [[(plainly(call), plain_gradients(call)) for call in mine] for mine in calls]
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        try:
            start.wait()
            for call, (y, gradients) in zip(calls[i], wanted[i], strict=True):
                assert same_bits(call.run(mlp), y)
                assert_same(call.gradients(mlp), gradients)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(replays) > 40
