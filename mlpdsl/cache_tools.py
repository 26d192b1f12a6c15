"""Looking at the cache of generated source: what is in it, whether it is right, and removing it.

What the disk holds is taken for hostile: only plain files of the user's own (or root's) are read, up to a limit, through
directory descriptors that follow no link; nothing read is executed; and a word of a manifest is shown only where it is
made of letters that no terminal obeys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlpdsl.cache import (
    DISK_ERRORS,
    KERNEL_FILE,
    LAYOUT,
    MANIFEST_FILE,
    OPEN_TO_READ,
    entry_name,
    in_words,
    is_own_file,
    open_below,
    open_directory,
)

__all__ = ["DamagedError", "Entry", "Outcome", "Verdict", "find", "listing", "plain", "read", "remove", "verify"]

MAX_MANIFEST = 4_000_000
MAX_KERNEL = 16_000_000
"""Bytes of a file that are read at most; the longest text that a spec can have is far below."""

_ENTRY = re.compile(r"(?![.-])([A-Za-z0-9_.-]{1,100})-([0-9a-f]{16})")
_WORD = re.compile(r"[!-~]{1,64}")
_FIELDS = {
    "name": re.compile(r"(?![.-])[A-Za-z0-9_.-]{1,100}"),
    "key": re.compile(r"[0-9a-f]{16,128}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "backend": _WORD,
    "target": _WORD,
    "mlpdsl": _WORD,
    "spec": re.compile(r".*", re.DOTALL),
}
"""What a manifest must say, each a string of this form."""

_YOUNG = 2.0  # seconds for which a half-written entry may be another process's work in progress


class DamagedError(Exception):
    """A file or directory of the cache is not what it should be, with the reason in words."""


@dataclass(frozen=True)
class Entry:
    """One directory of the cache. `backend`, `target` and `version` (of mlpdsl) are the manifest's, None where it is damaged."""

    directory: str
    name: str
    key: str
    """The first 16 digits."""
    backend: str | None
    target: str | None
    version: str | None
    size: int
    """Bytes of the cache's own files."""
    written: float
    """Seconds since the epoch."""
    complete: bool
    """Whether both files are there."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: "ok", "stale" (written by another version or generator) or "damaged"; `reason` where not ok."""

    directory: str
    status: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What `remove` did: "removed", "gone" or "republished" (another process was faster), "kept" or "failed"; then `reason`."""

    directory: str
    status: str
    reason: str = ""


def plain(text: str, limit: int = 400) -> str:
    """`text` on one line with every character that does not print escaped, cut at `limit`."""
    cut = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


@contextlib.contextmanager
def _layout(root: Path | None) -> Iterator[int | None]:
    """A descriptor of the directory of entries, None where there is none yet. Raises what `DISK_ERRORS` lists."""
    with contextlib.ExitStack() as stack:
        directory = None
        if root is not None:
            with contextlib.suppress(FileNotFoundError):
                directory = stack.enter_context(open_below(root, LAYOUT, create=False))
        yield directory


def listing(root: Path | None) -> tuple[list[Entry], list[str]]:
    """The entries under `root`, sorted by name, and the names there that are no entry's.

    Raises one of `mlpdsl.cache.DISK_ERRORS` where the root exists and must not, or cannot, be used.
    """
    with _layout(root) as layout:
        names = [] if layout is None else sorted(os.listdir(layout))
        entries = [_entry(layout, n) for n in names if layout is not None and _ENTRY.fullmatch(n)]
    return [e for e in entries if e is not None], [n for n in names if not _ENTRY.fullmatch(n)]


def _entry(layout: int, directory: str) -> Entry | None:
    """The entry as it is now, None where it is gone. Never raises for what the disk holds."""
    name, _, key = directory.rpartition("-")
    manifest: Mapping[str, str] = {}
    size, written, plain_files = 0, 0.0, set()
    try:
        with _opened(layout, directory) as opened:
            for file in filter(is_own_file, os.listdir(opened)):
                with contextlib.suppress(OSError):
                    status = os.stat(file, dir_fd=opened, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        plain_files.add(file)
                        size += status.st_size
                        written = max(written, status.st_mtime)
            with contextlib.suppress(DamagedError):
                manifest = _manifest(opened)
    except FileNotFoundError:
        return None
    except (DamagedError, OSError):
        pass
    backend, target, version = (manifest.get(field) for field in ("backend", "target", "mlpdsl"))
    return Entry(directory, name, key, backend, target, version, size, written, {KERNEL_FILE, MANIFEST_FILE} <= plain_files)


@contextlib.contextmanager
def _opened(layout: int, directory: str) -> Iterator[int]:
    """A descriptor of an entry. Raises `FileNotFoundError` where it is gone, `DamagedError` where it must not be used."""
    try:
        opened = open_directory(directory, layout)
    except FileNotFoundError:
        raise
    except DISK_ERRORS as error:
        raise DamagedError(in_words(error)) from None
    try:
        yield opened
    finally:
        os.close(opened)


_KINDS = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))


def _read(directory: int, name: str, limit: int) -> bytes:
    """The content of a plain file of the user's own. Raises `DamagedError`; never waits, follows a link or reads past `limit`."""
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):  # before it is opened: opening a device can do things
            kind = next((words for test, words in _KINDS if test(mode)), "a device")
            raise DamagedError(f"{name} is {kind}, not a file")
        file = os.open(name, OPEN_TO_READ, dir_fd=directory)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(f"{name} is not a file")
            if status.st_uid not in (os.geteuid(), 0):
                raise DamagedError(f"{name} belongs to another user (uid {status.st_uid})")
            if status.st_size > limit:
                raise DamagedError(f"{name} has {status.st_size} bytes; the limit is {limit}")
            parts, rest = [], limit + 1
            while rest and (part := os.read(file, min(rest, 1 << 20))):
                parts.append(part)
                rest -= len(part)
        finally:
            os.close(file)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    if not rest:
        raise DamagedError(f"{name} grew while it was read")
    return b"".join(parts)


def _integer(text: str) -> int:
    if len(text) > 20:  # reading an integer takes quadratic time, and Python 3.10 has no limit of its own
        raise ValueError("an integer of more than 20 digits")
    return int(text)


def _manifest(directory: int) -> dict[str, str]:
    """The fields of a manifest, each of its form. Raises `DamagedError`."""
    content = _read(directory, MANIFEST_FILE, MAX_MANIFEST)
    try:
        value = json.loads(content.decode("ascii"), parse_int=_integer)
    except (ValueError, RecursionError):
        raise DamagedError(f"{MANIFEST_FILE} is not JSON as mlpdsl writes it") from None
    if type(value) is not dict:
        raise DamagedError(f"{MANIFEST_FILE} is not a JSON object")
    for name, form in _FIELDS.items():
        if name not in value:
            raise DamagedError(f"{MANIFEST_FILE} does not say {name!r}")
        if type(value[name]) is not str or not form.fullmatch(value[name]):
            raise DamagedError(f"{MANIFEST_FILE} has no sensible {name!r}")
    return {name: value[name] for name in _FIELDS}


def _matching(manifest: Mapping[str, str], body: bytes) -> None:
    found = hashlib.sha256(body).hexdigest()
    if found != manifest["sha256"]:
        raise DamagedError(f"{KERNEL_FILE} was changed: its sha256 is {found[:16]}…, the manifest's {manifest['sha256'][:16]}…")


def find(entries: Iterable[Entry], query: str) -> list[Entry]:
    """The entries whose directory or name is `query`, else those whose directory or key begins with it."""
    known = list(entries)
    short = query[:16] if re.fullmatch(r"[0-9a-f]{17,64}", query) else query  # a whole key names its first 16 digits
    exact = [e for e in known if query == e.directory or short == e.key] or [e for e in known if query == e.name]
    return exact or [e for e in known if query and (e.directory.startswith(query) or e.key.startswith(query))]


def read(root: Path | None, directory: str, file: str) -> tuple[bytes, str]:
    """The bytes of `kernel.py` or `manifest.json` of an entry, and why they may not be what was written ("" where they are).

    Raises `DamagedError` where there is no such plain file, and `mlpdsl.cache.DISK_ERRORS` as `listing` does.
    """
    with _layout(root) as layout:
        try:
            if layout is None:
                raise FileNotFoundError
            with _opened(layout, directory) as opened:
                content = _read(opened, file, MAX_KERNEL if file == KERNEL_FILE else MAX_MANIFEST)
                try:
                    _matching(_manifest(opened), content if file == KERNEL_FILE else _read(opened, KERNEL_FILE, MAX_KERNEL))
                except DamagedError as error:
                    return content, str(error)
        except FileNotFoundError:
            raise DamagedError("another process removed it") from None
    return content, ""


def verify(root: Path | None, directories: Iterable[str]) -> Iterator[Verdict]:
    """Hold each entry against its manifest, and against what this version of mlpdsl writes. One that is gone is left out.

    Needs jinja2. Raises `mlpdsl.cache.DISK_ERRORS` as `listing` does, and nothing for what an entry holds.
    """
    with _layout(root) as layout:
        if layout is None:
            return
        for directory in directories:
            verdict = _verdict(layout, directory)
            for _ in range(3):
                if verdict is None or verdict.status != "damaged" or not _is_young(layout, directory):
                    break
                time.sleep(0.05)  # its writer may not have come to its end
                verdict = _verdict(layout, directory)
            if verdict is not None:
                yield verdict


def _is_young(layout: int, directory: str) -> bool:
    with contextlib.suppress(OSError):
        return abs(time.time() - os.stat(directory, dir_fd=layout, follow_symlinks=False).st_mtime) < _YOUNG
    return True  # gone: the next look will say so


def _verdict(layout: int, directory: str) -> Verdict | None:
    try:
        with _opened(layout, directory) as opened:
            manifest = _manifest(opened)
            body = _read(opened, KERNEL_FILE, MAX_KERNEL)
        _matching(manifest, body)
        if entry_name(manifest["name"], manifest["key"]) != directory:
            raise DamagedError(f"{MANIFEST_FILE} is another entry's: it names {entry_name(manifest['name'], manifest['key'])}")
        other = _other_writer(manifest, body)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        return Verdict(directory, "damaged", plain(str(error)))
    return Verdict(directory, "stale" if other else "ok", other)


def _other_writer(manifest: Mapping[str, str], body: bytes) -> str:
    """Who wrote the entry, where it was not this generator. Raises `DamagedError` where it was and wrote something else."""
    from mlpdsl import source
    from mlpdsl.backends import backend_named
    from mlpdsl.spec import MLPSpec
    from mlpdsl.target import parse_target
    from mlpdsl.version import __version__

    if manifest["mlpdsl"] != __version__:
        return f"mlpdsl {manifest['mlpdsl']} wrote it"
    try:
        spec, target = MLPSpec.from_json(manifest["spec"]), parse_target(manifest["target"])
        backend = backend_named(manifest["backend"]).name
        if source.source_key(spec, target, backend) != manifest["key"]:
            return "another generator of this version wrote it (its templates, code or jinja2 differ)"
        text = source.source_text(spec, target, backend)[1]
    except ImportError:
        raise
    except Exception as error:  # a hostile spec may reach anything; whatever it raises, this entry is not one of ours
        raise DamagedError(f"its spec cannot be rendered: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if (spec.to_json(), target.name) != (manifest["spec"], manifest["target"]):
        raise DamagedError(f"the spec or target in {MANIFEST_FILE} is not written as mlpdsl writes it")
    if manifest["name"] != entry_name(source.entry_name(spec, target), manifest["key"]).rpartition("-")[0]:
        raise DamagedError(f"{MANIFEST_FILE} has another spec's name")
    if text.encode() != body:
        raise DamagedError(f"{KERNEL_FILE} and {MANIFEST_FILE} agree, but this version writes another text for the spec")
    return ""


def remove(root: Path | None, directories: Iterable[str]) -> Iterator[Outcome]:
    """Remove entries: the files under the cache's own names, then the directory if nothing else is in it.

    A link under such a name is removed, never followed; a directory under one is kept. Raises as `listing` does.
    """
    with _layout(root) as layout:
        if layout is None:
            return
        for directory in directories:
            try:
                with _opened(layout, directory) as opened:
                    outcome = _remove(layout, directory, opened)
            except FileNotFoundError:
                outcome = Outcome(directory, "gone")
            except DamagedError as error:
                outcome = Outcome(directory, "failed", plain(str(error)))
            except OSError as error:
                outcome = Outcome(directory, "failed", plain(in_words(error)))
            yield outcome


def _remove(layout: int, directory: str, opened: int) -> Outcome:
    # The manifest first: without it, what is left is known to be incomplete.
    for file in sorted(filter(is_own_file, os.listdir(opened)), key=lambda name: (name != MANIFEST_FILE, name)):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if not _is_directory(opened, file):
                os.unlink(file, dir_fd=opened)
    try:
        os.rmdir(directory, dir_fd=layout)
    except FileNotFoundError:
        return Outcome(directory, "gone")
    except OSError:
        rest = sorted(os.listdir(opened))
        foreign = [name for name in rest if not is_own_file(name) or _is_directory(opened, name)]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            names = ", ".join(f"'{plain(name, 60)}'" for name in foreign[:3])
            return Outcome(directory, "kept", f"in it is what mlpdsl did not write: {names}{more}")
        if rest:
            return Outcome(directory, "republished", "another process wrote it again")
        raise
    return Outcome(directory, "removed")


def _is_directory(parent: int, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    return False
