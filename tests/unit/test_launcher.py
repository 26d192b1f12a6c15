"""What a repeated launch hands to Triton's C launcher: exactly what Triton's own launcher would. No GPU, and no kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mlpdsl import launch, straight
from mlpdsl.launch import descriptor as describe
from mlpdsl.straight import Encoded
from mlpdsl.tape import Recorder, Step
from tests.launchers import (
    META,
    POINTERS,
    Native,
    Utils,
    arguments,
    by_triton,
    compiled,
    leaves,
    plain,
    recorded,
    tensors,
)

# The arguments


@pytest.mark.parametrize("grid", [(5,), (5, 3), (5, 3, 2)])
@pytest.mark.parametrize("cooperative", [False, True])
def test_a_launch_repeated_is_triton_s(grid: tuple[int, ...], cooperative: bool, utils: Utils) -> None:
    """Pointers, descriptors of an input and of fixed tensors, integers, a float and constexprs, in one order, to one function."""
    kernel = compiled(launch_cooperative_grid=cooperative, launch_pdl=not cooperative)
    found, (_, a, b) = recorded(kernel, grid, utils)
    for _ in range(3):
        x = torch.zeros(24, 64)
        utils.launch.calls.clear()
        (out,) = found.replay([x, a, b], [t.data_ptr() for t in (x, a, b)])
        (call,) = utils.launch.calls
        assert plain(call) == by_triton(kernel, grid, arguments(x, a, b, out), utils)
        assert not any(isinstance(v, Tensor) for v in leaves(call)), "integers: the C launcher asks the driver about a tensor"
        assert out.shape == (25, 64)


def test_a_launch_without_descriptors_is_triton_s(utils: Utils) -> None:
    """Where Triton wraps no launcher."""
    kernel = compiled(POINTERS)
    recorder = Recorder([x := torch.zeros(8)], [w := torch.zeros(8)])
    recorder.launched("kernel", (7,), {}, kernel, [x[2:], 8, 64, w[4:]])
    found = recorder.tape([x], direct=True)
    assert found is not None and found.direct
    other = torch.zeros(8)
    assert found.replay([other, w], [other.data_ptr(), w.data_ptr()]) == [other]
    (call,) = utils.launch.calls
    assert plain(call) == by_triton(kernel, (7,), [other[2:], 8, 64, w[4:]], utils)


def test_one_descriptor_over_two_weights(utils: Utils) -> None:
    """The lower address first, and the distance for a stride: both weights stay where they are."""
    both = torch.zeros(2, 16, 32, dtype=torch.float16)
    up, gate = both.unbind(0)
    signature = {"out": "*fp16", "w": "tensordesc<fp16[1, 16, 16]>"}
    kernel, pair = compiled(signature, tensordesc_meta=META[1:]), launch.describe_pair(gate, up, 1, 16, 16)
    recorder = Recorder([x := torch.zeros(4, dtype=torch.float16)], [gate, up])
    recorder.launched("kernel", (1,), {}, kernel, [x, pair])
    found = recorder.tape([x], direct=True)
    assert found is not None
    found.replay([x, gate, up], [t.data_ptr() for t in (x, gate, up)])
    (call,) = utils.launch.calls
    assert plain(call) == by_triton(kernel, (1,), [x, pair], utils)
    told = leaves(call)
    assert up.data_ptr() in told and gate.data_ptr() not in told


class _Launcher36:
    """Triton 3.6's `CudaLauncher`, in what is read of it: one C launcher a signature, which takes the kernel's arguments flat."""

    def __init__(self, native: Native, described: tuple[int, ...]) -> None:
        launcher = native

        def wrapped(*args: Any) -> Any:
            final = list(args[:13])
            for i, arg in enumerate(args[13:]):
                final.extend(("descriptor", *arg.shape, *arg.strides) if i in described else [arg])
            return launcher(*final)

        self.launch = wrapped if described else native
        self.global_scratch_size = self.profile_scratch_size = 0
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, True, False

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *args)


@pytest.mark.parametrize("described", [(), (1, 3)])
def test_the_launcher_of_triton_3_6(described: tuple[int, ...], utils: Utils) -> None:
    """The scratch before the kernel's metadata, then hooks, then all arguments in a row."""
    native = Native()
    metadata = SimpleNamespace(tensordesc_meta=META) if described else SimpleNamespace()
    kernel = SimpleNamespace(run=_Launcher36(native, described), metadata=metadata, function=4321, packed_metadata=(4, 1, 1024))
    x, a, b = tensors()
    args = arguments(x, a, b, x)
    if not described:
        args = [arg for arg in args if not isinstance(arg, TensorDescriptor)]
    kernel.run(5, 3, 1, 777, kernel.function, kernel.packed_metadata, None, None, None, *args)
    recorder = Recorder([x], [a, b])
    recorder.launched("kernel", (5, 3), {}, kernel, args)
    found = recorder.tape([x], direct=True)
    assert found is not None and found.direct
    found.replay([x, a, b], [t.data_ptr() for t in (x, a, b)])
    theirs, ours = (plain(call) for call in native.calls)
    encoded = [leaf for leaf in ours if isinstance(leaf, tuple) and leaf[:1] == ("descriptor",)]
    assert [leaf[1] for leaf in encoded] == ([a.data_ptr(), b.data_ptr()] if described else [])
    assert tuple("descriptor" if leaf in encoded else leaf for leaf in ours) == theirs
    assert ours[:13] == (5, 3, 1, 777, 4321, True, False, None, None, (4, 1, 1024), None, None, None)


# Launchers that are not known


def _strange(**changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        kernel = compiled()
        for name, value in changes.items():
            if value is None:
                delattr(kernel.run, name)
            else:
                setattr(kernel.run, name, value)
        return kernel

    return make


def _python_launcher(*args: Any) -> None:
    raise AssertionError("no C function")


REFUSED: dict[str, Callable[[], Any]] = {
    "global scratch": lambda: compiled(global_scratch_size=128),
    "profile scratch": lambda: compiled(profile_scratch_size=8),
    "scratch unknown": _strange(global_scratch_size=None),
    "profile scratch unknown": _strange(profile_scratch_size=None),
    "a descriptor passed as pointers": lambda: compiled(tensordesc_meta=[META[0], None]),
    "every descriptor passed as pointers": lambda: compiled(tensordesc_meta=None),
    "descriptors of which nothing is said": lambda: compiled(tensordesc_meta=[]),
    "no launcher": _strange(launch=None),
    "a launcher in Python": _strange(launch=_python_launcher),
    "a wrapper around something else": _strange(launch=lambda *args: REFUSED),
    "another object": lambda: SimpleNamespace(run=_python_launcher, metadata=SimpleNamespace(), function=1, packed_metadata=()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_left_to_triton(name: str, utils: Utils) -> None:
    """No arguments are prepared, and a call is repeated by `launch.run`, which asks Triton's launcher."""
    kernel = REFUSED[name]()
    x, a, b = tensors()
    recorder = Recorder([x], [a, b])
    recorder.launched("kernel", (5,), {}, kernel, arguments(x, a, b, x))
    (step,) = recorder.steps
    assert isinstance(step, Step)
    found = recorder.tape([x], direct=True)
    assert found is not None and not found.direct and step.flat is None
    assert not utils.launch.calls


def test_a_recording_that_is_not_direct_asks_launch_run(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    """With descriptors over the tensors of now, on which Triton's launcher encodes them."""
    kernel, (x, a, b) = compiled(global_scratch_size=128), tensors()
    recorder = Recorder([x], [a, b])
    recorder.launched("kernel", (5,), {"num_warps": 4}, kernel, arguments(x, a, b, x)[:4])
    found = recorder.tape([x], direct=True)
    assert found is not None
    seen: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda *args: seen.append(args))
    other = torch.ones(24, 64)
    assert found.replay([other, a, b], [t.data_ptr() for t in (other, a, b)]) == [other]
    ((name, grid, options, first, described, rows, second),) = seen
    assert (name, grid, options, rows) == ("kernel", (5,), {"num_warps": 4}, 24)
    assert first is other and described.base is a and second.base is b
    assert isinstance(described, TensorDescriptor)
    assert (described.shape, described.strides, described.block_shape) == ([24, 64], [64, 1], [16, 32])


# Descriptors that are kept


def _of_input(utils: Utils) -> tuple[Any, Any]:
    signature = {"a": "tensordesc<fp32[16, 32]>"}
    kernel, x = compiled(signature, tensordesc_meta=META[:1]), torch.zeros(24, 64)
    recorder = Recorder([x], [])
    recorder.launched("kernel", (5,), {}, kernel, [describe(x, [24, 64], [64, 1], [16, 32])])
    found = recorder.tape([x], direct=True)
    assert found is not None and found.direct
    return found, kernel


def test_descriptors_are_kept_by_address(utils: Utils) -> None:
    """Encoded once for each place of x, and for weights once when the call is recorded."""
    found, kernel = _of_input(utils)
    places = [torch.zeros(24, 64) for _ in range(3)]
    assert utils.filled == 0
    for x in (*places, *reversed(places)):
        found.replay([x], [x.data_ptr()])
    assert utils.filled == 3
    calls = [plain(call) for call in utils.launch.calls]
    assert calls == [by_triton(kernel, (5,), [describe(x, [24, 64], [64, 1], [16, 32])], utils) for x in (*places, *places[::-1])]


def test_descriptors_of_fixed_tensors_are_encoded_once(utils: Utils) -> None:
    found, inputs = recorded(compiled(), (5,), utils)
    before = utils.filled
    assert before == 2
    for _ in range(3):
        found.replay(inputs, [t.data_ptr() for t in inputs])
    assert utils.filled == before


def test_descriptors_are_bounded(monkeypatch: pytest.MonkeyPatch, utils: Utils) -> None:
    monkeypatch.setattr(straight, "MOST_MAPS", 4)
    found, kernel = _of_input(utils)
    (step,) = found.steps
    (maps,) = [a.maps for a in step.flat if isinstance(a, Encoded)]
    memory = torch.zeros(24 * 64 + 4 * 32)
    for turn in range(30):
        x = memory.as_strided((24, 64), (64, 1), 4 * (turn % 7))
        found.replay([x], [x.data_ptr()])
        assert len(maps) <= 4
        call = plain(utils.launch.calls[-1])
        assert call == by_triton(kernel, (5,), [describe(x, [24, 64], [64, 1], [16, 32])], utils)


# One descriptor over two weights


def test_an_error_while_it_is_proved_is_no_answer_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that there was none of, say. The third error is one: a call must not cost a compilation for ever."""
    from mlpdsl import probe

    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "_proved", {})
    monkeypatch.setattr(launch, "_unseen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for answers, said in (
        ([None, True], [False, True, True]), ([None, None, None], [False] * 4), ([False], [False] * 2),
    ):  # fmt: skip
        launch._proved.clear()
        launch._unseen.clear()
        left = list(answers)
        monkeypatch.setattr(probe, "pair_descriptor_works", lambda device, left=left: left.pop(0))
        assert [launch._pair_proved(device) for _ in said] == said
        assert left == []
