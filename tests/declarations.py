"""What declarations are tested with: specs as they come, words and values that no spec has, objects that misbehave."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mlpdsl.names import ACTIVATIONS, ALIASES, DTYPES, EPILOGUE_OPERANDS, PRECISIONS
from mlpdsl.spec import MLPSpec

LLAMA = MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16")
BERT = MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, epilogue=("residual",))

# A list, or an activation by another name, may be declared; the annotations describe the canonical form.
declare: Any = MLPSpec
GOOD = {"dims": (4, 5, 6), "activation": "relu"}


class Word(str, Enum):
    SILU = "swish"


class Width(IntEnum):
    HIDDEN = 5


class Index:
    """An integer of a foreign type, as numpy's and torch's are."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value  # type: ignore[return-value]


class Broken:
    """Every way of looking at it raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __index__(self) -> int:
        raise KeyError("no index")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


@st.composite
def specs(draw: st.DrawFn) -> MLPSpec:
    dims = draw(st.lists(st.integers(1, 2**30), min_size=2, max_size=9))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    operands = draw(st.permutations(sorted(EPILOGUE_OPERANDS)))[: draw(st.integers(0, 3))]
    activations = draw(st.lists(st.sampled_from([*ACTIVATIONS, *ALIASES]), max_size=4))
    spec: MLPSpec = declare(
        dims=dims,
        activation="identity" if len(dims) == 2 else draw(st.sampled_from([*ACTIVATIONS, *ALIASES])),
        gated=len(dims) == 3 and draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=dtype,
        precision=draw(st.sampled_from(PRECISIONS)) if dtype == "float32" else "ieee",
        epilogue=draw(st.permutations([*operands, *activations])),
    )
    return spec


# Generation may be slow on a loaded machine; that says nothing about the spec.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

words = st.sampled_from([*ACTIVATIONS, *EPILOGUE_OPERANDS, "expr", "packed", ""]) | st.text("aeilsu_ \n\0'{}é\ud800", max_size=9)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
anything = json_like | st.binary(max_size=8)
