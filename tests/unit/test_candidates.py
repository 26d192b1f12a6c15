"""What tuning tries for a product: the usual config first, each once, and nothing that may not stand in a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlpdsl import MLPSpec, tables
from mlpdsl.codegen import config as rule
from mlpdsl.codegen.candidates import candidates
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import products
from mlpdsl.tables import Product
from mlpdsl.target import TARGETS

GATED = MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
PLAIN = MLPSpec(dims=(64, 128, 64), activation="relu", dtype="float32")


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("spec", [GATED, PLAIN, MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"),
                                  MLPSpec(dims=(333, 1111, 577), activation="gelu", dtype="float16"),
                                  MLPSpec(dims=(1024, 2749, 1024), activation="silu", gated=True, precision="tf32")])  # fmt: skip
def test_candidates(spec: MLPSpec, target: str) -> None:
    plan = lower(spec, TARGETS[target])
    for m in (1, 100, 4096):
        for role, _, *shape in products(plan, m):
            product, _ = Product.of(plan, role, *shape)
            words = {"dtype": plan.dtype, "precision": plan.precision, "planes": product.planes, "target": plan.target}
            found = candidates(role, product.path, *shape, **words)
            assert found[0] == rule.usual(role, product.path, *shape, **words)
            assert len(set(found)) == len(found) and 4 <= len(found) <= 90
            assert any(c.strategy == "library" for c in found) == (rule.library(role, m, 1, dtype=plan.dtype, planes=product.planes) is not None)  # fmt: skip  # noqa: E501
            copied = rule.padded(role, *shape, **words)
            wanted = copied is not None and product.path == "masked" and shape[0] > rule.SKINNY_ROWS
            assert (copied in found) == any(c.strategy == "padded" for c in found) == wanted
            for c in found:
                stands = tables._config(tables._config_to_dict(c))  # what may win may stand in a table
                assert stands == replace(c, bias_pass=False)
