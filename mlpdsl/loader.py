"""Turn rendered source into a module, from memory.

The text that was rendered in this process is what is compiled and run; the file that the cache keeps under the same
path is never read. Triton is the one that would: ``@triton.jit`` asks ``inspect`` for the source of the function, and
``inspect`` asks ``linecache``, which reads the file unless it already knows its lines. So the lines go into
``linecache`` before the text runs, in an entry without a modification time, which ``linecache.checkcache`` keeps.
The same entry gives tracebacks and debuggers the generated line, whether or not there is a file.
"""

from __future__ import annotations

import io
import linecache
import os
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

__all__ = ["load"]

_V = TypeVar("_V")
_LineCacheEntry = tuple[int, None, list[str], str]


class _Loaded(NamedTuple):
    module: ModuleType
    text: str
    lines: _LineCacheEntry


# Re-entrant, because generated source may load other generated source while it runs.
_lock = threading.RLock()
_loaded: dict[tuple[str, str], _Loaded] = {}  # by (key, path)
_running: dict[str, ModuleType] = {}  # by module name: those whose text has not run to its end


def load(path: Path | str, text: str, key: str) -> ModuleType:
    """Return the module that ``text`` defines; it is run once a process for each ``(key, path)``.

    ``path`` is where the text would be on disk; it is recorded as the file name and never opened. The module is called
    ``mlpdsl_generated_<first 16 characters of key>`` and is in ``sys.modules`` under that name (if one key was loaded
    under two paths, the later one). Safe in threads, which get one object between them, and around ``os.fork``.

    Whatever ``text`` raises comes out, ``SyntaxError`` included, and then nothing stays registered. Raises
    ``RuntimeError`` if ``(key, path)`` was loaded with a different text: the key then leaves out something on which
    the text depends, and to return either module would be to run a kernel that nobody asked for.
    """
    filename = str(path)
    with _lock:
        known = _loaded.get((key, filename))
        if known is None:
            known = _loaded[key, filename] = _execute(filename, text, f"mlpdsl_generated_{key[:16]}")
        elif known.text != text:
            raise RuntimeError(
                f"key {key!r} stands for two different texts in {filename!r}: it does not cover all that they depend "
                "on. This is a defect of mlpdsl; please report it."
            )
        else:
            linecache.cache[filename] = known.lines  # in case somebody called linecache.clearcache()
        return known.module


def _execute(filename: str, text: str, name: str) -> _Loaded:
    """Run ``text`` in a new module called ``name``; on failure leave ``linecache`` and ``sys.modules`` as they were."""
    code = compile(text, filename, "exec", dont_inherit=True)
    module = ModuleType(name)
    module.__file__ = filename
    lines_before, module_before = linecache.cache.get(filename), sys.modules.get(name)
    lines = linecache.cache[filename] = _entry(filename, text)
    _running[name] = sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        _restore(linecache.cache, filename, lines_before)
        _restore(sys.modules, name, module_before)
        raise
    finally:
        _running.pop(name, None)
    return _Loaded(module, text, lines)


def _entry(filename: str, text: str) -> _LineCacheEntry:
    """Return ``text`` as ``linecache`` keeps it; no modification time, so that it is never checked against a file.

    Lines end where the compiler says they do. ``str.splitlines`` would also split at form feeds and U+2028, and Triton
    would then be given another function's lines.
    """
    lines = io.StringIO(text, newline=None).readlines()
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return len(text), None, lines, filename


def _restore(table: MutableMapping[str, _V], name: str, before: _V | None) -> None:
    if before is None:
        table.pop(name, None)
    else:
        table[name] = before


def _after_fork_in_child() -> None:
    """Forget what other threads of the parent were doing: they are not here to finish it, nor to release the lock."""
    global _lock
    _lock = threading.RLock()
    for name, module in _running.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
