"""MLPs, modules and operands for tests of how they stand among torch's own machinery."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLP, MLPSpec
from mlpdsl.testing.calls import make_call

GATED = MLPSpec(dims=(24, 40, 16), activation="silu", gated=True, bias=True)
PLAIN = MLPSpec(dims=(13, 33, 9), activation="gelu", bias=True, epilogue=("residual", "layer_scale", "scale"))
DEEP = MLPSpec(dims=(8, 16, 24, 8), activation="relu2", bias=True)
SINGLE = MLPSpec(dims=(8, 16), activation="identity", epilogue=("gelu",))
SPECS = [GATED, PLAIN, DEEP, SINGLE]
NAMES = ["gated", "plain", "deep", "single"]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=NAMES)


def compiled(spec: MLPSpec) -> Callable[..., Tensor]:
    return mlpdsl.compile(spec, backend="triton")


def layer_of(spec: MLPSpec, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(spec, backend="triton")


def operands_of(spec: MLPSpec, *lead: int) -> dict[str, Tensor]:
    return make_call(spec, lead, 1).operands
