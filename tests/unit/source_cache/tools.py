"""An entry to publish, and what is found afterwards."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mlpdsl.cache import SourceCache, digest

TEXT = "# a kernel, with a letter beyond ASCII: λ\n" + "".join(f"x{i} = {i}\n" for i in range(200))
KEY = digest("spec", "sm_90")
FIELDS: dict[str, object] = {"target": "sm_90", "versions": {"jinja2": "3.1"}}


def publish(root: Path | None, name: str = "mlp", key: str = KEY, text: str = TEXT) -> Path:
    return SourceCache(root).publish(name, key, text, FIELDS)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mlpdsl" and r.levelno >= logging.WARNING]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
