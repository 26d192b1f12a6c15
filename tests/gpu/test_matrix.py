"""Every activation, gated or not, with bias or not, in every dtype, under every built-in epilogue: forward and backward.

One test an (activation, gated, bias, dtype), so that a dozen processes share the work, which is mostly Triton compiling. Kernels
know N, K and their tile sizes at compile time and not M, so within a test the widths stay the same. Every spec runs at
two shapes (16-byte rows: tensor descriptors in 16-bit types on sm_90; odd widths: masked loads); without an epilogue also with a
single row, for which tiles are smaller. Each test has no epilogue, all entries in a row, and one entry alone; the twelve tests of
an activation have each entry alone three times.
"""

from __future__ import annotations

import pytest

from mlpdsl import MLPSpec
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.calls import check_call, make_call

pytestmark = pytest.mark.usefixtures("generated")

ALIGNED, ODD = (128, 256, 128), (67, 131, 37)
# In float32 every width takes masked loads, and fused multiply-adds of a large tile compile for many seconds.
SMALL = {ALIGNED: (32, 48, 16), ODD: (35, 41, 19)}
ROWS = {ALIGNED: 192, ODD: 93}


DTYPES = ("float32", "float16", "bfloat16")


def epilogues(activation: str, gated: bool, bias: bool, dtype: str) -> list[tuple[str, ...]]:
    alone = ("residual", "layer_scale", "scale", activation)[(2 * gated + bias + DTYPES.index(dtype)) % 4]
    return [(), (alone,), ("layer_scale", activation, "residual", "scale")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_epilogues(activation: str, gated: bool, bias: bool, dtype: str) -> None:
    failures = []
    for i, epilogue in enumerate(epilogues(activation, gated, bias, dtype)):
        shapes = [(ALIGNED, 192), (ODD, 93), *([] if epilogue else [(ALIGNED, 1)])]
        for dims, rows in shapes:
            widths = SMALL[dims] if dtype == "float32" else dims
            spec = MLPSpec(dims=widths, activation=activation, gated=gated, bias=bias, dtype=dtype, epilogue=epilogue)
            # Descriptors where they are possible; where not, layouts that only pointers can follow.
            lies = "padded" if dims == ALIGNED else ("strided", "transposed", "offset")[i % 3]
            call = make_call(
                spec, (rows,), i, x=lies, operands=lies, dy="padded", pair="up_first" if i % 2 else "apart", device="cuda"
            )
            try:
                verdict = check_call(call)
                # scale's gradient is one number, and may be near zero.
                weakest = min(strength for name, strength in verdict.strength.items() if name != "scale")
                assert rows == 1 or weakest > 4, f"a gradient says nothing: {verdict} of {spec!r}"
            except Exception as error:  # the others are still worth knowing
                failures.append(f"{type(error).__name__}: {str(error)[:1500]}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_float32_precisions(precision: str, gated: bool) -> None:
    for dims in (ALIGNED, ODD):
        spec = MLPSpec(dims=dims, activation="gelu", gated=gated, bias=True, precision=precision, epilogue=("residual",))
        check_call(make_call(spec, (ROWS[dims],), 0, device="cuda"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 32), (37, 5), (48, 64, 80, 96), (33, 17, 5, 9, 24)], ids=str)
def test_depths(dims: tuple[int, ...], dtype: str) -> None:
    """One linear, three and four."""
    spec = MLPSpec(dims=dims, activation="identity" if len(dims) == 2 else "silu", bias=True, dtype=dtype, epilogue=("gelu",))
    for rows in (1, 150):
        check_call(make_call(spec, (rows,), 0, device="cuda"))
