"""The key of a generated file covers all that its text depends on, and the text depends on nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import pytest

from mlpdsl import MLPSpec, source
from mlpdsl.codegen import render
from mlpdsl.target import TARGETS, parse_target
from tests.faults.figures import FULL, Figures, rounds
from tests.faults.tools import run_script

FUNCTION = {"expr": "x * sigmoid(1.5 * x)"}
FINISH = {"expr": "tile * gamma + b", "operands": [["gamma", "column"], ["b", "tile"]]}
SPEC = MLPSpec(dims=(64, 128, 64), activation=FUNCTION, epilogue=("residual", FINISH))

CHANGED: dict[str, list[dict[str, Any]]] = {
    "dims": [{"dims": (65, 128, 64)}, {"dims": (64, 129, 64)}, {"dims": (64, 128, 65)}, {"dims": (64, 128, 128, 64)}],
    "activation": [{"activation": "silu"}, {"activation": {"expr": "x * sigmoid(1.5000000000000002 * x)"}}],
    "gated": [{"gated": True}],
    "bias": [{"bias": True}],
    "dtype": [{"dtype": "float16"}, {"dtype": "bfloat16"}],
    "precision": [{"precision": "tf32"}, {"precision": "tf32x3"}],
    "epilogue": [
        {"epilogue": ()},
        {"epilogue": (FINISH, "residual")},
        {"epilogue": ("residual", {**FINISH, "expr": "tile * gamma - b"})},
        {"epilogue": ("residual", {**FINISH, "operands": [["gamma", "row"], ["b", "tile"]]})},
        {"epilogue": ("residual", {"expr": "tile * beta + b", "operands": [["beta", "column"], ["b", "tile"]]})},
    ],
    "layout": [],  # has one value so far
}


def key(spec: MLPSpec = SPEC, target: str = "sm_90", backend: str = "triton") -> str:
    return source.source_key(spec, parse_target(target), backend)


def test_every_field_of_the_spec_changes_the_key() -> None:
    assert set(CHANGED) == {f.name for f in fields(MLPSpec)}
    specs = [SPEC, *(SPEC.replace(**change) for changes in CHANGED.values() for change in changes)]
    assert len({key(s) for s in specs}) == len(specs)
    for field in CHANGED:
        assert f'"{field}":' in SPEC.to_json()
        content = json.loads(SPEC.to_json())
        content[field] = "changed"
        changed = MLPSpec.__new__(MLPSpec)  # any change at all, also one to what is no value yet
        changed.__dict__.update(SPEC.__dict__, _json=json.dumps(content))
        assert key(changed) != key()


def test_target_backend_and_every_version_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key(target=name) for name in TARGETS} | {key(backend="another")}
    assert len(keys) == len(TARGETS) + 1 and key() in keys
    for owner, name in ((source, "SOURCE_SCHEMA"), (source, "__version__"), (jinja2, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, "999")
            render.generator_hash.cache_clear()
            keys.add(key())
    render.generator_hash.cache_clear()
    assert len(keys) == len(TARGETS) + 4
    spec = SPEC.to_json().replace('"schema_version":1', '"schema_version":2')
    assert spec != SPEC.to_json()  # so the schema of the JSON form is in the key as well


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A copy of all that turns a plan into text, of which the digest is taken; its files."""
    ground = Path(source.__file__).parent
    for name in ("codegen", "templates"):
        shutil.copytree(ground / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ground").mkdir()
    for name in ("spec.py", "function.py", "names.py", "target.py"):
        shutil.copy(ground / name, tmp_path / "ground" / name)
    before = render.generator_hash.__wrapped__()
    monkeypatch.setattr(render, "_ROOT", tmp_path / "codegen")
    monkeypatch.setattr(render, "_TEMPLATES", tmp_path / "templates")
    monkeypatch.setattr(render.mlpdsl.spec, "__file__", str(tmp_path / "ground" / "spec.py"))
    assert render.generator_hash.__wrapped__() == before  # where the files lie makes no difference
    return sorted(p for p in tmp_path.rglob("*") if p.is_file())


def test_every_byte_of_a_template_and_every_file_of_the_generator_change_the_key(copy: list[Path], figures: Figures) -> None:
    digest_of = render.generator_hash.__wrapped__
    right, templates = digest_of(), [p for p in copy if p.suffix == ".jinja"]
    assert len(templates) == len(list((Path(render.__file__).parents[1] / "templates").rglob("*.jinja"))) >= 4
    seen, changes = {right}, 0
    for path in copy:
        data = path.read_bytes()
        places = (
            range(len(data)) if FULL and path in templates else random.Random(path.name).sample(range(len(data)), min(2, len(data)))
        )
        for at in places:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            seen.add(digest_of())
            changes += 1
        path.write_bytes(data + b"\n")
        seen.add(digest_of())
        changes += 1
        if path.parent.name != "ground":  # whose files are named one by one
            path.rename(path.with_name("renamed" + path.suffix))
            seen.add(digest_of())
            path.with_name("renamed" + path.suffix).unlink()
            seen.add(digest_of())
            changes += 2
        path.write_bytes(data)
    assert digest_of() == right
    assert len(seen) == 1 + changes
    figures.note("keys", files=len(copy), changes=changes, keys=len(seen) - 1)


SEEDS = """
import hashlib, mlpdsl
from tests.faults import workers
made = [mlpdsl.generate(s, target=t) for s in workers.specs(8) for t in ("sm_80", "sm_90", "gfx942")]
print(json.dumps([[m.key, hashlib.sha256(m.text.encode()).hexdigest()] for m in made]))
"""


def test_the_same_bytes_whatever_the_hash_seed(root: Path, figures: Figures) -> None:
    seeds = rounds(2, 20)
    said = {run_script(SEEDS, root, PYTHONHASHSEED=str(s), MLPDSL_CACHE_DIR="/dev/null/x")[0] for s in range(seeds)}
    assert len(said) == 1
    texts = json.loads(said.pop())
    assert len(texts) == len({k for k, _ in texts}) == 24
    figures.note("hash seeds", seeds=seeds, texts=len(texts), differences=0)


IMPORT = """
import torch, triton, jinja2
start = time.perf_counter()
import mlpdsl
from tests.faults import workers
made = [mlpdsl.compile(spec) for spec in workers.specs(20, functions=False)]  # deriving the first function takes 50 ms by itself
print((time.perf_counter() - start) * 1e3)
"""


@pytest.mark.skipif(not FULL, reason="tests/compiled/test_import.py measures it in CI")
def test_a_warm_import(root: Path, figures: Figures) -> None:
    """Twenty specs declared and compiled, over what torch, triton and jinja2 cost: 50 ms at most."""
    took = []
    for _ in range(11):
        stdout, _ = run_script(IMPORT, root, MLPDSL_CACHE_DIR=str(root), MLPDSL_TARGET="sm_90")
        took.append(float(stdout))
    cold, *warm = took
    figures.note("warm import", specs=20, runs=len(warm), cold_ms=round(cold, 1), warm_ms=round(min(warm), 1))
    assert min(warm) <= 50, f"milliseconds: {took}"
    assert os.listdir(root) == ["v1"]
