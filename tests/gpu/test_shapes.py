"""Few specs at many batch sizes, widths and layouts: the paths that tile sizes and alignment choose between."""

from __future__ import annotations

import random

import pytest

from mlpdsl import MLPSpec
from tests.support import LAYOUTS, PAIRS, WEIGHT_LAYOUTS, check_call, make_call

NARROW = [
    dict(dims=(64, 192, 64), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    dict(dims=(128, 320, 192), activation="silu", gated=True, dtype="bfloat16"),
    dict(dims=(200, 136, 72), activation="gelu_tanh", gated=True, bias=True, dtype="float16", epilogue=("layer_scale", "residual")),
    dict(dims=(8, 8, 8), activation="relu2", dtype="float16"),
    dict(dims=(97, 255, 61), activation="mish", bias=True, dtype="bfloat16"),
    dict(dims=(63, 129, 65), activation="silu", gated=True, dtype="float16", epilogue=("scale",)),
    dict(dims=(1, 1, 1), activation="tanh", gated=True, bias=True, dtype="bfloat16"),
    dict(dims=(100, 300, 50), activation="gelu", bias=True, dtype="float32"),
    dict(dims=(48, 80, 32), activation="quick_gelu", gated=True, dtype="float32", precision="tf32"),
    dict(dims=(3, 500, 2), activation="elu", bias=True, dtype="float32", epilogue=("sigmoid",)),
    dict(dims=(256, 512), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "residual")),
    dict(dims=(64, 128, 96, 64, 32), activation="leaky_relu", bias=True, dtype="float16"),
]
WIDE = [
    dict(dims=(4096, 1024, 4096), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    dict(dims=(1024, 4096, 1024), activation="silu", gated=True, dtype="bfloat16"),
    dict(dims=(4097, 515, 129), activation="silu", gated=True, bias=True, dtype="float16"),
    dict(dims=(512, 4096, 64), activation="relu", dtype="float32"),
]
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("fields", NARROW, ids=lambda f: MLPSpec(**f).short_name)
def test_narrow(fields: dict, part: int) -> None:
    """Random rows and layouts; a call compiles only where its tile sizes are new, so many are cheap."""
    spec = MLPSpec(**fields)
    choose = random.Random(f"{spec.short_name} {part}")
    failures = []
    for seed in range(14):
        rows = choose.choice(EDGES) if seed % 2 else choose.randint(1, 300)
        lead = choose.choice([(rows,), (rows,), (3, -(-rows // 3)), (2, 1, -(-rows // 2))])
        layouts = {
            "x": choose.choice(["dense", "dense", "padded", *LAYOUTS]),
            "weights": choose.choice(["dense", "dense", "padded", *WEIGHT_LAYOUTS]),
            "operands": choose.choice(["dense", "padded", *LAYOUTS]),
            "dy": choose.choice(["dense", "padded", *LAYOUTS]),
            "pair": choose.choice(PAIRS),
            "values": choose.choice(["normal", "normal", "tiny", "huge"]),
            "swap": choose.random() < 0.3,
        }
        try:
            check_call(make_call(spec, lead, seed, device="cuda", **layouts))
        except Exception as error:
            failures.append(f"{lead} {layouts}: {type(error).__name__}: {str(error)[:800]}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@pytest.mark.parametrize("fields", WIDE, ids=lambda f: MLPSpec(**f).short_name)
def test_wide(fields: dict) -> None:
    spec = MLPSpec(**fields)
    failures = []
    for seed, (rows, lies) in enumerate([(1, "dense"), (300, "dense"), (1000, "padded"), (2049, "dense"), (130, "transposed")]):
        call = make_call(
            spec, (rows,), seed, x=lies, operands=lies, dy=lies, pair="up_first" if seed % 2 else "apart", device="cuda"
        )
        try:
            check_call(call)
        except Exception as error:
            failures.append(f"{rows} rows, {lies}: {type(error).__name__}: {str(error)[:800]}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@pytest.mark.parametrize(
    "fields",
    [
        dict(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"),
        dict(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
        dict(dims=(768, 3072, 768), activation="gelu_tanh", bias=True, dtype="float16"),
        dict(dims=(1152, 4304, 1152), activation="gelu_tanh", bias=True, dtype="bfloat16"),
    ],
    ids=lambda f: MLPSpec(**f).short_name,
)
def test_models(fields: dict) -> None:
    """Shapes of language and vision models, forward and backward."""
    spec = MLPSpec(**fields)
    for rows in (257, 1):
        verdict = check_call(make_call(spec, (rows,), 0, device="cuda"))
        assert min(verdict.strength.values()) > 1, verdict  # the bound grows with K, the gradient with its root
