"""`mlpdsl fuzz`: what it finds, what it keeps when it is interrupted or killed, and what it says.

A function stands in for the process that makes the calls, but for the last tests, which run kernels.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")

from mlpdsl import MLPSpec, SpecError, cli, cli_fuzz
from mlpdsl.testing import compiling, night
from mlpdsl.testing.strategies import Recipe
from tests.wrong_processes import SUBTRACTED, run

ROOT = Path(__file__).resolve().parents[2]
SPEC = MLPSpec(dims=(12, 20, 8), activation="silu", gated=True, bias=True)
OTHER = MLPSpec(dims=(512, 8), activation="identity")
RUN = Path("mlpdsl-fuzz")


class Found(AssertionError):
    def __init__(self, origin: str) -> None:
        super().__init__(f"found {origin}")
        self.origin = origin


class Stand:
    """What stands in for the child: `rule` is called with each recipe, and raises for what fails."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.rule: Callable[[Recipe], float | None] = lambda recipe: 0.5
        self.reasons = ""
        self.compiles: Callable[[str], None] = lambda spec: None
        self.compiled: list[tuple[str, str]] = []

    def in_child(self, child: object, recipe: Recipe) -> float:
        self.made.append(repr(recipe))
        return self.rule(recipe) or 0.5

    def child(self, interpret: bool) -> Stand:
        return self

    def ask(self, question: str, **words: Any) -> str:
        return {"where": "Triton's interpreter", "reasons": self.reasons}[question]

    def send(self, question: str, spec: str, target: str) -> None:
        self.compiled.append((spec, target))

    def receive(self) -> int:
        self.compiles(self.compiled[-1][0])
        return 8

    def abandon(self) -> None: ...

    def close(self, kill: bool = False) -> None: ...


Fuzz = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(night, "in_child", stand.in_child)
    monkeypatch.setattr(night, "Child", stand.child)
    return stand


@pytest.fixture
def fuzz(stand: Stand, capsys: pytest.CaptureFixture[str]) -> Fuzz:
    """Runs the command: exit status, stdout, stderr."""

    def fuzz(*args: str) -> tuple[int, str, str]:
        status = cli.main(["fuzz", *args])
        said = capsys.readouterr()
        return status, said.out, said.err

    return fuzz


def state(folder: Path = RUN) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def test_all_pass(fuzz: Fuzz, stand: Stand) -> None:
    status, out, err = fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "120", "--seed", "1")
    assert status == 0, err
    assert "240 calls in " in out and out.count("passed") == 2 and "nearest to its bound, 0.50 of it: make_call(" in out
    assert "no GPU: kernels run in Triton's interpreter" in err and "narrow widths, and are compiled for sm_90" in err
    assert [p["calls"] for p in state()["specs"]] == [120, 120] and state()["seed"] == 1
    assert len(stand.made) == len(set(stand.made)) == 240  # the simplest call, with which every batch begins, is made once
    assert stand.compiled == [(SPEC.to_json(), "sm_90"), (OTHER.to_json(), "sm_90")]
    assert all(int(found) <= 72 for text in stand.made for found in re.findall(r"dims=\((\d+)", text))
    assert not Path(".hypothesis/examples").exists()
    first = list(stand.made)
    stand.made.clear()
    fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "120", "--seed", "1", "--out", "again", "--widths", "own")
    assert [text for text in first if "512" not in text and "silu" in text] == [text for text in stand.made if "silu" in text]
    assert any("dims=(512, 8)" in text for text in stand.made)


def test_on_a_gpu(fuzz: Fuzz, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the child, not what a GPU makes of it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    status, _, err = fuzz(OTHER.to_json(), "--examples", "10")
    assert status == 0 and "kernels run on the GPU\n" in err and stand.compiled == []
    assert all("dims=(512, 8)" in text and "device='cuda'" in text for text in stand.made)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "whether kernels are interpreted is False there and True here" in fuzz(OTHER.to_json(), "--resume")[2]


def several(recipe: Recipe) -> None:
    if "silu" in repr(recipe):
        for word in ("huge", "warm", "retained"):
            if word in recipe.recipe.values():
                raise Found(word)


def test_several_failures_in_one_run(fuzz: Fuzz, stand: Stand) -> None:
    stand.rule = several
    status, out, _ = fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "250", "--seed", "0", "--compile", "off")
    assert status == 1
    first, second = state()["specs"]
    assert {f["origin"] for f in first["failures"]} == {"huge", "warm", "retained"} and second["failures"] == []
    assert first["calls"] == second["calls"] == 250
    assert stand.compiled == []
    for failure in first["failures"]:
        assert failure["recipe"]["lead"] == [1] and failure["recipe"]["seed"] == 0  # shrunk
        text = (RUN / failure["script"]).read_text()
        compile(text, failure["script"], "exec")
        assert failure["origin"] in text and text in f"{out}\n"
        assert f"Found: found {failure['origin']}\n" in out and f"{RUN / failure['script']}: {failure['origin']}\n" in out
    assert "3 failed " in out and "passed " in out
    log = (RUN / "fuzz.log").read_text()
    assert log.count("failure of ") == 3 and "end: 500 calls, 3 failed" in log


def test_a_spec_with_many_failures_is_left_alone(fuzz: Fuzz, stand: Stand) -> None:
    def always(recipe: Recipe) -> None:
        raise Found(repr(sorted(recipe.recipe)))

    stand.rule = always
    assert fuzz(SPEC.to_json(), "--examples", "5000", "--seed", "0")[0] == 1
    assert len(state()["specs"][0]["failures"]) == night.MOST_FAILURES


def test_ctrl_c_and_resume(fuzz: Fuzz, stand: Stand) -> None:
    def interrupted(recipe: Recipe) -> None:
        if len(stand.made) == 130:
            raise KeyboardInterrupt

    stand.rule = interrupted
    arguments = (SPEC.to_json(), "--examples", "200", "--seed", "0")
    status, _, err = fuzz(*arguments)
    assert status == 130 and "the same command with --resume goes on" in err
    assert (state()["specs"][0]["calls"], state()["specs"][0]["batches"]) == (130, 3)
    status, out, err = fuzz(*arguments, "--resume")
    assert status == 0 and "going on after 130 calls" in err and "200 calls" in out
    assert len(stand.made) == len(set(stand.made)) == 200
    fuzz(*arguments[:1], "--examples", "210", "--resume")
    assert len(stand.made) == len(set(stand.made)) == 210 and len(stand.compiled) == 1


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from tests.unit.test_cli_fuzz import Stand
from mlpdsl import cli
from mlpdsl.testing import night
stand = Stand()
night.in_child, night.Child = stand.in_child, stand.child
def rule(recipe):
    if len(stand.made) == 130:
        os.kill(os.getpid(), signal.SIGKILL)
    with open("made", "a") as file:
        file.write(repr(recipe) + "\\n")
stand.rule = rule
cli.main(["fuzz", {spec!r}, "--examples", "200", "--seed", "0"])
"""


def test_kill_9_loses_one_batch_at_most(fuzz: Fuzz, stand: Stand, tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = KILLED.format(root=str(ROOT), spec=SPEC.to_json())
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    before = (tmp_path / "made").read_text().splitlines()
    kept = state()["specs"][0]["calls"]
    assert len(before) == 129 and 129 - night.BATCH <= kept < 129
    status, out, _ = fuzz(SPEC.to_json(), "--examples", "200", "--resume")
    assert status == 0 and "200 calls in" in out
    assert not set(before[:kept]) & set(stand.made)
    # Not one more is lost. That the batch is the same again holds for a process that has imported the same: Hypothesis draws
    # constants of the code that it finds loaded.
    assert len(stand.made) == 200 - kept


def test_the_state_of_another_run_is_refused_and_kept(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(SPEC.to_json(), "--examples", "3", "--seed", "0")
    kept = (RUN / "state.json").read_bytes()

    def refused(*args: str) -> str:
        status, out, err = fuzz(*args)
        assert (status, out) == (2, "") and err.startswith("mlpdsl: ") and err.count("\n") == 1
        assert (RUN / "state.json").read_bytes() == kept
        return err

    assert "--resume goes on with it" in refused(SPEC.to_json())
    assert "the seed is 0 there and 1 here" in refused(SPEC.to_json(), "--resume", "--seed", "1")
    assert "whether widths are narrow is True there and False here" in refused(SPEC.to_json(), "--resume", "--widths", "own")
    err = refused(OTHER.to_json(), "--resume")
    assert f"the spec {OTHER.short_name} is not in it" in err and f"the spec {SPEC.short_name} is in it, and was not named" in err
    changed = SPEC.replace(epilogue=("residual",))
    monkeypatch.setattr(cli_fuzz, "read_specs", lambda texts: {SPEC.short_name: changed})
    assert f"the spec {SPEC.short_name} is another one there" in refused("x", "--resume")
    monkeypatch.undo()
    monkeypatch.chdir(RUN.absolute().parent)


def test_the_state_of_another_version_is_refused_and_kept(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(SPEC.to_json(), "--examples", "3", "--seed", "0")
    kept = (RUN / "state.json").read_bytes()
    monkeypatch.setattr(night, "__version__", "99.0")
    status, _, err = fuzz(SPEC.to_json(), "--resume")
    assert status == 2 and "is 0.1.0 there and 99.0 here" in err.replace(cli.__version__, "0.1.0")
    assert (RUN / "state.json").read_bytes() == kept
    (RUN / "state.json").write_text("{")
    status, _, err = fuzz(SPEC.to_json(), "--resume")
    assert status == 2 and "cannot be read (JSONDecodeError" in err
    assert (RUN / "state.json").read_text() == "{"


def test_one_run_at_a_time_in_a_folder(fuzz: Fuzz) -> None:
    with night.locked(RUN):
        status, _, err = fuzz(SPEC.to_json())
    assert status == 2 and f"another mlpdsl fuzz is at work in {RUN}" in err


def test_what_is_known_comes_first(fuzz: Fuzz, stand: Stand) -> None:
    stand.rule = several
    fuzz(SPEC.to_json(), "--examples", "250", "--seed", "0")
    known = {repr(Recipe(SPEC, {**f["recipe"], "lead": (1,)})) for f in state()["specs"][0]["failures"]}
    assert len(known) == 3
    for arguments in (("--seed", "7", "--out", "new"), ("--resume",)):  # by the database, by the state
        stand.made.clear()
        assert fuzz(SPEC.to_json(), "--examples", "1", *arguments)[0] == 1
        assert len(state()["specs"][0]["failures"]) == 3
        assert known <= set(stand.made)
    stand.rule = lambda recipe: 0.1
    status, _, err = fuzz(SPEC.to_json(), "--examples", "1", "--resume")
    assert status == 0 and err.count("a call that failed passes now") == 3
    assert state()["specs"][0]["failures"] == []


def test_what_does_not_compile_is_a_failure(fuzz: Fuzz, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: str) -> None:
        raise compiling.CompileError("it does not fit")

    stand.compiles = refuse
    monkeypatch.setenv("MLPDSL_TARGET", "sm_80")
    status, out, err = fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "2")
    assert status == 1 and "are compiled for sm_80" in err and out.count("it does not fit") == 2
    (failure,) = state()["specs"][0]["failures"]
    assert failure["origin"] == "compiling: CompileError" and failure["recipe"] is None
    assert 'check_compiled(spec, "sm_80")' in (RUN / failure["script"]).read_text()
    assert fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "3", "--resume")[0] == 1
    assert len(stand.compiled) == 2
    stand.compiles = lambda spec: None
    monkeypatch.setenv("MLPDSL_TARGET", "sm_90")
    assert fuzz(SPEC.to_json(), OTHER.to_json(), "--examples", "3", "--resume")[0] == 0


def test_where_no_kernel_can_run(fuzz: Fuzz, stand: Stand) -> None:
    stand.reasons = "triton is not installed: pip install triton"
    status, out, _ = fuzz(SPEC.to_json(), "--compile", "off")
    assert status == cli_fuzz.NOTHING_RAN == 3 and "not run" in out and stand.reasons in out and stand.made == []


def test_seconds(fuzz: Fuzz, stand: Stand) -> None:
    status, out, _ = fuzz(SPEC.to_json(), "--seconds", "1.5")
    assert status == 0 and 0 < len(stand.made) == len(set(stand.made)) == state()["specs"][0]["calls"]
    assert " calls in 1 s" in out or " calls in 2 s" in out


def test_on_a_terminal_it_is_live(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    status, out, err = fuzz(SPEC.to_json(), "--examples", "20", "--seed", "0")
    assert status == 0 and "worst/bound" in err and "20 calls, " in err and "worst 0.50 of its bound" in err
    assert "worst/bound" not in out


def test_a_log_has_lines_now_and_then(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_fuzz, "LINES_EVERY", 0.0)
    _, _, err = fuzz(SPEC.to_json(), "--examples", "20", "--seed", "0")
    lines = [line for line in err.splitlines() if line.startswith("20")]
    assert len(lines) >= 20
    assert re.search(r"^\S+ \S+ 20 calls, [\d.]+/s, worst 0\.50 of its bound \(.*\), 0 failed, about 0 s left, at ", lines[-1])
    assert set(lines) <= set((RUN / "fuzz.log").read_text().splitlines())


def test_the_ways_to_name_specs(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(OTHER.to_json())
    (tmp_path / "fuzz_models.py").write_text(
        f"import mlpdsl\nspec = mlpdsl.MLPSpec.from_json({SPEC.to_json()!r})\nnumber, layer = 3, mlpdsl.MLP(spec)\n"
        "mlp = mlpdsl.compile(spec)\ndeep = spec.replace(bias=False)\n"
    )
    deep = SPEC.replace(bias=False)
    assert cli_fuzz.read_specs([SPEC.to_json()]) == {SPEC.short_name: SPEC}
    assert cli_fuzz.read_specs(["one.json", "fuzz_models:layer"]) == {"one": OTHER, "fuzz_models::layer": SPEC}
    assert cli_fuzz.read_specs(["fuzz_models"]) == {"fuzz_models::spec": SPEC, "fuzz_models::deep": deep}
    assert deep.short_name == SPEC.short_name
    assert cli_fuzz.read_specs([deep.to_json(), SPEC.to_json()]) == {deep.short_name: deep, f"{deep.short_name}-2": SPEC}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no_such_module", "there is no module 'no_such_module'"),
        ("bare", "no MLPSpec, mlpdsl.MLP or compiled MLP at the module's top level"),
        ("raises", "raised ZeroDivisionError"),
        ("not-a-module", "SPEC: got 'not-a-module'; allowed: JSON text, the path of a .json file, module:attribute, or a module"),
        ("nope.json", "cannot read the file"),
        ("bare:x", "an MLPSpec"),
        ("", "SPEC: got ''"),
    ],
)
def test_what_names_no_spec(text: str, said: str, fuzz: Fuzz, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    status, out, err = fuzz(text)
    assert (status, out) == (2, "") and said in err and not RUN.exists()
    for module in ("bare", "raises"):
        sys.modules.pop(module, None)


def test_mistakes(fuzz: Fuzz) -> None:
    for arguments in (
        (),
        (SPEC.to_json(), "--examples", "0"),
        (SPEC.to_json(), "--widths", "some"),
        (SPEC.to_json(), "--seed", "-1"),
    ):
        status, out, err = fuzz(*arguments)
        assert (status, out) == (2, "") and "Usage: mlpdsl fuzz" in err
    assert "Exit status: 0 every call passed; 1 something failed;" in fuzz("--help")[1].replace("\n  ", " ")
    with pytest.raises(SpecError):
        cli_fuzz.read_specs(["{}"])


def test_without_hypothesis_it_says_what_to_install(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [name for name in sys.modules if name.startswith("mlpdsl.testing.")]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = fuzz(SPEC.to_json())
    assert status == 2 and "this command needs hypothesis, which is not installed: pip install 'mlpdsl[test]'" in err


# The page


def workflow() -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install -e '.[dev]'")
    found = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "fuzzing.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(found) == 1
    parsed: dict[Any, Any] = yaml.safe_load(found[0])
    return parsed


def test_the_workflow_on_the_page() -> None:
    """It parses; every command's options exist; what is kept is what the commands write."""
    made = workflow()
    assert set(made[True]) == {"pull_request", "schedule"}  # YAML reads `on` as true
    steps = made["jobs"]["specs"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    commands = [shlex.split(step["run"]) for step in steps if "run" in step]
    (night_command,) = [words for words in commands if words[:2] == ["mlpdsl", "fuzz"]]
    asked = cli_fuzz.command().make_context("fuzz", night_command[2:]).params
    assert asked["resume"] and asked["seconds"] and asked["specs"] == ("my_package.specs",)
    assert asked["seconds"] < 60 * made["jobs"]["specs"]["timeout-minutes"]
    kept = [step["with"]["path"] for step in steps if "cache/save" in step.get("uses", "")]
    assert sorted(kept) == sorted([str(asked["out"]), asked["database"].parts[0]])
    restored = [step["with"]["path"] for step in steps if "cache/restore" in step.get("uses", "")]
    assert restored == kept
    (artifact,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert artifact["with"]["path"] == str(asked["out"]) and "always()" in artifact["if"]
    (request,) = [words for words in commands if words[0] == "pytest"]
    options = [word.partition("=")[0] for word in request if word.startswith("--")]
    text = (ROOT / "mlpdsl" / "testing" / "plugin.py").read_text(encoding="utf-8")
    assert options and all(f'"{option}"' in text for option in options)


# Kernels


def interpreted(folder: Path, *arguments: str, wrong: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlpdsl", "fuzz", SPEC.to_json(), "--seed", "0", "--compile", "off", *arguments]
    done = run(command, folder, wrong, **environment)
    assert "no GPU: kernels run in Triton's interpreter, in a process of their own" in done.stderr
    return done


def test_right_kernels_in_the_interpreter(tmp_path: Path) -> None:
    done = interpreted(tmp_path, "--examples", "4")
    assert done.returncode == 0 and "4 calls in" in done.stdout, done.stderr


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_wrong_kernels_in_the_interpreter(interpret: str, tmp_path: Path) -> None:
    """With neither a GPU nor TRITON_INTERPRET it interprets by itself; a wrong kernel is found, and its script finds it again."""
    wrong = interpreted(tmp_path, "--examples", "8", wrong=SUBTRACTED, TRITON_INTERPRET=interpret)
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    failures = state(tmp_path / RUN)["specs"][0]["failures"]
    assert any(re.fullmatch(r"OracleError y oracle\.py:\d+", failure["origin"]) for failure in failures)
    if interpret == "0":  # the script sets TRITON_INTERPRET itself
        script = [sys.executable, str(tmp_path / RUN / failures[0]["script"])]
        again = run(script, tmp_path, SUBTRACTED)
        assert again.returncode == 1 and "OracleError" in again.stderr
        assert run(script, tmp_path).returncode == 0
