"""docs/activations.md: its blocks run, by PyTorch's operations and by the generated kernels, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "activations.md"
FILE = "example.py"  # what the page calls the block, in messages that name a line


def blocks() -> list[tuple[str, str]]:
    """Each python block, and the text block that follows it at once (or an empty text): what it prints."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.M | re.S)


def printed() -> list[str]:
    """Run every block, in order and in one namespace; what each prints."""
    names: dict[str, Any] = {"__name__": "example"}
    found = []
    for code, _ in blocks():
        linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, FILE, "exec"), names)
        found.append(output.getvalue())
    return found


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_page_on_activations(interpret: str, tmp_path: Path) -> None:
    # In a process of its own: whether Triton interprets is decided once, and a registered name stays.
    code = f"import json, runpy; print('\\0' + json.dumps(runpy.run_path({str(Path(__file__))!r})['printed']()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("\0")[2])
    for (code, shown), real in zip(blocks(), found, strict=True):  # lines are broken differently on the page
        assert "".join(shown.split()) == "".join(real.split()), f"the page should show, after\n{code}\n{real}"
    assert not done.stderr


def test_every_block_of_the_page_is_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(blocks()) == text.count("```python\n") >= 5
    assert sum(bool(output.strip()) for _, output in blocks()) == text.count("```text\n")
