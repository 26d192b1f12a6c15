"""Call patterns that only a GPU has, and that they see what they are there to see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import GPU_PATTERNS, PATTERNS, CallError, check_call, make_call, run_call

SPECS = {
    "gated-bf16": MLPSpec(dims=(128, 256, 128), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual",)),
    "odd-fp16": MLPSpec(dims=(67, 131, 37), activation="gelu", bias=True, dtype="float16"),
    "deep-fp32": MLPSpec(dims=(40, 72, 33, 64), activation="mish", epilogue=("layer_scale", "tanh", "scale")),
    "own-bf16": MLPSpec(dims=(64, 96, 48), activation=lambda x: x * torch.sin(x), dtype="bfloat16", epilogue=("layer_scale",)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.mark.parametrize("pattern", [*PATTERNS, *GPU_PATTERNS])
@each_spec
def test_every_pattern(spec: MLPSpec, pattern: str) -> None:
    """At calm and at special values, dense and expanded, with all gradients, some and none; and with no rows at all."""
    names = ("x", *spec.parameter_shapes())
    for rows, words in (
        (93, {}),
        (200, {"x": "strided", "dy": "expanded", "weights": "transposed", "requires_grad": names[1:2]}),
        (33, {"x": "expanded", "values": "specials", "operands": "columns", "requires_grad": ()}),
        (70, {"x": "padded", "weights": "offset", "pair": "up_first", "values": "huge", "requires_grad": names[:1]}),
        (0, {}),
    ):
        words = {name: word for name, word in words.items() if name != "pair" or spec.gated}
        check_call(make_call(spec, (rows,), 5, device="cuda", pattern=pattern, **words))


def on_the_default_stream(mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrong: launches on another stream than the current one."""

    def wrong(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return mlp(x, *params, **operands)

    return wrong


def remembering(mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrong: keeps what it read at an address, as a remembered descriptor over a copy would."""
    seen: dict[int, Tensor] = {}

    def wrong(x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        copy = seen.setdefault(x.data_ptr(), x.detach().clone())
        return mlp(copy, *params, **operands)

    return wrong


@pytest.mark.parametrize(
    ("pattern", "mistake"),
    [("side_stream", on_the_default_stream), ("captured", remembering)],
    ids=["side_stream", "captured"],
)
@each_spec
def test_a_wrong_call_is_seen(spec: MLPSpec, pattern: str, mistake: Callable[..., Callable[..., Tensor]]) -> None:
    mlp = mlpdsl.compile(spec, backend="triton")
    call = make_call(spec, (93,), 0, device="cuda", pattern=pattern, requires_grad=())
    run_call(call, mlp)
    with pytest.raises(CallError, match="y has other bits"):
        run_call(call, mistake(mlp))
