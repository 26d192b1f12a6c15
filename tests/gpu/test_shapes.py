"""Wide specs, and those of models, at a few batch sizes; `test_tier` has narrow ones at many."""

from __future__ import annotations

import pytest

from mlpdsl import MLPSpec, dispatch
from mlpdsl.testing.calls import check_call, make_call

pytestmark = pytest.mark.usefixtures("generated")

WIDE = [
    dict(dims=(4096, 1024, 4096), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    dict(dims=(1024, 4096, 1024), activation="silu", gated=True, dtype="bfloat16"),
    dict(dims=(4097, 515, 129), activation="silu", gated=True, bias=True, dtype="float16"),
    dict(dims=(512, 4096, 64), activation="relu", dtype="float32"),
]


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


@pytest.mark.parametrize("strategy", ["padded", ""], ids=["forced", "by_the_rule"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(dims=(333, 1111, 577), activation="gelu", bias=True, dtype="bfloat16"),
        dict(dims=(1021, 749, 1021), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",)),
        dict(dims=(1024, 749, 520), activation="silu", gated=True, bias=True, dtype="float16", epilogue=("gelu",)),
    ],
    ids=lambda f: MLPSpec(**f).short_name,
)
def test_on_copies(fields: dict, strategy: str, launched: set[str]) -> None:
    """Rows of no whole 16 bytes: made, recorded and repeated with the same bits, forward and backward; and in a CUDA graph."""
    spec = MLPSpec(**fields)
    says = max if "gelu" in spec.epilogue else min  # of that one's smallest gradients the bound says little
    with dispatch.forcing(strategy):
        for seed, (pattern, lies) in enumerate(
            [("repeat", "dense"), ("captured", "dense"), ("repeat", "ragged"), ("once", "offset")]
        ):
            verdict = check_call(make_call(spec, (1500,), seed, x=lies, dy=lies, pattern=pattern, device="cuda"))
            assert says(verdict.strength.values()) > 1, verdict
    assert "copy_rows" in launched
    if strategy:
        assert {name for name in launched if name.endswith(("_tma", "_masked"))} == {
            "hidden_tma", "output_tma", "hidden_grad_tma", "input_grad_tma", "weight_grad_tma",
        }  # fmt: skip


@pytest.mark.parametrize("strategy", ["padded", ""], ids=["forced", "by_the_rule"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(dims=(1021, 749, 1021), activation="silu", gated=True, bias=True),
        dict(dims=(1021, 749, 1021), activation="gelu", bias=True, epilogue=("gelu", "residual")),
        dict(dims=(1024, 2816, 2048), activation="silu", gated=True),
        dict(dims=(784, 512, 784), activation="gelu", bias=True, epilogue=("residual",)),
    ],
    ids=lambda f: MLPSpec(**f).short_name,
)
def test_on_descriptors_in_tf32(fields: dict, strategy: str, launched: set[str]) -> None:
    """Forward's products, with copies of rows of no whole 16 bytes and of nothing else. Of fewer rows the rule takes others."""
    spec = MLPSpec(**fields, precision="tf32")
    with dispatch.forcing(strategy):
        for seed, (rows, pattern, pair) in enumerate(
            [(1500, "repeat", "apart"), (4096, "captured", "up_first"), (300, "repeat", "up_first"), (65, "once", "apart")]
        ):
            check_call(make_call(spec, (rows,), seed, pattern=pattern, pair=pair, device="cuda"))
    last_by_cublas = not strategy and spec.gated and spec.dims[0] % 4 == 0
    assert "hidden_tma" in launched and ("output_tma" in launched or last_by_cublas)
    assert not strategy or not {"hidden_masked", "output_masked"} & launched
    assert ("copy_rows" in launched) == any(width % 4 for width in spec.dims)
