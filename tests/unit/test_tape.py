"""What a repeated launch hands to Triton's C launcher: exactly what Triton's own launcher would. No GPU, and no kernel runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from mlpdsl import launch, library, tape
from mlpdsl.agreement import hooked, twins
from mlpdsl.launch import descriptor as describe
from mlpdsl.tape import Described, Recorder, Step, Tapes, View

META = [
    {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [16, 32], "fp4_padded": False},
    {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [1, 16, 16], "fp4_padded": False},
]
SIGNATURE = {
    "x": "*fp32", "a": "tensordesc<fp32[16, 32]>", "M": "i32", "b": "tensordesc<fp16[1, 16, 16]>", "FIRST": "constexpr",
    "out": "*fp32", "scale": "fp32", "BLOCK": "constexpr", "SAVE": "constexpr", "N": "i64",
}  # fmt: skip
POINTERS = {"x": "*fp32", "M": "i32", "BLOCK": "constexpr", "out": "*fp32"}


class Native:
    """A C function: no Python one, and it remembers its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


class Utils:
    """What a CUDA driver gives Triton, without one. A descriptor is what it was made of."""

    def __init__(self) -> None:
        self.launch = Native()
        self.filled = 0

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return "|".join(signature).encode()

    def fill_tma_descriptor_tiled(self, *args: Any) -> tuple[Any, ...]:
        self.filled += 1
        return ("descriptor", *(tuple(a) if isinstance(a, list) else a for a in args))

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Utils:
    """Triton's CUDA driver, active and without a GPU."""
    utils = Utils()
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
    # Triton 3.7 reads its C classes from the module; 3.6 compiles a launcher for every signature.
    monkeypatch.setattr(nvidia, "PyKernelArg", lambda nested_tuple, type: (nested_tuple, type), raising=False)
    monkeypatch.setattr(nvidia, "ARG_CONSTEXPR", 0, raising=False)
    monkeypatch.setattr(nvidia, "ARG_KERNEL", 1, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=utils.launch))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 777, raising=False)
    return utils


def compiled(signature: dict[str, str] = SIGNATURE, **changes: Any) -> Any:
    """A compiled kernel as `launch.run` knows one, with the launcher that is installed."""
    about: dict[str, Any] = {"num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
                             "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": True}  # fmt: skip
    if any(kind.startswith("tensordesc") for kind in signature.values()):
        about["tensordesc_meta"] = META
    metadata = SimpleNamespace(**{**about, **changes})
    names = list(signature)
    constants = {(i,): 64 for i, kind in enumerate(signature.values()) if kind == "constexpr"}
    source = SimpleNamespace(constants=constants, signature=signature, fn=SimpleNamespace(arg_names=names))
    run = nvidia.CudaLauncher(source, metadata)
    return SimpleNamespace(run=run, metadata=metadata, function=4321, packed_metadata=(4, 1, 1024))


def by_triton(kernel: Any, grid: tuple[int, ...], args: list[Any], utils: Utils) -> tuple[Any, ...]:
    """The C call that Triton's launcher makes of these arguments, tensors as their addresses."""
    x, y, z = (*grid, 1, 1)[:3]
    utils.launch.calls.clear()
    kernel.run(x, y, z, 777, kernel.function, kernel.packed_metadata, None, None, None, *args)
    (call,) = utils.launch.calls
    utils.launch.calls.clear()
    return plain(call)


def plain(value: Any) -> Any:
    """Tensors as their addresses, which the C launcher asks them for; lists as tuples, which are one to it."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def arguments(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> list[Any]:
    return [
        x, describe(a, [24, 64], [64, 1], [16, 32]), 24, describe(b, [2, 16, 32], [512, 32, 1], [1, 16, 16]), 0, out[1:], 0.5,
        64, True, 2**40,
    ]  # fmt: skip


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(24, 64), torch.zeros(24, 64), torch.zeros(2, 16, 32, dtype=torch.float16)


def recorded(kernel: Any, grid: tuple[int, ...], utils: Utils) -> tuple[Any, list[Tensor]]:
    """A recording of one launch whose inputs are x (varying) and a, b (fixed), and which allocates its output."""
    x, a, b = tensors()
    recorder = Recorder([x], [a, b])
    out = x.new_empty((25, 64))
    recorder.allocated(out)
    recorder.launched("kernel", grid, {}, kernel, arguments(x, a, b, out))
    found = recorder.tape([out], direct=True)
    assert found is not None and found.direct
    return found, [x, a, b]


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
        assert not any(isinstance(v, Tensor) for v in _leaves(call)), "integers: the C launcher asks the driver about a tensor"
        assert out.shape == (25, 64)


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (list, tuple)) else [value]


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
    leaves = _leaves(call)
    assert up.data_ptr() in leaves and gate.data_ptr() not in leaves


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
    monkeypatch.setattr(tape, "_MOST_MAPS", 4)
    found, kernel = _of_input(utils)
    (step,) = found.steps
    ((_, _, _, maps, _),) = step.maps
    memory = torch.zeros(24 * 64 + 4 * 32)
    for turn in range(30):
        x = memory.as_strided((24, 64), (64, 1), 4 * (turn % 7))
        found.replay([x], [x.data_ptr()])
        assert len(maps) <= 4
        call = plain(utils.launch.calls[-1])
        assert call == by_triton(kernel, (5,), [describe(x, [24, 64], [64, 1], [16, 32])], utils)


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
