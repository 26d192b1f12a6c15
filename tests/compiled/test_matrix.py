"""What the default configs compile to, without a GPU: 24 specs on 6 chips.

A third of these cases, chosen to cover, and not every path and number of rows; all of them with MLPDSL_TEST_COMPILED=full.

Compiled anew each time, in two processes: tests/conftest.py gives Triton an empty cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from mlpdsl.backends import interpreting
from mlpdsl.codegen.config import SKINNY_ROWS
from mlpdsl.codegen.few_rows import granule
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config
from mlpdsl.resources import Resources
from mlpdsl.target import TARGETS
from tests.compiled.matrix import CASES, CHIPS, COVERING, REFUSED, SPECS, Case, Row, attempt, faults, pool

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

BRIEF = os.environ.get("MLPDSL_TEST_COMPILED") != "full"
CHOSEN = COVERING if BRIEF else CASES

Compiled = Callable[[Case], "list[Row] | str"]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """The rows of a case, or why it was refused. All the cases that this session will ask for are under way from the first."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes are there already, each with some of the cases
        yield lambda case: attempt(case, BRIEF)
        return
    asked = dict.fromkeys(
        item.callspec.params["case"] for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())
    )
    with pool() as executor:
        futures = {case: executor.submit(attempt, case, BRIEF) for case in asked}
        yield lambda case: futures[case].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_every_kernel_of_the_default_configs(case: Case, compiled: Compiled) -> None:
    spec, rows = SPECS[case.name], compiled(case)
    word = REFUSED.get((case.name, case.chip))
    if word is not None:
        assert isinstance(rows, str) and word in rows, rows
        return
    assert not isinstance(rows, str), rows
    wanted = {"output", "input_grad", "weight_grad", *(("hidden", "hidden_grad") if spec.depth > 1 else ())}
    for path, m in case.calls(BRIEF):
        kernels = [row.kernel for row in rows if (row.path, row.m) == (path, m)]
        few = m <= SKINNY_ROWS and TARGETS[case.chip].kind == "cuda" and (m == 1 or spec.dtype != "float32")
        forward = ("row" if m == 1 else "skinny") if few else path
        backward = path if spec.dtype != "float32" else "masked"
        assert {f"{role}_{forward if role in ('hidden', 'output') else backward}" for role in wanted} <= set(kernels)
        assert not spec.bias or {"epilogue_grad", "sum_rows"} <= set(kernels)
        copied = any(width % granule(spec.dtype) for width in spec.dims)
        assert ("copy_rows" in kernels) == (path == "tma" and copied)
    assert [fault for row in rows for fault in row.faults] == []


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"shared": 999_999}, "shared memory"), ({"fits": False}, "shared memory"), ({"instruction": "mma"}, "not wgmma"),
        ({"serialised": True}, "serialised"), ({"spills": 4}, "4 bytes spilled"), ({"spills": None}, "not told"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(wrong: dict[str, Any], word: str) -> None:
    case = Case("swiglu-4096x14336", "sm_90")
    right = Resources("output_tma", 1, Config(128, 256, 64), 200, 0, 200_000, 8, "wgmma", False, True, "")
    assert faults(right, case) == []
    (fault,) = faults(replace(right, **wrong), case)
    assert word in fault


def test_the_covering_part_covers() -> None:
    """Every spec on a chip of NVIDIA's, and those that keep many values where the compiler is most tempted to spill them, with
    wgmma or tcgen05; on every chip six specs that it takes, each way to multiply, and each kind of spec; every refusal."""
    for name in SPECS:
        assert any(case.name == name and case.chip.startswith("sm_") for case in COVERING), name
    for name in ("own", "mish-gated", "laplace", "gelu_10"):
        assert any(case.name == name and case.chip in ("sm_90", "sm_100") for case in COVERING), name
    assert {Case(*pair) for pair in REFUSED} <= set(COVERING)
    for chip in CHIPS:
        names = [case.name for case in COVERING if case.chip == chip]
        assert len([name for name in names if (name, chip) not in REFUSED]) >= 6
        chosen = [SPECS[name] for name in names]
        assert {(spec.dtype, spec.precision) for spec in chosen} == {(spec.dtype, spec.precision) for spec in SPECS.values()}
        assert {spec.gated for spec in chosen} == {spec.bias for spec in chosen} == {False, True}
        assert any(name.startswith("own") for name in names) and any(spec.depth != 2 for spec in chosen)
        assert any(width % 8 for spec in chosen for width in spec.dims)
        copied = [lower(spec, TARGETS[chip]).copies for spec in chosen]
        assert any(copied) or not TARGETS[chip].has_tma, "no kernel on copies"
    assert (len(SPECS), len(CHIPS), len(CASES)) == (24, 6, 144)
