"""`check` and `fuzz`: drawn calls of a spec, forward and backward through the generated kernels, held against the oracle.

On a GPU where there is one, else in Triton's interpreter: in this process where TRITON_INTERPRET=1, else in a child of it. What was
interpreted is also compiled, and not run, because an interpreter takes what a compiler refuses. A failure's message ends with a
Python script that makes exactly the call that failed, after Hypothesis has shrunk it.
"""

from __future__ import annotations

import functools
import inspect
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import hypothesis
from hypothesis.strategies import SearchStrategy

from mlpdsl.errors import SpecError, describe
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import strategies
from mlpdsl.testing.calls import Call, check_call
from mlpdsl.testing.child import shared
from mlpdsl.testing.compiling import compile_target
from mlpdsl.testing.places import place, skip_reason
from mlpdsl.testing.search import FuzzError, TimeUp, compile_failure, in_child, one_thread, script, search
from mlpdsl.testing.strategies import Recipe

__all__ = ["COMPILE", "WIDTHS", "FuzzError", "check", "fuzz", "script", "skip_reason", "spec_of", "specs_in"]

WIDTHS = ("auto", "own", "narrow")
"""The widths that are run: the spec's own; narrow ones in their place (`strategies.narrowed`); or, by "auto", narrow ones where the
kernels are interpreted, because an interpreter takes seconds for a width of thousands."""

COMPILE = ("auto", "off")
"""Whether kernels are compiled, and not run: by "auto" where they are interpreted; never."""


def check(
    spec: object,
    examples: int | None = None,
    seed: int | None = None,
    seconds: float | None = None,
    *,
    widths: str = "auto",
    compile: str = "auto",
) -> None:
    """Draw calls of `spec` and hold each, forward and backward through the triton backend, against the oracle.

    `spec` is an `MLPSpec`, anything with one as `.spec` (an `mlpdsl.MLP`, what `mlpdsl.compile` returned), or a strategy of specs.
    `examples` is how many calls, as many as the Hypothesis profile says where None; with `seconds` the search ends after that time,
    and at least one call is made. With `seed`, whatever the profile, equal seeds draw equal calls. `widths` is one of `WIDTHS`.

    Where there is no GPU the kernels are interpreted, and with `compile="auto"` those of a spec (of a strategy none) are compiled
    as well, at the spec's own widths: for MLPDSL_TARGET where it is set, else sm_90. Each happens in a process of its own where
    this one cannot do it.

    Raises `FuzzError` where a call fails, or where a kernel does not compile or fit; `unittest.SkipTest`, which every test runner
    knows, where no kernel can run here; `SpecError` for what is not a spec.
    """
    _held(spec, None, examples, seed, seconds, widths, compile)


def fuzz(
    spec: object,
    examples: int | None = None,
    seconds: float | None = None,
    *,
    seed: int | None = None,
    widths: str = "auto",
    compile: str = "auto",
) -> Callable[..., Any]:
    """A test of `spec`: a test function as it stands, and a decorator for one that has more to say about each call.

        test_swiglu = mlpdsl.testing.fuzz(spec, examples=200)

        @mlpdsl.testing.fuzz(spec, seconds=60)
        def test_swiglu_is_finite(call):
            assert call.run(mlpdsl.compile(spec, backend="triton")).isfinite().all()

    The decorated function has a parameter `call`, a `mlpdsl.testing.calls.Call` that has passed `check_call`; its other parameters
    are the runner's (pytest's fixtures, `self`), one of each for all calls. Arguments and errors as for `check`, raised when the
    test runs; `TypeError` at once where a decorated function has no parameter `call`. Such a function runs kernels in its own
    process: without a GPU or TRITON_INTERPRET=1 the calls are checked, and then the test is skipped, saying that it was not called.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(function)
        if "call" not in signature.parameters:
            shown = f"{function.__qualname__}({', '.join(signature.parameters)})"
            raise TypeError(f"mlpdsl.testing.fuzz: {shown} has no parameter 'call' to receive the call")

        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            def more(call: Call) -> None:
                function(*args, call=call, **kwargs)

            _held(spec, more, examples, seed, seconds, widths, compile)
            if place() == "child":
                step = "set TRITON_INTERPRET=1 before triton is imported, or use a machine with a GPU"
                shown = getattr(function, "__qualname__", "the test")
                raise unittest.SkipTest(f"the calls passed, but {shown} was not called: no kernel runs in this process; {step}")

        others = [parameter for name, parameter in signature.parameters.items() if name != "call"]
        test.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return test

    def test(function: Callable[..., Any] | None = None) -> Callable[..., None] | None:
        if function is not None:
            return decorate(function)
        check(spec, examples, seed, seconds, widths=widths, compile=compile)
        return None

    return test


def spec_of(value: object) -> MLPSpec | None:
    """The spec that a value is, or that it has as `.spec` (`mlpdsl.MLP`, what `mlpdsl.compile` returned); None for any other."""
    try:
        found = value if isinstance(value, (MLPSpec, type)) else getattr(value, "spec", None)
    except Exception:  # a foreign attribute may raise anything
        return None
    return found if isinstance(found, MLPSpec) else None


def specs_in(module: ModuleType) -> dict[str, MLPSpec]:
    """By name, in the order in which the module names them, the specs at its top level, as `spec_of` sees them."""
    found = {name: spec_of(value) for name, value in vars(module).items() if not name.startswith("__")}
    return {name: spec for name, spec in found.items() if spec is not None}


def drawn_from(spec: object, narrow: bool) -> tuple[SearchStrategy[MLPSpec], str]:
    """What to draw specs from, and a name for it that is the same in every process. Raises `SpecError` for what is not a spec."""
    if isinstance(spec, SearchStrategy):
        return (spec.flatmap(strategies.narrowed) if narrow else spec), repr(spec)
    found = spec_of(spec)
    if found is None:
        step = "Pass an MLPSpec, an mlpdsl.MLP, or what mlpdsl.compile returned."
        raise SpecError(describe("mlpdsl.testing, spec", spec, "an MLPSpec, or something with one as .spec", step))
    return (strategies.narrowed(found) if narrow else hypothesis.strategies.just(found)), found.to_json()


def _held(
    spec: object,
    more: Callable[[Call], object] | None,
    examples: int | None,
    seed: int | None,
    seconds: float | None,
    widths: str,
    compile: str,
) -> None:
    """Hold calls of `spec` against the oracle, and each that has passed, made in this process, against `more`."""
    for what, word, allowed in (("widths", widths, WIDTHS), ("compile", compile, COMPILE)):
        if word not in allowed:
            raise ValueError(f"{what}: got {word!r}; allowed: {', '.join(allowed)}")
    at = place()
    drawn, name = drawn_from(spec, widths == "narrow" or (widths == "auto" and at != "gpu"))
    found = spec_of(spec)
    device = "cuda" if at == "gpu" else "cpu"
    began, count, failed = time.monotonic(), 0, False

    def body(recipe: Recipe) -> None:
        nonlocal count, failed
        if seconds is not None and count and not failed and time.monotonic() - began > seconds:
            raise TimeUp("the time is up")
        count += 1
        if found is None:
            hypothesis.assume(not skip_reason(recipe.spec))
        try:
            if at == "child":
                in_child(shared(interpret=True), recipe)
            else:
                call = recipe.make()
                check_call(call)
                if more is not None:
                    more(call)
        except unittest.SkipTest:
            raise
        except Exception:
            failed = True
            raise

    chosen: dict[str, Any] = {} if seed is None else {"seed": seed, "database": None}
    where = "Triton's interpreter" if at == "child" else None
    with _compiling(found if compile == "auto" and at != "gpu" else None):
        reason = skip_reason(found)
        if reason:
            raise unittest.SkipTest(reason)
        with one_thread(device):
            try:
                search(body, drawn, name, device=device, examples=examples, where=where, **chosen)
            except TimeUp:
                return


@contextmanager
def _compiling(spec: MLPSpec | None) -> Iterator[None]:
    """Compile the kernels of a spec, of None nothing, in a child, while the body runs. Raises `FuzzError` after the body.

    Where the body raises, that is what is told; but a spec that it skips is compiled all the same.
    """
    if spec is None or skip_reason():
        yield
        return
    child, target = shared(interpret=False), compile_target().name
    child.send("compile", spec=spec.to_json(), target=target)
    skipped: unittest.SkipTest | None = None
    try:
        yield
    except unittest.SkipTest as skip:
        skipped = skip
    except BaseException:
        child.abandon()
        raise
    try:
        child.receive()
    except Exception as error:
        raise compile_failure(error, spec, target) from error
    if skipped is not None:
        raise unittest.SkipTest(f"{skipped}; compiled for {target} without running")
