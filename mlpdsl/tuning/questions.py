"""What the processes of tuning answer. Reasons are answers; only what broke the process, or its GPU, is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mlpdsl.bench.gpu import Gpu
from mlpdsl.bench.measure import first_line
from mlpdsl.bench.timer import Call
from mlpdsl.codegen.plan import Config, products
from mlpdsl.dispatch import forcing_config, plan_of, target_of
from mlpdsl.errors import UnsupportedError
from mlpdsl.resources import compiled
from mlpdsl.spec import MLPSpec
from mlpdsl.testing.calls import check_call, make_call
from mlpdsl.tuning.launching import Product
from mlpdsl.tuning.paired import paired

__all__ = ["QUESTIONS"]


def _describe() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"reason": "tune times kernels on a GPU, and torch sees none here: `mlpdsl doctor` says why"}
    try:
        gpu = Gpu()
        target = target_of(torch.device(gpu.torch_device))
    except UnsupportedError as error:
        return {"reason": str(error)}
    versions = gpu.versions()
    named = {name: versions[name] for name in ("mlpdsl", "torch", "triton", "cuda") if versions[name] is not None}
    return {"gpu": gpu.name, "target": target.name, "versions": named}


def _compile(spec: str, target: str, role: str, stage: int, path: str, rows: int, config: dict[str, Any]) -> dict[str, str]:
    try:
        found = compiled(MLPSpec.from_json(spec), target, role, stage, path, rows, Config(**config))
    except UnsupportedError as error:
        return {"reason": f"does not compile: {'; '.join(error.reasons)}"}
    reasons = []
    if not found.fits:
        reasons.append(f"takes {found.shared} bytes of shared memory")
    if found.spills:
        reasons.append(f"spills {found.spills} bytes")
    if found.serialised:
        reasons.append("wgmma is serialised")
    if not reasons and torch.cuda.is_available():
        _warm(MLPSpec.from_json(spec), role, stage, rows, Config(**config))
    return {"reason": ", ".join(reasons)}


WARM_ROWS = 256
"""Rows of a launch whose result nobody wants."""


def _warm(spec: MLPSpec, role: str, stage: int, rows: int, config: Config) -> None:
    """Launch it once, so that the process that times finds it in Triton's cache: there they would compile one after the other."""
    Product(spec, role, stage, min(rows, WARM_ROWS), torch.device("cuda")).call(config)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


class _Held(NamedTuple):
    """The product under way: its tensors, and the default captured. `graph` is what `capture` returned: replays want it alive."""

    key: tuple[Any, ...]
    product: Product
    default: Call
    graph: Any


_gpu: Gpu | None = None
_held: _Held | None = None


def _hold(spec: str, role: str, stage: int, rows: int, default: dict[str, Any]) -> tuple[Gpu, _Held]:
    """The GPU, and the product with its default on it, made anew where another one was under way."""
    global _gpu, _held
    gpu = _gpu = _gpu or Gpu()
    key = (spec, role, stage, rows, tuple(default.items()))
    if _held is None or _held.key != key:
        _release()
        product = Product(MLPSpec.from_json(spec), role, stage, rows, torch.device(gpu.torch_device), gpu.l2_bytes)
        graph = gpu.capture(product.call(Config(**default)))
        _held = _Held(key, product, graph[0], graph)
    return gpu, _held


def _release() -> None:
    """Let go of the memory of the product under way."""
    global _held
    _held = None
    if _gpu is not None:
        _gpu.clear()


def _time(
    spec: str,
    role: str,
    stage: int,
    path: str,
    rows: int,
    config: dict[str, Any],
    default: dict[str, Any],
    rounds: int,
    floor: float,
) -> dict[str, Any]:
    # The launcher decides on the path itself: these tensors are aligned.
    def timed() -> dict[str, Any]:
        gpu, held = _hold(spec, role, stage, rows, default)
        torch.cuda.empty_cache()  # what the last candidate's graph held
        candidate = gpu.capture(held.product.call(Config(**config)))
        found = paired(gpu, held.default, candidate[0], rounds, floor, held.product.launches)
        return {"default": found.default, "candidate": found.candidate}

    return _surviving(timed)


LEAST_ROWS = 256
"""Where float64 does not fit the GPU's memory, results are checked at half as many rows, down to this many."""


def _check(spec: str, role: str, stage: int, path: str, rows: int, config: dict[str, Any], device: str = "cuda") -> dict[str, str]:
    declared = MLPSpec.from_json(spec)

    def checked() -> dict[str, str]:
        _release()
        at = rows
        while True:
            try:
                return {"reason": _checked(declared, role, stage, path, at, Config(**config), device)}
            except torch.OutOfMemoryError:
                if at < 2 * LEAST_ROWS:
                    raise
            torch.cuda.empty_cache()
            at //= 2

    return _surviving(checked)


def _checked(spec: MLPSpec, role: str, stage: int, path: str, rows: int, config: Config, device: str) -> str:
    """What the oracle has against a call with the config, which must have been used on the path that was timed."""
    plan = plan_of(spec.to_json())
    m, n, k = next(sizes for name, i, *sizes in products(plan, rows) if (name, i) == (role, stage))
    call = make_call(spec, (rows,), 0, device=device)
    with forcing_config(role, m, n, k, config) as paths:
        try:
            check_call(call, backward=role not in ("hidden", "output"))
        except AssertionError as error:
            return f"wrong: {first_line(error)}"
    if path not in paths:
        return f"not checked: the call took {', '.join(dict.fromkeys(paths)) or 'no'} path, not {path}"
    return ""


def _surviving(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was answered, or the reason why not, where the GPU still answers. Else raises, and this process ends."""
    try:
        return act()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"failed": first_line(error)}


QUESTIONS: dict[str, Callable[..., Any]] = {"describe": _describe, "compile": _compile, "time": _time, "check": _check}
