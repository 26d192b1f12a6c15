"""docs/jax.md runs on a CPU, of one device and of four, and prints what it says; docs/backends.md quotes what is there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "jax.md"


def blocks() -> list[tuple[str, str]]:
    """Each python block, and the text block that follows it at once (or an empty text): what it prints."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.M | re.S)


def printed() -> list[str]:
    """Run every block, in order and in one namespace; what each prints."""
    names: dict[str, Any] = {"__name__": "example"}
    found = []
    for code, _ in blocks():
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, "example.py", "exec"), names)
        found.append(output.getvalue())
    return found


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed: pip install 'mlpdsl[jax]'")
@pytest.mark.parametrize("devices", [4])
def test_the_page_on_jax(devices: int, tmp_path: Path) -> None:
    # In a process of its own: how many devices a CPU is, is decided before JAX's first use.
    code = f"import json, runpy; print('\\0' + json.dumps(runpy.run_path({str(Path(__file__))!r})['printed']()))"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("\0")[2])
    for (code, shown), real in zip(blocks(), found, strict=True):
        assert "".join(shown.split()) == "".join(real.split()), f"the page should show, after\n{code}\n{real}"
    assert not done.stderr


def test_every_block_of_the_page_is_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(blocks()) == text.count("```python\n") >= 5
    assert sum(bool(output.strip()) for _, output in blocks()) == text.count("```text\n")


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
