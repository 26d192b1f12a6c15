"""Kernels that Triton compiled, held against what mlpdsl saw compiled before: Triton believes its own cache, and mlpdsl does not.

Triton keeps binaries under TRITON_CACHE_DIR and checks nothing that it reads back: a file cut short raises whatever it happens to
raise, and a binary with one bit flipped is launched. So at the first launch of a variant, and only there, it is compiled without
being launched, and the digest of its binary and of what its launch goes by is looked up among those seen before::

    <root>/binaries-v1/<Triton's hash>-<digest>       an empty file: all that it says is in its name

What is promised, on NVIDIA GPUs:

* A binary that was seen compiled, or first met, under this root is the one that runs. One that differs is compiled again, in a
  private directory that lives as long as the compilation, and what Triton's cache holds is replaced, after one warning.
* Where Triton's cache cannot be read or written at all, the same.
* A compiler's error comes out as it is. Any other error that the private directory does not cure comes out as it was.

What is not: a binary met in Triton's cache before any record of its kernel exists is taken on trust (and recorded, so that it
cannot change later); Triton's own shared libraries, which it loads from the same cache before anybody could look at them; a file
there that never ends, such as a FIFO, for which Triton waits. Without a root that can be used there are no records: damage that
raises is still cured, damage that does not is not noticed.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton import knobs
from triton.errors import TritonError
from triton.runtime.cache import FileCacheManager, get_cache_manager

from mlpdsl import on_jit
from mlpdsl.cache import DISK_ERRORS, default_root, in_words, open_below

__all__ = ["compiled", "fingerprint", "obtain"]

_RECORDS = "binaries-v1"
_OPEN_RECORD = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS = 1000  # threads that read one damaged file at once: more than anybody starts
_NOT_DIGESTED = frozenset({"extern_libs"})  # paths of an installation; their contents are in Triton's hash

_log = logging.getLogger("mlpdsl")
_warned: dict[str, object] = {}  # Triton's cache directories that this process has warned about
_checked: weakref.WeakSet[Any] = weakref.WeakSet()  # the compiled kernels that need no second look

_lock = threading.Lock()  # around the knob, which is the process's
_hook_lock = threading.Lock()  # around Triton's hook, which is the process's as well
_load_lock = threading.RLock()  # around loading
_private: tuple[int, str] | None = None  # the thread that compiles in a private directory, and the directory


def compiled(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], args: tuple[Any, ...]) -> Any:
    """The variant of a `triton.jit` function that `kernel[grid](*args, **options)` would launch: compiled, checked, and loaded on
    the current device, but not launched. None where a hook of Triton's kept it from compiling.

    Raises Triton's errors of compilation and of loading; `NotCompiledError` where MLPDSL_ON_JIT=error and a call asks for it.
    """
    call = on_jit.watched(kernel)
    if call is not None and _is_new(kernel, grid, options, args):
        on_jit.tell(call, kernel)

    def compile_step() -> Any:
        made = kernel.run(*args, grid=grid, warmup=True, **options)
        return made.result() if hasattr(made, "result") else made  # a future, where somebody compiles in the background

    def forget(made: Any) -> None:
        for tables in list(kernel.device_caches.values()):
            for key in [k for k, v in list(tables[0].items()) if v is made]:
                tables[0].pop(key, None)

    return obtain(compile_step, _load, forget)


class _NewError(Exception):
    """Triton does not remember the variant."""


def _is_new(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether Triton would have to compile the variant, or read it from its cache. It does neither here."""
    thread, asking = threading.get_ident(), True
    with _hook_lock:
        was_set, usual = "jit_cache_hook" in vars(knobs.runtime), knobs.runtime.jit_cache_hook

        def refuse(**what: Any) -> Any:
            if asking and threading.get_ident() == thread:  # somebody may put it back later, who saved it meanwhile
                raise _NewError
            return usual(**what) if usual is not None else None

        knobs.runtime.jit_cache_hook = refuse
        try:
            kernel.run(*args, grid=grid, warmup=True, **options)
        except _NewError:
            return True
        finally:
            asking = False
            if was_set:
                knobs.runtime.jit_cache_hook = usual
            else:
                del knobs.runtime.jit_cache_hook
    return False


def obtain(compile_step: Callable[[], Any], load: Callable[[Any], object], forget: Callable[[Any], None]) -> Any:
    """What `compile_step` returns, a `CompiledKernel` or None, once it is known to be what was compiled and `load` has taken it.

    `compile_step` compiles, or reads Triton's cache; where that cannot be believed it is called once more with an empty cache
    directory, after `forget` was told of what it returned before. `load` raises for a binary that no device can use.
    """
    made: Any = None
    known = other = False
    problem: Exception | None = None
    try:
        made = compile_step()
        if made is None or made in _checked:
            return made
        known, other = _look_up(made)
        if not other:
            load(made)
            if not known:
                _record(made)
            _checked.add(made)
            return made
    except TritonError:
        raise
    except Exception as error:  # whatever reading a damaged file may raise
        if known and not isinstance(error, OSError | ImportError):
            raise  # the binary is right, so its loading fails for another reason
        problem = error
    if made is not None:
        forget(made)
    return _privately(compile_step, load, forget, problem, made)


def fingerprint(made: Any) -> str:
    """SHA-256, as 64 hex digits, of a compiled kernel's binary and of the metadata that its launch goes by."""
    metadata = {k: v for k, v in made.metadata._asdict().items() if k not in _NOT_DIGESTED}
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True, default=str).encode())
    binary = made.kernel
    sha.update(binary if isinstance(binary, bytes) else str(binary).encode())
    return sha.hexdigest()


def _load(made: Any) -> object:
    """Build the launcher and load the binary. Raises what either raises, also where an earlier try of another thread's did.

    Triton has the launcher before it lets go of the interpreter's lock to load the binary: whoever asks meanwhile, or after a
    failure, is told that all is done, and would launch a function that is not there.
    """
    with _load_lock:
        run = made.run  # a property, which does it
        if getattr(made, "function", run) is None:
            made._init_handles()
            run = made.run
        return run


def _privately(
    compile_step: Callable[[], Any],
    load: Callable[[Any], object],
    forget: Callable[[Any], None],
    problem: Exception | None,
    made: Any,
) -> Any:
    """Compile and load with an empty cache directory. Raises `problem` where that does not help either."""
    place = _triton_directory()
    try:
        with _private_directory() as directory:
            again = _anew(compile_step, forget, directory)
            if again is None or again in _checked:  # another thread was faster
                return again
            load(again)
            differs = problem is not None or fingerprint(again) != fingerprint(made)
            files = {name: Path(path).read_bytes() for name, path in again.metadata_group.items()} if differs else {}
            _checked.add(again)  # before the next thread gets here
    except TritonError:
        raise
    except Exception:
        if problem is None:
            raise
        again = None
    if again is None:
        assert problem is not None
        raise problem
    # Equal to what was there: Triton had compiled it a moment ago. Its line table may differ from one recorded before, because
    # two specs can hold one kernel under two paths.
    _record(again)
    if differs:
        _warn_once(place, again, problem)
        _replace(again.hash, files)
    return again


def _anew(compile_step: Callable[[], Any], forget: Callable[[Any], None], directory: str) -> Any:
    """What `compile_step` compiles in the directory; or what another thread compiled so, which is among those checked.

    Triton may remember what a thread read from its usual directory when this one did. Every such thread comes here next, and
    waits, so that one of these is met once a thread.
    """
    for _ in range(_OTHERS):
        again = contextvars.Context().run(compile_step)  # no setting for background compilation, which knows no directory
        if again is None or again in _checked:
            return again
        if all(Path(path).is_relative_to(directory) for path in again.metadata_group.values()):
            return again
        forget(again)
    raise RuntimeError(f"Triton did not compile the kernel {again.name} anew")


class _PrivateManager(FileCacheManager):  # type: ignore[misc]
    """Triton's own manager of one kernel's files, in a directory that it is given."""

    def __init__(self, key: str, place: str) -> None:
        self.key = key
        self.cache_dir = os.path.join(place, key)
        self.lock_path = os.path.join(self.cache_dir, "lock")
        os.makedirs(self.cache_dir, exist_ok=True)


@contextlib.contextmanager
def _private_directory() -> Iterator[str]:
    """Let Triton compile in an empty directory, which is yielded, in this thread alone.

    The knob is the process's. To name a directory there would send other threads' kernels into one that is gone a moment later,
    and would change the environment.
    """
    global _private
    # Not a TemporaryDirectory, which a process forked meanwhile would remove at its end.
    place = tempfile.mkdtemp(prefix="mlpdsl-triton-")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        stack.enter_context(_lock)
        was_set, usual = "manager_class" in vars(knobs.cache), knobs.cache.manager_class

        def manager(key: str, **purpose: bool) -> Any:
            if _private == (threading.get_ident(), place) and not purpose:  # not where users put kernels of their own
                return _PrivateManager(key, place)
            return (usual or FileCacheManager)(key, **purpose)

        _private, knobs.cache.manager_class = (threading.get_ident(), place), manager
        try:
            yield place
        finally:
            _private = None
            if was_set:
                knobs.cache.manager_class = usual
            else:
                del knobs.cache.manager_class


def _triton_directory() -> str:
    try:
        return str(knobs.cache.dir)
    except Exception:  # a home that cannot be expanded
        return "its cache directory"


def _replace(key: str, files: dict[str, bytes]) -> None:
    """Put the files of one kernel into Triton's cache, by Triton's own means: each is moved over its place. Best effort."""
    try:
        manager = get_cache_manager(key)
        group = {name: manager.put(data, name) for name, data in files.items()}
        manager.put_group(next(name for name in files if name.endswith(".json")), group)
    except Exception:  # the place may be unusable as a whole, and a remote one may raise anything
        return


# the records


def _look_up(made: Any) -> tuple[bool, bool]:
    """Whether this binary was seen before for its kernel; and if not, whether another one was."""
    root = default_root()
    if root is None:
        return False, False
    key = _key(made)
    try:
        with open_below(root, _RECORDS, create=False) as directory:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(f"{key}-{fingerprint(made)}", dir_fd=directory, follow_symlinks=False).st_mode):
                    return True, False
            return False, any(name.startswith(f"{key}-") for name in os.listdir(directory))
    except DISK_ERRORS:
        return False, False


def _record(made: Any) -> None:
    """Remember the binary as one of its kernel's, where the disk allows."""
    root = default_root()
    if root is not None:
        with contextlib.suppress(*DISK_ERRORS), open_below(root, _RECORDS, create=True) as directory:
            os.close(os.open(f"{_key(made)}-{fingerprint(made)}", _OPEN_RECORD, 0o644, dir_fd=directory))


def _key(made: Any) -> str:
    """Triton's hash of all that the binary depends on, as 64 hex digits. Not read from its cache."""
    return hashlib.sha256(str(made.hash).encode()).hexdigest()


def _warn_once(place: str, made: Any, problem: Exception | None) -> None:
    """Log that what Triton's cache holds cannot be used, once a process and directory."""
    token = object()
    if _warned.setdefault(place, token) is not token:
        return
    if problem is None:
        reason = "its binary is not the one that was compiled"
    else:
        reason = f"{type(problem).__name__}: {in_words(problem)!r:.300}"  # quoted: it may hold what the file held
    _log.warning(
        "mlpdsl cannot use what Triton's cache in %r holds for the kernel %s (%s). It is compiled again, and so is any other that "
        "is damaged: results are unaffected. If you see this again, delete that directory, or set TRITON_CACHE_DIR to another.",
        place,
        made.name,
        reason,
    )


def _after_fork_in_child() -> None:
    global _lock, _hook_lock, _load_lock, _private
    # The thread that held one is not here to release it.
    _lock, _hook_lock, _load_lock, _private = threading.Lock(), threading.Lock(), threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
