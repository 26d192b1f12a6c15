"""`mlpdsl doctor` on devices, targets and what specs get there; compilers, headers, variables, directories."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import explanation, source, surroundings, tables
from mlpdsl.machine import Device, Driver
from tests.unit.doctor.tools import H200, MI300, NAMES, ROOT, SPEC, T4, Look, check, problem, programs

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


def test_a_mistake_in_what_calls_may_compile(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDSL_ON_JIT", "eror")
    problem(look(H200), "environment", "MLPDSL_ON_JIT: got 'eror'", "Set MLPDSL_ON_JIT to one of these")
    monkeypatch.setenv("MLPDSL_ON_JIT", "error")
    assert check(look(H200), "environment").status == "ok"


def test_tables(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLPDSL_TABLES", str(tmp_path / "nothere.json"))
    problem(look(H200), "environment", "nothere.json' is no table, and configs follow the rule: No such file", "Name a table")
    (tmp_path / "broken.json").write_text("{}")
    monkeypatch.setenv("MLPDSL_TABLES", str(tmp_path / "broken.json"))
    problem(look(H200), "environment", "broken.json' is no table", "Name a table")
    (tmp_path / "whole.json").write_text(tables.write("sm_90", []))
    for fine in ("off", str(tmp_path), str(tmp_path / "whole.json")):
        monkeypatch.setenv("MLPDSL_TABLES", fine)
        assert check(look(H200), "environment").status == "ok"


def test_a_backend_that_takes_no_tensors_of_torch(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call would raise for is no all-clear."""
    monkeypatch.setenv("MLPDSL_BACKEND", "pallas")
    found = look(H200, specs=(SPEC,))
    assert {row["backend"] for row in found.specs[0].details["rows"]} == {None}
    assert found.specs[0].status == "problem" and "JAX" in str(found)


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
