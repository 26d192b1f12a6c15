"""Pages of docs/ whose python blocks run, and print what stands after them."""

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

ROOT = Path(__file__).resolve().parents[2]
FILE = "example.py"  # what a page calls the block, in messages that name a line


def blocks(page: str) -> list[tuple[str, str]]:
    """Each python block, and the text block that follows it at once (or an empty text): what it prints."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.M | re.S)


def printed(page: str) -> list[str]:
    """Run every block, in order and in one namespace; what each prints."""
    names: dict[str, Any] = {"__name__": "example"}
    found = []
    for code, _ in blocks(page):
        linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, FILE, "exec"), names)
        found.append(output.getvalue())
    return found


def check_page(page: str, folder: Path, **environment: str) -> None:
    """Run a page in a process of its own, in `folder`: it prints what it shows, wherever lines break, and warns of nothing."""
    code = f"import json; from tests.unit.pages import printed; print('\\0' + json.dumps(printed({page!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("\0")[2])
    for (block, shown), real in zip(blocks(page), found, strict=True):
        assert "".join(shown.split()) == "".join(real.split()), f"the page should show, after\n{block}\n{real}"
    assert not done.stderr


def check_blocks_are_found(page: str) -> None:
    """No block escapes the reading: there are as many as the page opens."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(blocks(page)) == text.count("```python\n") >= 5
    assert sum(bool(output.strip()) for _, output in blocks(page)) == text.count("```text\n")
