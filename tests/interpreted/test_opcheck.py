"""`torch.library.opcheck` on the two operators: schema, fake tensors, tracing, and what it says of autograd."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

import mlpdsl
from mlpdsl import MLPSpec, ops
from mlpdsl.testing.calls import Call, make_call

torch.set_num_threads(1)

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
"""All but test_autograd_registration, which wants a formula registered on the operator itself wherever an argument requires grad.
Autograd stands outside ours: `mlpdsl.autograd` calls the operators inside a `torch.autograd.Function`, and the operator called
directly raises when its gradient is asked for (test_autograd_is_refused_aloud). Nor does it apply to arguments without grad, as
these: then it has nothing to ask, and passes."""

EVERY_KIND = mlpdsl.epilogue(
    lambda y, gamma, keep, skip, t: skip + keep * gamma * torch.tanh(y / t), gamma="column", keep="row", skip="tile", t="scalar"
)
SPECS = {
    "plain": MLPSpec(dims=(7, 20, 6), activation="gelu", bias=True),
    "gated": MLPSpec(
        dims=(8, 24, 16), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "residual")
    ),
    "deep": MLPSpec(dims=(8, 16, 5, 8), activation="relu2", dtype="float16", epilogue=("scale", "tanh")),
    "linear": MLPSpec(dims=(9, 4), activation="identity", bias=True),
    "own": MLPSpec(dims=(8, 16, 8), activation=lambda x: x * torch.sin(x), bias=True, epilogue=(EVERY_KIND,)),
}
each_spec = pytest.mark.parametrize("name", SPECS)


def arguments(call: Call, save: bool) -> tuple[Any, ...]:
    """Those of `ops.forward`."""
    extra = (False,) * (len(ops.forward._schema.arguments) - 5)  # later fields, where there are any
    return (call.x, call.params, list(call.operands.values()), call.spec.to_json(), save, *extra)


def backward_arguments(call: Call, needs: list[bool]) -> tuple[Any, ...]:
    _, *saved = ops.forward(*arguments(call, True))
    extra = (False,) * (len(ops.backward._schema.arguments) - 7)
    return (call.dy, call.x, call.params, list(call.operands.values()), saved, needs, call.spec.to_json(), *extra)


def passes(results: dict[str, str]) -> bool:
    return bool(results) and all(said == "SUCCESS" for said in results.values())


@each_spec
def test_forward(name: str) -> None:
    """With what backward needs, of dense arguments; without it, of strided ones."""
    for save, layout in ((True, "dense"), (False, "strided")):
        call = make_call(SPECS[name], (5,), 0, x=layout, weights=layout, operands=layout)
        results = opcheck(ops.forward, arguments(call, save), test_utils=CHECKS if save else CHECKS[:2])
        assert passes(results)


@each_spec
def test_backward(name: str) -> None:
    """All gradients, some, and none."""
    call = make_call(SPECS[name], (2, 3), 0, dy="strided")
    count = len(call.named())
    assert passes(opcheck(ops.backward, backward_arguments(call, [True] * count), test_utils=CHECKS))
    for needs in ([i % 2 == 0 for i in range(count)], [False] * count):
        assert passes(opcheck(ops.backward, backward_arguments(call, needs), test_utils=CHECKS[:2]))


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
@each_spec
def test_no_rows_and_no_batch(name: str, lead: tuple[int, ...]) -> None:
    call = make_call(SPECS[name], lead, 0)
    checks = CHECKS if lead == (0,) and name == "own" else CHECKS[:2]
    assert passes(opcheck(ops.forward, arguments(call, True), test_utils=checks))
    assert passes(opcheck(ops.backward, backward_arguments(call, [True] * len(call.named())), test_utils=checks))


@each_spec
def test_autograd_is_refused_aloud(name: str) -> None:
    """Why test_autograd_registration is not among the checks, and what stands for it: no gradient is lost without a word."""
    call = make_call(SPECS[name], (5,), 0)
    assert passes(opcheck(ops.forward, arguments(call, False), test_utils="test_autograd_registration"))
    y = ops.forward(*arguments(call.needing(), False))[0]
    with pytest.raises(RuntimeError, match="records no gradient"):
        y.sum().backward()


def test_a_wrong_operator_is_refused() -> None:
    """Each check fails for what it is there for: one operator that lies about its shape, one that writes into its input."""
    library = torch.library.Library("mlpdsl_tests_opcheck", "DEF")
    library.define("narrow(Tensor x) -> Tensor")
    library.impl("narrow", lambda x: x.new_zeros(x.shape[0]), "CPU")
    torch.library.register_fake("mlpdsl_tests_opcheck::narrow", lambda x: x.new_empty(x.shape), lib=library)
    library.define("write(Tensor x) -> Tensor")

    def write(x: Tensor) -> Tensor:
        return x.add_(1.0).clone()

    library.impl("write", write, "CPU")
    torch.library.register_fake("mlpdsl_tests_opcheck::write", lambda x: torch.empty_like(x), lib=library)
    namespace = torch.ops.mlpdsl_tests_opcheck
    with pytest.raises(Exception, match="test_faketensor"):
        opcheck(namespace.narrow.default, (torch.ones(3, 4),), test_utils=CHECKS)
    with pytest.raises(Exception, match="test_schema"):
        opcheck(namespace.write.default, (torch.ones(3, 4),), test_utils=CHECKS)
