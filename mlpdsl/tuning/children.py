"""The GPU behind tuning: child processes compile, one more launches. Whatever crashes or hangs, crashes or hangs there."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlpdsl.bench.measure import first_line
from mlpdsl.codegen.plan import Config
from mlpdsl.errors import UnsupportedError
from mlpdsl.testing.child import Child
from mlpdsl.tuning.device import Facts, LostError, Times
from mlpdsl.tuning.job import Job

__all__ = ["Children"]

COMPILE_LIMIT, TIME_LIMIT, CHECK_LIMIT, START_LIMIT = 120.0, 120.0, 300.0, 180.0
"""Seconds that a candidate may take: to compile, to be timed, to be checked; and the first answer of the process that launches."""


class Children:
    """torch's current GPU. `compilers`: how many processes compile (default: one a core, at most 16), each config in
    `compile_limit` seconds; `time_limit` and `check_limit` likewise. `module` answers the questions."""

    def __init__(
        self,
        compilers: int | None = None,
        compile_limit: float = COMPILE_LIMIT,
        time_limit: float = TIME_LIMIT,
        check_limit: float = CHECK_LIMIT,
        module: str = "mlpdsl.tuning.questions",
    ) -> None:
        count = compilers or min(16, os.cpu_count() or 1)
        self._compile_limit, self._time_limit, self._check_limit = compile_limit, time_limit, check_limit
        self._all = [Child(False, module) for _ in range(count)]
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._all:
            self._idle.put(child)
        self._launcher = Child(False, module)
        self._described: dict[str, Any] | None = None

    def now(self) -> float:
        return time.monotonic()

    def describe(self) -> dict[str, Any]:
        if self._described is None:
            found = self._launcher.ask("describe", START_LIMIT)
            if "reason" in found:
                raise UnsupportedError(found["reason"])
            self._described = found
        return dict(self._described)

    def compile(self, job: Job, configs: Sequence[Config]) -> list[Facts]:
        pool = ThreadPoolExecutor(len(self._all))
        try:
            return list(pool.map(lambda config: self._compile(job, config), configs))
        except BaseException:  # Ctrl-C: children that compile for a minute yet are not waited for
            for child in self._all:
                child.close(kill=True)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, job: Job, config: Config) -> Facts:
        if config.strategy == "library":
            return Facts()  # torch's own product: nothing to compile but a pass
        child = self._idle.get()
        try:
            return Facts(child.ask("compile", self._compile_limit, target=job.target.name, **_words(job, config))["reason"])
        except Exception as error:
            return Facts(f"compiling: {first_line(error)}")
        finally:
            self._idle.put(child)

    def time(self, job: Job, default: Config, candidate: Config, rounds: int, floor: float) -> Times:
        words = {**_words(job, candidate), "default": default.to_dict(), "rounds": rounds, "floor": floor}
        found = self._ask("time", self._time_limit, words)
        return Times(tuple(found["default"]), tuple(found["candidate"]))

    def check(self, job: Job, config: Config) -> str:
        reason: str = self._ask("check", self._check_limit, _words(job, config))["reason"]
        return reason

    def _ask(self, question: str, limit: float, words: dict[str, Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._launcher.ask(question, limit, **words)
        except Exception as error:  # it crashed, hung, or broke its GPU context: the next question gets a new process
            raise LostError(f"{question}: {first_line(error)}") from error
        if "failed" in found:
            raise LostError(f"{question}: {found['failed']}")
        return found

    def close(self) -> None:
        for child in (*self._all, self._launcher):
            child.close(kill=True)


def _words(job: Job, config: Config) -> dict[str, Any]:
    p = job.product
    named = {"spec": job.spec.to_json(), "role": p.role, "stage": job.stage, "path": p.path, "rows": job.rows}
    return named | {"config": config.to_dict()}
