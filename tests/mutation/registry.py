"""Every mutant, in the order of the table."""

from __future__ import annotations

from tests.mutation import activations, backward, epilogue, forward, library, network, padded, skinny
from tests.mutation.mutant import Mutant

__all__ = ["MUTANTS", "SURVIVORS", "cases"]

MUTANTS: list[Mutant] = [
    *forward.MUTANTS, *backward.MUTANTS, *epilogue.MUTANTS, *activations.MUTANTS, *library.MUTANTS, *skinny.MUTANTS,
    *padded.MUTANTS, *network.MUTANTS,
]  # fmt: skip

SURVIVORS: dict[str, str] = {
    "partial sums from the 17th on left out": "for which a call needs more than 1,024 rows, and drawn calls have at most 150; "
    "`test_more_partial_sums_than_fit_one_step` refuses it",
}
"""Names of mutants that no ordinary property refuses, and what would."""


def cases() -> list[tuple[Mutant, str]]:
    """Every mutant with each of its families."""
    return [(mutant, family) for mutant in MUTANTS for family in mutant.families]
