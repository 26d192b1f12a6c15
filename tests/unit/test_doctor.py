"""`mlpdsl doctor`: what it finds on machines of every kind, most of them made up, and what it says to do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import MLPSpec, cli, doctor, explanation, machine, requirements, source, surroundings, target
from mlpdsl.doctor import Check, Diagnosis, diagnose
from mlpdsl.errors import ShapeError, SpecError
from mlpdsl.machine import Device, Driver, Installed

ROOT = Path(__file__).resolve().parents[2]
SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
H200 = Device("NVIDIA H200", "9.0", 141 * 2**30)
T4 = Device("Tesla T4", "7.5", 16 * 2**30)
MI300 = Device("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 192 * 2**30)
NAMES = ["python", "mlpdsl", "torch", "triton", "jinja2", "numpy", "pair", "devices", "target", "compiler", "headers"]
NAMES += ["environment", "cache", "triton_cache"]


@pytest.fixture(autouse=True)
def _plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment with nothing set, a compiler, and no driver."""
    for name in list(os.environ):
        if name.startswith(("MLPDSL_", "TRITON_", "TORCH", "CUDA_", "HIP_", "ROCR_")) or name == "CC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(target, "_load_nvml", no_library)
    monkeypatch.setattr(machine, "_load_nvml", no_library)
    programs(monkeypatch, "gcc")
    target._ask.cache_clear()
    yield
    target._ask.cache_clear()


def no_library() -> object:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def programs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(surroundings.shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)


Look = Callable[..., Diagnosis]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Diagnose a machine that has these devices and versions; a version None is not installed."""

    def look(
        *devices: Device,
        specs: tuple[MLPSpec, ...] = (),
        m: tuple[int, ...] = (1, 4096),
        driver: Driver | None = None,
        errors: dict[str, str] | None = None,
        cuda: str | None = "13.0",
        hip: str | None = None,
        **versions: str | None,
    ) -> Diagnosis:
        known: dict[str, str | None] = {"torch": "2.11.0+cu130", "triton": "3.6.0", "jinja2": "3.1.6", "numpy": "2.3.0", **versions}

        def version(name: str) -> str:
            found = known.get(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(requirements.metadata, "version", version)
        monkeypatch.setattr(requirements.metadata, "requires", lambda name: [])
        imported = {n: v for n in ("torch", "triton") if (v := known[n]) is not None and n not in (errors or {})}
        installed = Installed(imported, errors or {}, cuda, hip, devices)
        monkeypatch.setattr(doctor, "ask_torch", lambda: installed)
        monkeypatch.setattr(doctor, "ask_nvml", lambda: driver or Driver("580.1" if devices and not hip else None, devices))
        return diagnose(specs, m)

    return look


def check(found: Diagnosis, name: str) -> Check:
    (one,) = [c for c in found.checks if c.name == name]
    assert (one.next_step == "") == (one.status == "ok"), one
    return one


def problem(found: Diagnosis, name: str, *said: str, status: str = "problem") -> Check:
    one = check(found, name)
    assert one.status == status, one
    for words in said:
        assert words in f"{one.found} → {one.next_step}"
    assert found.status == status or status == "note"
    return one


# the whole


def test_a_machine_where_all_is_well(look: Look) -> None:
    found = look(H200, specs=(SPEC,))
    assert [c.name for c in found.checks] == NAMES
    assert [c for c in found.checks if c.status != "ok"] == []
    assert found.status == "ok"
    assert check(found, "torch").found == "2.11.0+cu130 (CUDA 13.0 build)"
    assert check(found, "devices").found == "NVIDIA H200 (sm_90, 141.0 GiB); driver 580.1"
    (spec,) = found.specs
    expected = {m: explanation.explain(SPEC, m, "sm_90") for m in (1, 4096)}
    assert spec.details["rows"] == [
        {
            **{"m": m, "device": "cuda", "target": "sm_90", "backend": "triton", "strategy": e.strategy, "reasons": []},
            "rejected": {name: list(why) for name, why in e.rejected.items()},
        }
        for m, e in expected.items()
    ]
    assert str(found).endswith("0 problems, 0 notes")


def test_json_has_the_keys_that_the_docstring_lists(look: Look) -> None:
    said = look(T4, specs=(SPEC,)).to_dict()
    assert json.loads(json.dumps(said)) == said
    assert list(said) == ["schema", "mlpdsl", "status", "checks", "specs"]
    assert [c["name"] for c in said["checks"]] == NAMES
    for one in (*said["checks"], *said["specs"]):
        assert list(one) == ["name", "status", "found", "next_step", "details"]
    details = {c["name"]: c["details"] for c in said["checks"]}
    assert list(details["torch"]) == ["version", "requires", "cuda", "hip"]
    assert details["devices"] == {
        "driver": "580.1",
        "devices": [{"name": "Tesla T4", "architecture": "7.5", "target": "sm_75", "memory": 16 * 2**30}],
    }
    for name in ("python", "mlpdsl", "triton", "jinja2", "numpy"):
        assert list(details[name]) == ["version", "requires"]
    assert {"root", "usable", "entries", "ok", "stale", "damaged"} <= set(details["cache"])
    row = said["specs"][0]["details"]["rows"][0]
    assert list(row) == ["m", "device", "target", "backend", "strategy", "reasons", "rejected"]
    for name in ("schema", "checks", "specs", *NAMES, "rejected", "reasons"):
        assert doctor.__doc__ is not None
        assert name in doctor.__doc__


def test_the_worst_status_counts() -> None:
    ok, note, bad = (Check(s, s, "found", "" if s == "ok" else "step") for s in ("ok", "note", "problem"))
    assert Diagnosis((ok,)).status == Diagnosis(()).status == "ok"
    assert Diagnosis((note, ok)).status == "note"
    assert Diagnosis((ok, note), (bad,)).status == "problem"
    text = str(Diagnosis((ok, note), (bad,)))
    assert text.splitlines() == [
        "ok       ok    found",
        "note     note  found",
        "         → step",
        "problem  problem  found",
        "         → step",
        "1 problem, 1 note",
    ]


def test_nothing_found_talks_to_the_terminal(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EVIL", "\x1b[2J\n\x07")
    found = look(Device("GPU\x1b[2J", "9.0", 1))
    assert "\x1b" not in str(found)
    assert "\x07" not in str(found)


def test_what_is_no_spec_and_no_number_of_rows(look: Look) -> None:
    with pytest.raises(SpecError):
        diagnose(["x"])  # type: ignore[list-item]
    for m in (0, -1, 1.5, "1"):
        with pytest.raises(ShapeError):
            diagnose((), (m,))  # type: ignore[arg-type]


# versions


def test_the_ranges_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    asked = dict(re.findall(r'"([a-z0-9]+)([><=!~][^;"]*)', block[1]))
    assert asked == requirements.RANGES
    python = re.search(r'requires-python = ">=3\.(\d+)"', text)
    assert python is not None
    assert (3, int(python[1])) == requirements._MIN_PYTHON


def test_the_pairs_are_those_of_the_readme() -> None:
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| versions |"))
    assert re.findall(r"torch (\S+) with triton (\S+)", line) == list(requirements.PAIRS)


def test_the_ranges_come_from_the_metadata_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "jinja2>=3.2",
        "torch (>=2.12,<4)",
        'triton>=3.7; sys_platform == "linux"',
        'numpy>=1; extra == "test"',
        'torch>9; extra == "x"',
    ]
    monkeypatch.setattr(requirements.metadata, "version", lambda name: mlpdsl.__version__)
    monkeypatch.setattr(requirements.metadata, "requires", lambda name: asked)
    assert requirements.ranges() == {"jinja2": ">=3.2", "torch": ">=2.12,<4", "triton": ">=3.7"}
    monkeypatch.setattr(requirements.metadata, "version", lambda name: "9.9")  # another mlpdsl is installed
    assert requirements.ranges() == requirements.RANGES


@pytest.mark.parametrize(
    ("version", "asked", "expected"),
    [
        ("2.11.0+cu130", ">=2.11", True),
        ("2.11", ">=2.11.0", True),
        ("2.9.1", ">=2.11", False),
        ("2.100", ">=2.11", True),
        ("2.12.0.dev20260101", ">=2.11", True),
        ("2.4.6", ">=1.26,<2.4", False),
        ("2.3.9", ">=1.26,<2.4", True),
        ("3.6.0", "==3.6.0", True),
        ("3.6.1", "==3.6.0", False),
        ("3.6.1", "==3.6.*", True),
        ("3.60", "==3.6.*", False),
        ("3.6.0", "!=3.6.0", False),
        ("3.6.1", "~=3.6.0", True),
        ("3.7.0", "~=3.6.0", False),
        ("3.6", ">3.6", False),
        ("3.6", "<=3.6", True),
        ("nonsense", ">=1", False),
        ("1", "", True),
    ],
)
def test_satisfies(version: str, asked: str, expected: bool) -> None:
    assert requirements.satisfies(version, asked) is expected


def test_old_and_missing_versions(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    problem(look(H200, torch="2.10.0"), "torch", "2.10.0", "needs torch>=2.11", "pip install 'torch>=2.11'")
    problem(look(H200, torch="2.10.0"), "pair", "not supported")
    problem(look(H200, triton="3.5.1"), "triton", "needs triton>=3.6")
    problem(look(H200, jinja2=None), "jinja2", "not installed", "pip install")
    found = look(torch=None, triton=None)
    problem(found, "torch", "not installed")
    problem(found, "triton", "not installed")
    assert check(found, "pair").status == "note"
    monkeypatch.setattr(requirements.sys, "platform", "darwin")
    assert check(look(triton=None), "triton").status == "note"
    monkeypatch.setattr(requirements, "_MIN_PYTHON", (99, 0))
    problem(look(H200), "python", "Use Python 99.0")


def test_what_is_installed_but_cannot_be_imported(look: Look) -> None:
    found = look(errors={"torch": "OSError: libcudart.so.13: cannot open", "triton": "ImportError: bad"}, specs=(SPEC,))
    problem(found, "torch", "2.11.0+cu130 is installed, but importing it raises OSError: libcudart.so.13")
    problem(found, "triton", "ImportError: bad")
    row = found.specs[0].details["rows"][0]
    assert row["backend"] == "eager"
    assert row["reasons"][0].startswith("torch cannot be imported: OSError")


def test_a_torch_that_does_not_answer(look: Look) -> None:
    found = look(errors={"process": "took more than 120 s"}, driver=Driver("580", (H200,)))
    problem(found, "torch", "took more than 120 s")
    problem(found, "devices", "torch could not be asked", "NVIDIA H200")


def test_pairs(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(look(H200, torch="2.13.1", triton="3.7.0"), "pair").status == "ok"
    problem(look(H200, torch="2.11.0", triton="3.7.0"), "pair", "not tested together", "torch 2.13 with triton 3.7", status="note")
    look(H200)
    pin = ['triton==3.6.0; platform_system == "Linux"', 'triton>=9; extra == "x"']
    monkeypatch.setattr(requirements.metadata, "requires", lambda name: pin if name == "torch" else [])
    monkeypatch.setattr(requirements.sys, "platform", "linux")
    same = requirements.check_pair(Installed({"torch": "2.11.0", "triton": "3.6.0"}, {}))
    assert same.status == "ok"
    other = requirements.check_pair(Installed({"torch": "2.11.0", "triton": "3.6.1"}, {}))
    assert (other.status, "asks for triton==3.6.0" in other.found) == ("note", True)


def test_the_trap_of_numpy_for_tritons_interpreter(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    problem(look(H200, numpy="2.4.0"), "numpy", "2.4.0; the interpreter of triton 3.6.0 needs numpy>=1.26,<2.4", status="note")
    assert check(look(H200, numpy="2.4.0", torch="2.13.0", triton="3.7.0"), "numpy").status == "ok"
    problem(look(numpy=None), "numpy", "not installed", status="note")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem(look(numpy="2.4.0"), "numpy", "pip install 'numpy>=1.26,<2.4'")
    problem(look(numpy=None), "numpy", "not installed")


# devices and targets


def test_no_gpu_is_worth_a_note(look: Look) -> None:
    found = look(specs=(SPEC,), cuda=None)
    problem(found, "devices", "no GPU was found", "TRITON_INTERPRET=1", status="note")
    assert found.status == "note"
    (spec,) = found.specs
    assert spec.status == "note"
    assert [(r["backend"], r["strategy"], r["device"]) for r in spec.details["rows"]] == [("eager", "eager", "cpu")] * 2
    assert "TRITON_INTERPRET=1" in spec.details["rows"][0]["reasons"][0]
    assert str(found).count("not triton: ") == 1


def test_why_torch_sees_no_gpu(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("580", (H200,))
    problem(look(driver=driver, cuda=None), "devices", "built for the CPU alone", "NVIDIA H200", "build of torch for CUDA")
    why = {"cuda": "RuntimeError: The NVIDIA driver on your system is too old"}
    problem(look(driver=driver, errors=why), "devices", "too old", "new enough for CUDA 13.0")
    problem(look(driver=Driver(error="nvmlInit_v2 returned 18")), "devices", "returned 18", "nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    problem(look(driver=driver, errors=why), "devices", "CUDA_VISIBLE_DEVICES=''", "Unset it", status="note")


def test_an_architecture_without_kernels(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(Device("Tesla V100", "7.0", 2**34), specs=(SPEC,))
    problem(found, "devices", "no kernel is written yet for 7.0", "MLPDSL_TARGET")
    assert found.specs[0].details["rows"][0]["reasons"] == ["no kernel is written yet for architecture 7.0"]
    assert found.specs[0].details["rows"][0]["backend"] == "eager"
    problem(look(Device("?", "gfx000", 2**34), hip="7.1", cuda=None), "devices", "gfx000")


def test_amd(look: Look) -> None:
    found = look(MI300, cuda=None, hip="7.1", specs=(SPEC,))
    assert check(found, "devices").found == "AMD Instinct MI300X (gfx942, 192.0 GiB)"
    assert check(found, "torch").found == "2.11.0+cu130 (HIP 7.1 build)"
    assert found.specs[0].details["rows"][0]["target"] == "gfx942"


def test_a_spec_on_gpus_that_differ(look: Look) -> None:
    found = look(H200, T4, H200, specs=(SPEC,), m=(16,))
    rows = found.specs[0].details["rows"]
    assert [(r["target"], r["backend"]) for r in rows] == [("sm_90", "triton"), ("sm_75", "eager")]
    assert "sm_75" in rows[1]["reasons"][0]
    assert found.specs[0].status == "note"
    assert "not triton: Triton writes no bfloat16 matrix instruction for sm_75 (m = 16)" in str(found)


def test_a_backend_chosen_by_hand(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDSL_BACKEND", "triton")
    found = look(specs=(SPEC,))
    assert found.specs[0].status == found.status == "problem"
    assert found.specs[0].details["rows"][0]["backend"] is None
    assert "m =    1: raises on cpu" in str(found)
    monkeypatch.setenv("MLPDSL_BACKEND", "eager")
    found = look(H200, specs=(SPEC,))
    assert found.specs[0].status == "ok"
    assert found.specs[0].details["rows"][0]["reasons"] == ["MLPDSL_BACKEND=eager"]
    monkeypatch.setenv("MLPDSL_BACKEND", "trition")
    found = look(H200, specs=(SPEC,))
    problem(found, "environment", "MLPDSL_BACKEND: got 'trition'", "Did you mean 'triton'?")
    assert found.specs[0].status == "problem"


def test_interpreting(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = look(specs=(SPEC,), cuda=None)
    assert found.specs[0].details["rows"][0]["backend"] == "triton"
    assert check(found, "environment").status == "ok"
    problem(look(H200), "environment", "TRITON_INTERPRET is on", "Unset it to use the GPU", status="note")


def test_the_target(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not known before the first call" in check(look(), "target").found
    monkeypatch.setenv("MLPDSL_TARGET", "sm_90")
    assert check(look(H200), "target").found == "sm_90, from MLPDSL_TARGET"
    found = look(T4, specs=(SPEC,))
    problem(found, "target", "the devices are sm_75", "Unset MLPDSL_TARGET", status="note")
    assert found.specs[0].details["rows"][0]["target"] == "sm_90"
    monkeypatch.setenv("MLPDSL_TARGET", "h100")
    found = look(H200, specs=(SPEC,))
    problem(found, "target", "MLPDSL_TARGET: got 'h100'")
    assert "h100" in found.specs[0].details["rows"][0]["reasons"][0]


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nb"), ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), KeyError("x")]
)
def test_a_spec_that_cannot_be_looked_at_does_not_hide_the_rest(
    look: Look, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(explanation, "explain", fails)
    found = look(H200, specs=(SPEC, SPEC))
    assert [s.status for s in found.specs] == ["problem", "problem"]
    assert type(error).__name__ in found.specs[0].found
    assert len(found.checks) == len(NAMES)


# compiler, headers, environment, directories


def test_the_compiler(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(look(H200), "compiler").details == {"path": "/usr/bin/gcc"}
    programs(monkeypatch)
    problem(look(H200), "compiler", "no C compiler was found", "install gcc or clang, or set CC")
    problem(look(), "compiler", "no C compiler was found", status="note")
    programs(monkeypatch, "cc")
    problem(look(H200), "compiler", "/usr/bin/cc is there, but Triton looks for gcc and clang", "Set CC=cc")
    programs(monkeypatch, "clang")
    assert check(look(H200), "compiler").found == "/usr/bin/clang"
    monkeypatch.setenv("CC", "clang")
    assert check(look(H200), "compiler").found == "/usr/bin/clang, from CC"
    monkeypatch.setenv("CC", "ccache clang")
    problem(look(H200), "compiler", "CC='ccache clang' is no program", "without arguments")


def test_the_headers(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    problem(look(H200), "headers", f"there is no {tmp_path}/Python.h", "python3-dev")
    problem(look(), "headers", status="note")
    (tmp_path / "Python.h").touch()
    assert check(look(H200), "headers").status == "ok"


def test_the_environment(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    monkeypatch.setenv("MLPDSL_TEST_SECRET_FREE", "x")
    monkeypatch.setenv("UNRELATED", "x")
    found = problem(look(H200), "environment", "TRITON_ALWAYS_COMPILE=1", "mlpdsl reads no MLPDSL_TEST_SECRET_FREE", status="note")
    assert set(found.details) == {"MLPDSL_CACHE_DIR", "MLPDSL_TEST_SECRET_FREE", "TRITON_ALWAYS_COMPILE", "TRITON_CACHE_DIR"} | (
        {"XDG_CACHE_HOME"} & set(os.environ)
    )
    monkeypatch.delenv("MLPDSL_TEST_SECRET_FREE")
    monkeypatch.setenv("MLPDSL_TARGETS", "sm_90")
    problem(look(H200), "environment", "Did you mean 'MLPDSL_TARGET'?", status="note")
    monkeypatch.delenv("MLPDSL_TARGETS")
    monkeypatch.setenv("MLPDSL_CACHE_DIR", "relative")
    problem(look(H200), "environment", "MLPDSL_CACHE_DIR is relative", status="note")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    problem(look(H200), "environment", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", status="note")


def test_every_variable_that_is_read_is_known() -> None:
    texts = [p.read_text() for folder in ("mlpdsl", "codegen") for p in (ROOT / folder).rglob("*.py")]
    read = {name for text in texts for name in re.findall(r'"(MLPDSL_[A-Z_]+)"', text)}
    assert read == set(surroundings.OURS)


def test_the_cache(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry, other = (mlpdsl.generate(SPEC, target=t).path.parent for t in ("sm_90", "sm_80"))
    found = check(look(H200), "cache")
    assert (found.status, found.details["entries"], found.details["ok"], found.details["damaged"]) == ("ok", 2, 2, 0)
    (entry / "kernel.py").write_text("changed")
    os.utime(entry, (1, 1))  # long ago, or it may be another process's work in progress
    manifest = json.loads((other / "manifest.json").read_text()) | {"mlpdsl": "0.0.9"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    found = problem(look(H200), "cache", "2 entries", "1 stale, 1 damaged", "mlpdsl cache clear --damaged", status="note")
    assert (found.details["ok"], found.details["stale"], found.details["damaged"]) == (0, 1, 1)
    monkeypatch.setattr(source, "source_key", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError("jinja2", name="jinja2")))
    (other / "manifest.json").write_text(json.dumps(manifest | {"mlpdsl": mlpdsl.__version__}))
    assert check(look(H200), "cache").details["ok"] is None
    (tmp_path / "cache").chmod(0o777)
    problem(look(H200), "cache", "cannot be used", "chmod go-w", "MLPDSL_CACHE_DIR", status="note")


def test_tritons_cache(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check(look(H200), "triton_cache").details == {"path": str(tmp_path / "triton")}
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    assert check(look(H200), "triton_cache").details == {"path": str(tmp_path / "home" / ".triton" / "cache")}
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "below"))
    problem(look(H200), "triton_cache", "file is not a directory", "TRITON_CACHE_DIR")
    problem(look(), "triton_cache", status="note")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    problem(look(H200), "triton_cache", "1 MiB are free")
    monkeypatch.setattr(os, "access", lambda *_args, **_more: False)
    problem(look(H200), "triton_cache", "cannot be written to")
    assert not (tmp_path / "triton").exists()


# the machine


class Nvml:
    """NVML with one GPU; a function in `fails` returns 9."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.ended = fails, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            pointers = [a._obj for a in arguments if hasattr(a, "_obj")]
            if name in self.fails:
                return 9
            if name in ("nvmlSystemGetDriverVersion", "nvmlDeviceGetName"):
                arguments[-2].value = {"nvmlDeviceGetName": b"NVIDIA H200"}.get(name, b"580.1")
            elif name == "nvmlDeviceGetCount_v2":
                pointers[0].value = 1
            elif name == "nvmlDeviceGetCudaComputeCapability":
                pointers[0].value, pointers[1].value = 9, 0
            elif name == "nvmlDeviceGetMemoryInfo":
                ctypes.memmove(pointers[0], (ctypes.c_ulonglong * 3)(7, 6, 1), 24)
            elif name == "nvmlShutdown":
                self.ended += 1
            return 0

        return call


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(machine, "_load_nvml", lambda: nvml)
    assert machine.ask_nvml() == Driver("580.1", (Device("NVIDIA H200", "9.0", 7),))
    assert nvml.ended == 1
    monkeypatch.setattr(machine, "_load_nvml", lambda: Nvml("nvmlDeviceGetMemoryInfo"))
    assert machine.ask_nvml().devices[0].memory == 0
    monkeypatch.setattr(machine, "_load_nvml", lambda: Nvml("nvmlInit_v2"))
    assert machine.ask_nvml() == Driver(error="nvmlInit_v2 returned 9")
    monkeypatch.setattr(machine, "_load_nvml", lambda: object())
    assert machine.ask_nvml().error
    monkeypatch.setattr(machine, "_load_nvml", no_library)
    assert machine.ask_nvml() == Driver()


FAKE_TORCH = """
print("chatter")
__version__ = "2.11.0+fake"
class version: cuda, hip = CUDA, None
class cuda:
    device_count = staticmethod(lambda: COUNT)
    def init(): raise RuntimeError("no driver")
    def get_device_properties(index):
        class p: name, major, minor, total_memory = "Fake", 9, 0, 12
        return p
"""


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        (
            FAKE_TORCH.replace("CUDA", "'13.0'").replace("COUNT", "2"),
            {"cuda": "13.0", "devices": (Device("Fake", "9.0", 12),) * 2},
        ),
        (
            FAKE_TORCH.replace("CUDA", "'13.0'").replace("COUNT", "0"),
            {"cuda": "13.0", "errors": {"cuda": "RuntimeError: no driver"}},
        ),
        (FAKE_TORCH.replace("CUDA", "None").replace("COUNT", "0"), {}),
        ("import sys; sys.exit(3)", {"versions": {"triton": "3.6.0"}, "errors": {"torch": "SystemExit: 3"}}),
        ("raise OSError('libcudart.so')", {"versions": {"triton": "3.6.0"}, "errors": {"torch": "OSError: libcudart.so"}}),
        (
            "import os; os.abort()",
            {"versions": {}, "errors": {"process": "the process that imports torch ended with status -6 and no answer"}},
        ),
    ],
)
def test_torch_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "triton.py").write_text("__version__ = '3.6.0'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    versions = {"torch": "2.11.0+fake", "triton": "3.6.0"}
    assert machine.ask_torch() == Installed(**{"versions": versions, "errors": {}, **expected})


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "torch.py").write_text(text)
    (tmp_path / "triton.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    found = machine.ask_torch(timeout=1)
    assert found == Installed({}, {"process": "importing torch and asking for its devices took more than 1 s"})
    assert time.monotonic() - start < 4
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "executable", "/no/such/python")
    assert "could not be asked" in machine.ask_torch().errors["process"]


# the command


@pytest.fixture
def run(look: Look, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["doctor", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command(run: Callable[..., tuple[int, str, str]], look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    look(H200)  # leaves the machine as it is
    status, out, err = run(SPEC.to_json(), "--json")
    assert (status, err) == (0, "")
    assert out.endswith("}\n")
    assert [r["m"] for r in json.loads(out)["specs"][0]["details"]["rows"]] == [1, 16, 256, 4096]
    status, out, _ = run(SPEC.to_json(), SPEC.replace(bias=True).to_json(), "--m", "3", "--m", "70")
    assert status == 0
    assert out.count("m =  3: triton, ") == out.count("m = 70: triton, ") == 2
    status, out, err = run("nonsense")
    assert (status, out) == (2, "")
    assert "'nonsense'" in err
    assert run("--m", "0")[0] == 2
    programs(monkeypatch)
    status, out, _ = run()
    assert status == 1
    assert "problem  compiler      no C compiler was found" in out
    status, out, _ = run("--json")
    assert (status, json.loads(out)["status"]) == (1, "problem")


WHOLE = """
import json, sys
from mlpdsl import MLPSpec
from mlpdsl.doctor import diagnose
found = diagnose([MLPSpec(dims=(64, 128, 64), activation="silu", gated=True)], (1,))
print(json.dumps([found.to_dict(), "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()]))
"""


def test_this_machine_as_it_is() -> None:
    """And no CUDA context is made in the process that asks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WHOLE], env=environment, capture_output=True, text=True, timeout=240, check=True)
    found, initialised = json.loads(done.stdout)
    assert initialised is False
    assert [c["name"] for c in found["checks"]] == NAMES
    versions = {c["name"]: c["details"].get("version") for c in found["checks"]}
    assert versions["jinja2"] == metadata.version("jinja2")
    if (torch := sys.modules.get("torch")) is not None:
        assert versions["torch"] == torch.__version__


def test_a_spec_of_text_alone_does_not_fall_back(look: Look) -> None:
    """PyTorch cannot run Triton's text: where no kernel can run, a call raises."""
    text = {"expr": "", "snippets": {"triton": ["tl.sin(x)", "tl.cos(x)"]}}
    spec = MLPSpec.from_json(json.dumps({"dims": [8, 8, 8], "activation": text}))
    (found,) = look(specs=(spec,), m=(1,)).specs
    assert found.status == "problem" and "text for Triton alone" in found.next_step
    assert look(H200, specs=(spec,), m=(1,)).specs[0].status == "ok"
