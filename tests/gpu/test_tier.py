"""Sixteen specs at three hundred drawn calls each: any lead up to 300 rows, values, subset of gradients, call pattern.

Kernels know widths, tile sizes, alignment and strides of 1 at compile time, and not M. So a call is cheap where its layout has
been before: each spec has a handful of layouts, drawn once, and one process. Layouts without end are interpreted, on CPUs.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlpdsl import MLPSpec
from mlpdsl.testing import strategies
from mlpdsl.testing.calls import LAYOUTS, PAIRS, WEIGHT_LAYOUTS, Call, check_call
from tests.sixteen import SPECS

EXAMPLES = 300
DRAWN_LAYOUTS = 2
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)


def leads() -> st.SearchStrategy[tuple[int, ...]]:
    """Up to 300 rows, those about the sizes of tiles as often as all others together; now and then none."""
    rows = st.sampled_from(EDGES) | st.integers(1, 300)
    return st.one_of(st.tuples(rows), st.tuples(rows), strategies.leads())


def layouts(name: str) -> list[dict[str, Any]]:
    """Arguments of `make_call`: everything dense, rows fit for descriptors with gaps between them, and some drawn by the name."""
    choose = random.Random(name)
    drawn = [
        {
            "x": choose.choice(list(LAYOUTS)),
            "weights": choose.choice(WEIGHT_LAYOUTS),
            "pair": choose.choice(PAIRS),
            "operands": choose.choice(list(LAYOUTS)),
            "dy": choose.choice(list(LAYOUTS)),
            "swap": choose.random() < 0.5,
            "wide_operands": choose.random() < 0.5,
        }
        for _ in range(DRAWN_LAYOUTS)
    ]
    return [{}, {"x": "padded", "weights": "padded", "operands": "padded", "dy": "padded", "pair": "up_first"}, *drawn]


def subsets(spec: MLPSpec) -> list[tuple[str, ...] | None]:
    """All gradients, none, those of x, and those of what is not a weight."""
    names = ("x", *spec.parameter_shapes(), *spec.operands())
    return [None, None, (), ("x",), tuple(name for name in names if not name.endswith("weight"))]


def search(name: str, examples: int) -> None:
    spec = SPECS[name]

    @settings(max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data(), lead=leads(), lies=st.sampled_from(layouts(name)), wanted=st.sampled_from(subsets(spec)))
    def each(data: st.DataObject, lead: tuple[int, ...], lies: dict[str, Any], wanted: tuple[str, ...] | None) -> None:
        call: Call = data.draw(strategies.calls(spec, lead=lead, requires_grad=wanted, device="cuda", **ALL_DENSE | lies))
        check_call(call)

    each()


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("name", SPECS)
def test_three_hundred_calls(name: str) -> None:
    search(name, EXAMPLES)


@pytest.mark.parametrize("name", SPECS)
def test_as_calls_run(name: str) -> None:
    """The library's products among them."""
    search(name, EXAMPLES // 3)


ALL_DENSE: dict[str, Any] = {
    "x": "dense", "weights": "dense", "pair": "apart", "operands": "dense", "dy": "dense", "swap": False, "wide_operands": False,
}  # fmt: skip


def test_there_are_sixteen() -> None:
    assert len(SPECS) == 16
