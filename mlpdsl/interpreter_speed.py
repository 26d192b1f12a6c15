"""Takes out of Triton's CPU interpreter what it does again and again: same results, less time. For `mlpdsl.interpreter`."""

from __future__ import annotations

import linecache
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from mlpdsl.frames import with_room

__all__ = ["install"]


class _Unpatched:
    """The scope of a patch that was not needed."""

    def restore(self) -> None:
        """Nothing was changed."""


def _patched_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang`, which replaces triton.language's functions, once a launch. Triton's own does it anew, for good, at every
    call of a device function."""
    launch = threading.local()
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what any device function may see

    def patch_lang(fn: Any) -> Any:
        if getattr(launch, "patched", False):
            return _Unpatched()
        scope = original(everything)
        restore = scope.restore

        def restored() -> None:
            launch.patched = False
            restore()

        scope.restore, launch.patched = restored, True
        return scope

    return patch_lang


def _generated_text(fn: FunctionType) -> str:
    """The lines of a function of generated source, from its decorator to its end; "" for any other function."""
    entry = linecache.cache.get(fn.__code__.co_filename, ())
    if len(entry) != 4 or entry[1] is not None:
        return ""  # not put there by mlpdsl.loader
    lines = entry[2]
    first = end = fn.__code__.co_firstlineno - 1
    while not lines[end].startswith("def "):
        end += 1
    end += 1
    while end < len(lines) and lines[end][0] in " \n)":
        end += 1
    return "".join(lines[first:end])


def _rewritten_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`FunctionRewriter.rewrite_ast`, once for each text: what the source of one spec has in common with that of another is not
    parsed and compiled anew."""
    known: dict[str, tuple[FunctionType, int]] = {}

    def rewrite_ast(self: Any) -> Any:
        fn = self.fn
        text, line = _generated_text(fn), fn.__code__.co_firstlineno
        if text not in known:
            made = original(self)
            if text and made is not fn:
                known[text] = made, line
            return made
        made, its_line = known[text]
        code = made.__code__
        code = code.replace(co_filename=fn.__code__.co_filename, co_firstlineno=code.co_firstlineno + line - its_line)
        fn.__globals__.setdefault("interpreter_semantic", triton_interpreter.interpreter_semantic)
        again = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__)
        again.__annotations__ = fn.__annotations__
        return again

    return rewrite_ast


def _with_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InterpretedFunction.run`, a whole launch, with room for its frames."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return with_room(original, self, *args, **kwargs)

    return run


def install() -> None:
    """Change triton's interpreter in place. To be called once a process."""
    module: Any = triton_interpreter
    module._patch_lang = _patched_once(module._patch_lang)
    functions: Any = triton_interpreter.InterpretedFunction
    functions.run = _with_room(functions.run)
    rewriter: Any = triton_interpreter.FunctionRewriter
    rewriter.rewrite_ast = _rewritten_once(rewriter.rewrite_ast)
