"""What the tests of `mlpdsl cache` share: entries, made and forged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlpdsl
from mlpdsl import MLPSpec

ROOT = Path(__file__).resolve().parents[3]
SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
OTHER = MLPSpec(dims=(32, 64, 32), activation="gelu")
SECRET = "the secret of somebody else"

Done = tuple[int, str, str]
Run = Callable[..., Done]


def made(spec: MLPSpec = SPEC, target: str = "sm_90") -> Path:
    """The directory of a new entry."""
    return mlpdsl.generate(spec, target=target).path.parent


def rewrite(entry: Path, **changes: object) -> Path:
    """Change fields of a manifest; where the name or key changes, the directory follows."""
    manifest = json.loads((entry / "manifest.json").read_text()) | changes
    (entry / "manifest.json").write_text(json.dumps(manifest))
    return (
        entry.rename(entry.with_name(f"{manifest['name']}-{str(manifest['key'])[:16]}"))
        if {"name", "key"} & set(changes)
        else entry
    )


def forged(entry: Path, text: str) -> Path:
    """An entry with another text, whose manifest agrees."""
    (entry / "kernel.py").write_text(text)
    return rewrite(entry, sha256=hashlib.sha256(text.encode()).hexdigest())


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))
