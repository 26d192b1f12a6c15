"""What a hostile reader found before the first release, each as a test."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import mlpdsl
from mlpdsl import MLPSpec, ShapeError, UnsupportedError
from mlpdsl.testing.calls import check_call, make_call


def spec(**changes: object) -> MLPSpec:
    return MLPSpec(**{"dims": (8, 16, 8), "activation": "gelu", **changes})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _cold() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.float])
def test_a_cast_layer_compiles_without_a_warm_call(backend: str, cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = cast(mlpdsl.MLP(spec(), backend=backend))
    x = torch.randn(3, 8, dtype=layer.fc1.weight.dtype)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_layer_compiles_under_autocast_without_a_warm_call(backend: str) -> None:
    layer, x = mlpdsl.MLP(spec(), backend=backend), torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))


def test_a_trainable_layer_exports_and_its_program_runs() -> None:
    layer, x = mlpdsl.MLP(spec(bias=True), backend="triton"), torch.randn(3, 8)
    program = torch.export.export(layer, (x,)).module()
    y = program(x)  # with gradients on, and parameters that require them
    torch.testing.assert_close(y, layer(x))
    if y.requires_grad:
        with pytest.raises(RuntimeError, match="records no gradient"):
            y.sum().backward()


@pytest.mark.parametrize(("target", "fields"), [("sm_75", {"dtype": "bfloat16"}), ("gfx942", {"precision": "tf32x3"})])
def test_what_the_target_cannot_do_runs_eager_unless_asked_for(
    target: str, fields: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpdsl import backends, dispatch

    monkeypatch.setenv("MLPDSL_TARGET", target)
    dispatch.target_of.cache_clear()
    backends._choose.cache_clear()
    mlp = mlpdsl.compile(spec(**fields))
    assert mlp.backend_for("cpu") == "eager"
    with pytest.raises(UnsupportedError):
        mlpdsl.compile(spec(**fields), backend="triton")
    explained = mlpdsl.explain(spec(**fields), m=4)
    assert explained.strategy == "eager"
    assert explained.rejected["two_stage"]
    dispatch.target_of.cache_clear()
    backends._choose.cache_clear()


def test_threads_take_turns_in_the_interpreter() -> None:
    layer, x = mlpdsl.MLP(spec(), backend="triton"), torch.randn(5, 8)
    wanted = layer(x)
    wrong: list[object] = []

    def call() -> None:
        try:
            wrong.extend([] if torch.equal(layer(x), wanted) else ["another result"] for _ in range(4))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [w for w in wrong if w]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_scalar_operand_of_any_shape_leaves_the_output_alone(backend: str, shape: tuple[int, ...]) -> None:
    scaled = spec(epilogue=("scale",))
    scale = torch.full(shape, 2.0, requires_grad=True)
    y = mlpdsl.MLP(scaled, backend=backend)(torch.randn(5, 8), scale=scale)
    assert y.shape == (5, 8)
    y.sum().backward()
    assert scale.grad is not None
    assert scale.grad.shape == shape


def test_a_child_whose_forward_would_be_skipped_is_refused() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0

    for change in (
        lambda layer: setattr(layer, "fc1", Quantised(8, 16, bias=False)),
        lambda layer: setattr(layer, "fc1", nn.Linear(8, 16)),
        lambda layer: layer.fc1.register_forward_hook(lambda *_: None),
    ):
        layer = mlpdsl.MLP(spec())
        change(layer)
        with pytest.raises(UnsupportedError, match="fc1"):
            layer(torch.randn(2, 8))


def test_the_bare_operator_stays_inside_its_tensors() -> None:
    with pytest.raises(ShapeError):
        torch.ops.mlpdsl.forward(torch.randn(4, 8), [torch.randn(3, 3), torch.randn(2, 2)], [], spec().to_json(), False)


def test_small_things() -> None:
    with pytest.raises(ShapeError, match="float"):
        mlpdsl.MLP(spec()).double()(torch.randn(2, 8, dtype=torch.float64))
    for bad in (-3, "x", 1.5):
        with pytest.raises(ShapeError):
            mlpdsl.generate(spec(), target="sm_90", m=bad)
        with pytest.raises(ShapeError):
            mlpdsl.warmup(spec(), m=bad)
    mlpdsl.warmup(spec(), m=2)
    assert mlpdsl.MLP(spec(), device="meta", backend="eager")(torch.randn(2, 8, device="meta")).shape == (2, 8)


def test_a_row_operand_of_no_rows() -> None:
    """The gradient of a row operand where there are no rows: the oracle once had no bound of its shape."""
    keep = mlpdsl.epilogue(lambda y, keep: y * keep, keep="row")
    for lead in ((0,), (2, 0), (0, 3)):
        check_call(make_call(spec(epilogue=(keep,)), lead, 0))
