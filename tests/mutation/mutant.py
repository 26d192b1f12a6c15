"""What a mutant is: a name, and how the generated text of some families is changed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlpdsl import MLPSpec, source

__all__ = ["Mutant", "mutant"]


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel, as a change of generated text."""

    name: str
    families: tuple[str, ...]
    """The keys of `FAMILIES` in whose text the change is made, each a case of its own."""
    within: str
    """The function, kernel or launcher, in which to change every occurrence; "" for all of the text."""
    edits: tuple[tuple[str, str], ...]
    """(old, new), one after the other. In both, "{dtype}" is the spec's dtype in Triton's words."""

    def text(self, spec: MLPSpec) -> str:
        """The generated text of `spec`, changed. Raises `AssertionError` where it no longer has what is to be changed."""
        text = source.generate(spec).text
        start, end = _function(text, self.within) if self.within else (0, len(text))
        assert end > start, f"{self.name}: the text of {spec!r} no longer has a function {self.within!r}"
        body = text[start:end]
        for old, new in self.edits:
            old, new = (part.replace("{dtype}", f"tl.{spec.dtype}") for part in (old, new))
            assert old in body, f"{self.name}: {self.within or 'the text'} of {spec!r} no longer has {old!r}"
            body = body.replace(old, new)
        assert body != text[start:end], f"{self.name} changes nothing"
        return text[:start] + body + text[end:]


def mutant(name: str, families: str, within: str, *edits: tuple[str, str]) -> Mutant:
    """A mutant; `families` are names with spaces between them."""
    return Mutant(name, tuple(families.split()), within, edits)


def _function(text: str, name: str) -> tuple[int, int]:
    """Where a function of a module begins and ends: before the next decorator, `def`, comment or constant at the margin."""
    found = re.search(rf"^def {name}\(.*?(?=^(?:@|def |# |[A-Z])|\Z)", text, re.M | re.S)
    return found.span() if found else (0, 0)
