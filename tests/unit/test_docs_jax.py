"""docs/jax.md runs on a CPU of four devices, and prints what it says; docs/backends.md quotes what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.unit.pages import ROOT, check_blocks_are_found, check_page


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed: pip install 'mlpdsl[jax]'")
def test_the_page_on_jax(tmp_path: Path) -> None:
    # In a process of its own: how many devices a CPU is, is decided before JAX's first use.
    check_page("jax.md", tmp_path, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")


def test_every_block_of_the_page_is_found() -> None:
    check_blocks_are_found("jax.md")


def test_what_docs_backends_quotes_is_there() -> None:
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    sources = [ROOT / "codegen" / "emit" / "pallas.py", ROOT / "templates" / "pallas" / "tpu.py.jinja"]
    quotes = re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)
    assert len(quotes) == len(sources)
    for quote, source in zip(quotes, sources, strict=True):
        assert quote.rstrip("\n") in source.read_text(encoding="utf-8"), f"no longer in {source.name}:\n{quote}"
    paths = set(re.findall(r"`([a-z_]+/[a-z_/.]+)`", text))
    assert len(paths) >= 10
    assert not [path for path in paths if not (ROOT / path).exists()]
