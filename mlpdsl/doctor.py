"""`mlpdsl doctor`: whether this machine can do what mlpdsl does, and what to do where it cannot.

`diagnose().to_dict()`, which `--json` prints, is one object with these keys, always all of them::

    schema     1
    mlpdsl     the version
    status     the worst of all: "ok", "note" (worth knowing; nothing is broken) or "problem"
    checks     a list of {name, status, found, next_step, details}, by name: python, mlpdsl, torch, triton, jinja2, numpy, jax,
               pair, devices, target, compiler, headers, environment, cache, triton_cache; next_step is "" where status is "ok"
    specs      such an object for each spec; its details are {spec, rows}, where rows has for each number of rows
               {m, device, target, backend, strategy, reasons, rejected}: reasons say why Triton does not run it ([] where it
               does), rejected the same of each other strategy, by name

`details` of checks: versions have {version, requires} (torch also cuda, hip); devices {devices: [{name, architecture, target,
memory}], driver}; target {target}; compiler and headers {path}; environment the variables that are set; cache what
`mlpdsl cache info --json` has, and {ok, stale, damaged} (null where that could not be found out); triton_cache {path}.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlpdsl.cache import DISK_ERRORS
from mlpdsl.cache_tools import plain
from mlpdsl.errors import MLPError, ShapeError, UnsupportedError, describe
from mlpdsl.machine import Device, Driver, Installed, ask_nvml, ask_torch
from mlpdsl.requirements import Check, check_pair, check_versions
from mlpdsl.spec import MLPSpec, check_rows, check_spec
from mlpdsl.surroundings import check_compiler, check_environment, check_headers, check_triton_cache
from mlpdsl.target import VARIABLE, Target, detect, from_capability, parse_target
from mlpdsl.version import __version__

__all__ = ["ROWS", "Check", "Diagnosis", "diagnose"]

ROWS = (1, 16, 256, 4096)
"""The numbers of rows that are looked at where none are given."""

_ORDER = ("ok", "note", "problem")


@dataclass(frozen=True)
class Diagnosis:
    """What was found; `str()` of it is what the command prints."""

    checks: tuple[Check, ...]
    specs: tuple[Check, ...] = ()

    @property
    def status(self) -> str:
        """The worst status of all checks."""
        return max((c.status for c in (*self.checks, *self.specs)), key=_ORDER.index, default="ok")

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; the module's docstring lists the keys."""
        checks, specs = ([c.to_dict() for c in found] for found in (self.checks, self.specs))
        return {"schema": 1, "mlpdsl": __version__, "status": self.status, "checks": checks, "specs": specs}

    def __str__(self) -> str:
        everything = (*self.checks, *self.specs)
        width = max(len(c.name) for c in self.checks) if self.checks else 0
        lines = []
        for c in everything:
            lines.append(f"{c.status:<7}  {c.name:<{width}}  {c.found}")
            lines += [f"{'':9}{line}" for line in _rows_in_words(c.details.get("rows", ()))]
            if c.next_step:
                lines.append(f"{'':9}→ {c.next_step}")
        counts = {status: sum(c.status == status for c in everything) for status in ("problem", "note")}
        lines.append(", ".join(f"{n} {status}{'' if n == 1 else 's'}" for status, n in counts.items()))
        return "\n".join(plain(line, 2000) for line in lines)


def diagnose(specs: Iterable[MLPSpec] = (), m: Iterable[int] = ROWS) -> Diagnosis:
    """Look at this machine, and at what each spec gets on it at each number of rows `m`.

    Creates no CUDA context in this process: a process of its own imports torch. Raises `SpecError` and `ShapeError` for what is
    no spec and no number of rows, 1 or more; whatever the machine does becomes a check.
    """
    declared, rows = list(specs), [check_rows(number) for number in m]
    for spec in declared:
        check_spec(spec)
    for number in rows:
        if number < 1:
            raise ShapeError(describe("m", number, "an integer, 1 or more", "Pass the number of rows of x."))
    installed, driver = ask_torch(), ask_nvml()
    versions = check_versions(installed)
    devices = _check_devices(installed, driver)
    gpu = bool(installed.devices)
    checks = [*versions, check_pair(installed), devices, _check_target(installed), check_compiler(gpu), check_headers(gpu)]
    checks += [check_environment(gpu), _check_cache(), check_triton_cache(gpu)]
    return Diagnosis(tuple(checks), tuple(_check_spec(spec, rows, installed) for spec in declared))


def _target_of(device: Device) -> Target | None:
    try:
        major, dot, minor = device.architecture.partition(".")
        return from_capability(int(major), int(minor)) if dot and major.isdecimal() else parse_target(device.architecture)
    except (UnsupportedError, ValueError):
        return None


def _check_devices(installed: Installed, driver: Driver) -> Check:
    """What torch sees, or why it sees none of what NVML sees."""
    shown = installed.devices or driver.devices
    targets = [_target_of(device) for device in shown]
    details: dict[str, Any] = {"driver": driver.version, "devices": []}
    for device, target in zip(shown, targets, strict=True):
        name = target.name if target else None
        entry = {"name": device.name, "architecture": device.architecture, "target": name, "memory": device.memory}
        details["devices"].append(entry)
    words = [
        f"{d.name} ({t.name if t else f'architecture {d.architecture}'}, {d.memory / 2**30:.1f} GiB)"
        for d, t in zip(shown, targets, strict=True)
    ]
    found = "; ".join(words) + (f"; driver {driver.version}" if driver.version else "")
    if installed.devices:
        unknown = [d.architecture for d, t in zip(shown, targets, strict=True) if t is None]
        if unknown:
            step = f"Set {VARIABLE} to the nearest architecture to try, or use MLPDSL_BACKEND=eager."
            return Check("devices", "problem", f"{found}; no kernel is written yet for {', '.join(unknown)}", step, details)
        return Check("devices", "ok", found, "", details)
    if driver.error:
        step = "Look at what nvidia-smi says; after an update of the driver the machine must be started again."
        return Check("devices", "problem", f"NVIDIA's driver fails: {driver.error}", step, details)
    if driver.devices:
        return Check("devices", *_unseen(installed, found), details)
    if installed.cuda or installed.hip:
        why = installed.errors.get("cuda", "")
        found = "no GPU was found" + (f" ({why})" if why else "")
    else:
        found = "no GPU was found"
    step = "MLPs run by PyTorch's own operations; set TRITON_INTERPRET=1 to run the generated kernels in Triton's interpreter."
    return Check("devices", "note", found, step, details)


def _unseen(installed: Installed, found: str) -> tuple[str, str, str]:
    """Status, words and next step where the machine has GPUs and torch sees none."""
    if "process" in installed.errors or "torch" in installed.errors:
        return "problem", f"torch could not be asked; the machine has {found}", "Put torch right first."
    if not (installed.cuda or installed.hip):
        return "problem", f"torch is built for the CPU alone; the machine has {found}", "Install a build of torch for CUDA."
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        step = "Unset it, or name devices that there are, to use them."
        return "note", f"CUDA_VISIBLE_DEVICES={value!r} hides the machine's {found}", step
    why = installed.errors.get("cuda", "it gives no reason")
    step = f"See whether the driver is new enough for CUDA {installed.cuda}, and whether this user may open /dev/nvidia*."
    return "problem", f"torch sees no GPU ({why}); the machine has {found}", step


def _check_target(installed: Installed) -> Check:
    """What generation writes for where nobody names a target, beside what the devices are."""
    from mlpdsl.source import DEFAULT_TARGET

    try:
        target = detect()
    except UnsupportedError as error:
        return Check("target", "problem", str(error), f"Set {VARIABLE} to one of these, or unset it.", {"target": None})
    own = {t.name for d in installed.devices if (t := _target_of(d))}
    details = {"target": target.name if target else None}
    named = os.environ.get(VARIABLE, "").strip()
    if target is None:
        found = f"not known before the first call; {DEFAULT_TARGET} where source is only shown"
        return Check("target", "ok", found, "", details)
    if named and own and own != {target.name}:
        found = f"{target.name}, from {VARIABLE}; the devices are {', '.join(sorted(own))}"
        return Check("target", "note", found, f"Unset {VARIABLE}, unless kernels for another architecture are meant.", details)
    return Check("target", "ok", f"{target.name}, from {VARIABLE if named else 'the driver'}", "", details)


def _check_cache() -> Check:
    """The cache of generated source: a convenience, so that nothing about it is a problem."""
    from mlpdsl.cache_info import info
    from mlpdsl.cache_tools import listing, verify

    found = info()
    counts: dict[str, int | None] = dict.fromkeys(("ok", "stale", "damaged"))
    try:
        root = None if found.root is None or found.entries == 0 else _path(found.root)
        verdicts = [v.status for v in verify(root, [e.directory for e in listing(root)[0]])]
        counts = {status: verdicts.count(status) for status in counts}
    except (ImportError, *DISK_ERRORS):  # jinja2 is missing, or the disk went away: other checks say so
        pass
    details = {**found.to_dict(), **counts}
    if not found.usable:
        step = "Results do not depend on it; set MLPDSL_CACHE_DIR to a directory of your own that others cannot write to."
        return Check("cache", "note", f"cannot be used: {found.root}: {found.reason}", step, details)
    words = f"{found.root}, from {found.origin}: {found.entries} entries, {found.bytes / 1e6:.1f} MB"
    words += "".join(f", {n} {status}" for status, n in counts.items() if status != "ok" and n)
    if counts["damaged"]:
        step = "See `mlpdsl cache verify`; `mlpdsl cache clear --damaged` removes them. They are never run."
        return Check("cache", "note", words, step, details)
    return Check("cache", "ok", words, "", details)


def _path(root: str) -> Any:
    from pathlib import Path

    return Path(root)


@dataclass
class _Place:
    """Where calls would run: a type of device, and its architecture."""

    device: str
    target: Target | None
    reasons: list[str] = field(default_factory=list)


def _places(installed: Installed) -> list[_Place]:
    """One for each architecture that torch sees, or the CPU."""
    from mlpdsl.source import DEFAULT_TARGET

    device = "cuda" if installed.devices else "cpu"
    try:
        if os.environ.get(VARIABLE, "").strip() or device == "cpu":
            return [_Place(device, detect() or parse_target(DEFAULT_TARGET))]
    except UnsupportedError as error:
        return [_Place(device, None, list(error.reasons))]
    found: dict[str, _Place] = {}
    for d in installed.devices:
        target = _target_of(d)
        reasons = [] if target else [f"no kernel is written yet for architecture {d.architecture}"]
        found.setdefault(target.name if target else d.architecture, _Place(device, target, reasons))
    return list(found.values())


def _check_spec(spec: MLPSpec, rows: Sequence[int], installed: Installed) -> Check:
    name, details = spec.short_name, {"spec": spec.to_json(), "rows": (made := [])}
    status, step = "ok", ""
    try:
        for place in _places(installed):
            asked, reasons = _reasons(spec, place, installed)
            for m in rows:
                made.append(_row(spec, m, place, asked, reasons))
            if reasons and asked in ("triton", "pallas"):
                status, step = "problem", "A call raises; unset MLPDSL_BACKEND to fall back to PyTorch's operations."
            elif reasons and _text_only(spec):
                status, step = "problem", "A call raises: the spec holds text for Triton alone, which PyTorch cannot run."
            elif reasons and status == "ok" and asked != "eager":
                status, step = "note", "Calls run by PyTorch's own operations; the reasons say what would change that."
    except Exception as error:  # whatever is wrong with this installation, the other checks must be shown
        why = " ".join(f"{'' if isinstance(error, MLPError) else f'{type(error).__name__}: '}{error}".split())
        step = "Install what is missing." if isinstance(error, ModuleNotFoundError) else "Do as the other checks say, if any."
        return Check("spec", "problem", f"{name}: cannot be looked at: {why}", step, details)
    return Check("spec", status, name, step, details)


def _text_only(spec: MLPSpec) -> bool:
    """Whether a function of the spec was read from JSON as a backend's text alone."""
    from mlpdsl.function import Function

    entries = [e for e in (spec.activation, *spec.epilogue) if isinstance(e, Function)]
    return any(not e.value and e.call is None for e in entries)


def _reasons(spec: MLPSpec, place: _Place, installed: Installed) -> tuple[str | None, list[str]]:
    """The backend asked for by MLPDSL_BACKEND, and every reason why Triton does not run the spec here."""
    from mlpdsl.backends import BACKENDS, VARIABLE, requested_backend
    from mlpdsl.codegen.lower import lower

    asked = requested_backend(None)
    if asked == "eager":
        return asked, [f"{VARIABLE}=eager"]
    if asked == "pallas":
        return asked, [f"{VARIABLE}=pallas, whose kernels are called from JAX alone: unset it for torch tensors"]
    reasons = [f"{name} cannot be imported: {why}" for name, why in installed.errors.items() if name in ("torch", "triton")]
    reasons += [] if reasons else BACKENDS["triton"].runs_on(place.device)
    if not reasons and place.target is not None:
        reasons = BACKENDS["triton"].supports(lower(spec, place.target), place.target)
    return asked, reasons or place.reasons


def _row(spec: MLPSpec, m: int, place: _Place, asked: str | None, reasons: list[str]) -> dict[str, Any]:
    from mlpdsl.explanation import explain

    row: dict[str, Any] = {"m": m, "device": place.device, "target": place.target.name if place.target else None}
    if reasons or place.target is None:
        backend = None if asked in ("triton", "pallas") else "eager"
        return {**row, "backend": backend, "strategy": backend, "reasons": list(reasons), "rejected": {}}
    found = explain(spec, m, place.target)
    rejected = {name: list(why) for name, why in found.rejected.items()}
    backend = "eager" if found.strategy == "eager" else "triton"
    return {**row, "backend": backend, "strategy": found.strategy, "reasons": [], "rejected": rejected}


def _rows_in_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each number of rows, then each reason once, with the rows that it is for where it is not for all."""
    width = max((len(str(row["m"])) for row in rows), default=0)
    lines: list[str] = []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        on = row["device"] if row["device"] == "cpu" else f"{row['device']} ({row['target']})"
        what = "raises" if row["backend"] is None else f"{row['backend']}, {row['strategy']}"
        lines.append(f"m = {row['m']:>{width}}: {'eager' if what == 'eager, eager' else what} on {on}")
        said = [f"not triton: {reason}" for reason in row["reasons"]]
        said += [f"not {name}: {'; '.join(why)}" for name, why in row["rejected"].items()]
        for text in said:
            reasons.setdefault(text, []).append(str(row["m"]))
    return lines + [text if len(ms) == len(rows) else f"{text} (m = {', '.join(ms)})" for text, ms in reasons.items()]
