"""The specs whose kernels are mutated, by name. Small, so that an interpreted call takes tens of milliseconds."""

from __future__ import annotations

from mlpdsl import MLPSpec

__all__ = ["FAMILIES", "forced"]

FAMILIES: dict[str, MLPSpec] = {
    # Masked loads alone: widths with a tail for every tile size.
    "gated": MLPSpec(dims=(50, 70, 41), activation="gelu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale",)),
    "plain": MLPSpec(dims=(50, 70, 41), activation="silu", bias=True, dtype="float16", epilogue=("residual",)),
    "float32": MLPSpec(dims=(50, 70, 41), activation="gelu", gated=True, dtype="float32"),
    "relu": MLPSpec(dims=(50, 70, 41), activation="relu", dtype="float32"),
    "deep": MLPSpec(dims=(33, 47, 65, 20), activation="gelu_tanh", bias=True, dtype="float32"),
    "quick": MLPSpec(dims=(33, 47, 20), activation="quick_gelu", dtype="float32"),
    "chain": MLPSpec(
        dims=(40, 71), activation="identity", bias=True, dtype="bfloat16", epilogue=("layer_scale", "silu", "scale", "residual")
    ),
    # (gate, up) of one's own, and an epilogue with an operand of each kind.
    "own": MLPSpec.from_json("""{
        "dims": [50, 70, 97], "gated": true, "dtype": "float16",
        "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
        "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                      "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}]
    }"""),
    # Tensor descriptors, wherever the tensors that are drawn fit them: several tiles each way, the last ones clipped.
    "gated_tma": MLPSpec(dims=(72, 88, 80), activation="gelu", gated=True, bias=True, dtype="bfloat16"),
    "plain_tma": MLPSpec(dims=(72, 88, 80), activation="silu", bias=True, dtype="float16", epilogue=("residual",)),
    "scaled_tma": MLPSpec(dims=(72, 80), activation="identity", bias=True, dtype="bfloat16", epilogue=("layer_scale", "scale")),
    # Every product by the library.
    "gated_library": MLPSpec(
        dims=(50, 70, 41), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale",)
    ),
    "gated_batched": MLPSpec(dims=(50, 70, 41), activation="silu", gated=True, dtype="float16"),
    "biased_batched": MLPSpec(
        dims=(50, 70, 41), activation="gelu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",)
    ),
    "wide_library": MLPSpec(dims=(33, 47, 20), activation="gelu", gated=True, dtype="float32", epilogue=("residual",)),
    "plain_library": MLPSpec(dims=(50, 70, 41), activation="gelu", bias=True, dtype="float16", epilogue=("residual", "scale")),
    # Biases of float32 in the passes.
    "plain_apart": MLPSpec(dims=(50, 70, 41), activation="gelu", bias=True, dtype="float32", epilogue=("gelu", "residual")),
    "gated_apart": MLPSpec(dims=(33, 47, 20), activation="silu", gated=True, bias=True, dtype="float32"),
    # The kernels for few rows wherever there are few.
    "gated_skinny": MLPSpec(
        dims=(50, 70, 41), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale",)
    ),
    "plain_skinny": MLPSpec(dims=(71, 70, 41), activation="gelu", bias=True, dtype="float16", epilogue=("residual",)),
    "exactgated_skinny": MLPSpec(dims=(50, 70, 41), activation="silu", gated=True, bias=True, dtype="float32"),
    "exact_skinny": MLPSpec(dims=(71, 70, 41), activation="gelu", bias=True, dtype="float32", epilogue=("residual",)),
    # On copies wherever rows are of no whole 16 bytes: which all are, or those of the first linear's result alone.
    "gated_padded": MLPSpec(dims=(50, 70, 41), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",)),
    "plain_padded": MLPSpec(dims=(267, 70, 41), activation="gelu", bias=True, dtype="float16", epilogue=("silu", "residual")),
    "tf32_padded": MLPSpec(dims=(50, 70, 41), activation="silu", gated=True, bias=True, dtype="float32", precision="tf32"),
    "mixed_padded": MLPSpec(dims=(48, 70, 40), activation="gelu", gated=True, dtype="bfloat16"),
    # Every linear in one launch: weights in shared memory, or read for each tile.
    "narrow_whole": MLPSpec(
        dims=(13, 64, 33, 20), activation="silu", bias=True, dtype="bfloat16", epilogue=("layer_scale", "residual")
    ),
    "gated_whole": MLPSpec(dims=(50, 40, 30), activation="silu", gated=True, bias=True, dtype="float16"),
    "anew_whole": MLPSpec(dims=(40, 100, 17), activation="gelu", dtype="bfloat16", epilogue=("silu",)),
}
"""Each family by its name: what a mutant's `families` name."""


def forced(family: str) -> str:
    """The strategy that is forced for a family; "" where the usual one runs."""
    ends = {
        "library": "library",
        "batched": "batched",
        "apart": "bias_pass",
        "skinny": "skinny",
        "padded": "padded",
        "whole": "whole_network",
    }
    return ends.get(family.rpartition("_")[2], "")
