"""The on-disk cache of generated source: readable files, kept for people, never trusted.

One generated kernel is one directory, named after what it holds::

    <root>/v1/<name>-<first 16 hex digits of the key>/kernel.py       exactly the rendered text
                                                      manifest.json   what it is, written last

The disk is a convenience and nothing here depends on it. What runs is the text that was rendered in this process
(see ``mlpdsl.loader``), so a damaged, foreign or missing file costs a rewrite and never a wrong result; and whatever
the disk does (full, read-only, gone, somebody else's), ``publish`` returns, after one warning through ``logging``.

There are no locks. A file is staged beside its place, synced, and moved over it with ``os.replace``: a reader sees no
file or all of it, and writers of one key write identical bytes, so it does not matter who is last. Every step below
the root goes through a directory descriptor and refuses symbolic links, so that nobody can redirect a write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["KERNEL_FILE", "MANIFEST_FILE", "SourceCache", "default_root", "digest"]

KERNEL_FILE = "kernel.py"
MANIFEST_FILE = "manifest.json"

LAYOUT = "v1"  # a change of the layout on disk is a new directory, so that two versions of mlpdsl can share a root
_KEY = re.compile(r"[0-9a-f]{16,}")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_NAME = 100  # characters; leaves room for the key and the stage suffix in the 143 bytes that eCryptfs allows

# Where "no disk at all" lives. Absolute, so that neither inspect nor linecache looks it up in the working directory or
# in sys.path; not of the form "<...>", for which inspect and linecache skip steps that differ between Python versions.
_NOWHERE = Path(os.sep, "<mlpdsl>")

_STAGE = re.compile(r"\.(kernel\.py|manifest\.json)\.\d+-[0-9a-f]{16}\.tmp")
_STAGE_LIFETIME = 3600.0  # seconds after which a stage file must belong to a dead writer
_ATTEMPTS = 8  # how often to start over when an entry is evicted while it is being written

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody put in our place must not wait for a writer.
OPEN_TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_TO_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger("mlpdsl")
_warned: dict[str, object] = {}  # roots that this process has warned about


class RefusedError(Exception):
    """A directory that must not be used, with the reason in words."""


DISK_ERRORS = (OSError, ValueError, RefusedError)  # ValueError: a path that the file system's encoding cannot hold


def digest(*parts: str) -> str:
    """Return the SHA-256 of ``parts`` as 64 hex digits.

    Each part goes in behind its length (8 bytes, big-endian), so that ``("ab", "c")`` and ``("a", "bc")`` differ.
    Text is encoded as UTF-8; a lone surrogate is allowed, because a key must never be what fails.
    """
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()


def default_root() -> Path | None:
    """Return the cache directory that the environment asks for, or None if there is no home to put one in.

    ``MLPDSL_CACHE_DIR``, else ``$XDG_CACHE_HOME/mlpdsl``, else ``~/.cache/mlpdsl``. Touches no file. An empty variable
    counts as unset, and so does a relative ``XDG_CACHE_HOME`` (as its specification says). A home of ``/`` is what a
    container gives to a user it does not know: it counts as none.
    """
    return root_and_origin()[0]


def root_and_origin() -> tuple[Path | None, str]:
    """Return ``default_root()`` and what named it: ``MLPDSL_CACHE_DIR``, ``XDG_CACHE_HOME``, ``home`` or ``none``."""
    try:
        if explicit := os.environ.get("MLPDSL_CACHE_DIR"):
            return Path(os.path.abspath(os.path.expanduser(explicit))), "MLPDSL_CACHE_DIR"
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        if os.path.isabs(xdg):
            return Path(xdg, "mlpdsl"), "XDG_CACHE_HOME"
        home = os.path.expanduser("~")
    except (OSError, ValueError, RuntimeError, LookupError):  # e.g. a relative path, and the working directory is gone
        return None, "none"
    if not os.path.isabs(home) or not home.strip(os.sep):
        return None, "none"
    return Path(home, ".cache", "mlpdsl"), "home"


class SourceCache:
    """Generated source under one root directory.

    ``root=None`` asks ``default_root()`` at every use, so a changed ``MLPDSL_CACHE_DIR`` takes effect at once. An
    object holds no state but that; make as many as you like.
    """

    def __init__(self, root: Path | None = None) -> None:
        # Absolute: with a relative file name, linecache would search sys.path once its entry is gone.
        self._root = None if root is None else Path(os.path.abspath(root))

    @property
    def root(self) -> Path | None:
        """The root in use now; None if there is none, and everything stays in memory."""
        return default_root() if self._root is None else self._root

    def path(self, name: str, key: str) -> Path:
        """Return where the source of ``(name, key)`` is, or would be.

        ``name`` is for people: characters outside ``[A-Za-z0-9_.-]`` become ``_`` and it is cut at 100. ``key`` is a
        lower-case hex digest of 16 digits or more (``ValueError`` otherwise). Touches no file. Without a usable root
        the path lies in a directory that does not exist, and is as good as any other for ``loader.load``.
        """
        root = self.root
        if root is None or not _can_be_named(root):
            root = _NOWHERE
        return root / LAYOUT / entry_name(name, key) / KERNEL_FILE

    def present(self, name: str, key: str) -> bool:
        """Return whether ``(name, key)`` was published under this root, from directory entries alone.

        Reads no content, writes nothing, warns about nothing: it is what makes a warm import render nothing. True
        says only that there is something to look at; whether it is right, ``publish`` finds out on first use.
        """
        entry, root = entry_name(name, key), self.root
        if root is None:
            return False
        try:
            with open_below(root, LAYOUT, entry, create=False) as directory:
                return all(_is_regular(directory, file) for file in (MANIFEST_FILE, KERNEL_FILE))
        except DISK_ERRORS:
            return False

    def publish(self, name: str, key: str, text: str, manifest: Mapping[str, object]) -> Path:
        """Make the file of ``(name, key)`` hold exactly ``text``, if the disk allows; return ``path(name, key)``.

        A file that is right is left alone; anything else in its place is replaced. The manifest gets the fields of
        ``manifest`` (which must not depend on time, place or process: all writers of a key write the same bytes)
        beside ``name``, ``key`` and ``sha256`` of the text.

        Never raises for what the disk does: the first failure under a root logs one warning, and the caller goes on
        with the text in memory. A later call tries again. Raises ``ValueError`` for a key that is not hex and
        ``TypeError`` for a manifest that JSON cannot hold.
        """
        path, entry, root = self.path(name, key), entry_name(name, key), self.root
        body = text.encode("utf-8")
        record = _manifest(entry, key, body, manifest)
        if root is None:
            _warn_once(None, "no home directory was found")
            return path
        problem: Exception | None = None
        for _ in range(_ATTEMPTS):
            try:
                with open_below(root, LAYOUT, entry, create=True) as directory:
                    _ensure(directory, KERNEL_FILE, body)
                    _ensure(directory, MANIFEST_FILE, record)
                return path
            except DISK_ERRORS as error:
                problem = error
                if not _was_evicted(error):
                    break
        _warn_once(root, in_words(problem))
        return path


def entry_name(name: str, key: str) -> str:
    """Return the directory name for ``(name, key)``: one plain path component, whatever ``name`` holds."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"key must be a lower-case hex digest of at least 16 digits, got {key!r}; use cache.digest()")
    return f"{_NOT_IN_A_NAME.sub('_', name)[:_MAX_NAME].lstrip('.-') or 'kernel'}-{key[:16]}"


def _manifest(entry: str, key: str, body: bytes, fields: Mapping[str, object]) -> bytes:
    own = {"name": entry.rpartition("-")[0], "key": key, "sha256": hashlib.sha256(body).hexdigest()}
    return (json.dumps({**fields, **own}, sort_keys=True, indent=1) + "\n").encode("ascii")


def _can_be_named(path: Path) -> bool:
    """Return whether ``path`` can be a file name in code: the compiler takes no NUL, and Triton only valid Unicode."""
    try:
        return b"\0" not in str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False


def is_own_file(name: str) -> bool:
    """Return whether a file of this name in an entry is one that the cache writes."""
    return name in (KERNEL_FILE, MANIFEST_FILE) or _STAGE.fullmatch(name) is not None


@contextlib.contextmanager
def open_below(root: Path, *names: str, create: bool) -> Iterator[int]:
    """Yield a descriptor of the directory ``root/names[0]/…``, after checking that each on the way is fit to use."""
    if not _can_be_named(root):
        raise RefusedError("its path is not valid UTF-8, or holds a NUL")
    with contextlib.ExitStack() as stack:
        if create:
            # realpath: a link may point to a directory that is yet to be made, say on a scratch disk that was wiped.
            with contextlib.suppress(FileExistsError):  # a file is in the way: said in better words below
                os.makedirs(os.path.realpath(root), mode=0o700, exist_ok=True)
        directory = open_directory(str(root), None)  # follows a link: what is checked is what it leads to
        stack.callback(os.close, directory)
        for name in names:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=directory)
            directory = open_directory(name, directory)
            stack.callback(os.close, directory)
        yield directory


def open_directory(name: str, parent: int | None) -> int:
    """Open a directory and check it: ours or root's, and writable by nobody else. Below the root, no link either."""
    flags = _OPEN_DIRECTORY if parent is None else _OPEN_DIRECTORY | os.O_NOFOLLOW
    try:
        directory = os.open(name, flags, dir_fd=parent)
    except NotADirectoryError:
        raise RefusedError(f"{name!r} is not a directory, or is a symbolic link") from None
    try:
        status = os.fstat(directory)
        if status.st_uid not in (os.geteuid(), 0):  # root's is fine: an administrator's cache, read-only for us
            raise RefusedError(f"{name!r} belongs to another user (uid {status.st_uid})")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise RefusedError(f"{name!r} is writable by its group or by others (mode {mode:04o}); run chmod go-w on it")
    except BaseException:
        os.close(directory)
        raise
    return directory


def _is_regular(directory: int, name: str) -> bool:
    return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)


def _ensure(directory: int, name: str, body: bytes) -> None:
    """Make ``name`` in ``directory`` a regular file of exactly ``body``."""
    if not _holds(directory, name, body):
        _write(directory, name, body)


def _holds(directory: int, name: str, body: bytes) -> bool:
    """Return whether ``name`` is a regular file of exactly ``body``. One that cannot be read is not."""
    try:
        file = os.open(name, OPEN_TO_READ, dir_fd=directory)
    except OSError:
        return False
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != len(body):
            return False
        found = b""
        while chunk := os.read(file, len(body) + 1 - len(found)):
            found += chunk
        return found == body
    except OSError:
        return False
    finally:
        os.close(file)


def _write(directory: int, name: str, body: bytes) -> None:
    """Put ``body`` in place of whatever ``name`` is, in one step. Leaves nothing behind if that fails."""
    _sweep(directory)
    stage = f".{name}.{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        file = os.open(stage, _OPEN_TO_WRITE, 0o644, dir_fd=directory)
        try:
            rest = memoryview(body)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)  # or a crash of the machine can leave the new name on an empty file
        finally:
            os.close(file)
        try:
            os.replace(stage, name, src_dir_fd=directory, dst_dir_fd=directory)
        except IsADirectoryError:
            _set_aside(directory, name)
            os.replace(stage, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(stage, dir_fd=directory)
        raise


def _set_aside(directory: int, name: str) -> None:
    """Move a directory that stands where a file belongs out of the way; delete it only if it is empty."""
    aside = f".{name}.{secrets.token_hex(8)}.aside"
    os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
    with contextlib.suppress(OSError):
        try:
            os.rmdir(aside, dir_fd=directory)
        except NotADirectoryError:  # the file that another writer has put there meanwhile, and that we are about to write again
            os.unlink(aside, dir_fd=directory)


def _sweep(directory: int) -> None:
    """Delete what writers that died long ago have left. Best effort: such files are litter and harm nobody."""
    with contextlib.suppress(OSError):
        for name in filter(_STAGE.fullmatch, os.listdir(directory)):
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if time.time() - status.st_mtime > _STAGE_LIFETIME:
                    os.unlink(name, dir_fd=directory)


def _was_evicted(error: Exception) -> bool:
    """Return whether ``error`` says that a directory vanished under us (ESTALE is how NFS says it)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE)


def in_words(problem: Exception | None) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror if problem.filename is None else f"{problem.strerror}: {problem.filename!r}"
    return str(problem)


def _warn_once(root: Path | None, reason: str) -> None:
    """Log that ``root`` cannot be used, once a process.

    Not through ``warnings``, so that ``-W error`` does not break an import.
    """
    token = object()
    if _warned.setdefault(str(root), token) is not token:  # atomic, and unlike a lock safe to fork around
        return
    place = "on disk" if root is None else f"in {str(root)!r}"
    _log.warning(
        "mlpdsl cannot keep generated source %s: %s. It stays in memory instead: results are unaffected, but it is "
        "rendered again in every process, and there is no file to read. To fix this, set MLPDSL_CACHE_DIR to a "
        "directory of your own, on a disk with space, that its group and others cannot write to.",
        place,
        reason,
    )
