"""What tests of captured functions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.traced import activation

Map = Callable[[Tensor], Tensor]


def spec_of(fn: Any) -> MLPSpec:
    return MLPSpec(dims=(4, 5, 3), activation=fn)


def run(spec: MLPSpec) -> Tensor:
    torch.manual_seed(3)
    return mlpdsl.reference(spec)(torch.randn(7, 4), *(torch.randn(s) for s in spec.parameter_shapes().values()))


def check_frozen(fn: Any, change: Callable[[], object]) -> None:
    """Declared, then changed: formula and reference stay; declared again, both are new."""
    spec = spec_of(fn)
    before, text = run(spec), spec.to_json()
    change()
    assert spec.to_json() == text
    assert torch.equal(run(spec), before)
    again = spec_of(fn)
    assert again != spec
    assert not torch.equal(run(again), before)


def refused(fn: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        activation(fn)
    return str(caught.value)
