"""A long search over several specs: in batches, kept on disk, so that it can be interrupted anywhere and gone on with.

Every batch of a spec has a seed of its own, made from the run's seed, the spec and the batch's number. The state file says how many
batches are behind, a file of digests which calls were made; both are written after each batch. So what is killed loses at most the
batch under way, and what goes on makes no call again. Calls are made in a child process, which a kernel that crashes takes with
it, and nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import Phase
from hypothesis.database import DirectoryBasedExampleDatabase, ReadOnlyDatabase

from mlpdsl.errors import MLPError
from mlpdsl.spec import MLPSpec
from mlpdsl.testing.child import Child
from mlpdsl.testing.fuzzing import drawn_from
from mlpdsl.testing.search import FuzzError, TimeUp, compile_failure, in_child, search
from mlpdsl.testing.strategies import Recipe
from mlpdsl.version import __version__

__all__ = ["BATCH", "Failure", "Night", "Progress", "StateError", "locked"]

BATCH = 50
"""Calls a batch: what a kill can lose."""

STATE = "state.json"
DRAWN = "drawn.bin"
"""Eight bytes for each call that was made; the state says how many bytes count."""
SCHEMA = 1

MOST_FAILURES = 5
"""Different failures of one spec, after which it is left alone."""


class StateError(MLPError):
    """The state on disk is not one that this run can go on with. Nothing was changed."""


@dataclass
class Failure:
    """One way in which a spec fails."""

    origin: str
    """What tells it from others of the spec; "compiling: …" where kernels did not compile."""
    message: str
    script: str
    """The name of the file, in the folder of results, that does it again."""
    recipe: dict[str, Any] | None = None
    spec: str = ""
    """The spec of the call, as JSON; its widths may be narrow ones."""


@dataclass
class Progress:
    """How far one spec has come."""

    name: str
    spec: str
    """As JSON."""
    batches: int = 0
    calls: int = 0
    worst: float = 0.0
    """The largest error of a call that passed, as a fraction of its bound."""
    worst_call: str = ""
    compiled: str = ""
    """The target for which the kernels compiled, or failed to; "" before."""
    reason: str = ""
    """Why no kernel of it can run here."""
    failures: list[Failure] = field(default_factory=list)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of results, made if it is not there. Raises `StateError` where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(f"another mlpdsl fuzz is at work in {folder}: name another folder with --out") from error
        yield


class Night:
    """A search over `specs`, by name, whose results lie in `folder`. Made by `begin` or `resume`.

    `tell` is called with a kind of event and the progress of the spec it is about, often: "call", "failure", "passes", "skip",
    "batch".
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, MLPSpec], seed: int, narrow: bool, interpret: bool, progress: list[Progress]
    ) -> None:
        self.folder, self.specs, self.seed, self.narrow, self.interpret = folder, dict(specs), seed, narrow, interpret
        self.progress = progress
        self.tell: Callable[[str, Progress], None] = lambda event, at: None
        self.shrinking = False
        """Whether a call has failed and a plainer one is looked for."""
        self._child = Child(interpret)
        self._where = ""
        self._drawn: set[bytes] = set()
        self._new = bytearray()
        """Of calls made since the state was written."""
        self._kept = 0

    @classmethod
    def begin(cls, folder: Path, specs: Mapping[str, MLPSpec], seed: int, narrow: bool, interpret: bool) -> Night:
        """A new one. Raises `StateError` where one is there that can be gone on with."""
        if (folder / STATE).exists():
            step = "--resume goes on with it; --out names another folder; or delete it"
            raise StateError(f"{folder / STATE} is there from an earlier run: {step}")
        return cls(folder, specs, seed, narrow, interpret, [Progress(name, spec.to_json()) for name, spec in specs.items()])

    @classmethod
    def resume(cls, folder: Path, specs: Mapping[str, MLPSpec], seed: int | None, narrow: bool, interpret: bool) -> Night | None:
        """The one whose state lies in `folder`; None where none does. Raises `StateError` unless it is of this version, these specs
        and options."""
        path = folder / STATE
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found = [Progress(**{**p, "failures": [Failure(**f) for f in p["failures"]]}) for p in state["specs"]]
            had = {name: state[name] for name in ("schema", "mlpdsl", "seed", "narrow", "interpret")}
            drawn = (folder / DRAWN).read_bytes()[: state["drawn"]] if state["drawn"] else b""
            if len(drawn) != state["drawn"]:
                raise ValueError(f"{DRAWN} is shorter than {state['drawn']} bytes")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StateError(f"{path} cannot be read ({type(error).__name__}: {error}): name another folder with --out") from error
        wanted = {"schema": SCHEMA, "mlpdsl": __version__, "seed": had["seed"] if seed is None else seed}
        wanted |= {"narrow": narrow, "interpret": interpret}
        differ = [f"{_WORDS[name]} is {had[name]} there and {wanted[name]} here" for name in wanted if had[name] != wanted[name]]
        theirs, ours = {p.name: p.spec for p in found}, {name: spec.to_json() for name, spec in specs.items()}
        differ += [f"the spec {name} is not in it" for name in ours if name not in theirs]
        differ += [f"the spec {name} is in it, and was not named" for name in theirs if name not in ours]
        differ += [f"the spec {name} is another one there" for name in ours if theirs.get(name, ours[name]) != ours[name]]
        if differ:
            raise StateError(f"{path} is of another run, and stays as it is: {'; '.join(differ)}. Name another folder with --out")
        night = cls(folder, specs, had["seed"], narrow, interpret, found)
        night._drawn = {drawn[i : i + 8] for i in range(0, len(drawn), 8)}
        night._kept = len(drawn)
        return night

    def run(
        self, examples: int | None, end: float, compile_for: str | None, database: Path, tell: Callable[[str, Progress], None]
    ) -> None:
        """Make calls until each spec has `examples` of them (None: without limit) or `time.monotonic()` is past `end`. Specs take
        turns of a batch, none of which lasts longer than an equal part of the time left.

        `compile_for` is the target for which kernels are compiled without running, `database` the folder of Hypothesis's database.
        Whatever ends it (Ctrl-C), the state is written.
        """
        self.tell = tell
        compiler = Child(interpret=False)
        active: list[Progress] = []
        self._save()
        try:
            self._where = str(self._child.ask("where"))
            for i, p in enumerate(self.progress):
                until = _share(end, len(self.progress) - i)
                with self._compiling(p, compiler, compile_for if time.monotonic() < end else None):
                    p.reason = str(self._child.ask("reasons", spec=p.spec))
                    if p.reason:
                        tell("skip", p)
                    elif self._known(p, database, end) and self._wanted(p, examples) and self._batch(p, examples, until, database):
                        active.append(p)
            while active and time.monotonic() < end:
                still = []
                for i, p in enumerate(active):
                    if self._wanted(p, examples) and self._batch(p, examples, _share(end, len(active) - i), database):
                        still.append(p)
                active = still
        finally:
            self._save()
            self._child.close(kill=True)
            compiler.close(kill=True)

    def _wanted(self, p: Progress, examples: int | None) -> bool:
        return (examples is None or p.calls < examples) and len(p.failures) < MOST_FAILURES

    @contextlib.contextmanager
    def _compiling(self, p: Progress, compiler: Child, target: str | None) -> Iterator[None]:
        """Meanwhile compile the kernels of a spec for `target`, where that is not behind."""
        if target is None or p.compiled == target:
            yield
            return
        compiler.send("compile", spec=p.spec, target=target)
        try:
            yield
        except BaseException:
            compiler.abandon()
            raise
        p.failures = [f for f in p.failures if not f.origin.startswith("compiling: ")]
        try:
            compiler.receive()
        except Exception as error:
            self._failed(p, compile_failure(error, self.specs[p.name], target))
        p.compiled = target
        self._save()

    def _known(self, p: Progress, database: Path, end: float) -> bool:
        """What is known to fail, first: by the state, then by Hypothesis's database. Whether there is time for more."""
        for failure in list(p.failures):
            if failure.recipe is None or time.monotonic() > end:
                continue
            recipe = Recipe(MLPSpec.from_json(failure.spec), failure.recipe)
            try:
                in_child(self._child, recipe)
            except Exception:
                continue
            p.failures.remove(failure)
            self.tell("passes", p)
        while self._wanted(p, None) and self._search(p, None, end, database, (Phase.reuse, Phase.shrink)):
            pass
        return time.monotonic() < end

    def _batch(self, p: Progress, examples: int | None, end: float, database: Path) -> bool:
        """One batch; whether there is more to draw."""
        before = p.calls
        try:
            self._search(p, examples, end, database, (Phase.generate, Phase.target, Phase.shrink))
        finally:  # what Ctrl-C leaves of a batch is not drawn either
            p.batches += 1
        self._save()
        self.tell("batch", p)
        return p.calls > before

    def _search(self, p: Progress, examples: int | None, end: float, database: Path, phases: tuple[Phase, ...]) -> bool:
        """Whether a failure was found that was not known."""
        drawn, name = drawn_from(self.specs[p.name], self.narrow)
        known = {failure.origin for failure in p.failures}
        generates = Phase.generate in phases
        self.shrinking = False

        def body(recipe: Recipe) -> None:
            if not self.shrinking and (time.monotonic() > end or (examples is not None and p.calls >= examples)):
                if generates:  # to raise would put this call into the database
                    return
                raise TimeUp("the time is up")  # to return would take what is known out of it
            if not self.shrinking:
                digest = hashlib.sha256(f"{p.name} {recipe!r}".encode()).digest()[:8]
                if digest in self._drawn and generates:
                    return
                if digest not in self._drawn:
                    self._drawn.add(digest)
                    self._new += digest
                    p.calls += 1
            try:
                ratio = in_child(self._child, recipe)
            except Exception as error:
                if getattr(error, "origin", "") in known:
                    return
                self.shrinking = True
                raise
            finally:
                self.tell("call", p)
            if ratio > p.worst:
                p.worst, p.worst_call = ratio, repr(recipe)

        kept = DirectoryBasedExampleDatabase(database)
        # Hypothesis removes from its database what no longer fails, and a failure that is known already looks as if.
        chosen: dict[str, Any] = {"database": kept if generates or not known else ReadOnlyDatabase(kept)}
        chosen |= {"derandomize": False, "seed": _seed(self.seed, p.spec, p.batches), "device": "cpu" if self.interpret else "cuda"}
        try:
            search(body, drawn, name, examples=BATCH, phases=phases, where=self._where, **chosen)
        except unittest.SkipTest:  # TimeUp, or Hypothesis, whose database has nothing to try
            return False
        except FuzzError as error:
            self._failed(p, error)
            return True
        finally:
            self.shrinking = False
        return False

    def _failed(self, p: Progress, error: FuzzError) -> None:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", p.name.replace("::", ".")).strip("-.") or "spec"
        taken = {failure.script for q in self.progress for failure in q.failures}
        number = next(n for n in range(1, 10**6) if f"{stem}-{n}.py" not in taken)
        recipe = error.recipe
        failure = Failure(error.origin, str(error), f"{stem}-{number}.py")
        if recipe is not None:
            failure.recipe, failure.spec = recipe.recipe, recipe.spec.to_json()
        _write(self.folder / failure.script, error.script)
        p.failures.append(failure)
        self._save()
        self.tell("failure", p)

    def _save(self) -> None:
        with (self.folder / DRAWN).open("r+b" if self._kept else "wb") as file:
            file.seek(self._kept)  # over what a run that was killed wrote after its last state
            self._kept += file.write(self._new)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._new.clear()
        state: dict[str, Any] = {
            "schema": SCHEMA,
            "mlpdsl": __version__,
            "seed": self.seed,
            "narrow": self.narrow,
            "interpret": self.interpret,
        }
        state["drawn"] = self._kept
        text = json.dumps({**state, "specs": [asdict(p) for p in self.progress]}, indent=1)
        _write(self.folder / STATE, text + "\n")


_WORDS = {
    "schema": "the form of the file",
    "mlpdsl": "mlpdsl",
    "seed": "the seed",
    "narrow": "whether widths are narrow",
    "interpret": "whether kernels are interpreted",
}


def _share(end: float, specs: int) -> float:
    """When the turn of the first of so many specs ends."""
    now = time.monotonic()
    return now + max(0.0, end - now) / specs


def _seed(seed: int, spec: str, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {batch} {spec}".encode()).digest()[:8], "big")


def _write(path: Path, text: str) -> None:
    """The whole file or the one before it, whenever the process is killed."""
    other = path.with_name(f".{path.name}.tmp")
    with other.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(other, path)
