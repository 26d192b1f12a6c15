"""What tuning launches and checks, interpreted: every role alone, and a config forced into a whole call."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from collections.abc import Callable
from dataclasses import replace

import torch

from mlpdsl import MLPSpec, dispatch, launch
from mlpdsl.codegen.plan import Config, products
from mlpdsl.testing.oracle import OracleError
from mlpdsl.tuning import questions
from mlpdsl.tuning.launching import Product

torch.set_num_threads(1)

GATED = MLPSpec(dims=(48, 96, 40), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale", "residual"))
DEEP = MLPSpec(dims=(24, 40, 56, 16), activation="gelu", dtype="float32")
CONFIG = Config(32, 64, 32, num_stages=1)
LIBRARY = Config(16, 64, 16, num_stages=1, strategy="library")


@pytest.mark.parametrize("config", [CONFIG, LIBRARY])
@pytest.mark.parametrize("spec", [GATED, DEEP])
def test_every_role_is_launched_alone(spec: MLPSpec, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    run, product = launch.run, launch.product
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: [launched.append(kernel.__name__), run(kernel, *rest)])
    monkeypatch.setattr(launch, "product", lambda *operands: [launched.append("library"), product(*operands)])
    plan = dispatch.plan_of(spec.to_json())
    for role, stage, *_ in products(plan, 20):
        if config.strategy == "library" and role == "input_grad" and spec.gated:
            continue
        made = Product(spec, role, stage, 20, torch.device("cpu"))
        launched.clear()
        made.call(config)()
        kernels = [name for name in launched if name.startswith(role) or name == "library"]
        assert len(kernels) >= made.launches == 8, (role, launched)


def test_copies_go_round() -> None:
    made = Product(GATED, "output", 1, 20, torch.device("cpu"), l2_bytes=40_000)
    assert len(made._sets) > 2 and made.launches % len(made._sets) == 0
    assert len(Product(GATED, "output", 1, 20, torch.device("cpu"), l2_bytes=2_000)._sets) == 1


@pytest.mark.parametrize("config", [CONFIG, LIBRARY])
@pytest.mark.parametrize(("role", "stage"), [("hidden", 0), ("output", 1), ("hidden_grad", 1), ("weight_grad", 0)])
def test_a_right_config_is_found_right(role: str, stage: int, config: Config) -> None:
    words = {"path": "tma", "rows": 20, "config": config.to_dict(), "device": "cpu"}
    assert questions._check(GATED.to_json(), role, stage, **words) == {"reason": ""}


class Stopwatch:
    """A GPU that says how often it was asked to capture, and that every launch takes as long as its tile is tall."""

    torch_device, l2_bytes = "cpu", 40_000

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.cleared = 0

    def capture(self, call: Callable[[], None]) -> tuple[Callable[[], None], None]:
        call()
        self.captured.append(len(self.captured))
        return call, None

    def stretch(self, call: Callable[[], None], count: int) -> float:
        call()
        return 10.0

    def clear(self) -> None:
        self.cleared += 1


def test_a_candidate_is_timed_beside_the_default_which_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Stopwatch()
    monkeypatch.setattr(questions, "Gpu", lambda: gpu)
    monkeypatch.setattr(questions, "_gpu", None)
    default = CONFIG.to_dict()
    words = {"path": "tma", "rows": 20, "default": default, "rounds": 4, "floor": 0.5}
    launches = Product(GATED, "output", 1, 20, torch.device("cpu"), 40_000).launches
    for config in (replace(CONFIG, block_m=16), LIBRARY):
        found = questions._time(GATED.to_json(), "output", 1, config=config.to_dict(), **words)
        assert found == {"default": (10.0 / launches,) * 4, "candidate": (10.0 / launches,) * 4}
    assert len(gpu.captured) == 3  # the default once, and each candidate
    assert questions._check(GATED.to_json(), "output", 1, "tma", 20, default, device="cpu") == {"reason": ""}
    assert questions._held is None and gpu.cleared == 2  # the tensors made room for the check
    questions._time(GATED.to_json(), "output", 1, config=default, **words)
    assert len(gpu.captured) == 5
    questions._release()
    broken = replace(CONFIG, block_m=24).to_dict()  # no power of two: Triton refuses it
    assert "failed" in questions._time(GATED.to_json(), "output", 1, config=broken, **words)
    questions._release()


def test_a_wrong_one_is_told_and_one_that_was_not_used_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"rows": 20, "config": CONFIG.to_dict(), "device": "cpu"}
    found = questions._check(DEEP.to_json(), "hidden", 0, path="tma", **words)  # float32 has no such kernel
    assert found["reason"].startswith("not checked: the call took masked path, not tma")

    def wrong(call: object, backward: bool) -> None:
        raise OracleError("y of MLPSpec(…) is wrong\nby far")

    monkeypatch.setattr(questions, "check_call", wrong)
    found = questions._check(GATED.to_json(), "hidden", 0, path="tma", **words)
    assert found == {"reason": "wrong: OracleError: y of MLPSpec(…) is wrong"}


def test_too_large_a_check_is_made_at_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def checked(spec: MLPSpec, role: str, stage: int, path: str, rows: int, config: Config, device: str) -> str:
        tried.append(rows)
        if rows > 1000:
            raise torch.OutOfMemoryError("too large")
        return ""

    monkeypatch.setattr(questions, "_checked", checked)
    words = {"path": "tma", "config": CONFIG.to_dict(), "device": "cpu"}
    assert questions._check(GATED.to_json(), "hidden", 0, rows=4096, **words) == {"reason": ""} and tried == [4096, 2048, 1024, 512]
    monkeypatch.setattr(questions, "LEAST_ROWS", 2048)
    assert questions._check(GATED.to_json(), "hidden", 0, rows=4000, **words) == {"failed": "OutOfMemoryError: too large"}
