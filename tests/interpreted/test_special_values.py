"""Every activation, value and derivative, from subnormals to infinity, in the generated kernels."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec, loader, ops, source
from mlpdsl.cache import digest
from mlpdsl.dispatch import Runner, runner
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing import bounded, oracle

MAGNITUDES = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-20, 1e-7, 1e-4, 0.01, 0.1, 0.5, 0.707107, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
MAGNITUDES += [8.0, 9.0, 10.0, 12.0, 16.0, 17.0, 20.0, 21.0, 30.0, 40.0, 60.0, 80.0, 87.0, 88.0, 89.0, 100.0, 104.0]
MAGNITUDES += [1e3, 1e10, 1e30, torch.inf]


def points() -> Tensor:
    """±, the neighbours of every kink, and steps of about 1% in between; then NaN."""
    special = torch.tensor(MAGNITUDES)
    kinks = torch.tensor([3.0, 6.0, 10.0, 0.707107])
    near = torch.cat([torch.nextafter(kinks, torch.zeros(4)), torch.nextafter(kinks, torch.full((4,), 100.0))])
    positive = torch.cat([special, near, torch.logspace(-9, 2.3, 400)])
    return torch.cat([positive, -positive, torch.tensor([torch.nan])])


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


def refused(name: str, replace: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, path: Path) -> bool:
    """Whether the comparison refuses the kernels of an activation once `replace` has changed their device functions."""
    spec = MLPSpec(dims=(1, 1, 1), activation=name)
    text = source.generate(spec).text
    start, end = text.index("def activate("), text.index("def hidden_masked(")
    changed = text[:start] + replace(text[start:end]) + text[end:]
    assert changed != text
    own = runner(spec.to_json(), ONE.device)
    module = loader.load(path / "kernel.py", changed, digest(changed))
    x = points()
    with monkeypatch.context() as patch:
        patch.setattr(ops, "runner", lambda spec_json, device: Runner(own.plan, module, own.pick))
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
    missed = [c for c in constants if not refused(name, lambda t, c=c: t.replace(c, repr(float(c) * 1.01)), monkeypatch, tmp_path)]
    assert not missed, f"changes of these constants of {name} went unnoticed: {missed}"


def test_a_wrong_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """silu holds x at -200, where the product is zero in float32 anyway, so that -inf gives 0 and not NaN."""
    assert refused("silu", lambda t: t.replace("200.0", "2.0"), monkeypatch, tmp_path)
