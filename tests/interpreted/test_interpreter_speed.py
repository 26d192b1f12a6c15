"""The interpreter made quicker is the one it was: same bits, same types, same refusals."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import inspect
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

import mlpdsl
from mlpdsl import MLPSpec, interpreter, interpreter_speed
from mlpdsl.backends import interpreter_lock
from mlpdsl.testing.calls import bits, make_call

interpreter.install()
core: Any = tl.core

SPECS = [
    MLPSpec(dims=(24, 40, 16), activation="gelu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual", "silu")),
    MLPSpec(dims=(13, 33, 9), activation="mish", bias=True, dtype="float16", epilogue=("layer_scale", "scale")),
    MLPSpec(dims=(20, 24, 40, 17), activation="tanh", precision="tf32"),
    MLPSpec(dims=(24, 24, 24), activation="silu", gated=True, dtype="float32", precision="ieee"),
]


def said(specs: list[MLPSpec]) -> str:
    """A digest of the bits of every result and gradient."""
    known = hashlib.sha256()
    for spec in specs:
        y, grads = make_call(spec, (37,), 3).gradients(mlpdsl.compile(spec, backend="triton"))
        for tensor in (y, *grads.values()):
            known.update(bits(tensor.contiguous()).numpy().tobytes())
    return known.hexdigest()


def test_bits_are_those_of_a_front_end_that_is_as_it_was() -> None:
    """Which a process of its own has."""
    code = (
        "from mlpdsl import interpreter_speed; interpreter_speed.front_end = lambda: None;"
        " from tests.interpreted import test_interpreter_speed as here; from triton.language.core import tensor;"
        " assert tensor.__init__.__module__ == 'triton.language.core'; print(here.said(here.SPECS))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == said(SPECS)


@triton.jit
def twice(x_ptr, N: tl.constexpr):
    """x = 2x, in programs of 4."""
    at = tl.program_id(0) * 4 + tl.arange(0, N)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + tl.load(x_ptr + at))


def doubled(value: int, programs: int = 1, size: Any = 4) -> list[int]:
    x = torch.full((4 * programs,), value, dtype=torch.int32)
    twice[(programs,)](x, size)
    return x.tolist()


def test_overflow_is_looked_for_where_an_assertion_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody asks for assertions later."""
    assert doubled(2**30) == [-(2**31)] * 4
    builder = triton_interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        doubled(2**30)


def test_launches_of_threads_take_turns() -> None:
    """A user's kernel beside another, and an MLP; and afterwards."""
    spec = MLPSpec(dims=(8, 16, 8), activation="relu")
    mlp, call = mlpdsl.compile(spec, backend="triton"), make_call(spec, (3,), 3)
    y = bits(mlp(call.x, *call.params))
    found: list[Any] = []

    def run() -> None:
        for _ in range(3):
            found.append(doubled(3, programs=64) == [6] * 256)
            found.append(torch.equal(bits(mlp(call.x, *call.params)), y))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    run()
    assert found == [True] * 24


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")
def test_a_child_takes_its_own_turns() -> None:
    """Forked while another thread launches."""
    begun, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with interpreter_lock():
            begun.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if interpreter_lock().acquire(timeout=1) else 1)
    leave.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("sizes", [(True, 4), (enum.IntEnum("Size", {"FOUR": 4}).FOUR, 2)], ids=["bool", "enumeration"])
def test_sizes_that_only_equal_others_leave_nothing_behind(sizes: tuple[Any, ...]) -> None:
    """What comes first in a process, and was refused, or was of another type, does not stay."""
    types = []
    for shape in ([*sizes], [int(size) for size in sizes]):
        with contextlib.suppress(ValueError, TypeError):
            block = core.block_type(tl.pointer_type(tl.int8), shape)
            types = [type(size) for size in (*block.shape, *(each.value for each in tl.tensor(None, block).shape))]
    assert types == [int] * 4


ELEMENTS = [tl.int1, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.float8e5, tl.pointer_type(tl.bfloat16)]
SHAPES = [[1], [16], [16, 1], [1, 16], [8, 16], [2, 4, 8], core.tuple([4, 4]), [core.constexpr(4), 8]]


def made(element: Any, shape: Any) -> list[Any]:
    """What a block and a tensor say of themselves."""
    block = core.block_type(element, shape)
    tensor = tl.tensor(None, block)
    assert block.scalar is block.element_ty is element and tensor.type is block and tensor.dtype is element
    sizes = [type(each) for each in (*block.shape, *tensor.shape)]
    whole = (block.shape, tensor.shape, tensor.numel)
    return [str(block), block.numel, [*map(str, whole)], sizes, [type(each) for each in whole]]


def test_types_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks and tensors, made for the first time and again."""
    every = [(element, shape) for element in ELEMENTS for shape in SHAPES]
    first, again = [made(*each) for each in every], [made(*each) for each in every]
    kinds = [triton_interpreter._get_np_dtype(each) for each in [*ELEMENTS, *(core.block_type(*each) for each in every)]]
    own = inspect.getclosurevars(triton_interpreter._get_np_dtype).nonlocals["original"]
    for kind in (core.block_type, core.tensor):
        monkeypatch.setattr(kind, "__init__", inspect.getclosurevars(kind.__init__).nonlocals["original"])
    assert first == again == [made(*each) for each in every]
    assert kinds == [own(each) for each in [*ELEMENTS, *(core.block_type(*each) for each in every)]]


def test_a_scalar_has_no_shape() -> None:
    for _ in range(2):
        scalar = tl.tensor(None, tl.int32)
        assert len(scalar.shape) == 0 and scalar.numel.value == 1 and not scalar.type.is_block()


@pytest.mark.parametrize(
    ("shape", "error"), [([3], ValueError), ([], TypeError), ([2.0], TypeError), ([True, 3], ValueError), ((2,), AssertionError)]
)
def test_refused_blocks_stay_refused(shape: list[Any], error: type[Exception]) -> None:
    core.block_type(tl.float32, [2])
    for _ in range(2):
        with pytest.raises(error):
            core.block_type(tl.float32, shape)


def test_types_compare_as_they_did() -> None:
    assert tl.float32 == tl.float32 and tl.float32 != tl.bfloat16 and tl.float32 != "fp32"
    assert tl.float32 == core.constexpr(tl.float32)
    assert core._unwrap_if_constexpr(core.constexpr(3)) == 3 == core._unwrap_if_constexpr(3)
    assert core._unwrap_if_constexpr([core.constexpr(3), 4]) == [3, 4]
    assert core._unwrap_if_constexpr((core.constexpr(3), 4)) == (3, 4)


def test_shapes_that_differ_are_broadcast_or_refused() -> None:
    semantic = triton_interpreter.interpreter_semantic

    def tensor(*shape: int) -> Any:
        handle = triton_interpreter.TensorHandle(np.zeros(shape, np.float32), tl.float32)
        return tl.tensor(handle, core.block_type(tl.float32, list(shape)))

    same = tensor(8, 4), tensor(8, 4)
    assert semantic.broadcast_impl_value(*same) == same
    for one, other in ((tensor(8, 1), tensor(1, 4)), (tensor(8, 4), tensor(1, 4)), (tensor(8, 1), tensor(8, 4))):
        for each in semantic.broadcast_impl_value(one, other):
            assert each.handle.data.shape == (8, 4) and [*each.type.shape] == [8, 4]
    with pytest.raises(ValueError, match="incompatible dimensions"):
        semantic.broadcast_impl_value(tensor(8, 4), tensor(4, 4))


def test_what_replaces_a_builtin_function_during_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that triton itself would find, also after somebody has put another one there; and all come back."""
    patch = interpreter_speed.patching()

    def during() -> dict[str, Any]:
        scope = triton_interpreter._LangPatchScope()
        before = dict(vars(tl))
        patch(tl, None, scope)
        found = {name: value for name, value in vars(tl).items() if value is not before[name]}
        scope.restore()
        assert vars(tl) == before
        return found

    builtin = {name for name, value in vars(tl).items() if core.is_builtin(value)}
    assert set(during()) == set(during()) == builtin and len(builtin) > 50
    monkeypatch.setattr(tl, "exp", core.builtin(lambda x, _semantic=None: (x, _semantic)))
    assert during()["exp"](3) == (3, triton_interpreter.interpreter_semantic)
    monkeypatch.setattr(tl, "one_more", tl.exp, raising=False)
    assert set(during()) == builtin | {"one_more"}
    monkeypatch.delattr(tl, "histogram")
    monkeypatch.setattr(tl, "two_more", tl.exp, raising=False)  # as many names as before
    assert set(during()) == builtin - {"histogram"} | {"one_more", "two_more"}


def test_every_change_of_the_front_end_was_made() -> None:
    """With the Tritons that this project supports; a later one may declare things otherwise, and loses time alone."""
    module, semantic = triton_interpreter, type(triton_interpreter.interpreter_semantic)
    changed = [
        core._unwrap_if_constexpr, core.dtype.__eq__, core.block_type.__init__, core.tensor.__init__, module._get_np_dtype,
        module._patch_builtin, module.InterpreterBuilder.create_splat, semantic.broadcast_impl_value,
        semantic.binary_op_type_checking_impl,
    ]  # fmt: skip
    assert {each.__module__ for each in changed} == {"mlpdsl.interpreter_speed"}


def test_what_is_declared_otherwise_is_left() -> None:
    def later(self: Any, handle: Any, type: Any, layout: Any) -> None: ...

    place = SimpleNamespace(init=later, number=3)
    for name in ("init", "number", "gone"):
        interpreter_speed._change(place, name, interpreter_speed.alike_tensors, "self", "handle", "type")
    assert vars(place) == {"init": later, "number": 3}


TYPES = [tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64]


@pytest.mark.parametrize("dividing", [False, True])
def test_types_are_promoted_as_they_were(dividing: bool) -> None:
    """Of two tensors, and of a tensor and a number."""
    semantic = triton_interpreter.interpreter_semantic
    check = semantic.binary_op_type_checking_impl
    original = inspect.getclosurevars(type(semantic).binary_op_type_checking_impl).nonlocals["original"].__get__(semantic)

    def said(promote: Any, *operands: Any) -> Any:
        try:
            found = promote(*operands, False, False, True, dividing)
        except (TypeError, ValueError) as error:
            return str(error)
        return [(str(each.type), each.handle.data.tolist()) for each in found]

    def tensor(kind: Any, *shape: int) -> Any:
        handle = triton_interpreter.TensorHandle(np.ones(shape, triton_interpreter._get_np_dtype(kind)), kind)
        return tl.tensor(handle, core.block_type(kind, list(shape)) if shape else kind)

    address = tl.tensor(
        triton_interpreter.TensorHandle(np.array([64], np.uint64), tl.pointer_type(tl.float32)), tl.pointer_type(tl.float32)
    )
    for promote in (check, original):
        assert promote(address, address, True, True) == (address, address)
    seen = set()
    with_lang = triton_interpreter._LangPatchScope()
    triton_interpreter._patch_lang_core(tl, with_lang)
    try:
        for left in TYPES:
            for right in [*(tensor(kind, *shape) for kind in TYPES for shape in ((2, 4), (1, 4), ())), 3, -1, 2.5]:
                operands = tensor(left, 2, 4), right
                assert said(check, *operands) == said(original, *operands)
                seen.add(type(said(check, *operands)))
    finally:
        with_lang.restore()
    assert seen == {str, list}


def test_a_splat_is_of_its_shape_and_type() -> None:
    arg = triton_interpreter.TensorHandle(np.array([2.5], np.float16), tl.float16)
    handle = triton_interpreter.interpreter_builder.create_splat(SimpleNamespace(shape=core.tuple([4, 8])), arg)
    assert handle.data.shape == (4, 8) and handle.data.dtype == np.float16 and (handle.data == 2.5).all()


def test_sums_of_any_columns_a_program_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights' gradients in parts, of biases and of an operand: as wide as here, and as on a GPU."""
    from mlpdsl import dispatch, launch

    spec = MLPSpec(dims=(40, 72, 24), activation="silu", gated=True, bias=True, dtype="float16", epilogue=("layer_scale",))
    call, mlp = make_call(spec, (150,), 3), mlpdsl.compile(spec, backend="triton")

    def gradients(columns: int) -> list[torch.Tensor]:
        dispatch.forget()  # what a recording launches it launches again
        monkeypatch.setattr(launch, "SUM_COLUMNS", columns)
        heard.clear()
        return [bits(each.contiguous()) for each in call.gradients(mlp)[1].values()]

    heard: list[tuple[int, ...]] = []
    run = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, grid, *rest: (heard.append((kernel.__name__, *grid)), run(kernel, grid, *rest))
    )
    wide, programs = gradients(512), [*heard]
    assert all(map(torch.equal, wide, gradients(64))) and max(at for name, at, *_ in programs if name == "sum_rows") > 1
    assert sum(at for name, at, *_ in heard if name == "sum_rows") > 2 * sum(at for name, at, *_ in programs if name == "sum_rows")
