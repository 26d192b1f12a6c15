"""Triton's own cache, damaged between two processes: the second one gets the same bits, and says so once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mlpdsl

ROOT = Path(mlpdsl.__file__).resolve().parents[1]

SCRIPT = """
import hashlib, json, logging, sys
import torch, mlpdsl
heard = []
class Ear(logging.Handler):
    def emit(self, record): heard.append(record.getMessage())
logging.getLogger("mlpdsl").addHandler(Ear())
logging.getLogger("mlpdsl").propagate = False
spec = mlpdsl.MLPSpec(dims=(128, 256, 128), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",))
torch.manual_seed(0)
layer = mlpdsl.MLP(spec, backend="triton", device="cuda")
x = torch.randn(93, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
results = []
for _ in range(2):  # the second call goes past what is looked at once
    y = layer(x, residual=x)
    results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
same = all(torch.equal(a, b) for a, b in zip(*results))
sha = hashlib.sha256()
for t in results[0]:
    sha.update(bytes(t.detach().cpu().contiguous().view(torch.uint8).flatten().tolist()))
print(json.dumps([sha.hexdigest(), same, heard]))
"""


def run(base: Path) -> tuple[str, list[str]]:
    """Digest of output and gradients, and the warnings, of a new process."""
    paths = {"TRITON_CACHE_DIR": str(base / "triton"), "MLPDSL_CACHE_DIR": str(base / "root"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | paths, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    sha, same, heard = json.loads(done.stdout.splitlines()[-1])
    assert same
    return sha, heard


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Caches as a first process leaves them, and what it computed."""
    base = tmp_path_factory.mktemp("caches")
    sha, heard = run(base)
    assert heard == []
    assert list(base.glob("root/binaries-v1/*")) and list(base.glob("triton/*/*.cubin"))
    return base, sha


def each(pattern: str, damage: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage_all(triton: Path) -> None:
        files = list(triton.glob(pattern))
        assert files
        for file in files:
            damage(file)

    return damage_all


def flip(file: Path) -> None:
    """One bit in the middle of the code, where a GPU would run it."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of every binary": each("*/*.cubin", flip),
    "no binary": each("*/*.cubin", lambda f: f.unlink()),
    "no metadata": each("*/[!_]*.json", lambda f: f.write_text("{}")),
    "garbage for groups": each("*/__grp__*.json", lambda f: f.write_bytes(b"\xff\xfe")),
    "a file in place of the cache": lambda triton: (shutil.rmtree(triton), triton.write_text("in the way")),
}
SILENT = {("garbage for groups", False)}
"""What newer releases of Triton (the second word: whether it is 3.6) repair by themselves."""


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cache(warm: tuple[Path, str], tmp_path: Path, what: str) -> None:
    import triton

    base, sha = warm
    shutil.copytree(base, tmp_path / "copy")
    for group in (tmp_path / "copy" / "triton").glob("*/__grp__*.json"):  # they name files by their whole paths
        group.write_text(group.read_text().replace(str(base), str(tmp_path / "copy")))
    DAMAGE[what](tmp_path / "copy" / "triton")
    found, heard = run(tmp_path / "copy")
    assert found == sha
    if (what, triton.__version__.startswith("3.6.")) in SILENT:
        assert heard == []
        return
    assert len(heard) == 1, heard
    assert "Triton's cache" in heard[0] and "results are unaffected" in heard[0]
    if what == "a bit of every binary":
        assert run(tmp_path / "copy") == (sha, []), "the damage was not repaired"


def test_no_cache_can_be_written(warm: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("triton", "root"):
        (tmp_path / name).write_text("in the way")
    sha, heard = run(tmp_path)
    assert sha == warm[1]
    assert sorted("Triton" in h for h in heard) == [False, True]  # one warning for each


def test_the_digest_is_of_what_runs(warm: tuple[Path, str]) -> None:
    """Every binary that Triton keeps of ours has its record."""
    import triton  # noqa: F401 - the module below imports it as well

    base, _ = warm
    records = {p.name for p in base.glob("root/binaries-v1/*")}
    hashes = {json.loads(p.read_text())["hash"] for p in base.glob("triton/*/*.json") if not p.name.startswith("__grp__")}
    assert {r.partition("-")[0] for r in records} == {hashlib.sha256(h.encode()).hexdigest() for h in hashes}
