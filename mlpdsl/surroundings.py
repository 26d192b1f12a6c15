"""What kernels need beside packages: a C compiler, Python's headers, variables, a directory. Used by `mlpdsl.doctor`."""

from __future__ import annotations

import os
import shutil
import sysconfig
from difflib import get_close_matches
from pathlib import Path

from mlpdsl import on_jit, tables
from mlpdsl.backends import VARIABLE, backend_named, interpreting
from mlpdsl.errors import MLPError, shorten
from mlpdsl.requirements import Check
from mlpdsl.tables import VARIABLE as TABLES_VARIABLE
from mlpdsl.target import VARIABLE as TARGET_VARIABLE

__all__ = ["check_compiler", "check_environment", "check_headers", "check_triton_cache"]

OURS = (VARIABLE, TARGET_VARIABLE, TABLES_VARIABLE, on_jit.VARIABLE, "MLPDSL_CACHE_DIR")
"""Every variable that mlpdsl reads under its own prefix."""

_OTHERS = (
    "CC",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "TORCHDYNAMO_DISABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "XDG_CACHE_HOME",
)
_LITTLE = 64 * 2**20  # bytes; one compiled MLP takes a few megabytes of Triton's cache


def _severity(gpu: bool) -> str:
    """Kernels are compiled where there is a GPU and they are not interpreted; elsewhere it is only worth knowing."""
    return "problem" if gpu and not interpreting() else "note"


def check_compiler(gpu: bool) -> Check:
    """Triton compiles a launcher in C for each kernel, with $CC, else gcc, else clang."""
    named = os.environ.get("CC")
    if named is not None:
        path = shutil.which(named)
        if path:
            return Check("compiler", "ok", f"{path}, from CC", "", {"path": path})
        step = "Set CC to one program without arguments, or unset it."
        return Check("compiler", _severity(gpu), f"CC={shorten(named)} is no program on PATH", step, {"path": None})
    path = shutil.which("gcc") or shutil.which("clang")
    if path:
        return Check("compiler", "ok", path, "", {"path": path})
    other = shutil.which("cc")
    if other:
        return Check(
            "compiler", _severity(gpu), f"{other} is there, but Triton looks for gcc and clang", "Set CC=cc.", {"path": None}
        )
    step = "Triton compiles its launchers in C: install gcc or clang, or set CC."
    return Check("compiler", _severity(gpu), "no C compiler was found", step, {"path": None})


def check_headers(gpu: bool) -> Check:
    """Those launchers include Python.h."""
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    path = os.path.join(folder, "Python.h")
    if os.path.isfile(path):
        return Check("headers", "ok", path, "", {"path": path})
    step = "Install the headers of this Python (on Debian and Ubuntu the package python3-dev)."
    return Check("headers", _severity(gpu), f"there is no {path}, which Triton's launchers include", step, {"path": None})


def check_environment(gpu: bool) -> Check:
    """The variables that change what runs, and those that were meant to."""
    prefixes = ("MLPDSL_", "TRITON_")
    details = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes) or name in _OTHERS}
    problems, notes, steps = [], [], []
    backend = os.environ.get(VARIABLE, "").strip()
    try:
        if backend:
            backend_named(backend, VARIABLE)
    except MLPError as error:
        problems.append(str(error))
        steps.append(f"Set {VARIABLE} to one of these, or unset it.")
    try:
        on_jit.policy()
    except MLPError as error:
        problems.append(str(error))
        steps.append(f"Set {on_jit.VARIABLE} to one of these, or unset it.")
    wrong = _wrong_table(os.environ.get(TABLES_VARIABLE, "").strip())
    if wrong:
        problems.append(wrong)
        steps.append(f"Name a table, or a folder of tables, in {TABLES_VARIABLE}, or unset it.")
    for name in details:
        if name.startswith("MLPDSL_") and name not in OURS:
            notes.append(f"mlpdsl reads no {name}")
            close = get_close_matches(name, OURS, n=1)
            steps.append(f"Did you mean '{close[0]}'?" if close else "Unset it.")
    folder = os.environ.get("MLPDSL_CACHE_DIR", "")
    if folder and not os.path.isabs(os.path.expanduser(folder)):
        notes.append("MLPDSL_CACHE_DIR is relative, so each working directory has a cache of its own")
        steps.append("Give an absolute path.")
    if gpu and interpreting():
        notes.append("TRITON_INTERPRET is on, so kernels run on the CPU, slowly")
        steps.append("Unset it to use the GPU.")
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0") not in ("", "0"):
        notes.append("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes PyTorch's own float32 products tf32")
        steps.append("Unset it where the eager backend's float32 matters.")
    status = "problem" if problems else "note" if notes else "ok"
    known = ", ".join(f"{name}={shorten(value)[1:-1]}" for name, value in details.items()) or "nothing set that matters"
    return Check("environment", status, "; ".join([known, *problems, *notes]), " ".join(steps), details)


def _wrong_table(setting: str) -> str:
    """Why calls would not use the tables that a setting names; "" where they would, or need not."""
    path = Path(setting).expanduser()
    if setting.lower() in ("", "off") or path.is_dir():
        return ""
    try:
        tables.read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{TABLES_VARIABLE}={shorten(setting)} is no table, and configs follow the rule: {why}"
    return ""


def triton_cache() -> str:
    """Where Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    return os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")


def check_triton_cache(gpu: bool) -> Check:
    """Without a place to write, Triton compiles nothing."""
    path = os.path.abspath(triton_cache())
    details = {"path": path}
    step = "Set TRITON_CACHE_DIR to a directory that you may write to, on a disk with space."
    try:
        above = path
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            return Check("triton_cache", _severity(gpu), f"{above} is not a directory", step, details)
        if not os.access(above, os.W_OK | os.X_OK):
            return Check("triton_cache", _severity(gpu), f"{above} cannot be written to", step, details)
        free = shutil.disk_usage(above).free
    except (OSError, ValueError) as error:
        return Check("triton_cache", _severity(gpu), f"{path}: {error}", step, details)
    if free < _LITTLE:
        return Check("triton_cache", _severity(gpu), f"{path}: {free // 2**20} MiB are free", step, details)
    return Check("triton_cache", "ok", path, "", details)
