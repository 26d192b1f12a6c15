"""The state of a run: what was found for each product, written whole after each one, read back, gone on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlpdsl.errors import MLPError

__all__ = ["SCHEMA", "State", "StateError", "alone", "write_whole"]

SCHEMA = 1


class StateError(MLPError, ValueError):
    """A file that cannot be used as asked. Nothing in it was changed."""


class State:
    """`data` is what the file holds: `gpu`, `target`, `versions`, and `jobs`, results by the job's key. `path` None: no file."""

    def __init__(self, data: dict[str, Any], path: Path | None = None) -> None:
        self.data, self.path = data, path

    @classmethod
    def begin(cls, header: dict[str, Any], path: Path | None, resume: bool) -> State:
        """A new one, or with `resume` that of the file, where there is one.

        Raises `StateError` where the file is there and may not be gone on with: without `resume`, or where GPU, target or versions
        differ, so that times would not compare.
        """
        fresh = {"schema": SCHEMA, **header, "jobs": {}}
        if path is None or not path.exists():
            return cls(fresh, path)
        if not resume:
            raise StateError(f"{path} is there already: --resume goes on with it; --out names another table")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StateError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        if type(data) is not dict or data.get("schema") != SCHEMA or type(data.get("jobs")) is not dict:
            raise StateError(f"{path} is no state of `mlpdsl tune` of this version")
        differ = [f"{name} is {data.get(name)} there and {value} here" for name, value in header.items() if data.get(name) != value]
        if differ:
            raise StateError(f"{path} is of another run, and stays as it is: {'; '.join(differ)}. Name another table with --out")
        return cls(data, path)

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Results by the key of their job."""
        found: dict[str, dict[str, Any]] = self.data["jobs"]
        return found

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Put a result in, and write the file."""
        self.jobs[key] = result
        if self.path is not None:
            write_whole(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file is all of the text, or what it was, whenever the process ends. Raises `StateError` where it cannot be written."""
    other = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")  # another process may write there too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with other.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(other, path)
        finally:
            other.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Hold a state's file for one run. Raises `StateError` where another process holds it."""
    if path is None:
        yield
        return
    place = path.with_name(f".{path.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("w")
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = place.exists() and os.path.samestat(place.stat(), os.fstat(file.fileno()))  # or its holder has just removed it
        except BlockingIOError:
            held = False
        except OSError:  # a disk that knows no locks
            held = True
        if not held:
            raise StateError(f"another mlpdsl tune is at work on {path}: wait for it, or name another table with --out")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
