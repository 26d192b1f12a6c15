"""What is written for Hopper lowers through Mosaic without a GPU, and what cannot says why. What it computes is tested on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

import mlpdsl.jax
from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.names import ACTIVATIONS

pytest.importorskip("absl", reason="Pallas for GPUs needs absl-py")

OWN = MLPSpec.from_json("""{
    "dims": [128, 192, 128], "dtype": "bfloat16", "gated": true,
    "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
    "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                  "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}]
}""")
SPECS = {
    "everything": MLPSpec(
        dims=(512, 1024, 512), activation="silu", gated=True, bias=True, dtype="bfloat16",
        epilogue=("layer_scale", "residual", "scale"),
    ),
    "deep": MLPSpec(dims=(128, 256, 128, 64), activation="relu", dtype="float16"),
    "single": MLPSpec(dims=(128, 256), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu",)),
    "own": OWN,
    **{name: MLPSpec(dims=(64, 128, 64), activation=name, dtype="bfloat16") for name in ACTIVATIONS},
}  # fmt: skip


def lowered(spec: MLPSpec, rows: int, backward: bool) -> str:
    """The module for CUDA of one call."""
    mlp = mlpdsl.jax.compile(spec, backend="pallas", target="sm_90")
    shapes = {"tile": (rows, spec.d_out), "row": (rows, 1), "column": (spec.d_out,), "scalar": ()}

    def like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype))  # type: ignore[no-untyped-call]

    def forward(x: Any, params: list[Any], operands: dict[str, Any]) -> Any:
        return mlp(x, *params, **operands)

    def step(x: Any, params: list[Any], operands: dict[str, Any]) -> Any:
        y, pull = jax.vjp(forward, x, params, operands)
        return pull(y)

    params = [like(shape) for shape in spec.parameter_shapes().values()]
    operands = {name: like(shapes[kind]) for name, kind in spec.operands().items()}
    made = export.export(jax.jit(step if backward else forward), platforms=["cuda"])
    return str(made(like((rows, spec.d_in)), params, operands).mlir_module())


@pytest.mark.parametrize("name", SPECS)
def test_it_lowers_for_hopper(name: str) -> None:
    spec = SPECS[name]
    for rows, backward in ((100, False), (256, True)):
        text = lowered(spec, rows, backward)
        assert text.count("custom_call @mosaic_gpu") == len(spec.dims) - 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (MLPSpec(dims=(64, 128, 64), activation="gelu"), "wgmma multiplies float32 as tf32 alone"),
        (MLPSpec(dims=(64, 100, 64), activation="gelu", dtype="bfloat16"), "multiples of 64, not 100"),
        (MLPSpec.from_json('{"dims": [64, 64, 64], "dtype": "bfloat16", "activation": {"expr": "sqrt(x * x + 1.0)"}}'), "no sqrt"),
    ],
)
def test_what_it_cannot(spec: MLPSpec, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        mlpdsl.jax.compile(spec, backend="pallas", target="sm_90")
    with pytest.raises(UnsupportedError, match="target='cpu' is for it"):
        mlpdsl.jax.compile(spec, backend="pallas", target="sm_90", interpret=True)


def test_it_runs_only_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    spec = MLPSpec(dims=(64, 192, 64), activation="silu", dtype="bfloat16")
    x, params = jnp.ones((3, 64), "bfloat16"), [jnp.ones(s, "bfloat16") for s in spec.parameter_shapes().values()]
    with caplog.at_level(logging.WARNING, "mlpdsl"):
        y = mlpdsl.jax.compile(spec, target="sm_90")(x, *params)
    assert jnp.array_equal(y, mlpdsl.jax.reference(spec)(x, *params))
    assert "XLA's products are as fast or faster" in caplog.text and "backend='pallas' asks for the kernels" in caplog.text


def test_an_older_jax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    monkeypatch.setattr(jax, "__version__", "0.10.1")
    spec = MLPSpec(dims=(192, 128, 192), activation="silu", dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r"need jax 0\.10\.2 or later, and this is 0\.10\.1"):
        mlpdsl.jax.compile(spec, backend="pallas", target="sm_90")
