"""Jinja2, set up strictly: an undefined name is an error, and templates compute nothing."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

import mlpdsl.spec

_ROOT = Path(__file__).resolve().parent
_TEMPLATES = Path(__file__).parent.parent / "templates"


@cache
def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mlpdsl", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        auto_reload=False,
    )


def render(template: str, module: Any, **fixed: Any) -> str:
    """The source text of a module view."""
    text = environment().get_template(template).render(module=module, plan=module.plan, **fixed)
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))  # regular expressions of these took longer than rendering
    return re.sub("\n\n\n\n+", "\n\n\n", text).rstrip() + "\n"


@cache
def generator_hash() -> str:
    """A digest of everything that turns a plan into text: templates, codegen and jinja2's version."""
    digest = hashlib.sha256(jinja2.__version__.encode())
    for name, data in sorted(_sources()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _sources() -> Iterable[tuple[str, bytes]]:
    ground = Path(mlpdsl.spec.__file__).parent  # names and widths that the text shows are decided there
    for name in ("spec.py", "function.py", "names.py", "target.py"):
        yield f"mlpdsl/{name}", (ground / name).read_bytes()
    for label, root in (("codegen", _ROOT), ("templates", _TEMPLATES.resolve())):
        for folder, _, files in os.walk(root):  # at every import: pathlib's rglob takes several times as long
            for name in files:
                if name.endswith((".py", ".json", ".jinja")):
                    with open(os.path.join(folder, name), "rb") as file:
                        inside = os.path.join(folder, name)[len(str(root)) + 1 :]
                        yield f"{label}/{inside.replace(os.sep, '/')}", file.read()
