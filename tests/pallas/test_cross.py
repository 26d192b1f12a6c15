"""Kernels in JAX and eager PyTorch on the same call: both within the same bounds, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.bounded import UNIT
from mlpdsl.testing.calls import judge, make_call
from tests.pallas.support import run
from tests.sixteen import SPECS

NARROW = {name: spec for name, spec in SPECS.items() if name != "long"}


def apart(found: Tensor, eager: Tensor, wanted: oracle.Bounded) -> float:
    """The largest difference of two results, in units of what the oracle tolerates of either."""
    far = (found.double() - eager.double()).abs() / wanted.bound
    return float(far[wanted.bound.isfinite() & (wanted.bound > 0) & wanted.value.isfinite()].amax().nan_to_num(nan=torch.inf))


@pytest.mark.parametrize("name", NARROW)
def test_the_same_call_in_both(name: str, record_property: Callable[[str, object], None]) -> None:
    """The kernels are judged with eager PyTorch beside them. In float32 eager is within the same bounds, so that they are at most
    two of these apart; in 16 bits, where eager rounds oftener, what lies between them is mostly eager's error."""
    spec = SPECS[name]
    call = make_call(spec, (33,), 12)
    y, grads = run(call)
    y_eager, grads_eager = call.gradients(mlpdsl.reference(spec))
    verdict = judge(call, y, grads)
    exact = spec.dtype == "float32"
    arguments = (spec, call.x, call.params, call.operands)
    wanted = {"y": oracle.forward(*arguments, replay=True), **oracle.backward(*arguments, call.dy, replay=True)}
    ours, theirs = {"y": y, **grads}, {"y": y_eager, **grads_eager}
    worst = {n: apart(ours[n], theirs[n], wanted[n]) for n in wanted if not wanted[n].is_exact and wanted[n].bound.any()}
    record_property("apart, in bounds", worst)
    record_property("ratio", verdict.ratio)
    if exact:
        judge(call, y_eager, grads_eager, eager=False)
        assert max(worst.values()) <= 2, worst
    for n, t in ours.items():
        if t.numel() < 8:  # of one number the size says nothing: its terms may cancel
            continue
        scale = float(wanted[n].value.abs().amax())
        far = float((t.double() - theirs[n].double()).abs().amax())
        assert far <= 64 * UNIT[t.dtype] * scale, (n, far, scale, worst)


def test_both_refuse_the_same_shapes() -> None:
    spec = MLPSpec(dims=(8, 16, 4), activation="relu", bias=True)
    call = make_call(spec, (5,), 0)
    for changed in (call.x[:, :7], call.x[:, :1]):
        with pytest.raises(mlpdsl.ShapeError, match=r"x\.shape"):
            mlpdsl.reference(spec)(changed, *call.params)
        with pytest.raises(mlpdsl.ShapeError, match=r"x\.shape"):
            run(type(call)(spec, changed, call.params, {}, call.dy))
