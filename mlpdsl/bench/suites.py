"""What there is to time: named sets of MLPs, and rows of an MLP, a number of rows of x, and a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlpdsl.errors import ShapeError, SpecError, describe
from mlpdsl.names import did_you_mean, listed
from mlpdsl.spec import MLPSpec, check_rows, check_spec

__all__ = ["DEFAULT_ROWS", "PASSES", "SUITES", "Entry", "Row", "Suite", "rows"]

PASSES = ("forward", "train")
"""`forward` without gradients; `train`: forward, and the gradient of x, of every parameter and of every operand."""

DEFAULT_ROWS = (1, 16, 256, 4096)
"""The numbers of rows of a spec that comes from no suite, where none are given."""


@dataclass(frozen=True)
class Entry:
    """One MLP of a suite, and the numbers of rows that it is timed with where none are given."""

    name: str
    spec: MLPSpec
    ms: tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """A named set of MLPs; `about` is one line for people."""

    name: str
    about: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Row:
    """What one line of a table is about: `m` rows of x through an MLP, in one of `PASSES`. The name is for people."""

    name: str
    spec: MLPSpec
    m: int
    passes: str = "forward"

    @property
    def key(self) -> str:
        """What tells it from other rows: all but the name."""
        return f"{self.passes} {self.m} {self.spec.to_json()}"

    def __str__(self) -> str:
        return f"{self.name}, M = {self.m}, {self.passes}"


def _spec(dims: tuple[int, ...], activation: str, **fields: Any) -> MLPSpec:
    return MLPSpec(**{"dims": dims, "activation": activation, "dtype": "bfloat16", **fields})


def _block(width: int, hidden: int, activation: str, **fields: Any) -> MLPSpec:
    return _spec((width, hidden, width), activation, **fields)


def _gated(width: int, hidden: int, activation: str = "silu", **fields: Any) -> MLPSpec:
    return _block(width, hidden, activation, gated=True, **fields)


def _suite(name: str, about: str, entries: Mapping[str, MLPSpec | tuple[MLPSpec, tuple[int, ...]]], ms: tuple[int, ...]) -> Suite:
    """Entries with numbers of rows of their own are pairs; the others get `ms`."""
    pairs = {entry: given if isinstance(given, tuple) else (given, ms) for entry, given in entries.items()}
    return Suite(name, about, tuple(Entry(entry, *pair) for entry, pair in pairs.items()))


_SEEDS = _suite(
    "seeds",
    "six MLPs from decode to large batches, narrow and wide, plain and gated",
    {
        "gelu-1024x4096-bias": _block(1024, 4096, "gelu", bias=True),
        "gelu-4096x4096-bias": _block(4096, 4096, "gelu", bias=True),
        "gelu_tanh-768x3072-bias": _block(768, 3072, "gelu_tanh", bias=True),
        "swiglu-4096x14336": _gated(4096, 14336),
        "swiglu-8192x28672": _gated(8192, 28672),
        "geglu_tanh-2048x16384": _gated(2048, 16384, "gelu_tanh"),
    },
    (1, 16, 64, 128, 256, 512, 4096, 16384),
)

_LLM = _suite(
    "llm",
    "MLPs of language models, at the widths they are published with",
    {
        "llama-3.2-1b": _gated(2048, 8192),
        "llama-2-7b": _gated(4096, 11008),
        "llama-3-8b": _gated(4096, 14336),
        "llama-2-13b": _gated(5120, 13824),
        "llama-3-70b": _gated(8192, 28672),
        "qwen2.5-7b": _gated(3584, 18944),
        "gemma-2b": _gated(2048, 16384, "gelu_tanh"),
        "gemma-7b": _gated(3072, 24576, "gelu_tanh"),
        "phi-2": _block(2560, 10240, "gelu_tanh", bias=True),
        "phi-3-mini": _gated(3072, 8192),
        "falcon-40b": _block(8192, 32768, "gelu"),
        "gpt-2": _block(768, 3072, "gelu_tanh", bias=True),
        "bert-base": _block(768, 3072, "gelu", bias=True),
    },
    (1, 8, 64, 512, 4096),
)


def _images(tokens: int, batches: tuple[int, ...] = (1, 8, 64)) -> tuple[int, ...]:
    return tuple(tokens * batch for batch in batches)


def _convnext(width: int) -> MLPSpec:
    return _block(width, 4 * width, "gelu", bias=True, epilogue=("layer_scale", "residual"))


_VISION = _suite(
    "vision",
    "MLPs of vision models, at M = tokens of an image × a batch of 1, 8, 64",
    {
        "vit-b-16": (_block(768, 3072, "gelu", bias=True), _images(197)),
        "vit-l-16": (_block(1024, 4096, "gelu", bias=True), _images(197)),
        "clip-l-14": (_block(1024, 4096, "quick_gelu", bias=True), _images(257)),
        "clip-l-14-text": (_block(768, 3072, "quick_gelu", bias=True), _images(77)),
        "siglip-so400m-14": (_block(1152, 4304, "gelu_tanh", bias=True), _images(729)),
        "dinov2-g-14": (_gated(1536, 4096, bias=True), _images(257)),
        "convnext-t-1": (_convnext(96), _images(56 * 56)),
        "convnext-t-2": (_convnext(192), _images(28 * 28)),
        "convnext-t-3": (_convnext(384), _images(14 * 14)),
        "convnext-t-4": (_convnext(768), _images(7 * 7)),
        "stable-diffusion-320": (_gated(320, 1280, "gelu", bias=True), _images(64 * 64, (2, 16))),
        "stable-diffusion-640": (_gated(640, 2560, "gelu", bias=True), _images(32 * 32, (2, 16))),
        "stable-diffusion-1280": (_gated(1280, 5120, "gelu", bias=True), _images(16 * 16, (2, 16))),
    },
    (),
)

_SMALL = _suite(
    "small",
    "narrow nets over many rows, small MLPs over few, heads",
    {
        "relu-64-4-layers": (_spec((64,) * 5, "relu"), (4096, 2**16, 2**20)),
        "gelu-128-8-layers": (_spec((128,) * 9, "gelu"), (4096, 2**15, 2**18)),
        "relu-256-8-layers-bias": (_spec((256,) * 9, "relu", bias=True), (4096, 2**16)),
        "minilm-l6": (_block(384, 1536, "gelu", bias=True), (1, 16, 256, 4096)),
        "minilm-l6-fp32": (_block(384, 1536, "gelu", bias=True, dtype="float32"), (1, 16, 256, 4096)),
        "dlrm-bottom": (_spec((13, 512, 256, 128), "relu", bias=True), (128, 2048, 32768)),
        "dlrm-top": (_spec((479, 1024, 1024, 512, 256, 1), "relu", bias=True), (128, 2048, 32768)),
        "classifier-768x2": (_spec((768, 768, 2), "tanh", bias=True), (1, 32, 256)),
        "linear-1024x1000-bias": (_spec((1024, 1000), "identity", bias=True), (1, 32, 256)),
        "digits-fp32": (_spec((64, 32, 10), "relu", bias=True, dtype="float32"), (1, 64, 1797)),
    },
    (),
)

_ODD = _suite(
    "odd",
    "widths and numbers of rows that are multiples of nothing",
    {
        "gelu-333x1111x577-bias": _spec((333, 1111, 577), "gelu", bias=True),
        "gelu-333x1111x577-bias-fp32": _spec((333, 1111, 577), "gelu", bias=True, dtype="float32"),
        "swiglu-1021x2749": _gated(1021, 2749),
        "swiglu-1021x2749-fp32": _gated(1021, 2749, dtype="float32"),
        "swiglu-1021x2749-fp16": _gated(1021, 2749, dtype="float16"),
        "relu-4-layers-101-to-499": _spec((101, 203, 307, 401, 499), "relu", bias=True),
        "relu-4-layers-101-to-499-tf32": _spec((101, 203, 307, 401, 499), "relu", bias=True, dtype="float32", precision="tf32"),
    },
    (1, 13, 127, 1021, 4093),
)

_FLOAT32 = _suite(
    "float32",
    "float32 multiplied exactly, in TF32, and as three products in TF32",
    {
        "gelu-768x3072-bias-fp32": _block(768, 3072, "gelu", bias=True, dtype="float32"),
        "gelu-768x3072-bias-tf32": _block(768, 3072, "gelu", bias=True, dtype="float32", precision="tf32"),
        "gelu-768x3072-bias-tf32x3": _block(768, 3072, "gelu", bias=True, dtype="float32", precision="tf32x3"),
        "swiglu-2048x5632-fp32": _gated(2048, 5632, dtype="float32"),
        "swiglu-2048x5632-tf32": _gated(2048, 5632, dtype="float32", precision="tf32"),
        "swiglu-2048x5632-tf32x3": _gated(2048, 5632, dtype="float32", precision="tf32x3"),
        "gelu-384x1536-bias-tf32": _block(384, 1536, "gelu", bias=True, dtype="float32", precision="tf32"),
        "swiglu-512x1536-tf32": _gated(512, 1536, dtype="float32", precision="tf32"),
        "relu-784x512x512x10-bias-tf32": _spec((784, 512, 512, 10), "relu", bias=True, dtype="float32", precision="tf32"),
        "swiglu-1021x2749-tf32": _gated(1021, 2749, dtype="float32", precision="tf32"),
    },
    (1, 16, 64, 256, 1024, 4096),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in (_SEEDS, _LLM, _VISION, _SMALL, _ODD, _FLOAT32)}
"""Every suite, by its name."""


def rows(
    given: Iterable[str | Suite | Entry | MLPSpec],
    ms: Sequence[int] = (),
    passes: Sequence[str] = ("forward",),
) -> list[Row]:
    """Every row of the given suites (or names of them), entries and specs, at the numbers of rows `ms`, each in every pass.

    Without `ms`, a suite's own numbers, or `DEFAULT_ROWS`. A row that comes twice is there once, under its first name; different
    MLPs never share a name. Raises `SpecError` for an unknown suite or pass, `ShapeError` for an m below 1.
    """
    for word in passes:
        if word not in PASSES:
            raise SpecError(describe("passes", word, listed(PASSES), did_you_mean(str(word), PASSES) or "Choose one of these."))
    for m in ms:
        if check_rows(m) < 1:
            raise ShapeError(describe("m", m, "an integer, 1 or more", "Pass the number of rows of x."))
    found: dict[str, Row] = {}
    names: dict[MLPSpec, str] = {}
    for entry in _entries(given):
        free = (entry.name, *(f"{entry.name}-{n}" for n in range(2, len(names) + 3)))
        names.setdefault(entry.spec, next(name for name in free if name not in names.values()))
        for word in passes:
            for m in ms or entry.ms:
                row = Row(names[entry.spec], entry.spec, int(m), word)
                found.setdefault(row.key, row)
    return list(found.values())


def _entries(given: Iterable[str | Suite | Entry | MLPSpec]) -> Iterable[Entry]:
    for each in given:
        if isinstance(each, str):
            if each not in SUITES:
                raise SpecError(describe("suite", each, listed(SUITES), did_you_mean(each, SUITES) or "Choose one of these."))
            each = SUITES[each]
        if isinstance(each, Suite):
            yield from each.entries
        elif isinstance(each, Entry):
            yield each
        else:
            check_spec(each)
            yield Entry(each.short_name, each, DEFAULT_ROWS)
