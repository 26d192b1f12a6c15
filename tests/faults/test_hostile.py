"""Hostile specs: a typed error, or source made of what the templates are made of; and nothing written outside the root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpdsl import MLPSpec, SpecError
from mlpdsl.function import Function
from tests.faults.allowed import GOLDENS, allow_list
from tests.faults.figures import Figures, rounds
from tests.faults.tools import run_script

SCRIPT = """
from tests.faults import hostile
os.chdir(root.parent / "here")
print(json.dumps(hostile.main(int(os.environ["MLPDSL_TEST_HOSTILE"]), root)))
"""


def test_hostile_specs(root: Path, figures: Figures) -> None:
    count = rounds(300, 10_000)
    for name in ("here", "home", "tmp"):
        (root.parent / name).mkdir()
    environment = {"MLPDSL_CACHE_DIR": str(root), "HOME": str(root.parent / "home"), "TMPDIR": str(root.parent / "tmp")}
    stdout, _ = run_script(SCRIPT, root, timeout=60 + count, MLPDSL_TEST_HOSTILE=str(count), **environment)
    said = json.loads(stdout)
    outcomes = said["outcomes"]
    assert said["wrong"] == []
    assert set(outcomes) <= {"source", "SpecError", "UnsupportedError"}
    assert sum(outcomes.values()) == count
    assert outcomes["source"] >= count // 4, "too few got through for their source to say anything"
    assert outcomes["SpecError"] >= count // 4, "too few are hostile"
    for name in ("here", "home", "tmp"):
        assert list((root.parent / name).iterdir()) == []
    assert {p.name for p in root.parent.iterdir()} == {"root", "here", "home", "tmp"}
    assert {p.name for p in root.iterdir()} == {"v1"}
    figures.note("hostile specs", specs=count, outcomes=outcomes, wrong=0, slowest_ms=said["slowest_ms"])


GOLDEN = (GOLDENS / "functions-bf16-sm_90.py.txt").read_text(encoding="utf-8")
KERNEL = "    tile_m, tile_n = tile_order("
FORBIDDEN = {
    "an import": ("import torch\n", "import torch\nimport os\n"),
    "an import from": ("import torch\n", "import torch\nfrom os import system\n"),
    "an import under another name": ("import torch\n", "import os as torch\n"),
    "a statement": ("import torch\n", "import torch\nprint(1)\n"),
    "a call in an assignment": ("import torch\n", "import torch\nx = open('x')\n"),
    "eval": (KERNEL, "    eval('1')\n" + KERNEL),
    "a known name, called": (KERNEL, "    launch.run('x')\n" + KERNEL),
    "getattr": (KERNEL, "    getattr(tl, 'x')\n" + KERNEL),
    "a private attribute": (KERNEL, "    tl.__class__\n" + KERNEL),
    "an unknown attribute": (KERNEL, "    torch.load\n" + KERNEL),
    "a string": (KERNEL, "    'x'\n" + KERNEL),
    "a lambda": (KERNEL, "    x = lambda: 0\n" + KERNEL),
    "an infinity": (KERNEL, "    x = 1e999\n" + KERNEL),
    "a decorator": ("@triton.jit\ndef activate(", "@triton.jit(debug=True)\ndef activate("),
    "an unknown name": (KERNEL, "    gamma = 1\n" + KERNEL),
    "a class": ("import torch\n", "import torch\nclass X: pass\n"),
    "with": (KERNEL, "    with x: pass\n" + KERNEL),
    "the end of a docstring": ('"""Gradients of the', '"""Gradients"""\n    eval("""of the'),
    "no Python": (KERNEL, "    (\n" + KERNEL),
}


def test_the_allow_list_lets_the_golden_files_through() -> None:
    allowed = allow_list()
    for file in GOLDENS.iterdir():
        assert allowed.objections(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_allow_list_objects(what: str) -> None:
    before, after = FORBIDDEN[what]
    assert before in GOLDEN
    assert allow_list().objections(GOLDEN.replace(before, after, 1))


WATCHED = """
from tests.faults.allowed import Watch
root.mkdir(mode=0o700)
watch = Watch(root)
def seen(action):
    watch.on = True
    try: action()
    except OSError: pass
    watch.on = False
    found = list(watch.seen)
    watch.seen.clear()
    return len(found)
elsewhere = root.parent / "elsewhere"
print(json.dumps([
    seen(lambda: publish(1)), seen(lambda: open(elsewhere).close()), seen(lambda: open(elsewhere, "w").close()),
    seen(lambda: os.mkdir(root.parent / "made")), seen(lambda: os.rename(elsewhere, root / "x")), seen(lambda: exec("1")),
    seen(lambda: os.system("true")), seen(lambda: exec(compile("def f(): return eval", "<mlpdsl formula>", "exec"))),
]))
"""


def test_the_watch_sees(root: Path) -> None:
    stdout, _ = run_script(WATCHED, root)
    assert json.loads(stdout) == [0, 0, 1, 1, 1, 1, 1, 1]


FOUND = {
    "a derivative that is no finite number": {"expr": "pow(0.0, x)"},
    "one inside a condition": {"expr": "where(ge(x, 0.0), 1.0, pow(0.0, x))"},
    "a function put together by hand": Function(("x",), (), "__import__('os').getpid()", ("1.0",)),
    "hand-written text in one": Function(("x",), (), "", (), (("triton", ("__import__('os').getpid()", "1.0")),)),
    "the end of a docstring in one": Function(("x",), (), "", (), (("triton", ('1.0"""\nimport os\n"""', "1.0")),)),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str) -> None:
    with pytest.raises(SpecError):
        MLPSpec(dims=(8, 8, 8), activation=FOUND[what])
