"""A process that makes calls, or compiles, for another one: Triton either interprets or compiles in a process, never both.

`Child(interpret=True)` starts Python with TRITON_INTERPRET=1, whatever this process has; `ask` sends a question and waits for the
answer. It says what the process itself would have said: an exception there is raised here, with its name, its message and its
traceback as the cause. A child that dies (a segmentation fault in a kernel) or does not answer is an error here too, and the next
question starts another.

Questions are JSON, a line each: a call goes as its recipe, never as tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from mlpdsl.spec import MLPSpec

__all__ = ["Child", "ChildError", "shared"]

LIMIT = 600.0
"""Seconds that one answer may take."""

_START = "import sys; sys.path[:] = {path!r}; from mlpdsl.testing.child import serve; serve({module!r})"


class ChildError(AssertionError):
    """The child ended, or gave no answer, over a question."""

    origin = ""
    """What told this error apart where it was raised: type, place and, from the oracle, whose error it is."""


class _Traceback(Exception):
    """The cause of an error that came from a child: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Child:
    """A process that answers questions, one at a time, started at the first one. It ends with the process that asks."""

    def __init__(self, interpret: bool, module: str = __name__) -> None:
        """`module` names what answers: its `QUESTIONS`, functions by name."""
        self.interpret, self.module = interpret, module
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._unread = b""

    def ask(self, question: str, limit: float = LIMIT, **words: Any) -> Any:
        """The answer to one of `QUESTIONS`, with its arguments as JSON has them. Raises what answering it raised, `ChildError`."""
        self.send(question, **words)
        return self.receive(limit)

    def send(self, question: str, **words: Any) -> None:
        """Ask, and do not wait: `receive` does. Only one question at a time."""
        self._lock.acquire()
        try:
            pipe = self._started().stdin
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it has died: receive will say so
                pipe.write(json.dumps([question, words]).encode() + b"\n")
                pipe.flush()
        except BaseException:
            self._lock.release()
            raise

    def receive(self, limit: float = LIMIT) -> Any:
        """The answer to what was sent."""
        try:
            answer = json.loads(self._line(time.monotonic() + limit))
        except BaseException:  # Ctrl-C too: an answer that nobody read must not answer the next question
            self.close(kill=True)
            raise
        finally:
            self._lock.release()
        if "error" in answer:
            if not self.interpret and not answer["judged"]:  # a fault on a GPU may have broken its context for good
                self.close(kill=True)
            raise _error(answer)
        return answer["answer"]

    def abandon(self) -> None:
        """Want no answer to what was sent."""
        self.close(kill=True)
        self._lock.release()

    def close(self, kill: bool = False) -> None:
        """End the process; another question starts a new one."""
        process, self._process, self._unread = self._process, None, b""
        if process is None or self._owner != os.getpid():
            return
        if kill:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self.interpret:
            environment["TRITON_INTERPRET"] = "1"
        self._owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path, module=self.module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        return self._process

    def _line(self, end: float) -> bytes:
        process = self._process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise _told(ChildError("the process that made the call gave no answer in time"), "no answer")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise _told(ChildError(f"the process that made the call {self._ending(process)}"), "ended")
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        status = process.wait()
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()[-20:]
        return "\n".join([f"{how}{'; its last words:' if said else ''}", *said])


_shared: dict[bool, Child] = {}


def shared(interpret: bool) -> Child:
    """This process's child of either kind: starting one takes seconds, mostly for the import of torch."""
    if interpret not in _shared:
        _shared[interpret] = Child(interpret)
        atexit.register(_shared[interpret].close)
    return _shared[interpret]


_classes: dict[tuple[str, str], type[Exception]] = {}


def _error(answer: dict[str, Any]) -> Exception:
    """What was raised there. Each origin has a class of its own, because Hypothesis tells failures apart by their class."""
    name, origin = answer["error"], answer["origin"]
    if (name, origin) not in _classes:
        if name == "OracleError":
            from mlpdsl.testing.oracle import OracleError as base
        elif name == "CallError":
            from mlpdsl.testing.calls import CallError as base  # type: ignore[assignment]
        else:
            base = ChildError  # type: ignore[assignment,misc]
        _classes[name, origin] = type(name, (base,), {"__module__": base.__module__})
    error = _told(_classes[name, origin](answer["message"]), origin)
    error.__cause__ = _Traceback(answer["traceback"])
    return error


def _told(error: Exception, origin: str) -> Exception:
    error.origin = origin  # type: ignore[attr-defined]
    return error


# In the child


def _check(spec: str, recipe: dict[str, Any]) -> float:
    """The largest error of a call as a fraction of its bound. Raises as `check_call` does."""
    from mlpdsl.testing.calls import check_call, make_call

    return check_call(make_call(MLPSpec.from_json(spec), **recipe)).ratio


def _reasons(spec: str | None) -> str:
    """Why the kernels of a spec, or of any, cannot run there."""
    from mlpdsl.testing.places import reason_here

    return reason_here(None if spec is None else MLPSpec.from_json(spec))


def _compile(spec: str, target: str) -> int:
    """How many kernels were compiled. Raises as `check_compiled` does."""
    from mlpdsl.testing.compiling import check_compiled

    return len(check_compiled(MLPSpec.from_json(spec), target))


def _where() -> str:
    """What runs the kernels there, in words."""
    from mlpdsl.testing.places import words_here

    return words_here()


QUESTIONS: dict[str, Callable[..., Any]] = {"check": _check, "reasons": _reasons, "compile": _compile, "where": _where}


def serve(module: str = __name__) -> None:
    """Answer the lines of stdin on stdout, by a module's `QUESTIONS`, until stdin ends, as it does with the process that asks."""
    questions: dict[str, Callable[..., Any]] = importlib.import_module(module).QUESTIONS
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    for line in sys.stdin:
        question, words = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": _quietly(questions[question], words)}
        except Exception as error:
            answer = {"error": type(error).__name__, "origin": _origin(error), "message": str(error)}
            answer["judged"] = isinstance(error, AssertionError)
            answer["traceback"] = "".join(traceback.format_exception(error))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _quietly(question: Callable[..., Any], words: dict[str, Any]) -> Any:
    import torch

    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # on matrices this small, threads cost ten times what they save
    return question(**words)


def _origin(error: BaseException) -> str:
    """Type and place, and of the oracle's errors which result it was ("gradient of fc1.bias")."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    what = str(error).partition(" of MLPSpec(")[0] if type(error).__name__ == "OracleError" else ""
    return " ".join(part for part in (type(error).__name__, what, place) if part)
