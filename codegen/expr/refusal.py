"""Why a user's function cannot be fused, and the user's own line that says so."""

from __future__ import annotations

import linecache
import os
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
    return _line(code, code.co_firstlineno) if code and _is_users(code) else ""


def raised_at(traceback: TracebackType | None) -> str:
    """The innermost line of the user's own that an exception passed through."""
    where = ""
    while traceback is not None:
        if _is_users(traceback.tb_frame.f_code):
            where = _line(traceback.tb_frame.f_code, traceback.tb_lineno)
        traceback = traceback.tb_next
    return where


def line_in(frame: FrameType | None) -> str:
    """The innermost line of the user's own above a frame of ours, up to our next frame: what the user's function is just doing."""
    frame = frame.f_back if frame else None
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        if _is_users(frame.f_code):
            return _line(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return ""
