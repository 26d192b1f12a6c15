"""Tools that hold generated kernels against float64: for this project's tests, and for the specs of its users.

    test_mlp = mlpdsl.testing.fuzz(spec)            # a test function: drawn calls, forward and backward, against the oracle
    mlpdsl.testing.check(spec, examples=200)        # the same in any test runner, or none

Both need Hypothesis (`pip install mlpdsl[test]`). `strategies` draws specs and calls, `calls` makes and checks a call without
Hypothesis, `plugin` is a pytest plugin (`--mlpdsl-specs`). Below them is the oracle, what an MLP and its gradients are in float64
and how far a correct kernel may be from it: `oracle.forward` and `oracle.backward` give values with an error bound each,
`oracle.check` compares; `functions` holds the activations' own float64 definitions, written independently of the code generator.

Names are loaded when they are first used: importing this package imports neither torch nor Hypothesis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from mlpdsl.spec import MLPSpec
    from mlpdsl.testing.fuzzing import FuzzError, check, fuzz

__all__ = ["FuzzError", "check", "fuzz", "register_strategies"]


def register_strategies() -> None:
    """Tell Hypothesis how to draw an `MLPSpec` from its type: `@given(...)` with type hints, `st.from_type(MLPSpec)`.

    Hypothesis calls this itself when it is imported and mlpdsl is installed, by the entry point in mlpdsl's metadata.
    """
    from hypothesis import strategies as st

    from mlpdsl.spec import MLPSpec

    st.register_type_strategy(MLPSpec, _any_spec)


def _any_spec(of: type[MLPSpec]) -> SearchStrategy[MLPSpec]:
    from mlpdsl.testing.strategies import specs  # only now: it imports torch

    return specs()


def __getattr__(name: str) -> Any:
    if name not in ("FuzzError", "check", "fuzz"):
        raise AttributeError(f"module 'mlpdsl.testing' has no attribute {name!r}")
    try:
        module = import_module("mlpdsl.testing.fuzzing")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(f"mlpdsl.testing.{name} needs Hypothesis: pip install 'mlpdsl[test]'", name="hypothesis") from error
    return getattr(module, name)
