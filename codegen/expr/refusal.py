"""Why a user's function cannot be fused, and the user's own line that says so."""

from __future__ import annotations

import linecache
import os
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any


class Refused(NotImplementedError):
    """A function that cannot become an expression: why, what to do, and where in the user's source."""

    def __init__(self, why: str, step: str, where: str) -> None:
        super().__init__(f"{why}{f' ({where})' if where else ''}. {step}")
        self.why, self.step, self.where = why, step, where


_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep  # the package


def _is_users(code: CodeType) -> bool:
    import torch

    path = code.co_filename
    return (
        not path.startswith((os.path.dirname(torch.__file__), _OURS))
        and not path.startswith("<frozen")
        and "/contextlib.py" not in path
    )


def _line(code: CodeType, number: int) -> str:
    text = linecache.getline(code.co_filename, number).strip()
    return f"{os.path.basename(code.co_filename)}:{number}" + (f": {text[:100]}" if text else "")


def location(f: Any) -> str:
    """Where a function begins."""
    code = getattr(f, "__code__", None)
    return _line(code, code.co_firstlineno) if code else ""


def raised_at(traceback: TracebackType | None) -> str:
    """The innermost line of the user's own that an exception passed through."""
    where = ""
    while traceback is not None:
        if _is_users(traceback.tb_frame.f_code):
            where = _line(traceback.tb_frame.f_code, traceback.tb_lineno)
        traceback = traceback.tb_next
    return where


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def calls_of(function: Callable[..., Any], inputs: tuple[Any, ...], name: str) -> str:
    """The first user's line that makes torch run the operation `aten.<name>`; an empty text where none does."""
    import sys

    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not found and str(op).removeprefix("aten.").split(".")[0] == name:
                users = (f for f in _frames(sys._getframe()) if _is_users(f.f_code))
                found.extend(_line(f.f_code, f.f_lineno) for f in [next(users, None)] if f is not None)
            return op(*args, **(kwargs or {}))

    try:
        with Watch():  # type: ignore[no-untyped-call]
            function(*inputs)
    except Exception:  # it may well fail after the operation looked for, and is refused anyway
        pass
    return found[0] if found else ""
