"""One product launched alone, on tensors of its own, with a config of one's choice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlpdsl.checks import torch_dtype
from mlpdsl.codegen.plan import Config, Plan
from mlpdsl.dispatch import runner
from mlpdsl.spec import MLPSpec

__all__ = ["Product"]

COLD = 2.5
"""So many times the L2 lie between two uses of a tensor, where that takes no more than `COPIES` copies."""
COPIES = 32


class Product:
    """A role of one stage at `rows` rows of x: copies of its tensors on a device, and launches on each in turn.

    As forward runs without gradients: preactivations are not written. Data are normal random numbers."""

    def __init__(self, spec: MLPSpec, role: str, stage: int, rows: int, device: torch.device, l2_bytes: int = 0) -> None:
        self._run = runner(spec.to_json(), device)
        self._role = role
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch_dtype(spec.dtype)).mul_(scale)

        def make() -> dict[str, Any]:
            return _arguments(self._run.plan, role, stage, rows, draw)

        first = make()
        size = sum(t.numel() * t.element_size() for t in _tensors(first))
        copies = max(1, min(COPIES, math.ceil(COLD * l2_bytes / size)))
        if size > 2 * l2_bytes:
            copies = 1
        self._sets = [first, *(make() for _ in range(copies - 1))]
        linear = self._run.plan.linears[stage]
        flops = 2.0 * rows * linear.width_in * linear.width_out * linear.planes
        # A graph's own launch is shared by several of the kernel's where that takes as long as it does.
        self.launches = copies * (1 if flops > 1e11 else math.ceil(8 / copies))

    def call(self, config: Config) -> Callable[[], None]:
        """`launches` launches with this config. The results are dropped."""
        from mlpdsl.launch import Launch

        launch = Launch.of(config)
        function = getattr(self._run.module, f"launch_{self._role}")
        wanted = inspect.signature(function).parameters
        given = [{name: value for name, value in each.items() if name in wanted} for each in self._sets]
        for each in given:
            each["pick"] = lambda *product: launch

        def call() -> None:
            for _ in range(self.launches // len(given)):
                for each in given:
                    function(**each)

        return call


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return [t for values in lists for t in values if isinstance(t, Tensor)]


def _arguments(plan: Plan, role: str, stage: int, rows: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    """By the parameters' names in the generated module; those that a launcher does not have are left out."""
    linear = plan.linears[stage]
    n, k, planes = linear.width_out, linear.width_in, linear.planes
    weights = [draw(n, k, scale=k**-0.5) for _ in linear.weights]
    biases = [draw(n) for _ in linear.biases]
    if role in ("hidden", "output"):
        shapes = {"tile": (rows, n), "column": (n,), "row": (rows,), "scalar": (1,)}
        operands = [draw(*shapes[o.kind]) for o in plan.epilogue.operands] if role == "output" else []
        return {"x": draw(rows, k), "weights": weights, "biases": biases, "operands": operands, "SAVE": False}
    if role == "hidden_grad":
        preact = draw(plan.linears[stage - 1].planes, rows, k)
        return {"grad": draw(rows, n), "weights": weights, "preact": preact, "EMIT_HIDDEN": True, "SUM_BIAS": plan.bias}
    if role == "input_grad":
        return {"preact_grad": draw(planes, rows, n), "weights": weights}
    return {"grad": draw(planes, rows, n), "x": draw(rows, k)}
