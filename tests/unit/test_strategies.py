"""`mlpdsl.testing.strategies` and `calls`: what is drawn is valid, varied, small in print, and made again from its recipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")

from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import mlpdsl
from mlpdsl import MLPSpec, SpecError
from mlpdsl.names import ACTIVATIONS, DTYPES
from mlpdsl.testing import calls, strategies
from mlpdsl.testing.calls import GPU_PATTERNS, CallError, check_call, make_call, run_call, same_bits

ROOT = Path(__file__).resolve().parents[2]
GATED = MLPSpec(dims=(12, 20, 8), activation="silu", gated=True, bias=True, epilogue=("residual", "layer_scale"))
PLAIN = MLPSpec(dims=(16, 24, 8), activation="gelu")

quick = settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)


def drawn(strategy: st.SearchStrategy[Any], count: int = 200) -> list[Any]:
    found: list[Any] = []

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def smallest(strategy: st.SearchStrategy[Any], wanted: Callable[[Any], bool]) -> Any:
    return find(strategy, wanted, settings=settings(max_examples=500, deadline=None, database=None, derandomize=True))


def half(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) / 2


def product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * (up + 1)


def test_specs_are_varied() -> None:
    found = drawn(strategies.specs(), 600)
    assert {spec.depth for spec in found} == {1, 2, 3, 4}
    assert {spec.dtype for spec in found} == set(DTYPES)
    assert {spec.precision for spec in found} == {"ieee", "tf32", "tf32x3"}
    assert {spec.activation for spec in found} == set(ACTIVATIONS)
    assert {spec.gated for spec in found} == {spec.bias for spec in found} == {True, False}
    assert {"residual", "layer_scale", "scale", "relu"} <= {entry for spec in found for entry in spec.epilogue}
    assert max(max(spec.dims) for spec in found) <= 72
    multiples = [[w % 8 == 0 for w in spec.dims] for spec in found]
    for kind in ([True, True], [False, False], [True, False], [False, True]):  # of 8
        assert sum(several[:2] == kind for several in multiples) >= 10
    assert all(MLPSpec.from_json(spec.to_json()) == spec for spec in found)


@pytest.mark.parametrize(
    "fixed",
    [
        {"dims": (8, 8)},
        {"dims": [8, 8, 8, 8], "bias": True},
        {"dims": (3, 4, 5), "gated": True},
        {"gated": True},
        {"gated": False, "activation": "mish"},
        {"activation": "identity"},
        {"dtype": torch.float16},
        {"precision": "tf32"},
        {"epilogue": ("residual",), "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_fixed_fields_stay(fixed: dict[str, Any]) -> None:
    for spec in drawn(strategies.specs(**fixed), 30):
        for name, value in fixed.items():
            assert getattr(spec, name) == getattr(MLPSpec(**{"dims": (4, 4, 4), "activation": "identity", name: value}), name) or (
                name == "dims" and spec.dims == tuple(value)
            )


def test_functions_of_ones_own() -> None:
    scaled = mlpdsl.epilogue(lambda y, gamma: y * gamma, gamma="column")
    found = drawn(strategies.specs(activations=[half, product, "relu"], epilogue_entries=[scaled, half]), 150)
    names = {getattr(spec.activation, "name", spec.activation) for spec in found}
    assert names == {"half", "product", "relu"}
    assert all(spec.gated for spec in found if getattr(spec.activation, "name", "") == "product")
    assert {getattr(e, "name", e) for spec in found for e in spec.epilogue} >= {scaled.name, "half"}
    assert all(list(spec.operands()) in ([], ["gamma"]) for spec in found)
    assert all(spec.gated for spec in drawn(strategies.specs(activation=product), 20))


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(TypeError, match="MLPSpec has no field 'width'"):
        strategies.specs(width=3)
    with pytest.raises(SpecError, match="precision"):
        drawn(strategies.specs(dtype="float16", precision="tf32"), 2)


def test_narrowed_keeps_what_matters() -> None:
    spec = MLPSpec(dims=(4096, 1001, 4096), activation="gelu", bias=True, dtype="bfloat16", epilogue=("residual",))
    for narrow in drawn(strategies.narrowed(spec), 40):
        assert narrow.replace(dims=spec.dims) == spec
        assert narrow.d_in == narrow.d_out <= 72 and narrow.d_in % 8 == 0 and narrow.dims[1] % 8
    assert drawn(strategies.narrowed(GATED), 3) == [GATED]


def test_calls_are_varied_and_print_small() -> None:
    found = drawn(strategies.calls(GATED), 300)
    assert {call.values for call in found} == set(calls.VALUES)
    assert {call.pattern for call in found} == set(calls.PATTERNS)
    assert {call.recipe.get("x", "dense") for call in found} == set(calls.LAYOUTS)
    assert {call.recipe.get("pair", "apart") for call in found} == set(calls.PAIRS)
    assert any(call.requires_grad == () for call in found) and any(call.requires_grad is None for call in found)
    assert {len(call.x.shape) for call in found} == {1, 2, 3, 4}
    assert any(call.x.numel() == 0 for call in found)
    assert max(len(repr(call)) for call in found) < 600


@quick
@given(strategies.calls(strategies.specs(activations=["relu", "silu"])))
def test_a_call_is_made_again_from_its_recipe(call: calls.Call) -> None:
    again = make_call(call.spec, **call.recipe)
    printed = eval(repr(call), {"MLPSpec": MLPSpec, "make_call": make_call})
    for other in (again, printed):
        assert other.recipe == call.recipe
        for name, t in (*call.named().items(), ("dy", call.dy)):
            twin = other.dy if name == "dy" else other.named()[name]
            assert same_bits(twin, t) and twin.stride() == t.stride(), name


def test_failures_shrink_to_the_plainest_call() -> None:
    call = smallest(strategies.calls(GATED), lambda call: call.values == "huge")
    assert repr(call) == f"make_call({GATED!r}, (1,), 0, values='huge')"
    spec = smallest(strategies.specs(), lambda spec: spec.bias)
    assert spec == MLPSpec(dims=(1, 1), activation="identity", bias=True)
    spec = smallest(strategies.specs(), lambda spec: len(spec.dims) == 3)
    assert spec == MLPSpec(dims=(1, 1, 1), activation="identity")


def test_hypothesis_prints_the_call_that_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=5, database=None, print_blob=False)
    @given(call=strategies.calls(PLAIN))
    def fails(call: calls.Call) -> None:
        raise KeyError("always")

    with pytest.raises(KeyError) as caught:
        fails()
    noted = "\n".join(getattr(caught.value, "__notes__", [])) + capsys.readouterr().out
    assert f"make_call({PLAIN!r}, (" in noted
    assert "tensor(" not in noted


def test_values() -> None:
    spec = MLPSpec(dims=(64, 64, 64), activation="relu", dtype="bfloat16")
    zeros, specials = (make_call(spec, (20,), 0, values=values) for values in ("zeros", "specials"))
    for t in (zeros.x, zeros.dy, *zeros.params):
        assert 0.4 < float((t == 0).double().mean()) < 0.6
    assert (torch.signbit(zeros.x) & (zeros.x == 0)).any()
    assert specials.x.isnan().sum() == 1 and specials.x.isinf().sum() == 2
    assert (specials.x == 4096).any() and ((specials.x != 0) & (specials.x.abs() < 1e-37)).any()
    assert all(t.isfinite().all() for t in (*specials.params, specials.dy))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"x": "diagonal"}, "make_call, x: got 'diagonal'; allowed: 'dense'"),
        ({"weights": "expanded"}, "weights"),
        ({"values": "random"}, "values"),
        ({"pattern": "twice"}, "pattern"),
        ({"requires_grad": ["y"]}, "requires_grad: got 'y'; allowed: 'x', 'fc1.weight'"),
    ],
    ids=str,
)
def test_unknown_words_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_call(PLAIN, (3,), 0, **words)


@pytest.mark.parametrize("pattern", calls.PATTERNS)
def test_patterns_on_eager(pattern: str) -> None:
    seen: list[tuple[int, bool]] = []
    reference = mlpdsl.reference(PLAIN)

    def mlp(x: Tensor, *params: Tensor) -> Tensor:
        seen.append((x.storage_offset() % 8, x.requires_grad))
        return reference(x, *params)

    y, grads = run_call(make_call(PLAIN, (3,), 0, pattern=pattern, requires_grad=["x", "fc2.weight"]), mlp)
    assert y.shape == (3, 8) and list(grads) == ["x", "fc2.weight"]
    expected = {"once": [(0, True)], "repeat": [(0, True)] * 3 + [(0, False)] * 3, "retained": [(0, True)]}
    assert seen == (expected[pattern] if pattern != "warm" else [(1, True), (0, True)])


def test_other_bits_the_second_time() -> None:
    reference, count = mlpdsl.reference(PLAIN), [0]

    def unsteady(x: Tensor, *params: Tensor) -> Tensor:
        count[0] += 1
        return reference(x, *params) * (1 + count[0] * 1e-6)

    with pytest.raises(CallError, match="y has other bits"):
        run_call(make_call(PLAIN, (3,), 0, pattern="repeat"), unsteady)

    class Unsteady(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            count[0] += 1
            return grad * (1 + count[0] * 1e-6)

    with pytest.raises(CallError, match="gradient of x has other bits"):
        run_call(make_call(PLAIN, (3,), 0, pattern="retained"), lambda x, *params: Unsteady.apply(reference(x, *params)))


def test_a_written_input_is_seen() -> None:
    reference = mlpdsl.reference(PLAIN)

    def writes(x: Tensor, *params: Tensor) -> Tensor:
        x.data.view(-1)[0] = 1.0
        return reference(x, *params)

    with pytest.raises(CallError, match="an input was written"):
        check_call(make_call(PLAIN, (3,), 0), writes)


@pytest.mark.parametrize("pattern", GPU_PATTERNS)
def test_patterns_of_a_gpu_are_refused_elsewhere(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"pattern: got '{pattern}'; allowed: 'once'"):
        make_call(MLPSpec(dims=(4, 4), activation="identity"), (2,), 0, pattern=pattern)


def entry_points(folder: Path) -> str:
    """A PYTHONPATH on which mlpdsl is this tree, and declares the entry points that pyproject.toml gives it."""
    info = folder / "installed" / "mlpdsl-0.0.0.dist-info"
    if not info.exists():
        info.mkdir(parents=True)
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        groups = re.findall(r'^\[project\.entry-points\.(\w+)\]\nmlpdsl = "([\w.:]+)"$', text, re.M)
        assert sorted(group for group, _ in groups) == ["hypothesis", "pytest11"]
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlpdsl\nVersion: 0.0.0\n")
        (info / "entry_points.txt").write_text("".join(f"[{group}]\nmlpdsl = {where}\n" for group, where in groups))
    return os.pathsep.join([str(info.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def python(code: str, tmp_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": entry_points(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_hypothesis_stays_cheap(tmp_path: Path) -> None:
    code = "import sys, hypothesis; print([m for m in ('mlpdsl.testing', 'mlpdsl.spec', 'torch', 'triton') if m in sys.modules])"
    assert python(code, tmp_path) == "['mlpdsl.testing', 'mlpdsl.spec']\n"


def test_from_the_type_alone(tmp_path: Path) -> None:
    code = """
from hypothesis import given, settings, strategies as st
from mlpdsl import MLPSpec

@settings(max_examples=20, database=None, deadline=None)
@given(...)
def test(spec: MLPSpec, other: MLPSpec | None) -> None:
    seen.append(spec)

seen = []
test()
print(len(seen), all(max(spec.dims) <= 72 for spec in seen))
"""
    assert python(code, tmp_path) == "20 True\n"
