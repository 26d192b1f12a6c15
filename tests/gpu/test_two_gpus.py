"""What takes two GPUs (`make test-gpu-2`): tensors on a device that is not the current one."""

from __future__ import annotations

import threading

import pytest
import torch

import mlpdsl
from mlpdsl import MLP, MLPSpec, ShapeError
from mlpdsl.testing.calls import check_call, make_call, same_bits

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SPECS = {
    "gated": MLPSpec(dims=(128, 256, 128), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",)),
    "odd": MLPSpec(dims=(67, 131, 37), activation="gelu", bias=True, dtype="float16"),
    "fp32": MLPSpec(dims=(96, 160, 64), activation="gelu", bias=True, epilogue=("layer_scale",)),
    "deep": MLPSpec(dims=(64, 128, 96, 64, 32), activation="mish", bias=True, dtype="bfloat16"),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_device = pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
each_current = pytest.mark.parametrize("current", [0, 1])


@each_spec
@each_device
@each_current
def test_wrong_current_device(spec: MLPSpec, device: str, current: int) -> None:
    """Kernels run where the tensors are, and leave the current device as it was."""
    with torch.cuda.device(current):
        for rows in (1, 93):
            check_call(make_call(spec, (rows,), 0, device=device))
            check_call(make_call(spec, (rows,), 1, device=device, x="strided", dy="offset", pattern="warm"))
        assert torch.cuda.current_device() == current


@each_spec
def test_both_give_the_same_bits(spec: MLPSpec) -> None:
    """Equal inputs on two GPUs of one kind, called in turn and from the backward thread of each."""
    mlp = mlpdsl.compile(spec, backend="triton")
    first = make_call(spec, (93,), 0, device="cuda:0")
    second = first.needing()
    for name in ("x", "dy"):
        setattr(second, name, getattr(first, name).detach().to("cuda:1"))
    second.params = [p.detach().to("cuda:1") for p in first.params]
    second.operands = {name: t.detach().to("cuda:1") for name, t in first.operands.items()}
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the two GPUs are not of one kind")
    for _ in range(3):
        (y, grads), (other, others) = first.gradients(mlp), second.gradients(mlp)
        assert other.device == torch.device("cuda:1") and same_bits(y.cpu(), other.cpu())
        for name, grad in grads.items():
            assert others[name].device == torch.device("cuda:1") and same_bits(grad.cpu(), others[name].cpu()), name


def test_mixed_devices_are_refused() -> None:
    spec = SPECS["gated"]
    call = make_call(spec, (9,), 0, device="cuda:1")
    with pytest.raises(ShapeError, match="device"):
        mlpdsl.compile(spec)(call.x.to("cuda:0"), *call.params, **call.operands)


def test_threads_on_two_devices() -> None:
    """Two threads, each with its own current device, at the same time."""
    spec = SPECS["gated"]
    mlp = mlpdsl.compile(spec, backend="triton")
    failures: list[str] = []
    start = threading.Barrier(4)

    def work(device: int) -> None:
        try:
            torch.cuda.set_device(device)
            calls = [make_call(spec, (rows,), rows, device=f"cuda:{device}") for rows in (5, 93, 200)]
            wanted = [call.gradients(mlp)[0].clone() for call in calls]
            start.wait()
            for _ in range(20):
                for call, y in zip(calls, wanted, strict=True):
                    assert same_bits(call.gradients(mlp)[0], y)
        except Exception as error:
            failures.append(f"{device}: {type(error).__name__}: {error}")
            start.abort()

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_side_stream_of_the_other_device() -> None:
    spec = SPECS["fp32"]
    mlp = mlpdsl.compile(spec, backend="triton")
    call = make_call(spec, (93,), 0, device="cuda:1")
    wanted = call.run(mlp)
    side = torch.cuda.Stream(device="cuda:1")
    side.wait_stream(torch.cuda.current_stream(torch.device("cuda:1")))
    with torch.cuda.stream(side):
        found = call.run(mlp)
    side.synchronize()
    assert same_bits(found, wanted)


def test_a_module_moves() -> None:
    torch.manual_seed(0)
    layer = MLP(SPECS["gated"], device="cuda:0")
    x = torch.randn(17, 128, device="cuda:0", dtype=torch.bfloat16)
    before = layer(x, residual=x).detach().cpu()
    layer.to("cuda:1")
    assert same_bits(layer(x.to("cuda:1"), residual=x.to("cuda:1")).detach().cpu(), before)
