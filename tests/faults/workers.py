"""What processes that are started together do. Imported by processes that multiprocessing spawns, so it imports little."""

from __future__ import annotations

import hashlib

import mlpdsl


def specs(count: int, first: int = 0, functions: bool = True) -> list[mlpdsl.MLPSpec]:
    """Different specs of every shape there is: gated or not, with bias, epilogue, and (if `functions`) a function of one's own."""
    activations = ("silu", "gelu", "relu2", {"expr": "x * sigmoid(1.5 * x)"} if functions else "mish")
    return [
        mlpdsl.MLPSpec(
            dims=(64, 64 + 8 * i, 64),
            activation=activations[i % 4],
            gated=i % 2 == 0,
            bias=i % 4 == 1,
            dtype=("float32", "bfloat16", "float16")[i % 3],
            epilogue=("residual",) if i % 5 == 0 else (),
        )
        for i in range(first, first + count)
    ]


def generate(spec: mlpdsl.MLPSpec) -> tuple[str, str, bool]:
    """Key, digest of the text, and whether the file holds exactly the text."""
    made = mlpdsl.generate(spec, target="sm_90")
    return made.key, hashlib.sha256(made.text.encode()).hexdigest(), made.path.read_text("utf-8") == made.text
