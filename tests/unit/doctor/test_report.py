"""`mlpdsl doctor` as a whole: what it reports, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

from mlpdsl import MLPSpec, cli, doctor, explanation
from mlpdsl.doctor import Check, Diagnosis, diagnose
from mlpdsl.errors import ShapeError, SpecError
from mlpdsl.machine import Device
from tests.unit.doctor.tools import H200, NAMES, ROOT, SPEC, T4, Look, check, programs


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
