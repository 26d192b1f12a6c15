"""Calls repeated from a recording, and past torch's dispatcher: the same bits, and nothing left behind."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import random
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

import mlpdsl
from mlpdsl import MLPSpec, dispatch, launch, tape
from mlpdsl.tape import Described, Step, Tape
from mlpdsl.testing.calls import check_call, make_call, same_bits
from tests.recordings import (
    DEEP,
    DTYPES,
    EPILOGUE,
    GATED,
    LAYOUTS,
    LEADS,
    OPERANDS,
    PLAIN,
    SINGLE,
    SPECS,
    anew,
    assert_same,
    compiled,
    each_spec,
    outcome,
    plain_gradients,
    plainly,
)

pytestmark = pytest.mark.usefixtures("no_recordings")


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
            wanted = outcome(lambda: plainly(call))
            results = [call.run(mlp) for _ in range(4)]
            assert all(outcome(lambda y=y: y) == wanted for y in results)
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
