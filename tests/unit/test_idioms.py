"""The shorter words that NVIDIA GPUs get, where they mean the same, and nowhere else."""

from __future__ import annotations

import re

import pytest

from mlpdsl import MLPSpec, generate


def activate(spec: MLPSpec, target: str = "sm_90") -> str:
    """The code of `activate`, docstring apart."""
    code = re.search(r'^def activate\(.*?""".*?"""(.*?)^@', generate(spec, target=target).text, re.M | re.S)
    assert code is not None
    return code[1]


def own(expr: str) -> MLPSpec:
    return MLPSpec.from_json(f'{{"dims": [64, 64, 64], "dtype": "bfloat16", "activation": {{"expr": "{expr}"}}}}')


def test_gelu_has_both_on_nvidia_gpus_and_neither_elsewhere() -> None:
    spec = MLPSpec(dims=(64, 64, 64), activation="gelu", dtype="bfloat16")
    assert "reciprocal(1.0 + " in activate(spec) and "tl.exp2((x * x) * -0.7213475204444817)" in activate(spec)
    assert "1.0 / (1.0 + " in activate(spec, "gfx942") and "tl.exp((x * x) * -0.5)" in activate(spec, "gfx942")
    assert "def reciprocal" in generate(spec, target="sm_80").text and "inline_asm" not in generate(spec, target="gfx942").text


def test_a_text_without_a_reciprocal_has_no_function_for_one() -> None:
    assert "inline_asm" not in generate(MLPSpec(dims=(64, 64, 64), activation="relu"), target="sm_90").text


QUOTIENTS = ["x / (1.0 + exp(-abs(x)))", "1.0 / (2.0 + exp(-abs(x)))", "1.0 / (1.0 + x * x)", "1.0 / (1.0 + abs(x) * x)"]


@pytest.mark.parametrize("expr", QUOTIENTS)
def test_other_quotients_stay(expr: str) -> None:
    assert "reciprocal" not in activate(own(expr))


EXPONENTIALS = {
    "exp(x * x * -0.25)": "tl.exp2((x * x) * -0.36067376022224085)",
    "exp(x * x * x * -0.5)": "tl.exp(",
    "exp(-abs(x))": "tl.exp(",
    "exp(min(x * x * 0.5, 1.0))": "tl.exp(",
}


@pytest.mark.parametrize("expr", EXPONENTIALS)
def test_exponentials(expr: str) -> None:
    """Only of a negative number times a square: what it flushes is far from zero."""
    found, word = activate(own(expr)), EXPONENTIALS[expr]
    assert word in found and ("exp2" in found) == ("exp2" in word)


def test_the_reciprocal_of_one_and_more() -> None:
    for expr in ("1.0 / (1.0 + exp(-abs(x)))", "1.0 / (exp(-abs(x)) + 1.0)", "1.0 / (1.0 + abs(x) * 0.25)"):
        assert "reciprocal(" in activate(own(expr)), expr
