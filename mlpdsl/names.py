"""The words a declaration may use: activations, built-in epilogues, dtypes, precisions, layouts.

Only the words. The functions behind the activations live in `mlpdsl.codegen.expr`, under these canonical names:

    gelu        x·Φ(x), Φ the normal distribution function (exact, by erf)
    gelu_tanh   0.5·x·(1 + tanh(sqrt(2/π)·(x + 0.044715·x³)))
    gelu_10     clip(gelu(x), -10, 10)
    quick_gelu  x·sigmoid(1.702·x)
    silu        x·sigmoid(x)
    relu        max(x, 0)
    relu2       max(x, 0)²
    relu6       min(max(x, 0), 6)
    leaky_relu  x where x ≥ 0, else 0.01·x
    elu         x where x > 0, else exp(x) - 1
    sigmoid     1/(1 + exp(-x))
    tanh        tanh(x)
    softplus    log(1 + exp(x))
    mish        x·tanh(softplus(x))
    hardswish   x·min(max(x + 3, 0), 6)/6
    laplace     0.5·(1 + erf((x - 0.707107)/(0.282095·sqrt(2))))      (as in transformers)
    identity    x
"""

from __future__ import annotations

from collections.abc import Iterable

from mlpdsl.errors import SpecError, UnsupportedError, describe

__all__ = [
    "ACTIVATIONS",
    "ALIASES",
    "DTYPES",
    "EPILOGUE_OPERANDS",
    "LATER_LAYOUTS",
    "LAYER_SCALE",
    "LAYOUTS",
    "PRECISIONS",
    "REFUSED",
    "RESIDUAL",
    "SCALE",
    "canonical_activation",
    "did_you_mean",
    "exact_str",
    "listed",
]

ACTIVATIONS: tuple[str, ...] = (
    "gelu",
    "gelu_tanh",
    "gelu_10",
    "quick_gelu",
    "silu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "elu",
    "sigmoid",
    "tanh",
    "softplus",
    "mish",
    "hardswish",
    "laplace",
    "identity",
)

ALIASES: dict[str, str] = {
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "swish": "silu",
    "linear": "identity",
}
"""Other names for the same function, as transformers' `ACT2FN` spells them, to the canonical name."""

REFUSED: dict[str, str] = {
    "prelu": "'prelu' has a learned slope, and activations here have no parameters",
    "xielu": "'xielu' has learned parameters, and activations here have none",
    "sqrtsoftplus": "'sqrtsoftplus' is not registered yet",
}
"""Names that mean something, but that this release cannot run, each with the reason."""

# Names of a whole gated unit, and of what it is made: people write them where the activation belongs.
_UNITS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "identity"}

RESIDUAL = "residual"
LAYER_SCALE = "layer_scale"
SCALE = "scale"

EPILOGUE_OPERANDS: dict[str, str] = {RESIDUAL: "tile", LAYER_SCALE: "column", SCALE: "scalar"}
"""Built-in epilogues that take an operand, to its kind: tile (M, N), column (N,), scalar (). The operand is passed by
keyword under the epilogue's own name. `residual` adds it to the output, the other two multiply the output by it."""

DTYPES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The dtypes, to the bytes of one element."""

PRECISIONS: tuple[str, ...] = ("ieee", "tf32", "tf32x3")
LAYOUTS: tuple[str, ...] = ("separate",)
LATER_LAYOUTS: tuple[str, ...] = ("packed", "interleaved", "transposed")
"""Layouts that a later release will know, so that today's refusal can say so."""


def exact_str(value: object) -> str | None:
    """`value` as a plain `str` where its type is `str` or a subclass of it (a string enum, numpy's), else None."""
    # By the real type: isinstance() believes __class__, which a mock or a proxy may set.
    return str.__str__(value) if issubclass(type(value), str) else None


def listed(words: Iterable[str]) -> str:
    """The words in quotes with commas between, for a message."""
    return ", ".join(f"'{word}'" for word in words)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`Did you mean 'silu'?` for the option closest to `word`, or an empty string where none is close."""
    if len(word) > 64:  # the comparison takes quadratic time, and such a word is no slip of the pen
        return ""
    from difflib import get_close_matches

    close = get_close_matches(word.lower().replace("-", "_"), list(options), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""


def canonical_activation(name: object, where: str = "activation") -> str:
    """The canonical name, one of `ACTIVATIONS`, of a registered activation or one of its aliases.

    `where` is the field named in messages. Raises `SpecError` for what is not a registered name, `UnsupportedError` for
    a known name that cannot be run (`REFUSED`).
    """
    word = exact_str(name)
    if word is None:
        raise SpecError(describe(where, name, "a registered name", f"Write one of {listed(ACTIVATIONS)}."))
    word = ALIASES.get(word, word)
    if word in ACTIVATIONS:
        return word
    if word in REFUSED:
        message = describe(where, word, listed(ACTIVATIONS), "Use one of these, or keep this MLP in PyTorch.")
        raise UnsupportedError(message, (REFUSED[word],))
    if word.lower() in _UNITS:
        step = f"For {word}, write activation='{_UNITS[word.lower()]}', gated=True."
    elif word in EPILOGUE_OPERANDS:
        step = f"'{word}' is an epilogue: write epilogue=('{word}',)."
    else:
        step = did_you_mean(word, (*ACTIVATIONS, *ALIASES)) or "Choose one of these names."
    raise SpecError(describe(where, word, listed(ACTIVATIONS), step))
