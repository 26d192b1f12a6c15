"""`mlpdsl.compile`: what it works out of a spec without a plan."""

from __future__ import annotations

from itertools import permutations

from mlpdsl import MLPSpec
from mlpdsl.codegen.lower import lower
from mlpdsl.compiled import same_as
from mlpdsl.target import parse_target

WORDS = ("residual", "layer_scale", "scale", "gelu", "relu")
EPILOGUES = [entries for count in range(5) for entries in permutations(WORDS, count)]


def test_whose_gradient_is_whose_is_what_the_plan_says() -> None:
    """For every epilogue of four words and fewer, and two that say a word twice."""
    seen = set()
    for entries in [*EPILOGUES, ("gelu", "residual", "gelu"), ("relu", "relu", "residual")]:
        spec = MLPSpec(dims=(8, 16, 8), activation="silu", gated=True, epilogue=entries)
        found = same_as(spec)
        assert found == lower(spec, parse_target("sm_90")).epilogue.same_as, entries
        seen |= set(found)
    assert seen == {"", "grad", "tile"}
