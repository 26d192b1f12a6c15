"""Mutants of activations: another function of the family, a lost limit, and every constant a little off."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cache

from mlpdsl import MLPSpec, source
from tests.mutation.families import FAMILIES
from tests.mutation.mutant import Mutant, mutant

__all__ = ["CONSTANTS", "MUTANTS"]

SIGMOID = "(1.0 / (1.0 + tl.exp(-({}))))"
TANH_GELU = "gate * " + SIGMOID.format("gate * 1.5957691216057308 * (gate * gate * 0.044715 + 1.0)")
QUICK_GELU = "gate * " + SIGMOID.format("gate * 1.702")

FUNCTIONS = [
    mutant("tanh-gelu for gelu", "gated float32 gated_tma", "activate", ("return t5 * up", f"return {TANH_GELU} * up")),
    mutant("quick-gelu for gelu", "gated float32", "activate", ("return t5 * up", f"return {QUICK_GELU} * up")),
    # gelu(x) = x·(1 + erf(c·x))/2, c = √½; the text has c²/ln 2 and t = 1/(1 + 0.3|x|), which goes with x.
    mutant("erf's constant 0.7071", "gated float32", "activate",
           ("(gate * gate) * -0.7213475204444817", "(gate * gate) * -0.72133368"),
           ("tl.abs(gate) * 0.3", "tl.abs(gate) * 0.29999712")),
    mutant("e's exponent for base 2", "gated float32", "activate", ("-0.7213475204444817", "-0.5")),
    mutant("a reciprocal of 1 part in 4,096 too many", "gated float32 plain", "reciprocal", ("[x]", "[x * 0.999755859375]")),
    mutant("gelu' without its second term", "gated float32", "activate_grad", ("(t6 + t8)", "t6")),
    mutant("silu' without its second term", "plain", "activate_grad", ("return grad * t5", "return grad * t3")),
    mutant("tanh-gelu' with the derivative of its cube left out", "deep", "activate_grad",
           ("((t2 * 0.134145) + 1.0)", "((t2 * 0.044715) + 1.0)")),
    mutant("silu at -inf", "plain", "activate", ("tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)", "x")),
    mutant("silu cut at -2", "plain", "activate", ("-200.0", "-2.0")),
    mutant("silu' at inf", "plain", "activate_grad", ("tl.minimum(t4, 200.0, propagate_nan=tl.PropagateNan.ALL)", "t4")),
    mutant("relu of NaN is 0", "relu", "activate", ("propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE")),
]  # fmt: skip


@cache
def constants(spec: MLPSpec, function: str) -> tuple[str, ...]:
    """The numbers in a device function of the spec's text that are not whole, docstring apart; sorted."""
    text = source.generate(spec).text
    code = re.search(rf'^def {function}\(.*?"""(?:.*?)"""(.*?)^@', text, re.M | re.S)
    assert code is not None, f"the text of {spec!r} has no function {function!r}"
    return tuple(sorted(n for n in set(re.findall(r"\d+\.\d+(?:e-?\d+)?", code[1])) if not float(n).is_integer()))


def constant_mutants() -> list[Mutant]:
    """One for each number of the functions of gelu, gelu_tanh and quick_gelu: off by 1e-6 below 1, which is what float32 rounding
    leaves visible, and by 1e-5 above."""
    found = []
    for family in ("float32", "deep", "quick"):
        for function in ("activate", "activate_grad"):
            for number in constants(FAMILIES[family], function):
                off = "1e-5" if float(number) >= 1 else "1e-6"
                name = f"{number} + {off} in {function} of {FAMILIES[family].activation}"
                found.append(mutant(name, family, function, (number, str(Decimal(number) + Decimal(off)))))
    return found


CONSTANTS = constant_mutants()
MUTANTS = [*FUNCTIONS, *CONSTANTS]
