"""Sixteen specs that differ in everything a spec has: what the suites on a GPU run."""

from __future__ import annotations

from mlpdsl import MLPSpec

SPECS = {
    "swiglu": MLPSpec(dims=(128, 320, 192), activation="silu", gated=True, dtype="bfloat16"),
    "gelu-residual": MLPSpec(dims=(64, 192, 64), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    "everything": MLPSpec(
        dims=(200, 136, 72), activation="gelu_tanh", gated=True, bias=True, dtype="float16",
        epilogue=("layer_scale", "residual", "scale", "relu6"),
    ),
    "smallest": MLPSpec(dims=(8, 8, 8), activation="relu2", dtype="float16"),
    "odd": MLPSpec(dims=(97, 255, 61), activation="mish", bias=True, dtype="bfloat16"),
    "odd-gated": MLPSpec(dims=(63, 129, 65), activation="silu", gated=True, dtype="float16", epilogue=("scale",)),
    "ones": MLPSpec(dims=(1, 1, 1), activation="tanh", gated=True, bias=True, dtype="bfloat16"),
    "fp32": MLPSpec(dims=(100, 300, 50), activation="gelu", bias=True),
    "fp32-gated": MLPSpec(dims=(40, 72, 24), activation="laplace", gated=True, bias=True, epilogue=("layer_scale",)),
    "tf32": MLPSpec(dims=(48, 80, 32), activation="quick_gelu", gated=True, precision="tf32"),
    "tf32x3": MLPSpec(dims=(64, 96, 40), activation="softplus", precision="tf32x3", epilogue=("residual",)),
    "single": MLPSpec(dims=(256, 512), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "residual")),
    "deep": MLPSpec(dims=(64, 128, 96, 64, 32), activation="leaky_relu", bias=True, dtype="float16"),
    "narrow-ends": MLPSpec(dims=(3, 500, 2), activation="elu", bias=True, epilogue=("sigmoid",)),
    "long": MLPSpec(dims=(1024, 2816, 1024), activation="gelu_10", gated=True, dtype="bfloat16"),
    "own": MLPSpec.from_json("""{
        "dims": [48, 72, 97], "gated": true, "dtype": "bfloat16",
        "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
        "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                      "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}]
    }"""),
}  # fmt: skip
