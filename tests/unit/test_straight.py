"""A recording as one function: what it allocates, how, and in which shape. No GPU, and no kernel runs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mlpdsl import shortcut, straight
from mlpdsl.tape import Recorder, Tape
from mlpdsl.testing.calls import guarded_allocations
from tests.launchers import Utils, by_triton, compiled, leaves, plain

PAIR = {"a": "*fp32", "b": "*fp32"}


def _chain(x: Tensor, w: Tensor, width: int, also: bool = False) -> Tape:
    """A recorded call of two launches: x to an intermediate, that to the result; `also` a second result, its first row."""
    kernel, recorder = compiled(PAIR), Recorder([x], [w])
    between = x.new_empty((x.numel() // x.shape[-1], 2 * width))
    recorder.allocated(between)
    recorder.launched("kernel", (3,), {}, kernel, [x, between])
    y = x.new_empty((x.numel() // x.shape[-1], width))
    recorder.allocated(y)
    recorder.launched("kernel", (5, 2), {}, kernel, [between, y])
    found = recorder.tape([y, y[:1]] if also else [y], direct=True)
    assert found is not None and found.direct
    return found


def _made(call: Any, *args: Any) -> tuple[list[Any], list[Any]]:
    """What a call returns, and how often each of torch's ways to allocate was taken."""
    taken = []
    real = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        taken.append(size)
        return real(self, *size, **options)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty, create=True):
        return call(*args), taken


def test_allocations_are_plain_tensors(utils: Utils) -> None:
    """As `new_empty` makes them, without its way through the dispatcher."""
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    found = _chain(x, w, 6)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            wanted = x.new_empty((4, 6))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                (y,) = found.replay([x, w], [x.data_ptr(), w.data_ptr()])
            assert not [e.key for e in profiler.key_averages() if e.key.startswith("aten::")]
            for about in ("shape", "dtype", "device", "is_leaf", "requires_grad", "layout"):
                assert getattr(y, about) == getattr(wanted, about), about
            assert y.stride() == wanted.stride() and not y._is_view() and y.is_inference() == wanted.is_inference()
            assert type(y) is Tensor and y.untyped_storage().nbytes() == 4 * 4 * 6
            y.fill_(1)


def test_another_allocator_is_heard(utils: Utils) -> None:
    """Whoever replaces `Tensor.new_empty`, as guard zones do, allocates for repeated calls too."""
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    found = _chain(x, w, 6)
    _, taken = _made(found.replay, [x, w], [x.data_ptr(), w.data_ptr()])
    assert taken == [((4, 12),), ((4, 6),)]
    with guarded_allocations() as guards:
        (y,) = found.replay([x, w], [x.data_ptr(), w.data_ptr()])
        assert guards.count == 2
        assert bool(y.isnan().all())


def test_one_that_was_there_before_torch_was_looked_at() -> None:
    """A replaced allocator is not taken for torch's own, though it was in place when the module was imported."""
    assert straight.NEW_EMPTY is torch._C.TensorBase.new_empty
    with guarded_allocations():
        assert straight.NEW_EMPTY is not torch.Tensor.new_empty


def test_where_torch_has_no_quick_allocation(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    (y,) = _chain(x, w, 6).replay([x, w], [x.data_ptr(), w.data_ptr()])
    assert y.shape == (4, 6) and y.is_contiguous()


def test_an_allocation_that_lies_otherwise(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """At no multiple of 16 bytes: the call is left to who decides anew, before anything was launched with it."""
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    found = _chain(x, w, 6)
    memory = torch.zeros(200)
    for launches, starts in enumerate(([1, 0], [0, 1])):
        utils.launch.calls.clear()
        places = iter(starts)

        def new_empty(self: Tensor, size: tuple[int, ...], places: Any = places, **options: Any) -> Tensor:
            return memory.as_strided(size, (size[1], 1), next(places))

        with mock.patch.object(torch.Tensor, "new_empty", new_empty, create=True):
            assert found.replay([x, w], [x.data_ptr(), w.data_ptr()]) is None
        assert len(utils.launch.calls) == launches


@pytest.mark.parametrize("lead", [(4,), (2, 2), (1, 2, 2), (4, 1)])
def test_a_result_in_another_shape(lead: tuple[int, ...], utils: Utils) -> None:
    """It is made in it, so that it is no view; kernels are told the same."""
    x, w = torch.zeros(*lead, 8), torch.zeros(8, 8)
    found = _chain(x, w, 6)
    run = found.in_shape((*lead, 6))
    assert run is not None
    (y,) = found.replay([x, w], [x.data_ptr(), w.data_ptr()], run)
    assert y.shape == (*lead, 6) and y.is_contiguous() and not y._is_view()
    first, second = utils.launch.calls
    assert plain(second)[:3] == (5, 2, 1)
    between = leaves(first)[-1]
    assert plain(second) == by_triton(found.steps[1].compiled, (5, 2), [between, y.view(4, 6)], utils)


def test_a_result_that_has_one_shape(utils: Utils) -> None:
    """An input, or a part of an allocation; and a second result stays what it was."""
    x, w = torch.zeros(4, 8), torch.zeros(8, 8)
    recorder = Recorder([x], [w])
    recorder.launched("kernel", (3,), {}, compiled(PAIR), [x, x])
    found = recorder.tape([x], direct=True)
    assert found is not None and found.in_shape((2, 2, 8)) is None
    both = _chain(x, w, 6, also=True)
    run = both.in_shape((2, 2, 6))
    y, row = both.replay([x, w], [x.data_ptr(), w.data_ptr()], run)
    assert y.shape == (2, 2, 6) and row.shape == (1, 6) and row.data_ptr() == y.data_ptr()
    indirect = Tape(2, 3, both.steps, both.results, False, x.device)
    assert indirect.in_shape((2, 2, 6)) is None


def test_a_kind_of_call_with_more_dimensions(utils: Utils) -> None:
    """Its result may be written to while that is recorded, as one of nn.Linear."""
    x, w = torch.zeros(2, 2, 8), torch.zeros(8, 8)
    kind = shortcut.Forward(_chain(x, w, 6), (x, w), 1)
    other = torch.ones(2, 2, 8)

    def call(x: Tensor, w: Tensor) -> Any:
        addresses = kind.places((x, w))
        results = None if addresses is None else kind.results((x, w), addresses)
        return results and results[0]

    y = call(other, w)
    assert y is not None and y.shape == (2, 2, 6) and not y._is_view()
    y.fill_(1).mul_(torch.ones(6, requires_grad=True)).sum().backward()
    assert call(other.view(4, 8), w) is None and call(other, w.clone()) is None


def test_recordings_of_other_shapes_share_their_text(utils: Utils) -> None:
    """What is compiled once is the form; sizes and addresses are not in it."""
    straight._maker.cache_clear()
    for rows in range(1, 9):
        x, w = torch.zeros(rows, 8), torch.zeros(8, 8)
        _chain(x, w, 2 * rows)
    about = straight._maker.cache_info()
    assert (about.misses, about.hits) == (1, 7)


def test_no_text_but_ours_is_run(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """Whatever a value is, it is handed over under a name, and not written out."""
    texts: list[str] = []
    real = straight._maker.__wrapped__
    monkeypatch.setattr(straight, "_maker", lambda text: texts.append(text) or real(text))
    x = torch.zeros(4, 8)
    recorder = Recorder([x], [])
    recorder.launched("kernel", (123456,), {}, compiled({"a": "*fp32", "b": "constexpr"}), [x, "'''; raise SystemExit #"])
    found = recorder.tape([x], direct=True)
    assert found is not None
    found.replay([x], [x.data_ptr()])
    (text,) = texts
    assert "SystemExit" not in text and "123456" not in text and str(x.data_ptr()) not in text
