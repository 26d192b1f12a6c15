"""Every activation, value and derivative, from subnormals to infinity and densely in between, as the compiler makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing import bounded, oracle

pytestmark = pytest.mark.usefixtures("generated")


def points() -> Tensor:
    special = torch.tensor(
        [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-7, 3.0, 6.0, 10.0, 87.0, 88.0, 89.0, 100.0, 104.0, 1e3, 1e10, 1e30, torch.inf]
    )
    positive = torch.cat([special, torch.logspace(-9, 2.5, 60_000), torch.linspace(0, 20, 40_000)])
    return torch.cat([positive, -positive, torch.tensor([torch.nan])]).cuda()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dims", [(1, 1, 1), (1, 1)], ids=["hidden", "output"])
def test_sweep(name: str, dims: tuple[int, ...]) -> None:
    spec = MLPSpec(dims=dims, activation=name) if len(dims) == 3 else MLPSpec(dims=dims, activation="identity", epilogue=(name,))
    x = points()
    leaf = x[:, None].clone().requires_grad_()
    y = mlpdsl.compile(spec, backend="triton")(leaf, *(torch.ones(1, 1, device="cuda") for _ in dims[1:]))
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    exact = bounded.exact(x)
    found = [
        (y.detach()[:, 0], bounded.activation(name, exact), f"{name}(x)"),
        (grad[:, 0], bounded.slope(name, exact), f"{name}'(x)"),
    ]
    failures = []
    for actual, wanted, what in found:
        try:
            oracle.check(actual, bounded.rounded(wanted, torch.float32), what)
        except oracle.OracleError as error:
            at = int(str(error).split("at (")[1].split(",")[0]) if "at (" in str(error) else 0
            failures.append(f"{error}, at x = {float(x[at])!r}")
    assert not failures, "\n".join(failures)
