"""MLPDSL_ON_JIT where kernels are compiled and autograd has threads of its own; what warmup leaves on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec, NotCompiledError, on_jit
from mlpdsl.testing.calls import check_call, make_call

PLAIN = MLPSpec(dims=(104, 232, 72), activation="gelu", bias=True)
GATED = MLPSpec(dims=(256, 512, 128), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",))


def line(text: str) -> str:
    return text[text.index("mlpdsl.warmup(mlpdsl.") :]


@pytest.mark.parametrize("spec", [PLAIN, GATED], ids=["fp32", "gated-bf16"])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_the_line_of_an_error_is_what_cures_it(spec: MLPSpec, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec.replace(dims=(spec.d_in, spec.dims[1] + 8 * rows, spec.d_out))  # of this test alone
    mlp = mlpdsl.compile(spec, backend="triton")
    call = make_call(spec, (rows,), 0, device="cuda")
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    with torch.no_grad(), pytest.raises(NotCompiledError) as caught:
        call.run(mlp)
    assert f"m={rows})" in line(str(caught.value))
    eval(line(str(caught.value)), {"mlpdsl": mlpdsl})
    with torch.no_grad():
        call.run(mlp)
    with pytest.raises(NotCompiledError) as caught:
        call.gradients(mlp)
    eval(line(str(caught.value)), {"mlpdsl": mlpdsl})
    call.gradients(mlp)
    monkeypatch.delenv(on_jit.VARIABLE)
    check_call(call, mlp)


def test_an_error_in_a_thread_of_autograd_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PLAIN.replace(dims=(104, 240, 72))
    mlp = mlpdsl.compile(spec, backend="triton")
    call = make_call(spec, (7,), 0, device="cuda")
    x, *params = (t.detach().requires_grad_() for t in (call.x, *call.params))
    y = mlp(x, *params)
    monkeypatch.setenv(on_jit.VARIABLE, "error")
    with pytest.raises(NotCompiledError, match="backward=True"):
        y.sum().backward()
    assert all(t.grad is None for t in (x, *params))
    monkeypatch.setenv(on_jit.VARIABLE, "warn")
    mlp(x, *params).backward(torch.ones_like(y))
    assert all(t.grad is not None for t in (x, *params))


def test_warmup_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MLPSpec(dims=(1024, 4096, 1024), activation="relu", dtype="bfloat16")
    mlpdsl.warmup(spec, m=(1, 4096), backward=True)  # cuBLAS keeps some for good
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    taken: list[int] = []
    right = torch.cuda.empty_cache

    def counted() -> Any:
        taken.append(torch.cuda.memory_reserved())
        return right()

    monkeypatch.setattr(torch.cuda, "empty_cache", counted)
    mlpdsl.warmup(spec, m=(1, 4096), backward=True)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before and taken[0] > before[1]
