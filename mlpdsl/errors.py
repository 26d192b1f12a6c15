"""The errors a user can meet, and how their messages are written.

Every message names the field or argument, what it got, what is allowed and the next step, in the one form that
`describe` gives. All classes pickle, so that they cross process boundaries (data loaders, `torchrun`) unchanged.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

__all__ = [
    "MLPError", "NotCompiledError", "ShapeError", "SpecError", "UnstableWarning", "UnsupportedError", "describe", "shorten",
]  # fmt: skip

_LIMIT = 80


class MLPError(Exception):
    """Base of every error that mlpdsl raises on purpose."""


class SpecError(MLPError, ValueError):
    """The declaration is wrong: no target could run it as written."""


class ShapeError(MLPError, ValueError):
    """A call does not fit the spec: shape, dtype, device, or a missing or unexpected operand."""


class UnsupportedError(MLPError, NotImplementedError):
    """The declaration is valid, but this release, or every backend on this target, cannot do it.

    `reasons` holds every reason found, not only the first; with none given it is the message itself, so it is never
    empty. `str(error)` is the message, and a line for each reason that it does not state.
    """

    reasons: tuple[str, ...]

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        super().__init__(message)
        listed = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        self.reasons = listed or (message,)

    def __str__(self) -> str:
        message = super().__str__()
        return "\n".join([message, *(f"  - {reason}" for reason in self.reasons if reason not in message)])


class NotCompiledError(MLPError, RuntimeError):
    """A call would have to compile a kernel, and MLPDSL_ON_JIT=error forbids it; the message has the `mlpdsl.warmup` to run."""


class UnstableWarning(UserWarning):
    """A user's function loses most of its digits somewhere in float32; the message says where, and what would not."""


class _Short(reprlib.Repr):
    """`repr` that looks at the first few characters or entries only, whatever the size of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4300 digits, and a long one helps nobody.
        return repr(x) if x.bit_length() <= 192 else f"<int of {x.bit_length()} bits>"


_SHORT = _Short()


def shorten(value: object) -> str:
    """`repr(value)` on one line and in at most 80 characters, for a message.

    Safe for any value: a string of 10^6 characters is cut before it is printed, and an object whose `repr` raises is
    shown by its type's name. Never raises.
    """
    try:
        text = " ".join(_SHORT.repr(value).split())
    except Exception:  # a foreign __repr__ may raise anything, and this already runs on the way to another error
        text = f"<{type.__dict__['__name__'].__get__(type(value))}, whose repr raises>"
    return text if len(text) <= _LIMIT else f"{text[: _LIMIT - 3]}..."


def describe(where: str, got: object, allowed: str, next_step: str) -> str:
    """The one form of a message: `where: got …; allowed: …. Next step.`

    `where` is the field or argument ("MLPSpec.dims[1]"), `got` the value itself (shown through `shorten`), `allowed` a
    phrase without a full stop, `next_step` a full sentence.
    """
    return f"{where}: got {shorten(got)}; allowed: {allowed}. {next_step}"
