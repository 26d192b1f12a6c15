"""Every activation, value and derivative, from subnormals to infinity, in the generated kernels."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, loader, ops, source
from mlpdsl.cache import digest
from mlpdsl.dispatch import runner
from mlpdsl.names import ACTIVATIONS
from mlpdsl.tape import Tapes
from mlpdsl.testing import bounded, oracle

MAGNITUDES = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-20, 1e-7, 1e-4, 0.01, 0.1, 0.5, 0.707107, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
MAGNITUDES += [8.0, 9.0, 10.0, 12.0, 16.0, 17.0, 20.0, 21.0, 30.0, 40.0, 60.0, 80.0, 1e3, 1e10, 1e30, 3.4028234663852886e38]
NEAR = [3.0, 6.0, 10.0, 0.707107, 1e-7]
"""Kinks, the ends of what is clamped, the centre of laplace."""
POINTS = 4096


def beside(values: Tensor) -> Tensor:
    """Each value with its neighbours, a float32 on either side."""
    return torch.cat([torch.nextafter(values, torch.zeros(1)), values, torch.nextafter(values, torch.full((1,), 1e38))])


def turning(f: Callable[[Tensor], Tensor]) -> Tensor:
    """Where f, on [-8, 8], changes its sign, by bisection."""
    grid = torch.linspace(-8.0003, 8.0, 4001, dtype=torch.float64)
    signs = f(grid).sign()
    here = ((signs[1:] * signs[:-1]) < 0).nonzero()[:, 0]
    low, high = grid[here], grid[here + 1]
    for _ in range(50):
        middle = (low + high) / 2
        same = f(middle).sign() == f(low).sign()
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return high.float()


@functools.cache
def minima() -> Tensor:
    """Where an activation or its derivative is least or greatest."""
    found = [turning(g) for f in bounded.FUNCTIONS.values() for g in (f.derivative, f.curvature)]
    return torch.cat(found).abs().unique()


@functools.cache
def points() -> Tensor:
    """4,096: ±0, subnormals, kinks and minima with their neighbours, the range in which exp overflows, ±max, ±inf and NaN; the rest
    steps of 1% from 1e-9 to 200 and of 5% beyond both."""
    special = torch.tensor([*MAGNITUDES, torch.inf])
    positive = [special, beside(torch.tensor(NEAR)), beside(minima()), torch.linspace(86.0, 106.0, 161)]
    positive += [torch.logspace(-45, -9, 120), torch.logspace(2.3, 38.5, 120)]
    count = (POINTS - 2) // 2 - sum(map(len, positive))
    steps = torch.logspace(-9, 2.3, count - 400)
    positive += [steps, torch.linspace(0.4, 3.6, 400)]
    half = torch.cat(positive)
    return torch.cat([half, -half, torch.tensor([torch.nan, -torch.nan])])


def test_there_are_4096_points() -> None:
    x = points()
    assert len(x) == POINTS and int(x.isnan().sum()) == 2 and int(x.isinf().sum()) == 2
    assert {float(v) for v in x[x.abs() > 3.4e38]} == {float(s * v) for s in (1, -1) for v in (3.4028234663852886e38, torch.inf)}
    assert int(((x != 0) & (x.abs() < 2.0**-126)).sum()) > 30 and int((x == 0).sum()) == 2
    for name, f in bounded.FUNCTIONS.items():  # the least value of each, to the accuracy of float32's neighbours
        grid = torch.linspace(-8.0, 8.0, 400_001, dtype=torch.float64)
        assert float(f.value(x[x.abs() <= 8.0].double()).min()) <= float(f.value(grid).min()) + 1e-12, name


def run(spec: MLPSpec, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """y and dy/dx of an MLP from 1 to 1."""
    x = x[:, None].clone().requires_grad_()
    y = mlpdsl.compile(spec, backend="triton")(x, *params)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach()[:, 0], grad[:, 0]


def compare(name: str, x: Tensor, y: Tensor, grad: Tensor) -> None:
    exact = bounded.exact(x)
    oracle.check(y, bounded.rounded(bounded.activation(name, exact), torch.float32), f"{name}(x)")
    oracle.check(grad, bounded.rounded(bounded.slope(name, exact), torch.float32), f"{name}'(x)")


ONE = torch.ones(1, 1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_between_layers(name: str) -> None:
    x = points()
    compare(name, x, *run(MLPSpec(dims=(1, 1, 1), activation=name), x, ONE, ONE))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_on_the_output(name: str) -> None:
    x = points()
    compare(name, x, *run(MLPSpec(dims=(1, 1), activation="identity", epilogue=(name,)), x, ONE))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name: str) -> None:
    """Gate alone varies: up is 1, by a weight of zero and a bias; so only x whose square is finite, or inf·0 comes in."""
    x = points()
    x = x[x.abs() < 1e15]
    zero = torch.zeros(1)
    spec = MLPSpec(dims=(1, 1, 1), activation=name, gated=True, bias=True)
    compare(name, x, *run(spec, x, ONE, zero, 0 * ONE, zero + 1, ONE, zero))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(name: str, dtype: str) -> None:
    """The limits at infinity and NaN hold in 16-bit types as well, and everything else is the float32 result rounded once."""
    spec = MLPSpec(dims=(1, 1), activation="identity", dtype=dtype, epilogue=(name,))
    x = points().to(getattr(torch, dtype))
    y, grad = run(spec, x, ONE.to(x.dtype))
    oracle.check(y, bounded.rounded(bounded.activation(name, bounded.exact(x)), x.dtype), f"{name}(x)")
    oracle.check(grad, bounded.rounded(bounded.slope(name, bounded.exact(x)), x.dtype), f"{name}'(x)")


def refused(name: str, replace: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, path: Path, every: int = 1) -> bool:
    """Whether the comparison refuses the kernels of an activation once `replace` has changed their device functions."""
    spec = MLPSpec(dims=(1, 1, 1), activation=name)
    text = source.generate(spec).text
    start, end = text.index("def activate("), text.index("def hidden_masked(")
    changed = text[:start] + replace(text[start:end]) + text[end:]
    assert changed != text
    own = runner(spec.to_json(), ONE.device)
    module = loader.load(path / "kernel.py", changed, digest(changed))
    x = points()[::every]
    with monkeypatch.context() as patch:
        patch.setattr(ops, "runner", lambda spec_json, device: own._replace(module=module, tapes=Tapes(False)))
        try:
            compare(name, x, *run(spec, x, ONE, ONE))
        except oracle.OracleError:
            return True
    return False


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "laplace", "hardswish"])
def test_wrong_constants_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each constant of several digits in turn, by one per cent."""
    text = source.generate(MLPSpec(dims=(1, 1, 1), activation=name)).text
    code = text[text.index("def activate(") : text.index("def hidden_masked(")].split('"""')  # not those in docstrings
    constants = {c for part in code[::2] for c in re.findall(r"\d+\.\d+(?:e-?\d+)?", part) if len(c.strip("0.")) > 1}
    assert constants
    missed = [
        c for c in constants if not refused(name, lambda t, c=c: t.replace(c, repr(float(c) * 1.01)), monkeypatch, tmp_path, 8)
    ]
    assert not missed, f"changes of these constants of {name} went unnoticed: {missed}"


def test_a_wrong_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """silu holds x at -200, where the product is zero in float32 anyway, so that -inf gives 0 and not NaN."""
    assert refused("silu", lambda t: t.replace("200.0", "2.0"), monkeypatch, tmp_path)
