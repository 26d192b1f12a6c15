"""The reference in `jax.numpy`: against the oracle and torch's own, and as what runs where no kernel can."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import mlpdsl
import mlpdsl.jax
from mlpdsl import MLPSpec, SpecError, UnsupportedError
from mlpdsl.jax import compiled
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing import oracle
from mlpdsl.testing.calls import Call, make_call, same_bits
from tests.pallas.support import arrays, of_named, run

OWN = MLPSpec.from_json("""{
    "dims": [24, 40, 16], "gated": true, "bias": true,
    "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
    "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                  "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}, "gelu"]
}""")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Nothing was chosen before."""
    compiled._chosen.cache_clear()
    yield
    compiled._chosen.cache_clear()


def hold(call: Call) -> None:
    """In float32 the reference is within the oracle, which need not replay: it rounds oftener than a kernel, but to float32."""
    y, grads = run(call, mlpdsl.jax.reference(call.spec))
    arguments = (call.spec, call.x, call.params, call.operands)
    oracle.check(y, oracle.forward(*arguments), f"y of {call!r}")
    expected = oracle.backward(*arguments, call.dy)
    for name, grad in grads.items():
        oracle.check(grad, expected[name], f"gradient of {name} of {call!r}")


def near(found: Tensor, eager: Tensor, wanted: oracle.Bounded, what: str) -> None:
    """Where every step rounds to 16 bits the oracle's bounds say nothing; the root mean square error is like eager PyTorch's."""
    finite = wanted.value.isfinite() & found.isfinite() & eager.isfinite()
    assert torch.equal(found.isfinite(), eager.isfinite()), what

    def rms(values: Tensor) -> float:
        return float(values[finite].square().mean().sqrt())

    limit = 2 * rms(eager.double() - wanted.value) + torch.finfo(found.dtype).eps * rms(wanted.value)
    assert rms(found.double() - wanted.value) <= limit, what


@pytest.mark.parametrize("values", ["normal", "tiny", "huge"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_float32(activation: str, values: str) -> None:
    """Between layers and on the output; gated as well, in the calm case."""
    spec = MLPSpec(dims=(24, 40, 16), activation=activation, bias=True, epilogue=(activation, "residual", "layer_scale", "scale"))
    hold(make_call(spec, (33,), 3, values=values))
    if values == "normal":
        hold(make_call(spec.replace(gated=True), (33,), 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "laplace"])
def test_as_exact_as_eager_in_16_bits(activation: str, dtype: str) -> None:
    epilogue = ("residual", "layer_scale", activation)
    for gated in (False, True):
        spec = MLPSpec(dims=(64, 96, 48), activation=activation, gated=gated, bias=True, dtype=dtype, epilogue=epilogue)
        call = make_call(spec, (65,), 4)
        y, grads = run(call, mlpdsl.jax.reference(spec))
        y_eager, grads_eager = call.gradients(mlpdsl.reference(spec))
        arguments = (spec, call.x, call.params, call.operands)
        near(y, y_eager, oracle.forward(*arguments), "y")
        expected = oracle.backward(*arguments, call.dy)
        for name, grad in grads.items():
            assert grad.dtype == call.named()[name].dtype
            near(grad, grads_eager[name], expected[name], f"gradient of {name}")


def test_functions_of_ones_own() -> None:
    """From JSON: one of gate and up, and one with an operand of each kind."""
    hold(make_call(OWN, (33,), 5))
    hold(make_call(OWN, (3, 5), 5))


def test_traced_functions_of_ones_own() -> None:
    act = mlpdsl.activation(lambda x: x * torch.tanh(torch.nn.functional.softplus(x)))
    hold(make_call(MLPSpec(dims=(24, 40, 16), activation=act, epilogue=(act,)), (33,), 6))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 4), (2, 3, 4)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    hold(make_call(OWN, lead, 7))


def test_without_pallas_it_is_what_runs(forgotten: None, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU, where only the interpreter runs kernels: every bit, and one line in the log, at INFO."""
    call = make_call(OWN, (9,), 8)
    mlp = mlpdsl.jax.compile(OWN)
    with caplog.at_level(logging.INFO, "mlpdsl"):
        y, grads = run(call, mlp)
        run(call, mlpdsl.jax.compile(OWN))
    wanted, wanted_grads = run(call, mlpdsl.jax.reference(OWN))
    assert same_bits(y, wanted)
    assert [n for n in grads if not same_bits(grads[n], wanted_grads[n])] == []
    (record,) = [record for record in caplog.records if record.name == "mlpdsl"]
    assert record.levelno == logging.INFO
    assert "jax.numpy runs" in record.getMessage() and "interpret=True" in record.getMessage()
    assert OWN.short_name in record.getMessage()


def test_a_target_that_has_no_kernels_falls_back_with_a_warning(forgotten: None, caplog: pytest.LogCaptureFixture) -> None:
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", precision="tf32")
    call = make_call(spec, (3,), 0)
    with caplog.at_level(logging.INFO, "mlpdsl"):
        y, _ = run(call, mlpdsl.jax.compile(spec, target="tpu_v5e"))
    (record,) = [record for record in caplog.records if record.name == "mlpdsl"]
    assert record.levelno == logging.WARNING and "tf32" in record.getMessage()
    assert same_bits(y, run(call, mlpdsl.jax.reference(spec))[0])


def test_asked_for_by_name() -> None:
    named = arrays(make_call(OWN, (5,), 9))
    by_name, itself = (of_named(OWN, f)(named) for f in (mlpdsl.jax.compile(OWN, backend="reference"), mlpdsl.jax.reference(OWN)))
    assert np.asarray(by_name).tobytes() == np.asarray(itself).tobytes()


def test_pallas_by_name_raises_with_every_reason(forgotten: None) -> None:
    """On a CPU at the first call, which asks what the device is; for a target at once, and all that it has not."""
    mlp = mlpdsl.jax.compile(OWN, backend="pallas")
    named = arrays(make_call(OWN, (5,), 9))
    with pytest.raises(UnsupportedError, match="interpret=True") as caught:
        of_named(OWN, mlp)(named)
    assert len(caught.value.reasons) == 1
    with pytest.raises(UnsupportedError, match="gfx942") as caught:
        mlpdsl.jax.compile(OWN, backend="pallas", target="gfx942")
    assert "triton" in caught.value.reasons[0]
    with pytest.raises(UnsupportedError, match="interpret=True"):
        mlpdsl.jax.compile(OWN, backend="pallas", target="cpu")


def test_backends_that_there_are_not() -> None:
    with pytest.raises(SpecError, match="pallas"):
        mlpdsl.jax.compile(OWN, backend="triton")
    with pytest.raises(SpecError, match="interpret"):
        mlpdsl.jax.compile(OWN, interpret=1)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="tpu_v5e"):
        mlpdsl.jax.compile(OWN, target="tpu_v99")


def test_what_is_no_spec() -> None:
    for function in (mlpdsl.jax.reference, mlpdsl.jax.compile):
        with pytest.raises(SpecError):
            function("not a spec")  # type: ignore[arg-type]
