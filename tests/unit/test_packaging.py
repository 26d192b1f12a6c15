"""What gets installed: one top-level package, complete, whichever way it is installed."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from mlpdsl.version import __version__

pytest.importorskip("build", reason="needs build: pip install -e '.[dev]'")

ROOT = Path(__file__).resolve().parents[2]
LINKS = {"mlpdsl/codegen": "../codegen", "mlpdsl/templates": "../templates"}
DIST_INFO = f"mlpdsl-{__version__}.dist-info"
PURELIB = sysconfig.get_paths()["purelib"]

ENTRY_POINTS = {
    "console_scripts": {"mlpdsl": "mlpdsl.cli:main"},
    "hypothesis": {"mlpdsl": "mlpdsl.testing:register_strategies"},
    "pytest11": {"mlpdsl": "mlpdsl.testing.plugin"},
}

# Run from an empty directory: where the package was found, what it generates, what its metadata declares (only what loads).
PROBE = """
import importlib.metadata, importlib.util, json, sys
import mlpdsl
points = {}
for point in importlib.metadata.distribution("mlpdsl").entry_points if "installed" in sys.argv else ():
    points.setdefault(point.group, {})[point.name] = point.value if point.load() else None
spec = mlpdsl.MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16")
made = mlpdsl.generate(spec, target="sm_90")
top = [name for name in ("codegen", "templates") if importlib.util.find_spec(name)]
found = {"file": mlpdsl.__file__, "version": mlpdsl.__version__, "key": made.key, "text": made.text}
print(json.dumps({**found, "top": top, "points": points}))
"""


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(python: str | Path, cwd: Path, **environment: str) -> dict[str, Any]:
    command = [python, "-c", PROBE, *(() if "PYTHONPATH" in environment else ("installed",))]
    result: dict[str, Any] = json.loads(run(command, cwd, **environment).splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a clone has it, so that no build touches this one and none of its litter is built in."""
    copy = tmp_path_factory.mktemp("checkout") / "mlpdsl"
    litter = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "docs", "benchmarks", "tests", "examples")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=litter)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel built from the checkout, and one built from the source distribution, as an index would get it."""
    direct, by_sdist = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("by-sdist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run([*build, "--outdir", by_sdist, checkout], checkout)
    shutil.rmtree(checkout / "mlpdsl.egg-info", ignore_errors=True)  # its list of sources would hide what is missing
    run([*build, "--wheel", "--outdir", direct, checkout], checkout)
    return {name: next(folder.glob("*.whl")) for name, folder in (("direct", direct), ("sdist", by_sdist))}


@pytest.fixture(scope="module")
def wheel(built: dict[str, Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(built["direct"])


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_string(wheel.read(f"{DIST_INFO}/METADATA").decode())


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """A new environment that sees this one's packages, but not its mlpdsl: a path in a .pth file is not searched for more."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(f"{PURELIB}\n")
    return home / "bin" / "python"


def install(python: Path, what: Sequence[str | Path]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what], python.parent)


@pytest.mark.parametrize("link", LINKS)
def test_the_links_are_relative(link: str) -> None:
    assert os.readlink(ROOT / link) == LINKS[link]


def test_nothing_imports_the_folders_at_the_top() -> None:
    banned = re.compile(r"^\s*(import|from)\s+(codegen|templates)\b", re.MULTILINE)
    paths = [path for folder in ("mlpdsl", "codegen", "examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 20
    assert [str(path) for path in paths if banned.search(path.read_text(encoding="utf-8"))] == []


def test_the_wheel_has_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"mlpdsl", DIST_INFO}


def test_the_wheel_holds_every_source_as_it_is(wheel: zipfile.ZipFile, checkout: Path) -> None:
    wanted = {}
    for top in ("mlpdsl", "codegen", "templates"):
        for path in (checkout / top).rglob("*"):
            name = path.relative_to(checkout).as_posix()
            inside = name if top == "mlpdsl" else f"mlpdsl/{name}"
            if path.is_file() and path.suffix != ".pyc":
                wanted[inside] = path.read_bytes()
    found = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("mlpdsl/")}
    assert sorted(found) == sorted(wanted)
    assert found == wanted
    kinds = ("py.typed", "codegen/expr/registered.json", "templates/triton/forward.py.jinja", "tables/sm_90.json")
    assert {f"mlpdsl/{name}" for name in kinds} <= set(found)


def test_the_source_distribution_makes_the_same_wheel(built: dict[str, Path]) -> None:
    direct, by_sdist = (zipfile.ZipFile(built[name]) for name in ("direct", "sdist"))
    assert sorted(direct.namelist()) == sorted(by_sdist.namelist())
    assert all(direct.read(name) == by_sdist.read(name) for name in direct.namelist() if name.startswith("mlpdsl/"))


def test_the_metadata(metadata: Message, wheel: zipfile.ZipFile) -> None:
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = metadata.get_all("Requires-Dist") or []
    core = sorted(entry for entry in required if "extra ==" not in entry)
    assert [re.split(r"[^a-z0-9]", entry)[0] for entry in core] == ["jinja2", "torch", "triton"]
    assert set(metadata.get_all("Provides-Extra") or []) == {"bench", "cli", "dev", "examples", "hf", "jax", "test"}
    assert f"{DIST_INFO}/licenses/LICENSE" in wheel.namelist()
    declared = configparser.ConfigParser()
    declared.read_string(wheel.read(f"{DIST_INFO}/entry_points.txt").decode())
    assert {group: dict(declared[group]) for group in declared.sections()} == ENTRY_POINTS


def test_an_installed_wheel_works(built: dict[str, Path], fresh_python: Path, here: dict[str, Any], tmp_path: Path) -> None:
    install(fresh_python, [built["direct"]])
    found = probe(fresh_python, empty(tmp_path))
    assert Path(found["file"]).is_relative_to(tmp_path / "venv")
    assert found["top"] == []
    assert same(found, here)
    assert found["points"] == ENTRY_POINTS
    assert (fresh_python.parent / "mlpdsl").exists()


def test_an_editable_install_works(checkout: Path, fresh_python: Path, here: dict[str, Any], tmp_path: Path) -> None:
    install(fresh_python, ["--editable", checkout])
    found = probe(fresh_python, empty(tmp_path))
    assert Path(found["file"]).is_relative_to(checkout)
    assert same(found, here)
    assert found["points"] == ENTRY_POINTS
    assert (fresh_python.parent / "mlpdsl").exists()


def test_a_checkout_works_without_installing(checkout: Path, here: dict[str, Any], tmp_path: Path) -> None:
    found = probe(sys.executable, empty(tmp_path), PYTHONPATH=str(checkout))
    assert Path(found["file"]).is_relative_to(checkout)
    assert same(found, here)


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """What this tree generates."""
    return probe(sys.executable, ROOT, PYTHONPATH=str(ROOT))


def same(found: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two installations are one version that generates one text under one key."""
    return all(found[name] == other[name] for name in ("version", "key", "text"))


def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder
