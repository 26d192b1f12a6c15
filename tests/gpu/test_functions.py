"""Users' own functions, the whole corpus of tests/functions: forward and backward, in every dtype, through both paths."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import check_call, make_call
from tests import functions

pytestmark = pytest.mark.usefixtures("generated")

# Descriptors in 16-bit types at the first shape, masked loads everywhere else.
ALIGNED, ODD = ((64, 128, 64), 96), ((67, 45, 37), 33)
RUNS = {"float32": (ODD,), "float16": (ODD,), "bfloat16": (ALIGNED, ODD)}


def check(dtype: str, **fields: Any) -> None:
    for at, (dims, rows) in enumerate(RUNS[dtype]):
        spec = MLPSpec(dims=dims, bias=True, dtype=dtype, **fields)
        lies = "padded" if dims == ALIGNED[0] else "strided"
        verdict = check_call(make_call(spec, (rows,), at, x=lies, operands=lies, dy="padded", device="cuda"))
        assert max(verdict.strength.values()) > 4, f"the gradients say nothing: {verdict}"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlpdsl.UnstableWarning)
        yield


@pytest.mark.parametrize("dtype", RUNS)
@pytest.mark.parametrize("name", functions.ACTIVATIONS)
def test_activations(name: str, dtype: str) -> None:
    check(dtype, activation=functions.ACTIVATIONS[name])


@pytest.mark.parametrize("dtype", RUNS)
@pytest.mark.parametrize("name", functions.GATED)
def test_gated(name: str, dtype: str) -> None:
    check(dtype, activation=functions.GATED[name], gated=True)


@pytest.mark.parametrize("dtype", RUNS)
@pytest.mark.parametrize("name", functions.EPILOGUES)
def test_epilogues(name: str, dtype: str) -> None:
    function, kinds = functions.EPILOGUES[name]
    check(dtype, activation="silu", epilogue=(mlpdsl.epilogue(function, **kinds), "tanh"))


@pytest.mark.parametrize("dtype", RUNS)
def test_several_in_a_row(dtype: str) -> None:
    """Two epilogues of one's own around a built-in one, each kind of operand among them."""
    first = mlpdsl.epilogue(lambda y, gamma, keep: y * gamma * keep, gamma="column", keep="row")
    last = mlpdsl.epilogue(lambda y, gate, skip: skip + gate * y, gate="scalar", skip="tile")
    check(dtype, activation=functions.ACTIVATIONS["snake"], gated=True, epilogue=(first, "layer_scale", last))


@pytest.mark.parametrize("dtype", RUNS)
def test_hand_written_triton(dtype: str) -> None:
    """Text of one's own in place of what is traced, with libdevice."""
    text = ("x * tl.sigmoid(x)", "tl.sigmoid(x) * (1.0 + x * (1.0 - tl.sigmoid(x)))")
    check(dtype, activation=mlpdsl.activation(lambda x: x / (1 + (-x).exp()), triton=text, check=False))
    erf = mlpdsl.activation(lambda x: (x * 0.5).erf(), triton=("libdevice.erf(x * 0.5)", "0.5641895835 * tl.exp(-0.25 * x * x)"))
    check(dtype, activation=erf)


def test_a_learned_scalar_compiles_nothing() -> None:
    """Its value is read by the kernel: another value is another number, not another kernel."""
    import torch
    from triton.runtime.jit import JITFunction

    spec = MLPSpec(
        dims=(64, 64), activation="identity", dtype="bfloat16", epilogue=(mlpdsl.epilogue(lambda y, t: y / t, t="scalar"),)
    )
    mlp = mlpdsl.compile(spec, backend="triton")
    x, weight = torch.randn(32, 64, device="cuda").bfloat16(), torch.randn(64, 64, device="cuda").bfloat16()
    first = mlp(x, weight, t=torch.tensor(1.0, device="cuda"))
    compiled: list[object] = []
    run = JITFunction.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = watched
    try:
        for value in (2.0, 1.0, 0.25, 16.0):
            y = mlp(x, weight, t=torch.tensor(value, device="cuda"))
            torch.testing.assert_close(y.float() * value, first.float(), rtol=2**-7, atol=0)
    finally:
        JITFunction.run = run
    assert not compiled
