"""What the fault tests share: one text to keep, ways to look at what was kept, scripts that run in a fresh interpreter."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlpdsl import loader
from mlpdsl.cache import SourceCache, digest

TEXT = "VALUE = 'ours'\n" + "# a line of some length, so that a write can stop in the middle of it\n" * 300
EVIL = "import sys\nsys.modules['mlpdsl_test_pwned'] = sys\nVALUE = 'theirs'\n"
KEY = digest("spec")
REPOSITORY = Path(__file__).resolve().parents[2]


def publish(root: Path | None, key: str = KEY, text: str = TEXT) -> Path:
    return SourceCache(root).publish("mlp", key, text, {"target": "sm_90"})


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mlpdsl" and r.levelno >= logging.WARNING]


def litter(root: Path) -> list[Path]:
    return [p for p in root.rglob(".*") if not p.is_dir()]


PREAMBLE = """
import contextlib, os, sys, time, json, random, shutil, signal, resource, logging
from pathlib import Path
from mlpdsl import cache as cache_module
from mlpdsl.cache import SourceCache, digest
root = Path(sys.argv[1])
def text_of(i): return f"# {i}\\n" + f"x{i} = 'some text to tear'\\n" * 2000
def publish(i): return SourceCache(root).publish("mlp", digest(str(i)), text_of(i), {})
"""


def run_script(script: str, root: Path, timeout: float = 60, **environment: str) -> tuple[str, str]:
    """Run ``script`` in a fresh interpreter, warnings being errors; return its stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(script), str(root)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it forked can be ended with it
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, stderr
    return stdout, stderr


def runs_from_memory(path: Path) -> None:
    """Check that what runs is our text, whatever is on the disk."""
    sys.modules.pop("mlpdsl_test_pwned", None)
    assert loader.load(path, TEXT, KEY).VALUE == "ours"
    assert "mlpdsl_test_pwned" not in sys.modules


def degraded(root: Path | None, caplog: pytest.LogCaptureFixture, because: str) -> Path:
    """Check that publishing under ``root`` fails quietly: one warning that says why, no exception, our text runs."""
    paths = {publish(root) for _ in range(3)}
    assert paths == {SourceCache(root).path("mlp", KEY)}
    messages = warnings_in(caplog)
    assert len(messages) == 1, messages
    for words in (because, "results are unaffected", "MLPDSL_CACHE_DIR"):
        assert words in messages[0]
    path = paths.pop()
    runs_from_memory(path)
    return path
