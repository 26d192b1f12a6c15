"""docs/activations.md: its blocks run, by PyTorch's operations and by the generated kernels, and print what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlpdsl import MLPSpec, SpecError
from mlpdsl.codegen.expr.graph import ARITY
from tests.unit.pages import check_blocks_are_found, check_page


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_page_on_activations(interpret: str, tmp_path: Path) -> None:
    # In a process of its own: whether Triton interprets is decided once, and a registered name stays.
    check_page("activations.md", tmp_path, TRITON_INTERPRET=interpret)


def test_every_block_of_the_page_is_found() -> None:
    check_blocks_are_found("activations.md")


def test_every_function_of_the_grammar_is_on_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")
    table = text[text.index("### Formulas by hand") : text.index("So `{")]
    words = set(re.findall(r"[a-z_0-9]+", table))
    assert words >= set(ARITY)
    for formula in ("where(gt(x, 0.0), x, 0.1 * x)", "s = sigmoid(x); x * s"):
        assert f'{{"expr": "{formula}"}}' in text
        MLPSpec(dims=(8, 8, 8), activation={"expr": formula})


@pytest.mark.parametrize(
    ("formula", "instead"), [("x ** 2", "x * x"), ("where(x > 0.0, x, 0.0)", "gt"), ("x if x else 1.0", "where"), ("x @ x", "")]
)
def test_python_that_is_no_formula_is_told_the_words(formula: str, instead: str) -> None:
    with pytest.raises(SpecError, match="outside the grammar") as caught:
        MLPSpec(dims=(8, 8, 8), activation={"expr": formula})
    assert instead in str(caught.value)
