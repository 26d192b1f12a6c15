"""From a spec to its generated source: the key, the text, and where the text lies on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mlpdsl.cache import SourceCache, digest
from mlpdsl.errors import UnsupportedError
from mlpdsl.spec import MLPSpec, check_rows, check_spec
from mlpdsl.target import VARIABLE, Target, detect, parse_target
from mlpdsl.version import __version__

__all__ = ["DEFAULT_TARGET", "Generated", "generate"]

DEFAULT_TARGET = "sm_90"
"""What is generated for where there is no GPU to ask and no MLPDSL_TARGET."""

DEFAULT_TPU = "tpu_v5e"
"""What is generated for by the backend "pallas" where no target is named."""

CACHE = SourceCache()
"""The process's cache of generated source; its root is looked up anew at each use."""

SOURCE_SCHEMA = "1"


@dataclass(frozen=True)
class Generated:
    """The source written for one spec on one target.

    `files` maps names to texts; `text` is all of them; `key` is the sha256 of everything the text depends on; `path` is
    where `kernel.py` lies, or would lie if the cache could be written.
    """

    files: Mapping[str, str]
    key: str
    path: Path

    @property
    def text(self) -> str:
        return "\n".join(self.files.values())


def source_key(spec: MLPSpec, target: Target, backend: str) -> str:
    """The digest of what a generated file depends on: schema, spec, target, backend, generator and its versions.

    The plan is a function of these (its code is in the generator's digest), so it needs no part of its own.
    """
    from mlpdsl.codegen.render import generator_hash

    return digest(SOURCE_SCHEMA, spec.to_json(), target.name, backend, generator_hash(), __version__)


def entry_name(spec: MLPSpec, target: Target) -> str:
    """The readable part of the cache entry's name."""
    return f"{spec.short_name}-{target.name}"


@lru_cache(maxsize=1024)
def source_text(spec: MLPSpec, target: Target, backend: str) -> tuple[str, str]:
    """Key and rendered text."""
    from mlpdsl.backends import backend_named
    from mlpdsl.codegen.lower import lower

    key = source_key(spec, target, backend)
    chosen = backend_named(backend)
    plan = lower(spec, target, backend)
    reasons = chosen.supports(plan, target)
    if reasons:
        raise UnsupportedError(f"backend {backend!r} cannot write {spec.short_name} for {target.name}", reasons)
    return key, chosen.emit(plan, key)


def publish(spec: MLPSpec, target: Target, backend: str) -> tuple[str, str, Path]:
    """Key, text and path of the source, with the file on disk holding exactly that text where the disk allows."""
    key, text = source_text(spec, target, backend)
    manifest = {"spec": spec.to_json(), "target": target.name, "backend": backend, "mlpdsl": __version__}
    return key, text, CACHE.publish(entry_name(spec, target), key, text, manifest)


def present(spec: MLPSpec, target: Target, backend: str) -> bool:
    """Whether the file is there. Computes a key and looks: renders nothing, and makes no plan."""
    return CACHE.present(entry_name(spec, target), source_key(spec, target, backend))


def target_for(backend: str, target: str | Target | None = None) -> Target:
    """The target to write for: the one named, else MLPDSL_TARGET, else this machine's GPU for "triton" and a TPU for "pallas".

    Raises `SpecError` for a name that is no backend's, `UnsupportedError` for one that is no target's.
    """
    from mlpdsl.backends import backend_named

    if backend_named(backend).name != "pallas":
        return parse_target(target) if target is not None else detect() or parse_target(DEFAULT_TARGET)
    named = os.environ.get(VARIABLE, "").strip()
    return parse_target(target if target is not None else named or DEFAULT_TPU)


def generate(spec: MLPSpec, target: str | Target | None = None, m: int | None = None, backend: str = "triton") -> Generated:
    """Write the source for `spec` without running it; needs no GPU, only jinja2.

    `target` is an architecture ("sm_90", "gfx942"; default: this machine's, else sm_90; for the backend "pallas" "tpu_v5e"). With
    `m`, the number of rows, the result also has `configs.json`: the tile sizes each kernel would get. Raises `SpecError`,
    `ShapeError` for a bad m, `UnsupportedError`.
    """

    check_spec(spec)
    chosen = target_for(backend, target)
    rows = None if m is None else check_rows(m)
    key, text, path = publish(spec, chosen, backend)
    files = {"kernel.py": text}
    if rows is not None:
        import json

        from mlpdsl.codegen import blocks, lower
        from mlpdsl.explanation import configs

        found = blocks.configs(lower.lower(spec, chosen, backend), rows) if backend == "pallas" else configs(spec, rows, chosen)
        files["configs.json"] = json.dumps({k: c.to_dict() for k, c in found.items()}, indent=1) + "\n"
    return Generated(files, key, path)
