"""The formulas of a spec, as people read them: what was traced, its derivatives, and where float32 loses digits."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from mlpdsl.codegen.expr import formula, soundness
from mlpdsl.codegen.expr.registered import activation
from mlpdsl.function import Function
from mlpdsl.names import EPILOGUE_OPERANDS
from mlpdsl.plain import expressions
from mlpdsl.spec import MLPSpec, check_spec

__all__ = ["formulas"]


def formulas(spec: MLPSpec) -> str:
    """Value and derivatives of the activation and of every epilogue entry, one below the other. Raises `SpecError`."""
    check_spec(spec)
    parts = []
    if spec.depth > 1:
        gate = " (of the gate, times up)" if spec.gated and _inputs(spec.activation) != 2 else ""
        parts.append("".join(_entry(f"activation{gate}", spec.activation)))
    parts += ["".join(_entry(f"epilogue[{i}]", entry)) for i, entry in enumerate(spec.epilogue)]
    return "\n".join(parts)


def _inputs(entry: object) -> int:
    return len(entry.inputs) if isinstance(entry, Function) else 1


def _entry(title: str, entry: object) -> Iterator[str]:
    if isinstance(entry, Function):
        kinds = "".join(f", {name} a {kind}" for name, kind in entry.operands.items())
        yield f"{title}: {entry.name}({', '.join(entry.inputs)}){kinds}\n"
        texts = [entry.value, *entry.partials] if entry.value else []
        for what, text in zip(["value", *(f"d/d{n}" for n in entry.inputs)], texts, strict=False):
            yield _lines(what, text)
        for backend, written in entry.snippets:
            for what, text in zip(["value", *(f"d/d{n}" for n in entry.inputs)], written, strict=True):
                yield _lines(f"{backend} {what}", text)
        if entry.call is not None and entry.value:
            value, partials = expressions(entry)
            for problem in soundness.problems(entry.call, entry.derivative, entry.inputs, [value, *partials]):
                yield _lines("note", f"{problem.kind}: {problem}")
        return
    name = str(entry)
    yield f"{title}: {name}\n"
    if name in EPILOGUE_OPERANDS:
        yield _lines("value", f"tile + {name}" if name == "residual" else f"tile * {name}")
        return
    for what, expr in zip(("value", "d/dx"), activation(name), strict=True):
        yield _lines(what, formula.to_text(expr))


def _lines(what: str, text: str) -> str:
    """One formula: what it names on the way on lines of their own."""
    parts = [textwrap.wrap(part, 110, subsequent_indent="    ", break_long_words=False) for part in text.split("; ")]
    lines = [line for part in parts for line in part]
    return "".join(f"  {what if i == 0 else '':<14}  {line}\n" for i, line in enumerate(lines))
