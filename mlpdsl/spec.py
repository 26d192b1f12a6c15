"""`MLPSpec`: what an MLP is, as data. How it runs is decided elsewhere."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NoReturn

from mlpdsl.errors import ShapeError, SpecError, UnsupportedError, describe
from mlpdsl.function import REGISTERED, Function
from mlpdsl.json_text import read_object
from mlpdsl.names import (
    ACTIVATIONS,
    DTYPES,
    EPILOGUE_OPERANDS,
    LATER_LAYOUTS,
    LAYOUTS,
    PRECISIONS,
    REFUSED,
    canonical_activation,
    did_you_mean,
    exact_str,
    listed,
)

__all__ = ["SCHEMA_VERSION", "MLPSpec", "check_rows", "check_spec"]

SCHEMA_VERSION = 1
"""The version of the JSON form that this release writes, and the newest that it reads."""

MAX_DIMS = 257
MAX_WIDTH = 2**30
MAX_EPILOGUES = 32


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """One MLP: widths, activation, and what is done to the output.

    With h₀ = x of shape (M, dims[0]), weights Wᵢ of shape (dims[i+1], dims[i]) and L = len(dims) - 1 linears:

        hᵢ₊₁ = act(hᵢ·Wᵢᵀ + bᵢ)  for i < L - 1,      y = epilogue(h_{L-1}·W_{L-1}ᵀ + b_{L-1})

    and where `gated` (three dims):  y = epilogue((act(x·Wgᵀ + bg) ∘ (x·Wuᵀ + bu))·Wdᵀ + bd).

    Validated and brought to canonical form at once: aliases are resolved ("swish" is "silu"), dims become a tuple of
    int, a torch dtype its name, and "identity" leaves the epilogue, so that equal MLPs are equal specs with equal
    hashes. Raises `SpecError` where the declaration is wrong, `UnsupportedError` where this release cannot do it.
    """

    dims: tuple[int, ...]
    """Widths of input, hidden layers and output: 2 to 257 of them, each from 1 to 2**30. A list, or integers of another
    type (numpy's), will do."""
    activation: str | Function | Callable[..., Any]
    """Applied between layers: a registered name (`mlpdsl.names.ACTIVATIONS`), or a function of one torch tensor, or of (gate, up)
    where gated (see `mlpdsl.activation`); "identity" where there are two dims."""
    gated: bool = False
    """Whether the hidden layer is act(gate) ∘ up; exactly three dims."""
    bias: bool = False
    """Whether every linear has a bias; else none has."""
    dtype: str = "float32"
    """Of input, parameters, operands and output: "float32", "float16" or "bfloat16", or a torch dtype."""
    precision: str = "ieee"
    """How float32 is multiplied: "ieee", "tf32", or "tf32x3" (three tf32 products, near float32)."""
    epilogue: tuple[str | Function | Callable[..., Any], ...] = ()
    """Applied to the output in order, in float32, before its one rounding: "residual", "layer_scale", "scale" (each
    once, with an operand of that name), names of activations, or functions (see `mlpdsl.epilogue`)."""
    layout: str = "separate"
    """How the weights lie in memory: one (out_features, in_features) tensor each."""

    def __post_init__(self) -> None:
        canonical = {
            "dims": _dims(self.dims),
            "gated": _bool("gated", self.gated),
            "activation": _activation(self.activation),
            "bias": _bool("bias", self.bias),
            "dtype": _dtype(self.dtype),
            "precision": _word("precision", self.precision, PRECISIONS),
            "epilogue": _epilogue(self.epilogue),
            "layout": _layout(self.layout),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)
        if self.gated and len(self.dims) != 3:
            _wrong("dims", self.dims, "three widths (input, hidden, output) where gated=True", "Set gated=False.")
        if len(self.dims) == 2 and self.activation != "identity":
            entry = "fn" if isinstance(self.activation, Function) else f"'{self.activation}'"
            step = f"write activation='identity', epilogue=({entry},)."
            step = f"An activation on the output is an epilogue: {step}"
            _wrong("activation", self.activation, "'identity' where there are two dims (one linear)", step)
        if isinstance(self.activation, Function) and len(self.activation.inputs) == 2 and not self.gated:
            step = "Set gated=True, or pass a function of one tensor."
            _wrong("activation", self.activation, "a function of one tensor where gated=False", step)
        if self.precision != "ieee" and self.dtype != "float32":
            step = f"Leave precision out for {self.dtype}, or set dtype='float32'."
            _wrong("precision", self.precision, f"'ieee' where dtype is '{self.dtype}'", step)

    @property
    def d_in(self) -> int:
        """Width of the input: dims[0]."""
        return self.dims[0]

    @property
    def d_out(self) -> int:
        """Width of the output: dims[-1]."""
        return self.dims[-1]

    @property
    def depth(self) -> int:
        """Number of layers, len(dims) - 1; gate and up together are one."""
        return len(self.dims) - 1

    @property
    def short_name(self) -> str:
        """A name for people and file names, like "gated-silu-4096x14336x4096-bf16"; not unique.

        At most 60 characters of [a-z0-9_.x-], made only of enumerated words and integers.
        """
        number = "fp32" if self.precision == "ieee" else self.precision
        tag = {"float32": number, "float16": "fp16", "bfloat16": "bf16"}[self.dtype]
        activation = f"fn{self.activation.digest}" if isinstance(self.activation, Function) else self.activation
        start = f"{'gated-' if self.gated else ''}{activation}"
        whole = "x".join(map(str, self.dims))
        ends = f"x..x{self.d_out}-{len(self.dims)}dims"
        candidates = [whole] if len(self.dims) <= 4 else []
        candidates += [f"{self.dims[0]}x{self.dims[1]}{ends}", f"{self.dims[0]}{ends}"]
        names = [f"{start}-{widths}-{tag}" for widths in candidates]
        return next((name for name in names if len(name) <= 60), names[-1])

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every parameter, in the order a call takes them; also the keys of a `state_dict`.

        Weights are (out_features, in_features), biases (out_features,). Layers are `gate_proj, up_proj, down_proj`
        where gated, `fc1, fc2` with one hidden layer, `layers.0, layers.1, …` otherwise.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (d_in, d_out) in self._linears().items():
            shapes[f"{name}.weight"] = (d_out, d_in)
            if self.bias:
                shapes[f"{name}.bias"] = (d_out,)
        return shapes

    def _linears(self) -> dict[str, tuple[int, int]]:
        """Name of every linear to (in_features, out_features)."""
        pairs = list(zip(self.dims, self.dims[1:], strict=False))
        if self.gated:
            return {"gate_proj": pairs[0], "up_proj": pairs[0], "down_proj": pairs[1]}
        if len(pairs) == 2:
            return {"fc1": pairs[0], "fc2": pairs[1]}
        return {f"layers.{index}": pair for index, pair in enumerate(pairs)}

    def operands(self) -> dict[str, str]:
        """Name to kind of the operands a call takes by keyword, in epilogue order.

        Kinds: "tile" (M, N), "column" (N,), "row" (M, 1), "scalar" (), with N = d_out.
        """
        kinds: dict[str, str] = {}
        for entry in self.epilogue:
            if isinstance(entry, Function):
                kinds |= entry.operands
            elif entry in EPILOGUE_OPERANDS:
                kinds[str(entry)] = EPILOGUE_OPERANDS[str(entry)]
        return kinds

    def flops(self, m: int) -> int:
        """Floating-point operations of the forward GEMMs on m rows: 2·m·Σ in_features·out_features over all linears.

        A multiply-add counts as two; gate and up count as two linears; bias, activation and epilogue do not count.
        Raises `ShapeError` where m is not an integer, 0 or more.
        """
        return 2 * check_rows(m) * sum(d_in * d_out for d_in, d_out in self._linears().values())

    def bytes_moved(self, m: int) -> int:
        """Bytes that an ideal fused forward moves on m rows: x, every parameter and operand read once, y written once.

        itemsize·(m·(d_in + d_out) + parameters + operands), where a tile counts m·d_out elements, a column d_out, a row m and
        a scalar 1. Hidden tensors stay on chip and do not count. Raises `ShapeError` as `flops` does.
        """
        rows = check_rows(m)
        weights = sum(d_out * (d_in + self.bias) for d_in, d_out in self._linears().values())
        sizes = {"tile": rows * self.d_out, "column": self.d_out, "row": rows, "scalar": 1}
        extra = sum(sizes[kind] for kind in self.operands().values())
        return DTYPES[self.dtype] * (rows * (self.d_in + self.d_out) + weights + extra)

    def replace(self, **changes: Any) -> MLPSpec:
        """A copy with these fields changed, validated again. Raises as the constructor does, and for unknown names."""
        _refuse_unknown("replace()", changes, _FIELDS)
        return replace(self, **changes)

    def to_json(self) -> str:
        """The canonical JSON form: every field and `schema_version`, keys sorted, no spaces, ASCII.

        Equal specs give equal text, in every process: it is what cache keys and exported programs hold.
        """
        return self._json

    @cached_property
    def _json(self) -> str:
        # Kept: the op takes this text at every call.
        content = {"schema_version": SCHEMA_VERSION, **{name: _plain(getattr(self, name)) for name in _FIELDS}}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> MLPSpec:
        """The spec that `to_json` wrote. Fields with defaults, and `schema_version`, may be left out.

        `text` is at most 10^6 characters (or bytes of UTF-8). Raises `SpecError` for anything but one JSON object with
        known, unrepeated keys and valid values, and for a newer schema; `UnsupportedError` as the constructor does.
        """
        content = read_object(text)
        version = content.pop("schema_version", SCHEMA_VERSION)
        where = "MLPSpec.from_json, schema_version"
        allowed = f"an integer from 1 to {SCHEMA_VERSION}"
        if type(version) is not int or version < 1:
            raise SpecError(describe(where, version, allowed, f"Write {SCHEMA_VERSION}, or leave it out."))
        if version > SCHEMA_VERSION:
            step = "A newer mlpdsl wrote this: upgrade mlpdsl to read it."
            raise SpecError(describe(where, version, allowed, step))
        _refuse_unknown("MLPSpec.from_json", content, (*_FIELDS, "schema_version"))
        missing = [name for name in ("dims", "activation") if name not in content]
        if missing:
            step = f"Add {listed(missing)}; the other fields have defaults."
            raise SpecError(describe("MLPSpec.from_json", list(content), "an object with 'dims' and 'activation'", step))
        return cls(**content)

    @classmethod
    def from_hf(cls, config: object) -> MLPSpec:
        """The spec of the MLPs of a transformers config. Not in this release: raises `UnsupportedError`."""
        _later("MLPSpec.from_hf", "reading a transformers config", "Write MLPSpec(dims=..., activation=...).")

    @classmethod
    def from_module(cls, module: object) -> MLPSpec:
        """The spec of an `nn.Module`. Not in this release: raises `UnsupportedError`."""
        _later("MLPSpec.from_module", "reading a module", "Write MLPSpec(dims=..., activation=...).")

    def __reduce__(self) -> tuple[Callable[[str], MLPSpec], tuple[str]]:
        # Through the JSON form: what is unpickled is validated, and another release's pickle can be read.
        return type(self).from_json, (self.to_json(),)


def check_spec(spec: object) -> None:
    """Raise `SpecError` for anything but an `MLPSpec`."""
    if not isinstance(spec, MLPSpec):
        step = "Write MLPSpec(dims=..., activation=...), or MLPSpec.from_json(text)."
        raise SpecError(describe("spec", spec, "an MLPSpec", step))


_FIELDS = tuple(field.name for field in fields(MLPSpec))


def _wrong(field: str, got: object, allowed: str, next_step: str) -> NoReturn:
    raise SpecError(describe(f"MLPSpec.{field}", got, allowed, next_step))


def _later(where: str, what: str, next_step: str) -> NoReturn:
    reason = f"{what} comes in a later release"
    raise UnsupportedError(f"{where}: {reason}. {next_step}", (reason,))


def _integer(value: object) -> int | None:
    """`value` as an int where it is one of some integer type; None for booleans, floats, arrays, strings …"""
    kind = type(value)
    if issubclass(kind, int):
        return None if kind is bool else int.__index__(value)  # type: ignore[arg-type]
    # Arrays and tensors of one element have __index__ too: they have a length, numpy's and torch's scalars have not.
    if hasattr(kind, "__len__") or not hasattr(kind, "__index__") or kind.__name__ in ("bool", "bool_"):
        return None
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except Exception:  # a foreign __index__ may raise anything; then it is no integer
        return None


def check_rows(m: object) -> int:
    """m as an int, 0 or more. Raises `ShapeError`."""
    rows = _integer(m)
    if rows is None or rows < 0:
        raise ShapeError(describe("m", m, "an integer, 0 or more", "Pass the number of rows of x."))
    return rows


def _dims(value: object) -> tuple[int, ...]:
    if not issubclass(type(value), tuple | list):
        step = "Write a tuple, for example dims=(768, 3072, 768)."
        _wrong("dims", value, "a tuple or list of integers", step)
    given: tuple[object, ...] | list[object] = value  # type: ignore[assignment]
    if not 2 <= len(given) <= MAX_DIMS:
        step = "Give the widths of input, hidden layers and output, for example dims=(768, 3072, 768)."
        _wrong("dims", value, f"2 to {MAX_DIMS} widths, not {len(given)}", step)
    widths = []
    for at, entry in enumerate(given):
        width = _integer(entry)
        if width is None or not 1 <= width <= MAX_WIDTH:
            whole = type(entry) is float and entry.is_integer() and 1 <= entry <= MAX_WIDTH
            step = f"Write {int(entry)}." if whole else "Write the number of features as an int."  # type: ignore[call-overload]
            _wrong(f"dims[{at}]", entry, f"an integer from 1 to {MAX_WIDTH}", step)
        widths.append(width)
    return tuple(widths)


def _bool(field: str, value: object) -> bool:
    if type(value) is not bool:
        _wrong(field, value, "True or False", f"Write {field}=True or {field}=False.")
    return value


def _word(field: str, value: object, options: tuple[str, ...]) -> str:
    word = exact_str(value)
    if word is None or word not in options:
        step = (did_you_mean(word, options) if word else "") or f"Write {field}='{options[0]}', or leave it out."
        _wrong(field, value, listed(options), step)
    return word


_DTYPE_SLANG = {"fp32": "float32", "float": "float32", "f32": "float32", "single": "float32", "fp16": "float16"}
_DTYPE_SLANG |= {"half": "float16", "f16": "float16", "bf16": "bfloat16"}


def _dtype(value: object) -> str:
    word = exact_str(value)
    if word is None and type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        word = str(value)
    if word is not None:
        word = word.removeprefix("torch.")
        if word in DTYPES:
            return word
    meant = _DTYPE_SLANG.get(word) if word else None
    step = f"Did you mean '{meant}'?" if meant else "Choose one of these, as a string or a torch dtype."
    if word == "tf32":
        step = "For tf32, write dtype='float32', precision='tf32'."
    _wrong("dtype", value, listed(DTYPES), step)


def _plain(value: Any) -> Any:
    """A field as JSON holds it."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value.to_plain() if isinstance(value, Function) else value


def _is_function(value: object) -> bool:
    """Whether this is a function, or the JSON form of one."""
    return callable(value) or isinstance(value, Function) or (type(value) is dict and "expr" in value)


def _function(value: object, where: str, epilogue: bool = False) -> Function | str:
    """The function as formulas; a name where it is a registered one. Imports torch only where there is something to trace."""
    if isinstance(value, Function) and value.is_epilogue != epilogue:
        right = "mlpdsl.epilogue" if epilogue else "mlpdsl.activation"
        raise SpecError(describe(where, value, f"what {right} returns", f"Pass the function to {right}."))
    from mlpdsl.traced import accept

    return accept(value, where, on_output=epilogue)


def _activation(value: object) -> str | Function:
    word = exact_str(value)
    if word is not None and word in REGISTERED:
        return _function(REGISTERED[word], "MLPSpec.activation")
    if word is None and _is_function(value):
        return _function(value, "MLPSpec.activation")
    return canonical_activation(value, "MLPSpec.activation")


def _epilogue(value: object) -> tuple[str | Function, ...]:
    if not issubclass(type(value), tuple | list):
        word = exact_str(value)
        short = word is not None and (word in EPILOGUE_OPERANDS or word in ACTIVATIONS)
        step = f"Write epilogue=('{word}',)." if short else "Write a tuple, for example epilogue=('residual',)."
        _wrong("epilogue", value, "a tuple or list of epilogues", step)
    given: tuple[object, ...] | list[object] = value  # type: ignore[assignment]
    if len(given) > MAX_EPILOGUES:
        _wrong("epilogue", value, f"at most {MAX_EPILOGUES} entries, not {len(given)}", "Shorten the list.")
    entries = [_epilogue_entry(f"epilogue[{at}]", entry) for at, entry in enumerate(given)]
    used: set[str] = set()
    for at, entry in enumerate(entries):
        operands = entry.operands if isinstance(entry, Function) else [entry] if entry in EPILOGUE_OPERANDS else []
        for name in operands:
            if name in used:
                step = "Add or multiply the two operands before the call and pass one, or rename the function's parameter."
                _wrong(f"epilogue[{at}]", entry, f"the operand '{name}' once, because it goes by that name", step)
            used.add(name)
    return tuple(entry for entry in entries if entry != "identity")


def _epilogue_entry(field: str, value: object) -> str | Function:
    word = exact_str(value)
    if word is not None and word in EPILOGUE_OPERANDS:
        return word
    if word is not None and word in REGISTERED:
        value, word = REGISTERED[word], None
    if word is None and _is_function(value):
        if isinstance(value, Function) and not value.is_epilogue:
            value = value.as_epilogue(f"MLPSpec.{field}")
        return _function(value, f"MLPSpec.{field}", epilogue=True)
    options = (*EPILOGUE_OPERANDS, *ACTIVATIONS)
    if word is not None and word in REFUSED:
        return canonical_activation(word, f"MLPSpec.{field}")
    try:
        return canonical_activation(value, f"MLPSpec.{field}")
    except SpecError:
        step = (did_you_mean(word, options) if word else "") or "Choose one of these names, or pass a function."
    _wrong(field, value, listed(options), step)


def _layout(value: object) -> str:
    word = exact_str(value)
    if word is not None and word in LATER_LAYOUTS:
        _later(f"MLPSpec.layout: got '{word}'", f"layout='{word}'", "Split the weights, and use layout='separate'.")
    return _word("layout", value, LAYOUTS)


def _refuse_unknown(where: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        step = did_you_mean(unknown[0], known) or "Remove what is not one of these."
        raise SpecError(describe(f"{where}, unknown field", ", ".join(unknown[:4]), listed(known), step))
