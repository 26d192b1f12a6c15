"""The versions that are installed, beside those that mlpdsl asks for. Used by `mlpdsl.doctor`."""

from __future__ import annotations

import operator
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from itertools import zip_longest
from typing import Any

from mlpdsl.machine import Installed
from mlpdsl.version import __version__

__all__ = ["PAIRS", "Check", "check_pair", "check_versions", "ranges", "satisfies"]

PAIRS = (("2.11", "3.6"), ("2.13", "3.7"))
"""The versions of torch and triton that are tested together."""

RANGES = {"jinja2": ">=3.1", "torch": ">=2.11", "triton": ">=3.6"}
"""What pyproject.toml asks for, for where mlpdsl runs without being installed."""

JAX = ">=0.9"
"""What the extra `jax` asks for."""

_MIN_PYTHON = (3, 10)
_DISTRIBUTIONS = {"triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `status` is "ok", "note" or "problem"; `next_step` is empty where it is "ok"."""

    name: str
    status: str
    found: str
    next_step: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "status", "found", "next_step")
        return {**{name: getattr(self, name) for name in names}, "details": dict(self.details)}


def ranges() -> dict[str, str]:
    """Which versions this mlpdsl asks for, by distribution: from its metadata, where it is installed."""
    try:
        if metadata.version("mlpdsl") != __version__:
            return dict(RANGES)
        asked = metadata.requires("mlpdsl") or []
    except Exception:  # not installed, or metadata that cannot be read
        return dict(RANGES)
    found = dict(RANGES)
    for text in asked:
        requirement, _, marker = text.partition(";")
        parts = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^()]*)\)?\s*", requirement.strip())
        if parts and "extra" not in marker and parts[1].lower() in found:
            found[parts[1].lower()] = parts[2].replace(" ", "")
    return found


_OPERATORS: dict[str, Callable[[list[int], list[int]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "2.11.0a0+git" is (2, 11, 0)."""
    numbers = re.match(r"v?(\d{1,9}(?:\.\d{1,9})*)", version)
    return tuple(map(int, numbers[1].split("."))) if numbers else ()


def satisfies(version: str, asked: str) -> bool:
    """Whether a version is in a range like ">=3.6,<4", by its numbers alone: 2.12.0.dev1 counts as 2.12.0."""
    for part in filter(None, asked.split(",")):
        form = re.fullmatch(r"\s*(>=|<=|==|!=|>|<|~=)\s*([^\s*]+?)(\.\*)?\s*", part)
        if form is None:
            continue  # a form that this release does not use
        given, bound = release(version), release(form[2])
        if form[3]:
            given = given[: len(bound)]
        sign = form[1]
        if sign == "~=":
            if given[: len(bound) - 1] != bound[:-1]:
                return False
            sign = ">="
        pairs = list(zip_longest(given, bound, fillvalue=0))
        if not _OPERATORS[sign]([a for a, _ in pairs], [b for _, b in pairs]):
            return False
    return True


def installed_version(name: str) -> str | None:
    """The version of a distribution, from its metadata; None where it is not installed."""
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except Exception:  # metadata that cannot be read is as good as none
            continue
    return None


def check_versions(installed: Installed) -> list[Check]:
    """Python, mlpdsl, torch, triton, jinja2, numpy and jax."""
    from mlpdsl.backends import interpreting

    python = platform.python_version()
    fits = sys.version_info >= _MIN_PYTHON
    step = "" if fits else f"Use Python {'.'.join(map(str, _MIN_PYTHON))} or newer."
    required = f">={'.'.join(map(str, _MIN_PYTHON))}"
    found = f"{python} ({sys.executable}) on {platform.system()} {platform.machine()}"
    checks = [Check("python", "ok" if fits else "problem", found, step, {"version": python, "requires": required})]
    checks.append(Check("mlpdsl", "ok", __version__, "", {"version": __version__, "requires": ""}))
    asked = ranges()
    checks += [_check_torch(installed, asked["torch"]), _check_triton(installed, asked["triton"])]
    checks.append(_check_version("jinja2", installed_version("jinja2"), asked["jinja2"]))
    return [*checks, _check_numpy(installed, interpreting()), _check_jax()]


def _check_version(name: str, version: str | None, asked: str, **more: Any) -> Check:
    details = {"version": version, "requires": asked, **more}
    if version is None:
        return Check(name, "problem", f"not installed; mlpdsl needs {name}{asked}", f"pip install '{name}{asked}'", details)
    if not satisfies(version, asked):
        return Check(name, "problem", f"{version}; mlpdsl needs {name}{asked}", f"pip install '{name}{asked}'", details)
    return Check(name, "ok", version, "", details)


def _version_of(installed: Installed, name: str) -> str | None:
    return installed.versions.get(name) or installed_version(name)


def _check_torch(installed: Installed, asked: str) -> Check:
    version = _version_of(installed, "torch")
    check = _check_version("torch", version, asked, cuda=installed.cuda, hip=installed.hip)
    if check.status != "ok":
        return check
    if why := installed.errors.get("torch") or installed.errors.get("process"):
        step = "Try `python -c 'import torch'`; install torch anew where that fails too."
        return Check("torch", "problem", f"{version} is installed, but {_raised(installed, 'torch', why)}", step, check.details)
    build = f"CUDA {installed.cuda}" if installed.cuda else f"HIP {installed.hip}" if installed.hip else "CPU"
    return Check("torch", "ok", f"{version} ({build} build)", "", check.details)


def _raised(installed: Installed, name: str, why: str) -> str:
    return f"importing it raises {why}" if name in installed.errors else why


def _check_triton(installed: Installed, asked: str) -> Check:
    version = _version_of(installed, "triton")
    check = _check_version("triton", version, asked)
    if version is None and sys.platform != "linux":
        step = "MLPs run by PyTorch's own operations; nothing to do."
        return Check("triton", "note", f"not installed; there is none for {sys.platform}", step, check.details)
    if check.status == "ok" and "triton" in installed.errors:
        found = f"{version} is installed, but importing it raises {installed.errors['triton']}"
        step = "Try `python -c 'import triton'`; install the triton that this torch asks for."
        return Check("triton", "problem", found, step, check.details)
    return check


def _check_numpy(installed: Installed, interpreting: bool) -> Check:
    """Only Triton's interpreter needs it; that of triton 3.6 breaks on numpy 2.4 and later."""
    version, triton = installed_version("numpy"), _version_of(installed, "triton")
    old = triton is not None and release(triton) < (3, 7)
    asked = ">=1.26,<2.4" if old else ">=1.26"
    check = _check_version("numpy", version, asked)
    if check.status == "ok":
        return check
    reader = f"the interpreter of triton {triton}" if triton else "Triton's interpreter"
    found = f"{version or 'not installed'}; {reader} needs numpy{asked}"
    step = f"pip install 'numpy{asked}'" + ("" if interpreting else ", if you want to interpret kernels")
    return Check("numpy", "problem" if interpreting else "note", found, step, check.details)


def _check_jax() -> Check:
    """Only mlpdsl.jax needs it. What it can run on is told by the plugins that are installed: nothing is imported."""
    version, asked = installed_version("jax"), JAX
    details = {"version": version, "requires": asked}
    if version is None:
        return Check("jax", "ok", "not installed; only mlpdsl.jax needs it", "", details)
    if not satisfies(version, asked):
        found = f"{version}; mlpdsl.jax needs jax{asked}"
        return Check("jax", "note", found, "pip install 'mlpdsl[jax]', to use mlpdsl.jax", details)
    plugins = {"a GPU": ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin"), "a TPU": ("libtpu",)}
    places = [place for place, names in plugins.items() if any(map(installed_version, names))]
    return Check("jax", "ok", f"{version}, with plugins for {' and '.join(places) or 'the CPU alone'}", "", details)


def check_pair(installed: Installed) -> Check:
    """Whether torch and triton are in their ranges, wanted together by torch, and tested together by mlpdsl."""
    torch, triton, asked = _version_of(installed, "torch"), _version_of(installed, "triton"), ranges()
    tested = ", ".join(f"torch {a} with triton {b}" for a, b in PAIRS)
    details = {"torch": torch, "triton": triton, "tested": [list(pair) for pair in PAIRS]}
    step = f"Tested pairs: {tested}."
    if torch is None or triton is None:
        return Check("pair", "note", "there is no pair: one of torch and triton is missing", step, details)
    found = f"torch {torch} with triton {triton}"
    if not satisfies(torch, asked["torch"]) or not satisfies(triton, asked["triton"]):
        return Check("pair", "problem", f"{found}: not supported", f"{step} Install one of them.", details)
    wanted = _pinned()
    if wanted and not satisfies(triton, wanted):
        step = f"torch.compile may fail; pip install 'triton{wanted}'."
        return Check("pair", "note", f"{found}, but this torch asks for triton{wanted}", step, details)
    if not any(satisfies(torch, f"=={a}.*") and satisfies(triton, f"=={b}.*") for a, b in PAIRS):
        return Check("pair", "note", f"{found}: supported, but not tested together", step, details)
    return Check("pair", "ok", f"{found}, tested together", "", details)


def _pinned() -> str:
    """The range of triton that the installed torch asks for; "" where it asks for none."""
    try:
        for text in metadata.requires("torch") or []:
            parts = re.match(r"triton\s*\(?([=<>!~][^;()]*)\)?\s*(;.*)?$", text)
            if parts and "extra" not in (parts[2] or "") and sys.platform == "linux":
                return parts[1].replace(" ", "")
    except Exception:  # metadata that cannot be read
        pass
    return ""
