"""`batch_invariant=True` on a GPU: rows alone, in another order, in a larger batch, anywhere in memory, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.testing.calls import check_call, make_call, same_bits
from tests.invariance import differing

SPECS = {
    "swiglu": MLPSpec(dims=(1024, 2816, 1024), activation="silu", gated=True, dtype="bfloat16", epilogue=("residual",)),
    "gelu": MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float16", epilogue=("layer_scale",)),
    "odd": MLPSpec(dims=(515, 1027, 129), activation="silu", gated=True, bias=True, dtype="bfloat16"),
    "fp32": MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True),
    "tf32": MLPSpec(dims=(256, 512, 256), activation="silu", gated=True, precision="tf32"),
    "tf32x3": MLPSpec(dims=(256, 512, 256), activation="silu", precision="tf32x3"),
    "deep": MLPSpec(dims=(256, 512, 256, 512, 128), activation="relu", bias=True, dtype="bfloat16"),
    "narrow": MLPSpec(dims=(48, 64, 32, 24), activation="silu", bias=True, dtype="bfloat16", epilogue=("residual",)),
    "own": MLPSpec.from_json("""{
        "dims": [128, 256, 512], "activation": "mish", "dtype": "float16",
        "epilogue": [{"expr": "skip + keep * tile", "operands": [["keep", "row"], ["skip", "tile"]]}]
    }"""),
}
each_spec = pytest.mark.parametrize("name", SPECS)


@each_spec
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    choose = random.Random(name)
    failures = []
    for seed, count in enumerate((2, 17, 64, 129, 257, 1000, 4099)):
        call = make_call(SPECS[name], (count,), seed, device="cuda", pair="up_first" if seed % 2 else "apart")
        everything = list(range(count))
        choose.shuffle(everything)
        parts = [everything, [0], [count - 1], everything[: count // 2], everything[:16], everything[-100:], [1] * 70]
        for part, lies in zip(parts, ("dense", "dense", "offset", "padded", "ragged", "strided", "transposed"), strict=True):
            found = differing(call, part, lies)
            if found:
                failures.append(f"{found} of {len(part)} rows of {count}, {lies}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@each_spec
def test_against_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlpdsl.compile
    monkeypatch.setattr("mlpdsl.testing.calls.compile_spec", lambda spec, **k: real(spec, batch_invariant=True, **k))
    for rows, lies in ((1, "dense"), (300, "offset"), (2049, "padded")):
        check_call(make_call(SPECS[name], (rows,), 5, device="cuda", x=lies, operands=lies, dy=lies))


def test_in_a_graph_and_on_a_side_stream() -> None:
    call = make_call(SPECS["swiglu"], (129,), 0, device="cuda")
    mlp = mlpdsl.compile(SPECS["swiglu"], backend="triton", batch_invariant=True)
    wanted = call.run(mlp)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    few = {name: t[7:9] for name, t in call.operands.items()}
    mlp(call.x[7:9], *call.params, **few)
    with torch.cuda.graph(graph):
        captured = mlp(call.x[7:9], *call.params, **few)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, wanted[7:9])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = call.run(mlp)
    side.synchronize()
    assert same_bits(again, wanted)
