"""Hypothesis strategies for specs and calls.

What is drawn is small: widths, words and a seed, never the elements of a tensor. So a failing example prints on a line, and shrinks
to a plain call: few rows, dense tensors, calm values.

    @given(specs(activations=["silu", my_function], gated=True), st.data())
    def test_mine(spec, data):
        check_call(data.draw(calls(spec)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mlpdsl import traced
from mlpdsl.function import Function
from mlpdsl.names import ACTIVATIONS, DTYPES, EPILOGUE_OPERANDS
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import register_strategies
from mlpdsl.testing.calls import GPU_PATTERNS, LAYOUTS, PAIRS, PATTERNS, VALUES, WEIGHT_LAYOUTS, Call, make_call, written

__all__ = [
    "SEEDS", "Recipe", "calls", "epilogues", "layouts", "leads", "narrowed", "patterns", "recipes", "requires_grad", "shapes",
    "specs", "values",
]  # fmt: skip

SEEDS: SearchStrategy[int] = st.integers(0, 2**31 - 1)
"""Seeds of tensors."""

WIDTHS = (1, 2, 3, 5, 7, 9, 13, 15, 17, 20, 31, 33, 47, 50, 65, 71)
ALIGNED_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72)
"""Multiples of 8, whose rows tensor descriptors can describe."""
ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 33, 40, 50, 64, 65, 70, 100, 129, 150)
NUMBERS = (("float32", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"), ("float16", "ieee"), ("bfloat16", "ieee"))

Given = str | Function | Callable[..., Any]
"""An activation, or an entry of an epilogue, as a declaration takes it."""

_FIELDS = tuple(field.name for field in fields(MLPSpec))
_SIMPLEST_FIRST = ("identity", "relu", *(name for name in ACTIVATIONS if name not in ("identity", "relu")))


def shapes(depth: int | None = None) -> SearchStrategy[tuple[int, ...]]:
    """`dims` of an MLP of `depth` layers (1 to 4 where None): all odd and small, all multiples of 8 up to 72, or some of each."""

    def of(layers: int) -> SearchStrategy[tuple[int, ...]]:
        kinds = (WIDTHS, ALIGNED_WIDTHS, WIDTHS + ALIGNED_WIDTHS)
        each = (st.lists(st.sampled_from(widths), min_size=layers + 1, max_size=layers + 1) for widths in kinds)
        return st.one_of(*each).map(tuple)

    return of(depth) if depth is not None else st.integers(1, 4).flatmap(of)


def leads() -> SearchStrategy[tuple[int, ...]]:
    """Leading dimensions of x: one, two, three or none, up to 150 rows, often 1, which has kernels of its own, now and then 0."""
    # Two strategies of rows, because Hypothesis draws from one that is given twice no more often than from one given once. Several
    # tiles each way, and sums that are split, take more than 64 rows.
    few, many = (st.tuples(st.sampled_from([n for n in ROWS if (n > 64) == large])) for large in (False, True))
    batch = st.tuples(st.sampled_from((1, 2, 3, 5)), st.sampled_from((1, 2, 7, 16, 21)))
    deep = st.tuples(st.sampled_from((1, 2)), st.sampled_from((1, 3)), st.sampled_from((1, 4, 9)))
    one = st.sampled_from(((1,), (), (1, 1)))
    return st.one_of(few, many, batch, deep, one, st.sampled_from(((0,), (2, 0))))


def values() -> SearchStrategy[str]:
    """A name in `mlpdsl.testing.calls.VALUES`."""
    return st.sampled_from(VALUES)


def patterns(device: str = "cpu") -> SearchStrategy[str]:
    """A name in `mlpdsl.testing.calls.PATTERNS`, or on a GPU in `GPU_PATTERNS` as well."""
    return st.sampled_from((*PATTERNS, *(GPU_PATTERNS if device.startswith("cuda") else ())))


def requires_grad(spec: MLPSpec) -> SearchStrategy[tuple[str, ...] | None]:
    """The names of the tensors of a call whose gradients are asked for; None, by half, for all."""
    names = ("x", *spec.parameter_shapes(), *spec.operands())
    some = st.sets(st.sampled_from(names)).map(lambda chosen: tuple(name for name in names if name in chosen))
    return st.none() | some


def layouts(spec: MLPSpec) -> SearchStrategy[dict[str, Any]]:
    """How the tensors of a call lie: keyword arguments of `make_call`. Those that the spec has no tensor for are left out."""
    drawn: dict[str, SearchStrategy[Any]] = {
        "x": st.sampled_from(tuple(LAYOUTS)),
        "swap": st.booleans(),
        "weights": st.sampled_from(WEIGHT_LAYOUTS),
        "dy": st.sampled_from(tuple(LAYOUTS)),
    }
    if spec.gated:
        drawn["pair"] = st.sampled_from(PAIRS)
    if spec.operands():
        drawn |= {"operands": st.sampled_from(tuple(LAYOUTS)), "wide_operands": st.booleans()}
    return st.fixed_dictionaries(drawn)


@dataclass(frozen=True, repr=False)
class Recipe:
    """A call before it is made: no tensor, and prints as the call that it makes."""

    spec: MLPSpec
    recipe: dict[str, Any]
    """Arguments of `make_call`; those that have their defaults are left out."""

    def make(self) -> Call:
        return make_call(self.spec, **self.recipe)

    def __repr__(self) -> str:
        return written(repr(self.spec), self.recipe)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis, which would print the fields of a dataclass."""
        printer.text(repr(self))


@st.composite
def recipes(draw: DrawFn, /, spec: MLPSpec | SearchStrategy[MLPSpec], *, device: str = "cpu", **fixed: Any) -> Recipe:
    """Recipes of the calls that `calls` draws with the same arguments: for calls that another process makes."""
    of = draw(spec) if isinstance(spec, SearchStrategy) else spec
    drawn: dict[str, SearchStrategy[Any]] = {
        "lead": leads(), "seed": SEEDS, "values": values(), "requires_grad": requires_grad(of), "pattern": patterns(device),
    }  # fmt: skip
    made = {name: draw(strategy) for name, strategy in drawn.items() if name not in fixed}
    words = {**draw(layouts(of)), **made, "device": device, **fixed}
    defaults = make_call.__kwdefaults__ or {}
    told = {name: words[name] for name in defaults if name in words and words[name] != defaults[name]}
    return Recipe(of, {"lead": words["lead"], "seed": words["seed"], **told})


def calls(spec: MLPSpec | SearchStrategy[MLPSpec], *, device: str = "cpu", **fixed: Any) -> SearchStrategy[Call]:
    """Calls of `spec`, or of one drawn: any lead, layout, values, subset of gradients and pattern.

    `fixed` are arguments of `make_call` that are not to be drawn. A drawn call prints as the `make_call(…)` that makes it.
    """
    return recipes(spec, device=device, **fixed).map(Recipe.make)


@st.composite
def epilogues(draw: DrawFn, /, entries: Sequence[Given] | None = None, max_size: int = 3) -> tuple[str | Function, ...]:
    """Epilogues of up to `max_size` of `entries`, every name where None: repeated where they have no operands."""
    known = _entries(entries)
    drawn: list[str | Function] = []
    used: set[str] = set()
    for _ in range(draw(st.integers(0, max_size))):
        free = [entry for entry in known if not used & _operands(entry)]
        if not free:
            break
        drawn.append(draw(st.sampled_from(free)))
        used |= _operands(drawn[-1])
    return tuple(drawn)


def specs(
    *,
    activations: Sequence[Given] | None = None,
    epilogue_entries: Sequence[Given] | None = None,
    max_depth: int = 4,
    max_epilogues: int = 3,
    **fixed: Any,
) -> SearchStrategy[MLPSpec]:
    """Valid specs of small widths: any depth, activation, gating, bias, dtype, precision, epilogue.

    `activations` and `epilogue_entries` are what to choose from, names and functions of one's own as `MLPSpec` takes them; every
    registered name where None. One linear alone, which has no activation, is drawn only where "identity" is among them. `fixed`
    are fields of `MLPSpec` that are not to be drawn; the others follow them (with dims of four widths nothing is gated, with
    float16 the precision is "ieee").

    Raises `TypeError` for a field that does not exist, `SpecError` and `UnsupportedError` for functions as `mlpdsl.activation`
    does, and when drawing, where the fixed fields fit no spec.
    """
    unknown = [name for name in fixed if name not in _FIELDS]
    if unknown:
        raise TypeError(f"specs: MLPSpec has no field {unknown[0]!r}; it has {', '.join(_FIELDS)}")
    if "dims" in fixed:
        fixed["dims"] = tuple(fixed["dims"])
    if "activation" in fixed:
        activations = [fixed.pop("activation")]
    known = [_function(each) for each in (_SIMPLEST_FIRST if activations is None else activations)]
    return _specs(known, _entries(epilogue_entries), max_depth, max_epilogues, fixed)


@st.composite
def _specs(
    draw: DrawFn,
    /,
    activations: list[str | Function],
    entries: list[str | Function],
    max_depth: int,
    max_epilogues: int,
    fixed: dict[str, Any],
) -> MLPSpec:
    dims: tuple[int, ...] | None = fixed.get("dims")
    single = [each for each in activations if not _takes_two(each)]
    gated_fits = (max_depth >= 2) if dims is None else len(dims) == 3
    choices = ([False] if single or not gated_fits else []) + ([True] if gated_fits else [])
    gated = fixed.get("gated", draw(st.sampled_from(choices)))
    if dims is None:
        shallowest = 2 if single and "identity" not in single else 1
        depth = draw(st.sampled_from(list(range(shallowest, max_depth + 1)) or [max_depth]))  # drawn even where gated, or gated,
        dims = draw(shapes(2 if gated else depth))  # with a choice less, would be the simpler one
    fitting = activations if gated else single
    activation = "identity" if len(dims) == 2 and "identity" in single else draw(st.sampled_from(fitting or activations))
    dtype = str(fixed.get("dtype", "")).removeprefix("torch.")
    numbers = [n for n in NUMBERS if dtype in ("", n[0]) and fixed.get("precision", n[1]) == n[1]]
    chosen, precision = draw(st.sampled_from(numbers or [(dtype or next(iter(DTYPES)), fixed.get("precision", "ieee"))]))
    epilogue = fixed["epilogue"] if "epilogue" in fixed else draw(epilogues(entries, max_epilogues))
    drawn = {"bias": draw(st.booleans()), **fixed, "gated": gated, "dims": dims, "epilogue": epilogue}
    return MLPSpec(**{**drawn, "activation": activation, "dtype": chosen, "precision": precision})


@st.composite
def narrowed(draw: DrawFn, /, spec: MLPSpec, widest: int = 72) -> MLPSpec:
    """`spec` with each width above `widest` replaced by one up to it: equal widths stay equal, multiples of 8 multiples of 8.

    For interpreters, which take seconds for a width of thousands. Formulas, gating, biases, epilogue and dtype are the spec's own;
    tile sizes may not be.
    """
    found: dict[int, int] = {}
    for width in sorted(set(spec.dims)):
        if width <= widest:
            found[width] = width
        else:
            choices = [w for w in (ALIGNED_WIDTHS if width % 8 == 0 else WIDTHS) if w <= widest]
            found[width] = draw(st.sampled_from(choices or [widest]))
    return spec.replace(dims=tuple(found[width] for width in spec.dims))


def _function(given: Given) -> str | Function:
    return given if isinstance(given, str | Function) else traced.activation(given)


def _entries(given: Sequence[Given] | None) -> list[str | Function]:
    names = (*EPILOGUE_OPERANDS, *(name for name in _SIMPLEST_FIRST if name != "identity"))
    return [_function(each) for each in (names if given is None else given)]


def _takes_two(activation: str | Function) -> bool:
    return isinstance(activation, Function) and len(activation.inputs) == 2


def _operands(entry: str | Function) -> set[str]:
    """The names of the operands that an entry of an epilogue takes."""
    if isinstance(entry, Function):
        return set(entry.operands)
    return {entry} & set(EPILOGUE_OPERANDS)


register_strategies()  # for a checkout that is not installed, whose entry points nobody sees
