"""The specs of the compile-only matrix: each is written for a TPU, or refused with reasons, and holds when interpreted."""

from __future__ import annotations

import ast
import re

import pytest

import mlpdsl
from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.backends import BACKENDS
from mlpdsl.codegen.blocks import block, footprint
from mlpdsl.codegen.lower import lower
from mlpdsl.target import TARGETS
from mlpdsl.testing.calls import make_call
from tests.compiled.matrix import SPECS
from tests.pallas.support import check

TPUS = [name for name, target in TARGETS.items() if target.kind == "tpu"]


def narrow(spec: MLPSpec) -> MLPSpec:
    """The spec with its widths above 768 made smaller, for the interpreter; all else stays.

    The n-th of its distinct such widths, from 1, becomes 512 + 128·n and the remainder of a division by 128. So unequal widths
    stay unequal, all still exceed one block of columns, and those that fill no block to its end still do not.
    """
    wide = sorted({width for width in spec.dims if width > 768})
    return spec.replace(dims=tuple(512 + 128 * (1 + wide.index(w)) + w % 128 if w in wide else w for w in spec.dims))


def refusals(spec: MLPSpec) -> list[str]:
    """A word of every reason why a TPU cannot."""
    return ["float16"] * (spec.dtype == "float16") + ["tf32"] * (spec.precision != "ieee")


def test_the_narrow_ones_are_still_themselves() -> None:
    for name, spec in SPECS.items():
        small = narrow(spec)
        assert small.replace(dims=spec.dims) == spec
        assert max(small.dims) < 1024 or small == spec, name
        assert len(set(small.dims)) == len(set(spec.dims)), name


@pytest.mark.parametrize("name", SPECS)
def test_is_written_for_a_cpu(name: str) -> None:
    text = mlpdsl.generate(SPECS[name], "cpu", backend="pallas").text
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert {"forward", "backward", "output_kernel", "input_grad_kernel", "weight_grad_kernel"} <= functions
    assert ("hidden_kernel" in functions) == ("hidden_grad_kernel" in functions) == (len(SPECS[name].dims) > 2)


@pytest.mark.parametrize("name", SPECS)
def test_is_written_for_a_tpu_or_refused(name: str) -> None:
    spec = SPECS[name]
    expected = refusals(spec)
    if not expected:
        assert "import pallas" in mlpdsl.generate(spec, "tpu_v5e", backend="pallas").text
        return
    with pytest.raises(UnsupportedError) as caught:
        mlpdsl.generate(spec, "tpu_v5e", backend="pallas")
    assert len(caught.value.reasons) == len(expected)
    for word, reason in zip(expected, caught.value.reasons, strict=True):
        assert word in reason


@pytest.mark.parametrize("name", [name for name in SPECS if not re.search(r"-\d+x", name) or name.startswith(("geglu", "gelu"))])
def test_holds_when_interpreted(name: str) -> None:
    """Of models two, which are much alike here."""
    spec = narrow(SPECS[name])
    verdict = check(make_call(spec, (17,), 11))
    assert max(verdict.strength.values()) > 30, verdict  # of the others the root mean square, beside eager's, says more


@pytest.mark.parametrize("target", TPUS)
def test_blocks_fit_vmem_and_the_rule_of_tiles(target: str) -> None:
    """A block's last two dimensions are multiples of (8, 128), of (16, 128) in 16 bits, or the whole array; two of each fit."""
    for name, spec in SPECS.items():
        if BACKENDS["pallas"].supports(lower(spec, TARGETS[target], "pallas"), TARGETS[target]):
            continue
        plan = lower(spec, TARGETS[target], "pallas")
        rows = 8 if spec.dtype == "float32" else 16
        for role in ("hidden", "output", "hidden_grad", "input_grad", "weight_grad"):
            for sizes in (
                (1, 8, 3),
                (17, 768, 3072),
                (4096, 4096, 14336),
                (4097, 767, 3071),
                (513, 513, 1025),
                (100_000, 640, 128),
            ):
                found = block(plan, role, *sizes)
                assert footprint(plan, role, *found) <= TARGETS[target].shared_memory, (name, role, sizes, found)
                m, n, k = ((size, whole) for size, whole in zip(found, sizes, strict=True))
                shapes = {
                    "hidden": ((m, k), (n, k), (m, n)),
                    "output": ((m, k), (n, k), (m, n)),
                    "hidden_grad": ((m, k), (k, n), (m, n)),
                    "input_grad": ((m, k), (k, n), (m, n)),
                    "weight_grad": ((k, m), (k, n), (m, n)),
                }[role]
                for (high, all_rows), (across, all_columns) in shapes:
                    assert 0 < high <= all_rows and (high == all_rows or high % rows == 0), (name, role, sizes, found)
                    assert 0 < across <= all_columns and (across == all_columns or across % 128 == 0), (name, role, sizes, found)
