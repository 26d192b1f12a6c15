"""The pytest plugin: each spec of a module as an item, interpreted or compiled, and failures with a script that fails as well."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")


from tests.wrong_processes import REFUSED, SUBTRACTED, run

SPECS = """
import torch, mlpdsl
spec = mlpdsl.MLPSpec(dims=(12, 20, 8), activation="silu", gated=True, bias=True)
compiled = mlpdsl.compile(mlpdsl.MLPSpec(dims=(4096, 999), activation="identity", dtype="bfloat16", epilogue=("residual",)))
layer = mlpdsl.MLP(mlpdsl.MLPSpec(dims=(9, 7, 9), activation=lambda x: x * torch.tanh(x)))
kind, number, same = mlpdsl.MLPSpec, 3, None
"""

TESTS = """
import mlpdsl.testing
from my_specs import spec

def test_fixture(mlpdsl_check):
    mlpdsl_check(spec, seed=0)

@mlpdsl.testing.fuzz(spec, examples=3)
def test_drawn(call, tmp_path):
    assert call.spec == spec and tmp_path

test_bare = mlpdsl.testing.fuzz(spec, examples=3)
"""


def run_pytest(folder: Path, *arguments: str, wrong: str = "", **environment: str) -> tuple[int, str]:
    """pytest with the plugin as an installation has it, in a folder with the module `my_specs`; the exit code, and what it says."""
    (folder / "my_specs.py").write_text(SPECS)
    done = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], folder, wrong, **environment)
    return done.returncode, done.stdout + done.stderr


def test_the_plugin_runs_each_spec_in_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    options = ("--strict-markers", "--hypothesis-profile=ci", "--mlpdsl-specs=my_specs", "--mlpdsl-examples=4")
    code, said = run_pytest(tmp_path, *options, "--mlpdsl-compile=off", "--deselect=test_mine.py::test_bare", TRITON_INTERPRET="1")
    assert code == 0, said
    assert "5 passed" in said


def test_without_a_gpu_or_the_interpreter_specs_are_interpreted_and_compiled(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    options = ("-rs", "--hypothesis-profile=ci", "--mlpdsl-specs=my_specs", "--mlpdsl-examples=4")
    options += ("-k", "not layer and not compiled and not bare")
    code, said = run_pytest(tmp_path, *options)
    assert code == 0, said
    assert "2 passed, 1 skipped" in said and "test_drawn was not called" in said


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_kernel_that_does_not_compile_fails_its_item(interpret: str, tmp_path: Path) -> None:
    options = ("--mlpdsl-specs=my_specs", "--mlpdsl-examples=2", "-k", "not compiled and not layer")
    code, said = run_pytest(tmp_path, *options, wrong=REFUSED, TRITON_INTERPRET=interpret)
    assert code == 1 and "1 failed" in said and "CompileError: compiling MLPSpec" in said
    assert 'print(check_compiled(spec, "sm_90"))' in said
    if interpret == "0":
        code, said = run_pytest(tmp_path, *options, "--mlpdsl-compile=off", wrong=REFUSED)
        assert code == 0 and "1 passed" in said, said


def test_ids_and_selection(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    code, said = run_pytest(tmp_path, "--collect-only", "-q", "--mlpdsl-specs=my_specs", "--mlpdsl-specs=my_specs")
    assert code == 0, said
    assert said.splitlines()[:4] == ["test_other.py::test_other", "my_specs::spec", "my_specs::compiled", "my_specs::layer"]
    options = ("--collect-only", "-q", "-m", "mlpdsl_spec and not nothing", "-k", "compiled or layer")
    code, said = run_pytest(tmp_path, *options, "--mlpdsl-specs=my_specs")
    assert code == 0, said
    assert said.splitlines()[:2] == ["my_specs::compiled", "my_specs::layer"] and "2 deselected" in said


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_wrong_kernel_fails_and_so_does_its_script(interpret: str, tmp_path: Path) -> None:
    options = ("--mlpdsl-specs=my_specs", "-k", "not compiled and not layer", "--mlpdsl-examples=8", "--hypothesis-seed=0")
    code, said = run_pytest(tmp_path, *options, "--mlpdsl-compile=off", wrong=SUBTRACTED, TRITON_INTERPRET=interpret)
    assert code == 1, said
    assert "FAILED my_specs::spec" in said
    found = re.search(r"^This script makes the call again:\n\n(.*?^print\(check_call.*?)$", said, re.M | re.S)
    assert found, said
    assert "tensor(" not in said and 'os.environ["TRITON_INTERPRET"] = "1"' in found[1]
    if interpret == "1":  # in this process as in a child of it: the same script
        return
    script = tmp_path / "script.py"
    script.write_text(found[1])
    again = run([sys.executable, str(script)], tmp_path, SUBTRACTED)
    assert again.returncode == 1
    assert "OracleError" in again.stderr and "out of bounds" in again.stderr
    right = run([sys.executable, str(script)], tmp_path)
    assert right.returncode == 0, right.stderr
    assert right.stdout.startswith("Verdict(ratio=")


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("nowhere", "", "--mlpdsl-specs=nowhere: importing the module raised ModuleNotFoundError"),
        ("broken", "1 / 0", "--mlpdsl-specs=broken: importing the module raised ZeroDivisionError"),
        ("bare", "x = 1", "--mlpdsl-specs=bare: no MLPSpec, mlpdsl.MLP or compiled MLP at the module's top level"),
    ],
)
def test_a_module_without_specs_is_an_error_of_usage(module: str, text: str, message: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / f"{module}.py").write_text(text)
    code, said = run_pytest(tmp_path, f"--mlpdsl-specs={module}")
    assert code == pytest.ExitCode.USAGE_ERROR, said
    assert message in said


def test_without_the_option_it_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_it(request):\n    assert request.config.pluginmanager.has_plugin('mlpdsl')\n"
        "    assert not {'torch', 'hypothesis', 'triton', 'mlpdsl.spec', 'mlpdsl.testing.fuzzing'} & set(sys.modules)\n"
    )
    code, said = run_pytest(tmp_path, "test_it.py")
    assert code == 0, said


def test_profiles(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import settings\n\n\ndef test_it():\n    s = settings.default\n"
        "    print('is', s.derandomize, s.deadline, s.database is None, s.max_examples)\n"
    )
    found = [run_pytest(tmp_path, "-s", "test_it.py", f"--hypothesis-profile={name}")[1] for name in ("ci", "fuzz")]
    assert "is True None True 100" in found[0]
    assert "is False None False 1000" in found[1]
