"""`mlpdsl doctor` on versions of Python and of packages."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("click")
pytest.importorskip("jinja2")

import mlpdsl
from mlpdsl import requirements
from mlpdsl.machine import Driver, Installed
from tests.unit.doctor.tools import H200, ROOT, SPEC, Look, check, problem


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


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({}, "ok", "not installed; only mlpdsl.jax needs it"),
        ({"jax": "0.4.38"}, "note", f"0.4.38; mlpdsl.jax needs jax{requirements.JAX}"),
        ({"jax": "0.10.2"}, "ok", "0.10.2, with plugins for the CPU alone"),
        ({"jax": "0.11.2", "jax-cuda13-plugin": "0.11.2", "libtpu": "0.0.52"}, "ok", "0.11.2, with plugins for a GPU and a TPU"),
    ],
)
def test_jax(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str, said: str) -> None:
    monkeypatch.setattr(requirements, "installed_version", installed.get)
    found = requirements._check_jax()
    assert (found.name, found.status, found.found) == ("jax", status, said)
    assert bool(found.next_step) == (status == "note")
    assert f'jax = ["jax{requirements.JAX};' in (ROOT / "pyproject.toml").read_text()


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
