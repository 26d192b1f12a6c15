"""`mlpdsl.testing.check` and `fuzz`: right kernels pass, wrong ones fail with a script that fails as well.

In this process eager PyTorch stands in for the kernels; the kernels run in processes of their own, which interpret them.
"""

from __future__ import annotations

import sys
import time
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")

import hypothesis

import mlpdsl
from mlpdsl import MLPSpec, SpecError
from mlpdsl.testing import FuzzError, calls, check, child, compiling, fuzz, fuzzing, places, strategies
from mlpdsl.testing.places import skip_reason
from tests.wrong_processes import REFUSED, python_path, run

SPEC = MLPSpec(dims=(12, 20, 8), activation="silu", gated=True, bias=True)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """Eager PyTorch in the place of the kernels; called, it changes the result. At infinity eager gives NaN, so not there."""
    monkeypatch.setattr(fuzzing, "place", lambda: "interpreter")
    monkeypatch.setattr(fuzzing, "skip_reason", lambda spec=None: "")
    monkeypatch.setattr(fuzzing, "_compiling", lambda spec: nullcontext())
    calm = [values for values in calls.VALUES if values != "specials"]
    monkeypatch.setattr(strategies, "values", lambda: hypothesis.strategies.sampled_from(calm))
    # Eager's bits may differ between a call with gradients and one without.
    steady = [pattern for pattern in calls.PATTERNS if pattern != "repeat"]
    monkeypatch.setattr(strategies, "patterns", lambda *_: hypothesis.strategies.sampled_from(steady))

    def use(change: Callable[[Tensor], Tensor]) -> None:
        def compiled(spec: MLPSpec, backend: str | None = None) -> Callable[..., Tensor]:
            return lambda *args, **operands: change(mlpdsl.reference(spec)(*args, **operands))

        monkeypatch.setattr(calls, "compile_spec", compiled)

    use(lambda y: y)
    return use


def recipes(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[str]:
    """The calls that `check` makes."""
    seen: list[str] = []
    monkeypatch.setattr(fuzzing, "check_call", lambda call: seen.append(repr(call)))
    check(SPEC, **arguments)
    return seen


def test_a_correct_mlp_passes(eager: Any) -> None:
    check(SPEC, 40, 0)
    check(mlpdsl.MLP(SPEC), 3)
    check(mlpdsl.compile(SPEC), 3)
    check(strategies.specs(dtype="float32", precision="ieee", activations=["relu"], epilogue_entries=["residual"]), 15, 0)


def test_a_wrong_one_fails_with_a_script(eager: Any) -> None:
    eager(lambda y: y * (1 + 1e-3))
    with pytest.raises(FuzzError, match=r"OracleError: y of MLPSpec\(") as caught:
        check(SPEC, 40, 0)
    message, script = str(caught.value), caught.value.script
    assert message.endswith(script.rstrip("\n"))
    assert caught.value.call.recipe == {"lead": (1,), "seed": caught.value.call.recipe["seed"]}
    with pytest.raises(AssertionError, match="out of bounds"):
        exec(compile(script, "script.py", "exec"), {})
    eager(lambda y: y)
    exec(compile(script, "script.py", "exec"), {})


def test_what_the_call_raises_is_told(eager: Any) -> None:
    def breaks(y: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    eager(breaks)
    with pytest.raises(FuzzError, match="RuntimeError: no such kernel") as caught:
        check(SPEC, 5, 0)
    assert "from mlpdsl.testing.calls import check_call, make_call" in caught.value.script


def test_seeds_examples_and_seconds(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (recipes(monkeypatch, examples=12, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 12 and first == again != other
    assert len(recipes(monkeypatch, seed=0)) == hypothesis.settings.default.max_examples
    began = time.monotonic()
    assert recipes(monkeypatch, examples=10**6, seconds=0.3)
    assert time.monotonic() - began < 5
    assert len(recipes(monkeypatch, examples=10**6, seconds=0)) == 1


def test_equal_specs_draw_equal_calls_and_others_do_not(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a profile that is derandomised, as this suite's."""
    seeds: list[list[int]] = []
    for spec in (SPEC, MLPSpec.from_json(SPEC.to_json()), SPEC.replace(bias=False)):
        seen: list[int] = []
        monkeypatch.setattr(fuzzing, "check_call", lambda call, seen=seen: seen.append(call.recipe["seed"]))
        check(spec, 10)
        seeds.append(seen)
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_failure_is_kept_and_tried_first(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the database of the Hypothesis profile, for this spec and for no other."""
    database = hypothesis.database.InMemoryExampleDatabase()
    hypothesis.settings.register_profile("kept", derandomize=False, database=database, max_examples=30)
    hypothesis.settings.register_profile("before", hypothesis.settings.default)
    hypothesis.settings.load_profile("kept")
    try:
        eager(lambda y: y * (1 + 1e-3))
        with pytest.raises(FuzzError) as caught:
            check(SPEC)
        assert recipes(monkeypatch)[0] == repr(caught.value.call)
    finally:
        hypothesis.settings.load_profile("before")


def test_widths(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = MLPSpec(dims=(264, 8), activation="identity")
    monkeypatch.setattr(strategies.Recipe, "make", lambda recipe: recipe)
    for widths, place, expected in (
        ("auto", "gpu", 264),
        ("auto", "interpreter", 72),
        ("own", "interpreter", 264),
        ("narrow", "gpu", 72),
    ):
        monkeypatch.setattr(fuzzing, "place", lambda place=place: place)
        seen: list[tuple[int, str]] = []
        monkeypatch.setattr(fuzzing, "check_call", lambda r, seen=seen: seen.append((r.spec.d_in, r.recipe.get("device", "cpu"))))
        check(wide, 5, 0, widths=widths)
        assert {width for width, _ in seen} == {264} if expected == 264 else max(seen)[0] <= 72
        assert {device for _, device in seen} == {"cuda" if place == "gpu" else "cpu"}
    with pytest.raises(ValueError, match="widths: got 'some'; allowed: auto, own, narrow"):
        check(SPEC, widths="some")
    with pytest.raises(ValueError, match="compile: got True; allowed: auto, off"):
        check(SPEC, compile=True)


def test_fuzz_as_a_decorator(eager: Any) -> None:
    seen: list[tuple[str, Any]] = []

    @fuzz(SPEC, examples=6, seed=0)
    def test(tmp_path: str, call: calls.Call) -> None:
        """Says more."""
        seen.append((tmp_path, call))

    assert list(test.__signature__.parameters) == ["tmp_path"] and test.__doc__ == "Says more."
    test(tmp_path="here")
    assert len(seen) == 6 and {where for where, _ in seen} == {"here"}
    assert all(isinstance(call, calls.Call) for _, call in seen)

    @fuzz(SPEC, examples=6, seed=0)
    def test_assertion(call: calls.Call) -> None:
        assert call.x.numel() == 0, "the test's own word"

    with pytest.raises(FuzzError, match="AssertionError: the test's own word"):
        test_assertion()

    @fuzz(SPEC, examples=6, seed=0)
    def test_skips(call: calls.Call) -> None:
        raise unittest.SkipTest("not today")

    with pytest.raises(unittest.SkipTest, match="not today"):
        test_skips()
    with pytest.raises(TypeError, match=r"test_nothing\(x\) has no parameter 'call'"):

        @fuzz(SPEC)
        def test_nothing(x: int) -> None: ...


test_fuzz_as_it_stands = pytest.mark.usefixtures("eager")(fuzz(SPEC, examples=3))


def test_a_fault_that_does_not_come_again_is_told(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "patterns", lambda *_: hypothesis.strategies.just("once"))
    count = [0]

    def sometimes(y: Tensor) -> Tensor:
        count[0] += y.numel() > 0
        return y + 1 if count[0] == 3 and y.numel() else y

    eager(sometimes)
    with pytest.raises(FuzzError, match=r"(?s)Flaky.*make_call\(spec, "):
        check(SPEC, 30, 0)


# Without a GPU, in a process that does not interpret: children of it do


LIBDEVICE = mlpdsl.activation(lambda x: torch.erf(x), triton=("libdevice.erf(x)", "tl.exp(-x * x)"), check=False)
WRONG_SLOPE = mlpdsl.activation(
    lambda x: x * torch.sigmoid(x), triton=("x * tl.sigmoid(x)", "tl.sigmoid(x) * (1 + x)"), check=False
)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_right_kernels_pass_in_children(capfd: pytest.CaptureFixture[str]) -> None:
    assert places.place() == "child" and skip_reason() == skip_reason(SPEC) == ""
    check(SPEC, 6, 0)
    check(strategies.specs(dtype="float32", precision="ieee", max_depth=2), 6, 0, compile="off")
    fuzz(SPEC, 2, seed=0, compile="off")()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_gpu")
def test_a_failure_in_a_child_is_told_as_if_it_were_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = MLPSpec(dims=(8, 8, 8), activation=WRONG_SLOPE)
    with pytest.raises(FuzzError) as caught:
        check(wrong, 20, 0, compile="off")
    code = f"""
import mlpdsl, sys
from mlpdsl.testing import FuzzError, check
spec = mlpdsl.MLPSpec.from_json({wrong.to_json()!r})
try:
    check(spec, 20, 0, compile="off")
except FuzzError as error:
    sys.stdout.write(str(error))
"""
    here = run([sys.executable, "-c", code], tmp_path, TRITON_INTERPRET="1").stdout
    function = str(MLPSpec.from_json(wrong.to_json()).activation)
    assert str(caught.value) == here.replace(function, str(wrong.activation)) and str(wrong.activation) != function
    assert here.startswith("OracleError: gradient of ") and 'os.environ["TRITON_INTERPRET"] = "1"' in here
    assert caught.value.recipe is not None and caught.value.call is not None
    assert repr(caught.value.call) == repr(caught.value.recipe) in str(caught.value)
    assert "check_call(" in str(caught.value.__cause__.__cause__)  # the traceback of there


@pytest.mark.usefixtures("no_gpu")
def test_what_does_not_compile_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path, REFUSED))
    monkeypatch.setattr(child, "_shared", {})
    with pytest.raises(FuzzError, match=r"CompileError: compiling MLPSpec.*for sm_90: ") as caught:
        check(SPEC, 1, 0)
    for each in child._shared.values():
        each.close()
    monkeypatch.delenv("PYTHONPATH")
    assert caught.value.recipe is caught.value.call is None and caught.value.origin.startswith("compiling: CompileError")
    assert str(caught.value).endswith(f"This script compiles them again:\n\n{caught.value.script.rstrip()}")
    (tmp_path / "again.py").write_text(caught.value.script)
    again = run([sys.executable, "again.py"], tmp_path, REFUSED)
    assert again.returncode == 1 and "CompileError: compiling MLPSpec" in again.stderr
    right = run([sys.executable, "again.py"], tmp_path)
    assert right.returncode == 0, right.stderr


def test_kernels_that_do_not_fit_or_are_serialised(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"fits": True, "serialised": False, "shared": 300_000}
    monkeypatch.setattr(compiling, "resources", lambda spec, target: [SimpleNamespace(name="hidden_tma", **made)])
    assert len(compiling.check_compiled(SPEC, "sm_80")) == 1
    made["fits"] = False
    with pytest.raises(compiling.CompileError, match="hidden_tma needs 300000 bytes of shared memory; a block of sm_80 has 166912"):
        compiling.check_compiled(SPEC, "sm_80")
    made |= {"fits": True, "serialised": True}
    with pytest.raises(compiling.CompileError, match="hidden_tma: ptxas serialised its wgmma"):
        compiling.check_compiled(SPEC)


@pytest.mark.usefixtures("no_gpu")
def test_what_no_interpreter_can_run_is_compiled_and_skipped() -> None:
    spec = MLPSpec(dims=(4, 4, 4), activation=LIBDEVICE)
    assert "libdevice" in skip_reason(spec)
    with pytest.raises(unittest.SkipTest, match=r"has no libdevice.*; compiled for sm_90 without running"):
        check(spec, 2)
    with pytest.raises(unittest.SkipTest, match=r"libdevice, which this spec's hand-written text calls$"):
        check(spec, 2, compile="off")


@pytest.mark.usefixtures("no_gpu")
def test_a_decorated_test_is_not_called_where_it_could_run_nothing() -> None:
    @fuzz(SPEC, examples=2, seed=0, compile="off")
    def test_more(call: calls.Call) -> None:
        raise AssertionError("called")

    with pytest.raises(unittest.SkipTest, match=r"the calls passed, but .*test_more was not called: .*TRITON_INTERPRET=1"):
        test_more()


def test_a_child_that_dies_or_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_START", "import os, sys; print('a word', file=sys.stderr); os.kill(os.getpid(), 11)")
    one = child.Child(interpret=True)
    with pytest.raises(child.ChildError, match=r"the process that made the call was ended by SIGSEGV; its last words:\na word$"):
        one.ask("where")
    monkeypatch.setattr(child, "_START", "import time; time.sleep(60)")
    with pytest.raises(child.ChildError, match="no answer in time"):
        one.ask("where", limit=0.2)
    monkeypatch.undo()
    assert one.ask("where") == "Triton's interpreter"  # and another one was started
    one.close()


@pytest.mark.parametrize(("interpret", "here", "where"), [(True, "0", "Triton's interpreter"), (False, "1", "the CPU")])
def test_a_child_is_what_this_process_is_not(interpret: bool, here: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one = child.Child(interpret)
    assert one.ask("where") == where
    one.close()


def test_what_is_no_spec() -> None:
    with pytest.raises(SpecError, match=r"mlpdsl\.testing, spec: got 3; allowed: an MLPSpec, or something with one as \.spec"):
        check(3)
    assert fuzzing.spec_of(mlpdsl.MLP(SPEC)) == fuzzing.spec_of(mlpdsl.compile(SPEC)) == fuzzing.spec_of(SPEC) == SPEC
    assert fuzzing.spec_of(MLPSpec) is fuzzing.spec_of(mlpdsl) is fuzzing.spec_of(None) is None
