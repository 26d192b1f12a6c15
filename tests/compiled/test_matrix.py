"""What the default configs compile to, without a GPU: 24 specs on 6 chips.

Half of these cases, chosen to cover; all of them with MLPDSL_TEST_COMPILED=full.

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
from mlpdsl.codegen.plan import Config
from mlpdsl.resources import Resources
from tests.compiled.matrix import CASES, CHIPS, COVERING, REFUSED, SPECS, Case, Row, attempt, faults, pool

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton interprets in this process, and so compiles nothing")

CHOSEN = CASES if os.environ.get("MLPDSL_TEST_COMPILED") == "full" else COVERING

Compiled = Callable[[Case], "list[Row] | str"]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """The rows of a case, or why it was refused. All the cases that this session will ask for are under way from the first."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes are there already, each with some of the cases
        yield attempt
        return
    asked = dict.fromkeys(
        item.callspec.params["case"] for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())
    )
    with pool() as executor:
        futures = {case: executor.submit(attempt, case) for case in asked}
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
    for path, m in case.calls():
        kernels = [row.kernel for row in rows if (row.path, row.m) == (path, m)]
        assert {f"{role}_{path}" for role in wanted} <= set(kernels)
        assert not spec.bias or {"epilogue_grad", "sum_rows"} <= set(kernels)
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
    for name in SPECS:
        assert len([case for case in COVERING if case.name == name]) >= 2
    for chip in CHIPS:
        assert len([case for case in COVERING if case.chip == chip]) >= 10
    assert (len(SPECS), len(CHIPS), len(CASES)) == (24, 6, 144)
