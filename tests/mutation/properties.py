"""The ordinary properties, each for the kernels of one spec: what they draw, and what they refuse.

They are those of the suites: drawn calls against the oracle (`mlpdsl.testing.fuzz` and `test_properties`), the sweep of an
activation (`test_special_values`), the bitwise laws (`test_properties`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing import bounded, oracle
from mlpdsl.testing.calls import Call, CallError, check_call, same_bits
from mlpdsl.testing.oracle import OracleError
from mlpdsl.testing.strategies import calls
from tests.interpreted import test_special_values as sweeps
from tests.support import kept

__all__ = ["PROPERTIES", "VERDICTS", "LawError", "Property", "computed_again", "laws", "sweep"]


class LawError(AssertionError):
    """A bitwise law does not hold."""


VERDICTS = (OracleError, CallError, LawError)
"""The words of a property; whatever else is raised is a crash."""


@dataclass(frozen=True)
class Property:
    """Something that holds for every example that is drawn for a spec."""

    name: str
    examples: Callable[[MLPSpec], SearchStrategy[Any] | None]
    """What to draw for a spec; None where the property says nothing about it."""
    check: Callable[[Any], object]
    """Raises one of `VERDICTS` where an example fails."""
    functions: tuple[str, ...] = ()
    """The functions of the text that it is about; () for all of it."""
    cost: int = 1
    """About how many calls an example makes: so many times fewer are drawn."""


def swept(spec: MLPSpec) -> SearchStrategy[MLPSpec] | None:
    """The MLP from 1 to 1 that shows the spec's activation and nothing else. Always the same points, so there is one example."""
    if not isinstance(spec.activation, str) or len(spec.dims) == 2:
        return None
    return st.just(spec.replace(dims=(1, 1, 1), bias=spec.gated, dtype="float32", precision="ieee", epilogue=()))


def sweep(spec: MLPSpec) -> None:
    """Value and derivative from subnormals to infinity, and the value as backward computes it again."""
    x, zero, one = sweeps.points(), torch.zeros(1), torch.ones(1, 1)
    params = (one, one)
    if spec.gated:  # up is 1, by a weight of 0 and a bias; so only x whose square is finite, or inf·0 comes in
        x, params = x[x.abs() < 1e15], (one, zero, 0 * one, zero + 1, one, zero)
    sweeps.compare(str(spec.activation), x, *sweeps.run(spec, x, *params))
    computed_again(spec)


def computed_again(spec: MLPSpec) -> None:
    """The hidden value that backward computes again: with one row, x = 1 and the points for weights, so that the hidden values
    are the gradient of the last weight. In `sweeps.run` that is a sum over all points."""
    x, one = sweeps.points(), torch.ones(1, 1)
    x = x[x.abs() < 1e15] if spec.gated else x
    hidden, bias = torch.ones(len(x)), [torch.zeros(len(x)), torch.zeros(1)]
    wide = spec.replace(dims=(1, len(x), 1))
    down = torch.zeros(1, len(x)).requires_grad_()
    params = [x[:, None], down] if not spec.gated else [x[:, None], bias[0], 0 * x[:, None], hidden, down, bias[1]]
    y = mlpdsl.compile(wide, backend="triton")(one, *params)
    (grad,) = torch.autograd.grad(y, down, torch.ones_like(y))
    name = str(spec.activation)
    oracle.check(grad[0], bounded.rounded(bounded.activation(name, bounded.exact(x)), torch.float32), f"{name}(x)")


def laws(call: Call) -> None:
    """The bitwise laws on one call."""
    mlp = mlpdsl.compile(call.spec, backend="triton")
    y, grads = everything = replace(call, requires_grad=None).gradients(mlp)
    _agree(call.gradients(mlp), everything, "fewer gradients asked for")
    if call.spec.dtype == "float32":  # where every layout runs the same kernels
        _agree(_dense(call).gradients(mlp), everything, "dense copies")
    _saved_is_not_written(call, mlp)
    _rows_are_apart(call, mlp, y)
    if call.spec.activation in ("relu", "identity") and not call.spec.bias and not call.spec.epilogue:
        _agree((replace(call, x=call.x * 1024).run(mlp), {}), (y * 1024, {}), "1024 times x")
    if grads.keys() != call.named().keys():
        raise LawError(f"gradients of {sorted(grads)}")


def _agree(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    for name, t in {"y": got[0], **got[1]}.items():
        if not same_bits(t, {"y": wanted[0], **wanted[1]}[name]):
            raise LawError(f"{name} has other bits: {what}")


def _dense(call: Call) -> Call:
    operands = {name: t.contiguous() for name, t in call.operands.items()}
    return Call(call.spec, call.x.contiguous(), [p.contiguous() for p in call.params], operands, call.dy.contiguous())


def _saved_is_not_written(call: Call, mlp: Callable[..., Tensor]) -> None:
    leaves = call.needing()
    with kept() as saved:
        y = leaves.run(mlp)
    torch.autograd.grad(y, list(leaves.named().values()), call.dy)
    if not all(same_bits(t, copy) for t, copy in saved):
        raise LawError("backward wrote what forward had saved")


def _rows_are_apart(call: Call, mlp: Callable[..., Tensor], y: Tensor) -> None:
    """NaN in the first row of x changes no other row."""
    if call.x.dim() != 2 or call.x.shape[0] < 2:
        return
    x = call.x.clone()
    x[0] = torch.nan
    clean = call.x.clone()  # as dense as x: in 16 bits the layout may choose the kernels
    _agree((replace(call, x=x).run(mlp)[1:], {}), (replace(call, x=clean).run(mlp)[1:], {}), "NaN in another row")


PROPERTIES: tuple[Property, ...] = (
    Property("sweep", swept, sweep, ("activate", "activate_grad")),
    Property("calls", calls, check_call),
    Property("laws", lambda spec: calls(spec, values="normal", pattern="once"), laws, cost=6),
)
"""In the order in which the gate asks them: the one of one example first."""
