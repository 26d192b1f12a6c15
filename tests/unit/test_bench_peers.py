"""What `mlpdsl bench` compares with: plain PyTorch, Liger, and the tensors that all of them get."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec, SpecError
from mlpdsl.bench import peers
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import Row
from tests.unit.test_bench import OTHER, SPEC

SPECS = {
    "gated": SPEC,
    "one linear": OTHER,
    "deep": MLPSpec(dims=(5, 7, 6, 3), activation="mish", bias=True, epilogue=("layer_scale", "residual", "silu", "scale")),
    "half": MLPSpec(dims=(6, 10, 4), activation="gelu_tanh", dtype="float16"),
    "own": MLPSpec(dims=(6, 10, 6), activation=lambda gate, up: torch.tanh(gate) * (up + 1.0), gated=True,
                   epilogue=(mlpdsl.epilogue(lambda y, keep, other: y * keep + other, keep="row", other="tile"),)),
}  # fmt: skip


@pytest.mark.parametrize("passes", ["forward", "train"])
@pytest.mark.parametrize("name", SPECS)
def test_plain_pytorch_is_the_reference(name: str, passes: str) -> None:
    row = Row(name, SPECS[name], 3, passes)
    tensors = peers.make_tensors(row, "cpu", 0)
    results = [peers.step(function(row.spec), tensors)() for function in (peers.plain, mlpdsl.reference)]
    assert peers.difference(*results) == 0.0
    if passes == "train":
        assert len(results[0]) == len(tensors.inputs) and all(
            g.shape == t.shape for g, t in zip(results[0], tensors.inputs, strict=True)
        )


def test_tensors_are_drawn_anew_by_seed_and_shared_by_again() -> None:
    row = Row("x", SPEC, 3, "train")
    one, same, other = (peers.make_tensors(row, "cpu", seed) for seed in (0, 0, 1))
    assert torch.equal(one.x, same.x) and not torch.equal(one.x, other.x)
    again = one.again()
    assert again.x.data_ptr() == one.x.data_ptr() and again.x is not one.x and again.x.requires_grad and again.x.is_leaf
    assert one.params[0].std() < 0.6 and not peers.make_tensors(Row("x", SPEC, 3), "cpu", 0).x.requires_grad


def test_a_difference() -> None:
    a = torch.tensor([3.0, 4.0])
    assert peers.difference(a * 1.1, a) == pytest.approx(0.1) and peers.difference((a, 2 * a), (a, a)) == 1.0
    assert peers.difference(torch.zeros(2), torch.zeros(2)) == 0.0
    for wrong in (torch.tensor([3.0, float("inf")]), torch.tensor([3.0, float("nan")]), torch.ones(3)):
        assert peers.difference(wrong, a) == float("inf")


@pytest.mark.parametrize("set_by_user", ["ieee", "tf32"])
def test_float32_products_are_what_the_spec_says(set_by_user: str) -> None:
    flag = torch.backends.cuda.matmul
    before = flag.fp32_precision
    flag.fp32_precision = set_by_user
    try:
        for precision, wanted in (("ieee", "ieee"), ("tf32", "tf32"), ("tf32x3", "ieee")):
            with peers.surroundings(Row("x", SPEC.replace(precision=precision), 1)):
                assert flag.fp32_precision == wanted and not torch.is_grad_enabled()
            assert flag.fp32_precision == set_by_user
        with peers.surroundings(Row("x", SPEC, 1, "train")):
            assert torch.is_grad_enabled()
    finally:
        flag.fp32_precision = before


def test_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = peers.CANDIDATES["liger"]
    for spec in (OTHER, SPEC.replace(activation="gelu"), SPEC.replace(epilogue=("residual",))):
        with pytest.raises(peers.AbsentError, match="without an epilogue"):
            factory(spec)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(peers.AbsentError, match="pip install liger-kernel"):
        factory(SPEC)
    units = {
        ("swiglu", "LigerSiLUMulFunction"): torch.nn.functional.silu,
        ("geglu", "LigerGELUMulFunction"): lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    for (part, name), function in units.items():
        module = ModuleType(f"liger_kernel.ops.{part}")
        setattr(module, name, SimpleNamespace(apply=lambda gate, up, function=function: function(gate) * up))
        for parent in ("liger_kernel", "liger_kernel.ops"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for bias in (True, False):
            spec = SPEC.replace(activation="silu" if part == "swiglu" else "gelu_tanh", bias=bias)
            row = Row("x", spec, 3)
            tensors = peers.make_tensors(row, "cpu", 0)
            results = [peers.step(made(spec), tensors)() for made in (factory, peers.plain)]
            assert peers.difference(*results) < 1e-6


def test_every_candidate_has_a_name_in_the_settings() -> None:
    assert list(peers.CANDIDATES) == ["mlpdsl", *Settings().peers]
    assert Settings(peers=("liger", "eager", "eager")).peers == ("eager", "liger")
    for words in ({"peers": ("quack",)}, {"launches": ()}, {"regimes": ("short",)}):
        with pytest.raises(SpecError):
            Settings(**words)  # type: ignore[arg-type]


def test_torch_compile_is_asked_for_one_shape_and_never_for_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compile(function: object, **words: object) -> object:
        asked.append(words)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    row = Row("x", SPEC, 3)
    tensors = peers.make_tensors(row, "cpu", 0)
    for name in ("compile", "max-autotune"):
        assert peers.step(peers.CANDIDATES[name](SPEC), tensors)().shape == (3, 8)
    modes: list[str | None] = [None, "max-autotune-no-cudagraphs"]
    assert asked == [{"dynamic": False, "fullgraph": True, "mode": mode} for mode in modes]
