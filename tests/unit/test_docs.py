"""docs/activations.md: its blocks run, by PyTorch's operations and by the generated kernels, and print what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.pages import check_blocks_are_found, check_page


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_page_on_activations(interpret: str, tmp_path: Path) -> None:
    # In a process of its own: whether Triton interprets is decided once, and a registered name stays.
    check_page("activations.md", tmp_path, TRITON_INTERPRET=interpret)


def test_every_block_of_the_page_is_found() -> None:
    check_blocks_are_found("activations.md")
