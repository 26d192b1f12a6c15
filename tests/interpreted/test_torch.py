"""The compiled MLP among torch's own machinery: modules, autocast, errors, backends."""

from __future__ import annotations

import pytest

from mlpdsl.testing.calls import make_call, same_bits
from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLP, MLPSpec, ShapeError, SpecError, UnsupportedError, ops
from mlpdsl.testing import oracle
from tests.layers import GATED, PLAIN, compiled, each_spec, layer_of, operands_of

# The module


@each_spec
def test_state_dict(spec: MLPSpec) -> None:
    layer = layer_of(spec)
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == spec.parameter_shapes()
    assert list(state) == list(spec.parameter_shapes())
    other = layer_of(spec, seed=1)
    x, operands = torch.randn(5, spec.d_in), operands_of(spec, 5)
    y = layer(x, **operands)
    assert not same_bits(other(x, **operands), y)
    assert other.load_state_dict(state).missing_keys == []
    assert same_bits(other(x, **operands), y)


@each_spec
def test_functional_and_module_agree(spec: MLPSpec) -> None:
    layer = layer_of(spec)
    x, operands = torch.randn(2, 5, spec.d_in), operands_of(spec, 2, 5)
    assert same_bits(layer(x, **operands), compiled(spec)(x, *layer.parameters(), **operands))


@each_spec
def test_copies(spec: MLPSpec, tmp_path: Path) -> None:
    layer = layer_of(spec)
    x, operands = torch.randn(5, spec.d_in), operands_of(spec, 5)
    y = layer(x, **operands)
    file = tmp_path / "layer.pt"
    torch.save(layer, file)
    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    memory.seek(0)
    from_state = layer_of(spec, seed=1)
    from_state.load_state_dict(torch.load(memory, weights_only=True))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), from_state]
    for other in copies:
        assert same_bits(other(x, **operands), y)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert same_bits(layer(x, **operands), y), "a copy shares parameters"
    mlp = compiled(spec)
    assert same_bits(pickle.loads(pickle.dumps(mlp))(x, *layer.parameters(), **operands), y)
    assert same_bits(copy.deepcopy(mlp)(x, *layer.parameters(), **operands), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_follows_its_parameters(dtype: torch.dtype) -> None:
    layer = layer_of(GATED)
    x = torch.randn(5, 24)
    before = layer(x)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    narrow = GATED.replace(dtype=dtype)
    oracle.check(y, oracle.forward(narrow, x.to(dtype), list(layer.parameters()), replay=True), "y")
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())
    with pytest.raises(ShapeError, match=r"x\.dtype"):
        layer(x)
    layer.float()
    assert layer(x).dtype == torch.float32 and before.dtype == torch.float32


def test_module_in_a_model_trains() -> None:
    """A few steps of SGD do what they do in eager PyTorch."""
    spec = MLPSpec(dims=(8, 16, 8), activation="gelu", bias=True)
    torch.manual_seed(0)
    ours = nn.Sequential(nn.LayerNorm(8), MLP(spec, backend="triton"), nn.Linear(8, 1))
    theirs = copy.deepcopy(ours)
    theirs[1] = MLP(spec, backend="eager")
    theirs[1].load_state_dict(ours[1].state_dict())
    x, wanted = torch.randn(32, 8), torch.randn(32, 1)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [GATED, PLAIN], ids=["gated", "plain"])
def test_autocast(spec: MLPSpec, dtype: torch.dtype) -> None:
    """float32 parameters, autocast's dtype in the kernels, float32 gradients of float32 tensors."""
    call = make_call(spec, (20,), 0).needing()
    mlp = compiled(spec)
    with torch.autocast("cpu", dtype):
        y = call.run(mlp)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == dtype
    narrow = spec.replace(dtype=dtype)
    x, *params = (t.detach().to(dtype) for t in (call.x, *call.params))
    operands = {name: t.detach().to(dtype) for name, t in call.operands.items()}
    oracle.check(y, oracle.forward(narrow, x, params, operands, replay=True), "y")
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = oracle.backward(narrow, x, params, operands, dy, replay=True)
    for name, t in call.named().items():
        assert t.grad is not None and t.grad.dtype == torch.float32
        oracle.check(t.grad.to(dtype), expected[name], f"gradient of {name}")


def test_autocast_like_linear() -> None:
    """Arguments of mixed dtypes are cast as nn.Linear's are; without gradients too; a 16-bit spec keeps its own dtype."""
    call = make_call(GATED, (5,), 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = compiled(GATED)(call.x.bfloat16(), *call.params)
        assert y.dtype == torch.bfloat16
        assert same_bits(y, compiled(GATED)(call.x, *(p.bfloat16() for p in call.params)))
        half = compiled(GATED.replace(dtype="float16"))(call.x.half(), *(p.half() for p in call.params))
        assert half.dtype == torch.float16
    layer = layer_of(GATED)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(call.x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# Calls that do not fit


def _calls_that_do_not_fit() -> dict[str, tuple[Callable[[], Tensor], str]]:
    mlp, call = compiled(PLAIN), make_call(PLAIN, (5,), 0)
    x, params, operands = call.x, call.params, call.operands

    def run(*args: object, **changes: object) -> Callable[[], Tensor]:
        named = {**operands, **changes}
        return lambda: mlp(*args, **{n: t for n, t in named.items() if t is not None})

    return {
        "width of x": (run(torch.randn(5, 14), *params), r"x\.shape"),
        "x without dimensions": (run(torch.tensor(1.0), *params), r"x\.shape"),
        "x is a list": (run([[1.0] * 13], *params), "x"),
        "dtype of x": (run(x.double(), *params), r"x\.dtype"),
        "integer x": (run(x.long(), *params), r"x\.dtype"),
        "sparse x": (run(x.to_sparse(), *params), r"x\.layout"),
        "device of a weight": (run(x, params[0].to("meta"), *params[1:]), r"fc1\.weight\.device"),
        "too few parameters": (run(x, *params[:-1]), "parameters"),
        "too many parameters": (run(x, *params, params[0]), "parameters"),
        "weight transposed": (run(x, params[0].T, *params[1:]), r"fc1\.weight\.shape"),
        "bias as a row": (run(x, params[0], params[1][None], *params[2:]), r"fc1\.bias\.shape"),
        "dtype of a bias": (run(x, params[0], params[1].half(), *params[2:]), r"fc1\.bias\.dtype"),
        "missing operand": (run(x, *params, residual=None), "missing residual"),
        "unexpected operand": (run(x, *params, gamma=x), "unexpected gamma"),
        "residual that would broadcast": (run(x, *params, residual=torch.randn(9)), r"residual\.shape"),
        "dtype of the residual": (run(x, *params, residual=operands["residual"].double()), r"residual\.dtype"),
        "layer_scale of one": (run(x, *params, layer_scale=torch.ones(1)), r"layer_scale\.shape"),
        "scale of two": (run(x, *params, scale=torch.ones(2)), r"scale\.shape"),
        "scale is a number": (run(x, *params, scale=2.0), "scale"),
    }


@pytest.mark.parametrize("name", list(_calls_that_do_not_fit()))
def test_shape_errors_before_any_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = _calls_that_do_not_fit()[name]

    def launched(*_: object) -> None:
        pytest.fail("a kernel was about to be launched")

    monkeypatch.setattr(ops, "runner", launched)
    with pytest.raises(ShapeError, match=message):
        call()


# Backends


def test_backend_by_argument_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(GATED, (5,), 0)
    launched: list[str] = []
    real = ops.runner
    monkeypatch.setattr(ops, "runner", lambda *args: launched.append("triton") or real(*args))
    eager = mlpdsl.reference(GATED)
    wanted = call.run(eager)
    assert same_bits(call.run(mlpdsl.compile(GATED, backend="eager")), wanted) and not launched
    monkeypatch.setenv("MLPDSL_BACKEND", "eager")
    assert same_bits(call.run(mlpdsl.compile(GATED)), wanted) and not launched
    call.run(mlpdsl.compile(GATED, backend="triton"))
    assert launched, "an argument outranks the variable"
    launched.clear()
    monkeypatch.delenv("MLPDSL_BACKEND")
    call.run(mlpdsl.compile(GATED))
    assert launched, "the interpreter makes triton the default on a CPU"
    monkeypatch.setenv("MLPDSL_BACKEND", "")
    mlpdsl.compile(GATED)


def test_invalid_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("tritn", "", 3, b"triton", None):
        if wrong is not None:
            with pytest.raises(SpecError, match=r"backend.*'triton', 'pallas', 'eager'"):
                mlpdsl.compile(GATED, backend=wrong)
    monkeypatch.setenv("MLPDSL_BACKEND", "tritn")
    with pytest.raises(SpecError, match=r"MLPDSL_BACKEND.*Did you mean 'triton'"):
        mlpdsl.compile(GATED)


def test_unsupported_says_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(GATED, (5,), 0)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match=r"backend 'triton' cannot run on cpu") as error:
        call.run(mlpdsl.compile(GATED, backend="triton"))
    assert len(error.value.reasons) == 1 and "TRITON_INTERPRET=1" in error.value.reasons[0]
    assert same_bits(call.run(mlpdsl.compile(GATED)), call.run(mlpdsl.reference(GATED))), "by itself it falls back"
    with pytest.raises(UnsupportedError) as error:
        mlpdsl.compile(GATED, save="input", batch_invariant=True, backend="eager")
    assert len(error.value.reasons) == 2
    with pytest.raises(UnsupportedError, match=r"backend 'triton' cannot run on cpu"):  # and never by eager PyTorch
        call.run(mlpdsl.compile(GATED, batch_invariant=True))
    with pytest.raises(SpecError, match="save"):
        mlpdsl.compile(GATED, save="nothing")
    with pytest.raises(SpecError, match="batch_invariant"):
        mlpdsl.compile(GATED, batch_invariant=1)
    with pytest.raises(SpecError, match="MLPSpec"):
        mlpdsl.compile(GATED.to_json())


@each_spec
def test_eager_backend_is_within_the_oracle(spec: MLPSpec) -> None:
    """The reference itself, in float32: forward and every gradient; and it differentiates twice."""
    call = make_call(spec, (9,), 0)
    y, grads = call.gradients(mlpdsl.compile(spec, backend="eager"))
    oracle.check(y, oracle.forward(spec, call.x, call.params, call.operands), "y")
    for name, wanted in oracle.backward(spec, call.x, call.params, call.operands, call.dy).items():
        oracle.check(grads[name], wanted, name)


def test_warmup_and_explain() -> None:
    mlpdsl.warmup(GATED, m=(0, 1, 5), backward=True)
    with pytest.raises(ShapeError):
        mlpdsl.warmup(GATED, m=(-1,))
    text = str(mlpdsl.explain(GATED, m=5))
    assert "m=5" in text and GATED.short_name in text
