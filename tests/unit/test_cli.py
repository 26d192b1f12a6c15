"""The command line: what each command prints, its exit status, and the one message that each mistake gets."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("click")

import mlpdsl
from mlpdsl import MLPSpec, cli, resources
from mlpdsl.codegen.plan import Config
from mlpdsl.resources import Resources

ROOT = Path(__file__).resolve().parents[2]
SPEC = MLPSpec(dims=(64, 128, 64), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",))
JSON = SPEC.to_json()

MODELS = f"""
import mlpdsl
print("importing")
spec = mlpdsl.MLPSpec.from_json({JSON!r})
class Net:
    mlp = mlpdsl.compile(spec)
    number = 3
    @property
    def broken(self): raise RuntimeError("not today")
net = Net()
"""

Done = tuple[int, str, str]
Run = Callable[..., Done]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def run(here: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def run(*args: str) -> Done:
        status = cli.main(list(args))
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def environ(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def message(found: Done) -> str:
    """The one message of a mistake: exit status 2, nothing on stdout, no traceback."""
    status, out, err = found
    assert (status, out) == (2, "")
    assert "Traceback" not in err and err.endswith("\n") and len(err) < 1200
    return err


def test_a_module_by_its_path_is_told_its_name(run: Run, here: Path) -> None:
    (here / "my_model.py").write_text("spec = 1\n")
    for text, name in (
        ("./my_model:spec", "my_model:spec"), ("my_model.py:spec", "my_model:spec"), ("./a/my_model.py:spec", "a.my_model:spec"),
        ("my_model.py", "my_model:the name of the spec"),
    ):  # fmt: skip
        assert f"Write {name}." in message(run("show", text))
    (here / "spec").write_text('{"dims": [8, 8], "activation": "identity"}')  # a file by any name is a file
    assert run("explain", "./spec", "--m", "4")[0] == 0


# Answers


def test_source_is_what_generate_returns_byte_for_byte(run: Run) -> None:
    for target in ("sm_90", "gfx942"):
        status, out, err = run("show", JSON, "--target", target)
        made = mlpdsl.generate(SPEC, target=target)
        assert (status, out, err) == (0, made.text, f"mlpdsl: {made.path}\n")
        assert made.path.read_text() == out


def test_one_function_of_the_source(run: Run) -> None:
    status, out, _ = run("show", JSON, "--kernel", "hidden_tma", "--target", "sm_90")
    assert status == 0
    assert out.startswith("@triton.jit(") and out.count("\ndef ") == 1
    assert out.strip("\n") in mlpdsl.generate(SPEC, target="sm_90").text
    assert "'output_tma'" in message(run("show", JSON, "--kernel", "output_tm", "--target", "sm_90"))


def test_another_backend(run: Run) -> None:
    status, out, err = run("show", JSON, "--backend", "pallas")
    assert status == 0 and "-tpu_v5e-" in err and "pl.pallas_call(" in out and "triton" not in out
    assert out == mlpdsl.generate(SPEC, backend="pallas").text
    status, out, _ = run("show", JSON, "--backend", "pallas", "--target", "cpu", "--kernel", "hidden_kernel")
    assert status == 0 and out.startswith("def hidden_kernel(")
    status, out, _ = run("explain", JSON, "--m", "100", "--backend", "pallas", "--target", "v4")
    assert status == 0 and "on tpu_v4: pallas" in out and "hidden[0]          blocks of 100x128, 64 deep" in out
    half = SPEC.replace(dtype="float16").to_json()
    status, out, _ = run("explain", half, "--m", "100", "--backend", "pallas")
    assert status == 0 and "reference in jax.numpy" in out and "not pallas: Mosaic loads no float16" in out
    assert run("show", half, "--backend", "pallas")[0] == 2
    status, _, err = run("show", JSON, "--backend", "pallas", "--stage", "ptx")
    assert status == 2 and "--backend pallas has no stage ptx" in err


def test_explain(run: Run) -> None:
    status, out, err = run("explain", JSON, "--m", "16", "--target", "sm_80")
    assert (status, out, err) == (0, f"{mlpdsl.explain(SPEC, 16, 'sm_80')}\n", "")
    assert "--m" in message(run("explain", JSON))
    assert "--m" in message(run("explain", JSON, "--m", "0"))


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mlpdsl {mlpdsl.__version__}\n", "")


def compiled(name: str, **changes: object) -> Resources:
    values: dict[str, object] = {"registers": 128, "spills": 0, "shared": 1000, "fits": True, "serialised": False, "stage": 0}
    values |= {"name": name, "config": Config(64, 128, 32), "warps": 4, "instruction": "wgmma", "assembly": f".entry {name}\n"}
    return Resources(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Resources]:
    """What compiling finds, without compiling; tests/compiled has the real thing."""
    found = [compiled("hidden_tma"), compiled("sum_rows", config=None, registers=None, spills=None, instruction="fma")]
    monkeypatch.setattr(resources, "resources", lambda *args, **options: found)
    return found


def test_resources_is_a_table(run: Run, found: list[Resources]) -> None:
    status, out, err = run("show", JSON, "--stage", "resources", "--target", "sm_90")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["kernel", "stage", "tile", "warps", "stages", "registers", "shared", "fits", "spills", "instruction", "serialised"],
        ["hidden_tma", "0", "64x128x32", "4", "3", "128", "1000", "of", "232448", "yes", "0", "wgmma", "no"],
        ["sum_rows", "0", "-", "4", "-", "-", "1000", "of", "232448", "yes", "-", "fma", "no"],
    ]
    found[0] = compiled("hidden_tma", fits=False, shared=300_000)
    status, out, _ = run("show", JSON, "--stage", "resources", "--target", "sm_90")
    assert status == 1 and "300000 of 232448  NO" in out
    assert run("show", JSON, "--stage", "resources", "--target", "sm_90", "--kernel", "sum_rows")[0] == 0


def test_ptx_of_every_kernel_or_of_one(run: Run, found: list[Resources]) -> None:
    status, out, _ = run("show", JSON, "--stage", "ptx", "--target", "sm_90")
    assert status == 0 and ".entry hidden_tma" in out and ".entry sum_rows" in out
    status, out, _ = run("show", JSON, "--stage", "ptx", "--target", "sm_90", "--kernel", "sum_rows")
    assert out == "// sum_rows, stage 0, 4 warps, for sm_90\n.entry sum_rows\n"
    assert run("show", JSON, "--stage", "ptx", "--target", "gfx942")[1].startswith("; hidden_tma")
    assert "'hidden_tma', 'sum_rows'" in message(run("show", JSON, "--stage", "ptx", "--kernel", "hidden"))


def test_the_options_reach_the_compiler(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(resources, "resources", lambda spec, target, m, **more: calls.append((spec, target.name, m, more)) or [])
    run("show", JSON, "--stage", "resources", "--target", "90")
    run("show", JSON, "--stage", "ptx", "--target", "sm_80", "--m", "16", "--forward-only", "--path", "masked")
    assert calls == [
        (SPEC, "sm_90", 4096, {"backward": True, "path": None}),
        (SPEC, "sm_80", 16, {"backward": False, "path": "masked"}),
    ]


# The ways to name a spec


def test_the_ways_to_name_a_spec(here: Path) -> None:
    (here / "one.json").write_text(JSON)
    (here / "no_ending").write_text(JSON)
    (here / "models_a.py").write_text(MODELS)
    for text in (JSON, f" \n{JSON}", "one.json", str(here / "one.json"), "no_ending", "models_a:spec", "models_a:net.mlp"):
        assert cli.read_spec(text) == SPEC


def test_an_nn_module_names_its_spec(here: Path) -> None:
    pytest.importorskip("torch")
    (here / "models_b.py").write_text(f"import mlpdsl\nlayer = mlpdsl.MLP(mlpdsl.MLPSpec.from_json({JSON!r}))\n")
    assert cli.read_spec("models_b:layer") == SPEC


def test_what_a_module_prints_is_not_part_of_the_answer(run: Run, here: Path) -> None:
    (here / "models_c.py").write_text(MODELS)
    status, out, err = run("show", "models_c:spec", "--target", "sm_90")
    assert (status, out) == (0, mlpdsl.generate(SPEC, target="sm_90").text)
    assert "importing\n" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["SPEC", "''", "module:attribute"]),
        ("nothing", ["'nothing'", "JSON text, the path of a .json file, or module:attribute"]),
        (":spec", ["':spec'"]),
        ("models_d:", ["'models_d:'"]),
        ("nope.json", ["'nope.json'", "No such file"]),
        ("folder.json", ["folder.json", "directory"]),
        ("bad.json", ["bad.json", "JSON"]),
        ("binary.json", ["binary.json"]),
        ('{"dims":[1', ["JSON"]),
        ('{"dims":[1,2,3],"activation":"sillu"}', ["activation", "'sillu'", "Did you mean 'silu'?"]),
        ('{"dims":[1,2,3],"activation":"silu","colour":1}', ["'colour'"]),
        ("no_such_module:spec", ["there is no module 'no_such_module'", "sys.path"]),
        ("models_d.sub:spec", ["models_d.sub"]),
        ("models_d:spce", ["models_d has no attribute 'spce'", "Did you mean 'spec'?"]),
        ("models_d:net.mpl", ["models_d.net has no attribute 'mpl'", "Did you mean 'mlp'?"]),
        ("models_d:net.broken", ["RuntimeError", "not today", "models_d.py:9"]),
        ("models_d:net.number", ["got 3", "an MLPSpec", ".spec"]),
        ("models_d:Net", ["an MLPSpec"]),
        ("raises:spec", ["raised ZeroDivisionError", "raises.py:2", "division by zero"]),
        ("exits:spec", ["raised SystemExit", "exits.py:2"]),
        ("wrong:spec", ["raised SpecError", "wrong.py:2", "MLPSpec.activation", "Did you mean 'silu'?"]),
        ("needs:spec", ["needs.py:1", "raised ModuleNotFoundError", "no_such_dependency"]),
        ("syntax:spec", ["SyntaxError"]),
        ("..:spec", ["'..'"]),
    ],
)
def test_what_is_no_spec(run: Run, here: Path, text: str, said: list[str]) -> None:
    (here / "folder.json").mkdir()
    (here / "bad.json").write_text("{'dims': 3}")
    (here / "binary.json").write_bytes(b"\xff\xfe\x00{")
    (here / "models_d.py").write_text(MODELS)
    (here / "raises.py").write_text("import sys\n1 / 0\n")
    (here / "exits.py").write_text("import sys\nsys.exit(7)\n")
    (here / "wrong.py").write_text("import mlpdsl\nspec = mlpdsl.MLPSpec(dims=(1, 2, 3), activation='sillu')\n")
    (here / "needs.py").write_text("import no_such_dependency\n")
    (here / "syntax.py").write_text("spec = (\n")
    error = message(run("show", text))
    for words in said:
        assert words in error


# Other mistakes


def test_other_mistakes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--target: got 'sm_9'" in message(run("show", JSON, "--target", "sm_9"))
    assert "--target: got 'h100'" in message(run("explain", JSON, "--m", "1", "--target", "h100"))
    assert "--stage ptx" in message(run("show", JSON, "--m", "16"))
    assert "--stage ptx" in message(run("show", JSON, "--forward-only"))
    assert "shwo" in message(run("shwo", JSON))
    monkeypatch.setenv("MLPDSL_TARGET", "sm_1")
    assert "MLPDSL_TARGET" in message(run("show", JSON))


def test_every_reason_of_an_unsupported_spec_is_printed(run: Run) -> None:
    error = message(run("show", JSON, "--target", "sm_75"))
    assert "sm_75" in error and "bfloat16" in error


def test_interpreting_there_is_no_ptx(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for stage in ("ptx", "resources"):
        error = message(run("show", JSON, "--stage", stage, "--target", "sm_90"))
        assert "TRITON_INTERPRET=1" in error and "unset" in error
    assert run("show", JSON, "--target", "sm_90")[0] == 0


def test_without_click_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    assert cli.main(["show", JSON]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "pip install 'mlpdsl[cli]'" in err


@pytest.mark.parametrize("name", ["jinja2", "torch", "triton"])
def test_a_missing_dependency_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def needs(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli, "_show_source", needs)
    assert f"needs {name}" in message(run("show", JSON))


# The process: what it imports, pipes and terminals

HELP = """
ARGUMENTS = [["--help"], ["show", "--help"], ["explain", "--help"], ["doctor", "--help"], ["cache", "--help"], ["--version"]]
ARGUMENTS += [["fuzz", "--help"]]
ARGUMENTS += [["cache", name, "--help"] for name in ("info", "ls", "show", "verify", "clear")]
import contextlib, io, json, sys
from mlpdsl.cli import main
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    statuses = [main(args) for args in ARGUMENTS]
heavy = [name for name in ("torch", "triton", "jinja2", "numpy", "rich", "hypothesis") if name in sys.modules]
print(json.dumps([statuses, heavy, printed.getvalue()]))
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], env=environ(), capture_output=True, text=True, timeout=60, check=True)
    statuses, heavy, text = json.loads(done.stdout)
    assert (statuses, heavy) == ([0] * 12, [])
    for words in (
        "show",
        "explain",
        "doctor",
        "cache",
        "--manifest",
        "--damaged",
        "--dry-run",
        "--json",
        "--stage",
        "--target",
        "--kernel",
        "--forward-only",
        "--resume",
        "module:attribute",
        "sm_90",
        "gfx942",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


def test_import_of_the_command_line_is_light() -> None:
    code = "import json, sys, mlpdsl.cli; print(json.dumps([n for n in ('torch', 'triton', 'click') if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env=environ(), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def test_piped_into_head_it_is_quiet(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mlpdsl show '{JSON}' --target sm_90 | head -c 10"
    done = subprocess.run(["bash", "-c", command], env=environ(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "# gated-si"
    assert [line for line in done.stderr.splitlines() if not line.endswith("kernel.py")] == []


def test_colours_on_a_terminal_alone(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "mlpdsl", "show", JSON, "--target", "sm_90", "--kernel", "tile_order"]
    with subprocess.Popen(
        command, env=environ(TERM="xterm-256color"), cwd=tmp_path, stdout=child, stderr=subprocess.DEVNULL
    ) as shown:
        os.close(child)
        seen = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # Linux says so where the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(parent)
    assert shown.returncode == 0
    assert b"\x1b[" in seen and b"tile_order" in seen
