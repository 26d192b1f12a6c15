"""Tools on a GPU: what touches none, two processes on one cache, warmup, explain."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import torch

import mlpdsl
from mlpdsl import MLPSpec
from tests.gpu_calls import call_on_gpu, compiled, gradients, run_python


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def test_compile_touches_no_gpu(tmp_path: Path) -> None:
    """No CUDA context after import and compile(), the target known all the same, and the source in the cache; fork works."""
    code = """
import os, torch, mlpdsl
spec = mlpdsl.MLPSpec(dims=(64, 128, 64), activation="gelu", dtype="bfloat16")
mlp = mlpdsl.compile(spec)
text = str(mlpdsl.explain(spec, m=16))
assert not torch.cuda.is_initialized()
pid = os.fork()
x, *params = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((5, 64), *spec.parameter_shapes().values()))
y = mlp(x, *params)
torch.cuda.synchronize()
if pid == 0:
    os._exit(0 if y.isfinite().all() else 1)
assert os.waitpid(pid, 0)[1] == 0
print(text)
"""
    text = run_python(code, MLPDSL_CACHE_DIR=str(tmp_path))
    assert architecture() in text
    assert list(tmp_path.rglob("kernel.py")), "compile() wrote no source"


def test_two_processes_on_one_cache(tmp_path: Path) -> None:
    """Started together on an empty cache of ours and of Triton's, and once more when both are warm: the same bits every time."""
    code = """
import hashlib, torch, mlpdsl
spec = mlpdsl.MLPSpec(dims=(64, 192, 64), activation="silu", gated=True, dtype="bfloat16")
make = torch.Generator().manual_seed(0)
shapes = ((700, 64), *spec.parameter_shapes().values())
x, *params = (torch.randn(s, generator=make).bfloat16().cuda().requires_grad_() for s in shapes)
y = mlpdsl.compile(spec)(x, *params)
results = [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *params))]
print(hashlib.sha256(b"".join(t.float().cpu().numpy().tobytes() for t in results)).hexdigest())
"""
    caches = {"MLPDSL_CACHE_DIR": str(tmp_path / "ours"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda _: run_python(code, **caches), range(2)))
    assert len({*together, run_python(code, **caches)}) == 1
    assert len(list((tmp_path / "ours").rglob("kernel.py"))) == 1


def test_warmup_compiles_everything() -> None:
    """After warmup no call with these numbers of rows compiles, forward or backward."""
    from triton import knobs

    spec = MLPSpec(
        dims=(72, 136, 40), activation="softplus", gated=True, bias=True, dtype="bfloat16", epilogue=("residual", "layer_scale")
    )
    mlpdsl.warmup(spec, m=(1, 93), backward=True)
    calls = [call_on_gpu(spec, rows) for rows in (1, 93)]
    compilations: list[object] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **what: compilations.append(what.get("src"))
        for call in calls:
            gradients(call, compiled(spec))
            call.run(compiled(spec))
    assert not compilations, [getattr(source, "name", source) for source in compilations]


def test_explain_is_what_runs() -> None:
    spec = MLPSpec(dims=(128, 256, 128), activation="gelu", dtype="bfloat16")
    explanation = mlpdsl.explain(spec, m=192)
    assert explanation.target == architecture()
    assert explanation.strategy in str(explanation) and explanation.config
