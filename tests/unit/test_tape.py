"""What a recording is of, when there is one, and what it holds. No GPU, and no kernel runs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from mlpdsl import launch, library, straight, tape
from mlpdsl.agreement import hooked, twins
from mlpdsl.tape import Described, Recorder, Tapes, View
from tests.launchers import (
    POINTERS,
    Utils,
    by_triton,
    compiled,
    plain,
)

# Recordings


def test_temporaries_are_freed_after_their_last_launch(utils: Utils) -> None:
    """Of a chain of launches no more lives than one step reads and writes; what nothing reads is not allocated."""
    kernel = compiled({"a": "*fp32", "b": "*fp32"})
    x = torch.zeros(8)
    recorder = Recorder([x], [])
    links = [x]
    for _ in range(6):
        out = x.new_empty((8,))
        recorder.allocated(out)
        recorder.launched("kernel", (1,), {}, kernel, [links[-1], out])
        links.append(out)
    recorder.allocated(x.new_empty((1 << 20,)))
    found = recorder.tape([links[-1]], direct=True)
    assert found is not None and found.direct
    alive: list[int] = []
    most = [0]

    class Counted(Tensor):
        def new_empty(self, *size: Any, **options: Any) -> Tensor:  # type: ignore[override]
            made = torch.empty(size[0], dtype=options["dtype"]).as_subclass(Counted)
            assert made.numel() == 8
            alive.append(0)
            most[0] = max(most[0], len(alive))
            return made

        def __del__(self) -> None:
            if alive:
                alive.pop()

    start = torch.zeros(8).as_subclass(Counted)
    (y,) = found.replay([start], [start.data_ptr()])
    assert isinstance(y, Counted)
    assert most[0] == 2 and len(alive) == 1


def test_what_cannot_be_told_is_not_recorded(utils: Utils) -> None:
    """Inputs that share memory and may move apart, a copy that torch made, a result of unknown memory, no launch at all."""
    kernel, x = compiled(POINTERS), torch.zeros(4, 8)

    def of(varying: list[Tensor], fixed: list[Tensor], *args: Tensor, result: Tensor | None = None) -> Any:
        recorder = Recorder(varying, fixed)
        if args:
            recorder.launched("kernel", (1,), {}, kernel, [args[0], 8, 64, args[-1]])
        return recorder.tape([x if result is None else result], direct=True)

    assert of([x], [], x) is not None
    assert of([x, x], [], x) is not None
    assert of([x, x.view(32)], [], x) is not None, "one address: what the call depends on"
    assert of([x], []) is None
    assert of([x], [], x.clone()) is None
    assert of([x], [], x, result=x.clone()) is None
    assert of([x, x[1:]], [], x) is None
    assert of([x], [x], x) is None
    assert of([x], [x[1:]], x) is None
    assert of([x], [w := torch.zeros(8), w[4:]], x, w[4:]) is not None


def test_products_are_steps_too(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """A product of the library between two launches, on views of now."""
    kernel = compiled({"a": "*fp32", "b": "*fp32"})
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    recorder = Recorder([x], [w])
    out = x.new_empty((4, 6))
    recorder.allocated(out)
    monkeypatch.setattr(tape._local, "recorder", recorder, raising=False)
    library.product(x, w.t(), out)
    monkeypatch.setattr(tape._local, "recorder", None)
    recorder.launched("kernel", (1,), {}, kernel, [out, out])
    found = recorder.tape([out], direct=True)
    assert found is not None and found.direct
    for _ in range(2):
        other = torch.randn(4, 8)
        (y,) = found.replay([other, w], [other.data_ptr(), w.data_ptr()])
        torch.testing.assert_close(y, other @ w.t())
        assert plain(utils.launch.calls[-1]) == by_triton(kernel, (1,), [y, y], utils)


@pytest.mark.parametrize("quickly", [True, False])
def test_products_of_parts(quickly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of x by rows of a weight, into a part of an allocation, a vector added: each where it lies now."""
    if not quickly:  # a torch without that function
        monkeypatch.setattr(straight, "REINTERPRET", None)
    x, w, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(12)
    recorder = Recorder([x], [w, b])
    out = x.new_empty((2, 4, 3))
    recorder.allocated(out)
    with monkeypatch.context() as patch:
        patch.setattr(tape._local, "recorder", recorder, raising=False)
        out[0].zero_()
        library.product(x[:, 2:6], w[3:, 2:6].t(), out[1], b[4:7])
    found = recorder.tape([out], direct=True)
    assert found is not None and found.direct
    other, moved = torch.randn(40)[8:].view(4, 8), torch.randn(20)[3:15]
    (y,) = found.replay([other, w, moved], [])
    torch.testing.assert_close(y[1], other[:, 2:6] @ w[3:, 2:6].t() + moved[4:7])


def test_views_are_of_the_tensors_of_now() -> None:
    """Where they lie follows the first element, not the storage; a descriptor likewise."""
    x = torch.arange(48.0).view(6, 8)
    view = View(0, 4 * 9, (2, 3), (8, 2), torch.float32)
    assert torch.equal(view.of([x]), x[1:, 1:].as_strided((2, 3), (8, 2)))
    moved = torch.arange(100.0)[20:68].view(6, 8)
    assert torch.equal(view.of([moved]), moved.as_strided((2, 3), (8, 2), 29))
    assert View(0, 0, (6, 8), (8, 1), torch.float32).of([x]) is x
    up = View(0, -4 * 8, (8,), (1,), torch.float32)
    assert torch.equal(up.of([x[1]]), x[0])
    described = Described(view, [2, 3], [8, 2], [16, 16]).of([x])
    assert torch.equal(described.base, view.of([x]))


def test_keys_tell_apart_what_decides() -> None:
    """Shape, strides, dtype and alignment of what varies, and which of it is one; address, strides and dtype of what is fixed."""
    x, w = torch.zeros(64, 8), torch.zeros(8, 8)
    word = ("forward", False, False)
    key = Tapes.key(word, [x[:4]], [w])
    assert key == Tapes.key(word, [x[4:8]], [w]) == Tapes.key(word, [torch.zeros(4, 8)], [w])
    others = [
        Tapes.key(("forward", True, False), [x[:4]], [w]),
        Tapes.key(word, [x[:5]], [w]),
        Tapes.key(word, [x[:8:2]], [w]),
        Tapes.key(word, [x[:4].bfloat16()], [w]),
        Tapes.key(word, [x.view(-1)[1:33].view(4, 8)], [w]),
        Tapes.key(word, [x[:4]], [w.clone()]),
        Tapes.key(word, [x[:4]], [w.t()]),
        Tapes.key(word, [x[:4], x[4:8]], [w]),
        Tapes.key(word, [x[:4], x[:4]], [w]),
    ]
    assert len({key, *others}) == 1 + len(others)
    assert twins([5, 7, 5, 7, 9]) == (0, 1, 0, 1, 4)


def test_one_who_listens_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of hooks, as Triton has them now, and single ones, as it had them."""

    def hook(metadata: Any) -> None:
        pass

    for name in ("launch_enter_hook", "launch_exit_hook"):
        assert not hooked()
        chain = getattr(knobs.runtime, name)
        if hasattr(chain, "add"):
            chain.add(hook)
            assert hooked()
            chain.remove(hook)
            assert not hooked()
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, hook)
            assert hooked()
            patch.setattr(knobs.runtime, name, None)
            assert not hooked()


def test_calls_are_made_recorded_repeated(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """Made, made and listened to, repeated; made again while a hook listens, or where nothing could be recorded."""
    kernel, tapes = compiled({"a": "*fp32", "b": "*fp32"}), Tapes(direct=True)
    made: list[Tensor] = []

    def call(x: Tensor, copy: bool = False) -> Tensor:
        def make() -> list[Any]:
            out = launch.empty(x, (8,))
            recorder, elsewhere = tape.recorder(), []
            thread = threading.Thread(target=lambda: elsewhere.append(tape.recorder()))
            thread.start()
            thread.join()
            assert elsewhere == [None], "another thread's call is another call"
            if recorder is not None:
                recorder.launched("kernel", (1,), {}, kernel, [x.clone() if copy else x, out])
            made.append(out)
            return [out]

        (y,) = tapes.call(("forward", copy), [x], [], make)
        assert tape.recorder() is None
        result: Tensor = y
        return result

    for count in range(5):
        y = call(torch.zeros(8))
        assert len(made) == min(count + 1, 2)
        assert (y is made[-1]) == (count < 2)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        assert call(torch.zeros(8)) is made[-1]
    assert call(torch.zeros(8)) is not made[-1]
    for _ in range(4):
        assert call(torch.zeros(8), copy=True) is made[-1]
    assert tapes.find(("forward", False), [torch.zeros(8)], []) is not None
    assert tapes.find(("forward", True), [torch.zeros(8)], []) is None
    assert tapes.find(("backward",), [torch.zeros(8)], []) is None


def test_a_launch_that_was_kept_back_is_not_left_out(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """A hook of Triton's that forbids compiling keeps one launch from being made: the call is none to repeat without it."""
    kernel, x = compiled({"a": "*fp32", "b": "*fp32"}), torch.zeros(8)
    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch.triton_cache, "compiled", lambda *_: None)
    recorder = Recorder([x], [])
    monkeypatch.setattr(tape._local, "recorder", recorder, raising=False)
    out = launch.empty(x, (8,))
    launch.run("forbidden", (1,), {"num_warps": 4}, x, out)
    monkeypatch.setattr(tape._local, "recorder", None)
    recorder.launched("kernel", (1,), {}, kernel, [out, out])
    assert recorder.tape([out], direct=True) is None
