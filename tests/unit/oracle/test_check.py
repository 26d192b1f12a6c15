"""What `check` asks and says, and bounds where something is infinite."""

from __future__ import annotations

import re

import pytest
import torch

from mlpdsl.eager import reference
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import judge, make_call
from mlpdsl.testing.oracle import Bounded, OracleError
from tests.unit.oracle.kernel import SHAPES, Kernel, case, other


def bounded(*values: float, bound: float = 0.5, dtype: torch.dtype | None = None) -> Bounded:
    value = torch.tensor(values, dtype=torch.float64)
    return Bounded(value, torch.full_like(value, bound), dtype)


def test_nan_and_inf_must_meet_their_like() -> None:
    nan, inf = torch.nan, torch.inf
    expected = bounded(1.0, nan, inf, -inf)
    assert oracle.check(torch.tensor([1.25, nan, inf, -inf]), expected, "y").ratio == 0.5
    for wrong in ([nan, nan, inf, -inf], [1.0, 0.0, inf, -inf], [1, nan, 3e38, -inf], [1, nan, inf, inf]):
        with pytest.raises(OracleError, match="1 of 4 elements"):
            oracle.check(torch.tensor(wrong), expected, "y")


def test_nothing_is_asked_where_the_bound_is_inf() -> None:
    report = oracle.check(torch.tensor([torch.nan, 2.0]), bounded(1.0, 2.0, bound=torch.inf), "y")
    assert (report.unbounded, report.ratio) == (2, 0.0)


def test_message_says_where_and_how_far() -> None:
    expected = bounded(0.0, 0.0, 0.0, bound=0.25)
    with pytest.raises(OracleError, match=r"y: 2 of 3 .* at \(2,\), is -2.0 where 0.0 ± 0.25 .*: 8 bounds away"):
        oracle.check(torch.tensor([0.25, 1.0, -2.0]), expected, "y")


def test_shape_and_dtype_are_checked() -> None:
    with pytest.raises(OracleError, match=r"shape \(1,\), expected \(2,\)"):
        oracle.check(torch.zeros(1), bounded(0.0, 0.0), "y")
    with pytest.raises(OracleError, match=r"dtype torch.float32, expected torch.bfloat16"):
        oracle.check(torch.zeros(2), bounded(0.0, 0.0, dtype=torch.bfloat16), "y")


def test_aggregate_rule_compares_with_eager() -> None:
    value = torch.ones(2000, dtype=torch.float64)
    expected = Bounded(value, torch.full_like(value, 0.1))
    eager, fair, poor = value + 0.01, value + 0.019, value + 0.021
    assert oracle.check(fair, expected, "y", eager).eager_rmse == pytest.approx(0.01)
    with pytest.raises(OracleError, match=r"root mean square error 0.021 exceeds 0.02"):
        oracle.check(poor, expected, "y", eager)
    few = Bounded(value[:500], expected.bound[:500])
    oracle.check(poor[:500], few, "y", eager[:500])
    with pytest.raises(OracleError, match="3 times"):
        oracle.check(poor[:500] + 0.02, few, "y", eager[:500])


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "tanh"])
def test_inf_and_nan_in_the_input(name: str) -> None:
    spec = MLPSpec(dims=(8, 12, 4), activation=name)
    given = case(spec, lead=(6,))
    given.x[1, 2], given.x[3, 4], given.x[4, 0] = torch.nan, torch.inf, -torch.inf
    y = given.expected()["y"]
    assert y.value[1].isnan().all() and y.value[[0, 2, 5]].isfinite().all()
    assert y.bound.isfinite().all()
    oracle.check(Kernel(spec).run(given.x, given.params, given.ops, given.dy)["y"], y, "y")
    if name == "relu":
        wrong = other(lambda z: z.fmax(torch.zeros(())))(spec).run(given.x, given.params, given.ops, given.dy)["y"]
        with pytest.raises(OracleError, match="4 of 24 elements"):
            oracle.check(wrong, y, "y")


def test_overflow_of_the_hidden_tensor_is_inf() -> None:
    spec = MLPSpec(dims=(4, 4, 2), activation="relu", dtype="float16")
    x, eye = torch.full((1, 4), 300.0).half(), (torch.eye(4) * 300).half()
    down = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]).half()
    y = oracle.forward(spec, x, [eye, down])
    assert y.value.tolist() == [[torch.inf, -torch.inf]] and y.bound.isfinite().all()
    near = oracle.forward(spec, torch.full((1, 4), 65519.0 / 300).half(), [eye, down / 100])
    assert near.bound.isinf().all() or near.value.isfinite().all()


def test_gradients_agree_with_autograd() -> None:
    spec = MLPSpec(**SHAPES["epilogues"])
    given = case(spec, lead=(5, 3))
    leaves = {"x": given.x, **given.params, **given.ops}
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    h = torch.nn.functional.mish(leaves["x"] @ leaves["fc1.weight"].T)
    t = torch.nn.functional.silu(h @ leaves["fc2.weight"].T * leaves["scale"])
    y = (t + leaves["residual"]) * leaves["layer_scale"]
    expected = torch.autograd.grad(y, list(leaves.values()), given.dy.double())
    found = given.expected()
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[name].value, gradient, rtol=1e-11, atol=1e-13)
        assert found[name].dtype == torch.float32


def test_a_failure_says_where_by_how_much_and_against_what() -> None:
    """Of a whole call: result or gradient, spec, shape, place, value, expectation with its bound, and the distance in bounds."""
    spec = MLPSpec(dims=(8, 12, 4), activation="silu", bias=True)
    call = make_call(spec, (2, 3), 0)
    y, grads = call.gradients(reference(spec))
    judge(call, y, grads)
    number = r"-?\d+\.\d+(?:e-\d+)?"
    tail = rf" is {number} where {number} ± \d\.\d+e-\d+ is expected: \d\.\d+e\+\d+ bounds away"
    y[1, 2, 3] += 1.0
    with pytest.raises(OracleError) as error:
        judge(call, y, grads)
    assert re.fullmatch(re.escape(f"y of {spec!r} x(2, 3, 8): 1 of 24 elements are out of bounds; the worst, at (1, 2, 3),") + tail,
                        str(error.value))  # fmt: skip
    y[1, 2, 3] -= 1.0
    grads["fc1.bias"][5] *= 2.0
    with pytest.raises(OracleError) as error:
        judge(call, call.run(reference(spec)), grads)
    said = f"gradient of fc1.bias of {spec!r} x(2, 3, 8): 1 of 12 elements are out of bounds; the worst, at (5,),"
    assert re.fullmatch(re.escape(said) + tail, str(error.value))
