"""The cache of generated source as a whole: where it is, why it is there, whether it can be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpdsl.cache import DISK_ERRORS, LAYOUT, in_words, open_below, root_and_origin
from mlpdsl.cache_tools import listing

__all__ = ["Info", "info"]


@dataclass(frozen=True)
class Info:
    """A cache as a whole. `reason` says, in the cache's own words, why it cannot be used; None where it can."""

    root: str | None
    origin: str
    """What named the root: MLPDSL_CACHE_DIR, XDG_CACHE_HOME, home, argument or none."""
    exists: bool
    writable: bool
    reason: str | None
    entries: int = 0
    bytes: int = 0
    incomplete: int = 0
    foreign: int = 0
    """Names in the cache that are no entry's, and are never touched."""
    versions: Mapping[str, int] | None = None
    """How many entries each version of mlpdsl wrote, "unknown" where the manifest does not say."""

    @property
    def usable(self) -> bool:
        return self.reason is None

    def to_dict(self) -> dict[str, Any]:
        """Every field, and `usable`: what `mlpdsl cache info --json` prints."""
        fields = ("root", "origin", "exists", "writable", "usable", "reason", "entries", "bytes", "incomplete", "foreign")
        return {**{name: getattr(self, name) for name in fields}, "versions": dict(self.versions or {})}


def info(root: Path | None = None) -> Info:
    """What there is to say about the cache under `root` (default: the one that the environment asks for). Never raises."""
    origin = "argument"
    if root is None:
        root, origin = root_and_origin()
    if root is None:
        return Info(None, origin, False, False, "no home directory was found", versions={})
    exists, writable, reason = _usable(root)
    try:
        entries, foreign = listing(root)
    except DISK_ERRORS as error:
        return Info(str(root), origin, exists, False, in_words(error), versions={})
    versions = dict(sorted(Counter(e.version or "unknown" for e in entries).items()))
    incomplete = sum(not e.complete for e in entries)
    sizes = sum(e.size for e in entries)
    return Info(str(root), origin, exists, writable, reason, len(entries), sizes, incomplete, len(foreign), versions)


def _usable(root: Path) -> tuple[bool, bool, str | None]:
    """Whether the root exists, whether it (or what it would be made in) can be written to, and why not."""
    exists, names = False, [LAYOUT]
    try:
        while True:
            try:
                with open_below(root, *names, create=False) as directory:
                    exists = True
                    return exists, *_writable(directory, root)
            except FileNotFoundError:
                if not names:
                    break
                names.pop()
        parent = os.path.dirname(os.path.realpath(root))
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return exists, *_writable(directory, Path(parent))
        finally:
            os.close(directory)
    except DISK_ERRORS as error:
        return exists or os.path.exists(root), False, in_words(error)


def _writable(directory: int, path: Path) -> tuple[bool, str | None]:
    if os.access(".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=os.access in os.supports_effective_ids):
        return True, None
    read_only = os.fstatvfs(directory).f_flag & os.ST_RDONLY
    return False, f"{'Read-only file system' if read_only else 'Permission denied'}: {str(path)!r}"
