"""`check` and `fuzz`: drawn calls of a spec, forward and backward through the generated kernels, held against the oracle.

On a GPU where there is one, else in Triton's interpreter where TRITON_INTERPRET=1, else skipped with the reason. A failure's
message ends with a Python script that makes exactly the call that failed, after Hypothesis has shrunk it.
"""

from __future__ import annotations

import functools
import inspect
import platform
import time
import unittest
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

from mlpdsl.backends import BACKENDS, interpreting
from mlpdsl.compiled import compile as compile_spec
from mlpdsl.errors import SpecError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import strategies
from mlpdsl.testing.calls import Call, check_call
from mlpdsl.version import __version__

__all__ = ["WIDTHS", "FuzzError", "check", "fuzz", "script", "skip_reason", "spec_of"]

WIDTHS = ("auto", "own", "narrow")
"""The widths that are run: the spec's own; narrow ones in their place (`strategies.narrowed`); or, by "auto", narrow ones where the
kernels are interpreted, because an interpreter takes seconds for a width of thousands."""


class FuzzError(AssertionError):
    """A drawn call failed. The message says how, and ends with a script that makes the call again."""

    def __init__(self, message: str, call: Call) -> None:
        super().__init__(message)
        self.call = call
        """The call that failed."""
        self.script = script(call)
        """Python source that makes it again, and raises again."""


class _TimeUp(unittest.SkipTest):
    """Hypothesis lets a skip through at once, and so the search ends."""


def check(
    spec: object, examples: int | None = None, seed: int | None = None, seconds: float | None = None, *, widths: str = "auto"
) -> None:
    """Draw calls of `spec` and hold each, forward and backward through the triton backend, against the oracle.

    `spec` is an `MLPSpec`, anything with one as `.spec` (an `mlpdsl.MLP`, what `mlpdsl.compile` returned), or a strategy of specs.
    `examples` is how many calls, as many as the Hypothesis profile says where None; with `seconds` the search ends after that time,
    and at least one call is made. With `seed`, whatever the profile, equal seeds draw equal calls. `widths` is one of `WIDTHS`.

    Raises `FuzzError` where a call fails, `unittest.SkipTest`, which every test runner knows, where no kernel can run here,
    `SpecError` for what is not a spec.
    """
    _search(spec, check_call, examples, seed, seconds, widths)


def fuzz(
    spec: object, examples: int | None = None, seconds: float | None = None, *, seed: int | None = None, widths: str = "auto"
) -> Callable[..., Any]:
    """A test of `spec`: a test function as it stands, and a decorator for one that has more to say about each call.

        test_swiglu = mlpdsl.testing.fuzz(spec, examples=200)

        @mlpdsl.testing.fuzz(spec, seconds=60)
        def test_swiglu_is_finite(call):
            assert call.run(mlpdsl.compile(spec, backend="triton")).isfinite().all()

    The decorated function has a parameter `call`, a `mlpdsl.testing.calls.Call` that has passed `check_call`; its other parameters
    are the runner's (pytest's fixtures, `self`), one of each for all calls. Arguments and errors as for `check`, raised when the
    test runs; `TypeError` at once where a decorated function has no parameter `call`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(function)
        if "call" not in signature.parameters:
            shown = f"{function.__qualname__}({', '.join(signature.parameters)})"
            raise TypeError(f"mlpdsl.testing.fuzz: {shown} has no parameter 'call' to receive the call")

        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            def both(call: Call) -> None:
                check_call(call)
                function(*args, call=call, **kwargs)

            _search(spec, both, examples, seed, seconds, widths)

        others = [parameter for name, parameter in signature.parameters.items() if name != "call"]
        test.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return test

    def test(function: Callable[..., Any] | None = None) -> Callable[..., None] | None:
        if function is not None:
            return decorate(function)
        check(spec, examples, seed, seconds, widths=widths)
        return None

    return test


def spec_of(value: object) -> MLPSpec | None:
    """The spec that a value is, or that it has as `.spec` (`mlpdsl.MLP`, what `mlpdsl.compile` returned); None for any other."""
    try:
        found = value if isinstance(value, (MLPSpec, type)) else getattr(value, "spec", None)
    except Exception:  # a foreign attribute may raise anything
        return None
    return found if isinstance(found, MLPSpec) else None


def skip_reason(spec: MLPSpec | None = None) -> str:
    """Why the kernels (of `spec`, or of any) cannot run in this process; empty where they can."""
    device = _device()
    reasons = BACKENDS["triton"].runs_on(device)
    if device == "cpu" and not interpreting():
        return "mlpdsl's kernels need a CUDA GPU, or TRITON_INTERPRET=1 set before triton is imported"
    if spec is not None and not reasons:
        try:
            compile_spec(spec, backend="triton").backend_for(device)
        except UnsupportedError as error:
            reasons = list(error.reasons)
    return "; ".join(reasons)


def script(call: Call) -> str:
    """A Python script that makes `call` again and holds it against the oracle. Only for calls that `make_call` made."""
    lead, seed = call.recipe["lead"], call.recipe["seed"]
    words = [f"{name}={value!r}" for name, value in call.recipe.items() if name not in ("lead", "seed")]
    interpreted = interpreting()
    found = f"mlpdsl {__version__}, torch {torch.__version__}, triton {_version('triton')}, Python {platform.python_version()}"
    where = "Triton's interpreter" if interpreted else torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    lines = [f"# Found with {found}, in {where}." if interpreted else f"# Found with {found}, on {where}."]
    if interpreted:
        lines += ["import os", "", 'os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported', ""]
    lines += [
        "from mlpdsl import MLPSpec",
        "from mlpdsl.testing.calls import check_call, make_call",
        "",
        f"spec = MLPSpec.from_json({call.spec.to_json()!r})",
        f"call = make_call({', '.join(['spec', repr(lead), repr(seed), *words])})",
        "print(check_call(call))  # raises AssertionError where the kernels are wrong",
    ]
    return "\n".join(lines) + "\n"


def _search(
    spec: object,
    body: Callable[[Call], object],
    examples: int | None,
    seed: int | None,
    seconds: float | None,
    widths: str,
) -> None:
    """Run `body` on drawn calls until one fails or there have been enough."""
    if widths not in WIDTHS:
        raise ValueError(f"widths: got {widths!r}; allowed: {', '.join(WIDTHS)}")
    drawn, name = _spec_strategy(spec, widths)
    failed: list[Call] = []
    began, count = time.monotonic(), 0

    def call_passes(call: Call) -> None:
        nonlocal count
        if seconds is not None and count and not failed and time.monotonic() - began > seconds:
            raise _TimeUp("the time is up")
        count += 1
        if isinstance(spec, SearchStrategy):
            hypothesis.assume(not skip_reason(call.spec))
        try:
            body(call)
        except (HypothesisException, unittest.SkipTest):  # assume() and the like, and a test that skips itself
            raise
        except Exception:
            failed.append(call)
            raise

    # Hypothesis tells tests apart by their source, and this is one source for all specs.
    call_passes.__dict__["_hypothesis_internal_add_digest"] = name.encode()
    chosen: dict[str, Any] = {"deadline": None, "print_blob": False, "report_multiple_bugs": False}
    if examples is not None:
        chosen["max_examples"] = examples
    if seed is not None:
        chosen["database"] = None
    phases = (Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
    test = given(call=strategies.calls(drawn, device=_device()))(call_passes)
    test = settings(phases=phases, suppress_health_check=list(HealthCheck), **chosen)(test)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    threads = torch.get_num_threads()
    if _device() == "cpu":
        torch.set_num_threads(1)  # on matrices this small, threads cost ten times what they save
    try:
        test()
    except _TimeUp:
        return
    except unittest.SkipTest:
        raise
    except Exception as error:
        if not failed:  # Hypothesis's own: nothing of ours ran
            raise
        raise FuzzError(_message(error, failed[-1]), failed[-1]) from error
    finally:
        torch.set_num_threads(threads)


def _spec_strategy(spec: object, widths: str) -> tuple[SearchStrategy[MLPSpec], str]:
    """What to draw specs from, and a name for it that is the same in every process. Raises `SkipTest` where nothing can run."""
    narrow = widths == "narrow" or (widths == "auto" and interpreting())
    found = None if isinstance(spec, SearchStrategy) else spec_of(spec)
    if found is None and not isinstance(spec, SearchStrategy):
        step = "Pass an MLPSpec, an mlpdsl.MLP, or what mlpdsl.compile returned."
        raise SpecError(describe("mlpdsl.testing, spec", spec, "an MLPSpec, or something with one as .spec", step))
    reason = skip_reason(found)
    if reason:
        raise unittest.SkipTest(reason)
    if found is None:
        of: SearchStrategy[MLPSpec] = spec  # type: ignore[assignment]
        return (of.flatmap(strategies.narrowed) if narrow else of), repr(spec)
    return (strategies.narrowed(found) if narrow else hypothesis.strategies.just(found)), found.to_json()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def _message(error: Exception, call: Call) -> str:
    """What was raised and what Hypothesis noted; last the script, so that it is what a terminal ends with."""
    notes: Sequence[str] = getattr(error, "__notes__", ())
    lines = [f"{type(error).__name__}: {error}", *notes, "", "This script makes the call again:", "", script(call)]
    return "\n".join(lines).rstrip("\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
