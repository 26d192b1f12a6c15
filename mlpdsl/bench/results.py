"""A file of results: written whole after each row, read back, gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlpdsl.errors import MLPError

__all__ = ["SCHEMA", "ResultError", "Results", "failed"]

SCHEMA = 1
"""The version of the file's form; docs/benchmarking.md describes it."""


class ResultError(MLPError, ValueError):
    """A file of results that cannot be used as asked, or a GPU that can no longer be measured. Nothing in the file was changed."""


class Results:
    """What was measured: `data` is what the file holds. `path` is None where there is no file."""

    def __init__(self, data: dict[str, Any], path: Path | None = None) -> None:
        self.data = data
        self.path = path

    @classmethod
    def begin(cls, header: dict[str, Any], path: Path | None) -> Results:
        """New ones, with a file at once. Raises `ResultError` where `path` exists, or cannot be written."""
        if path is not None and path.exists():
            raise ResultError(f"{path} is there already: --resume goes on with it; --out names another file")
        results = cls({"schema": SCHEMA, **header, "rows": []}, path)
        results.save()
        return results

    @classmethod
    def load(cls, path: Path) -> Results:
        """Those of a file. Raises `ResultError` where it cannot be read, or is not one."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ResultError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        kinds = {"gpu": dict, "versions": dict, "settings": dict, "method": dict, "ceilings": dict, "rows": list}
        if type(data) is not dict or data.get("schema") != SCHEMA:
            said = data.get("schema") if type(data) is dict else type(data).__name__
            raise ResultError(f"{path} is no file of `mlpdsl bench` of this version: its schema is {said!r}, and {SCHEMA} is read")
        wrong = [name for name, kind in kinds.items() if type(data.get(name)) is not kind]
        if wrong:
            raise ResultError(f"{path} is no file of `mlpdsl bench`: without {', '.join(wrong)}, or another kind of value there")
        return cls(data, path)

    @classmethod
    def resume(cls, header: dict[str, Any], path: Path) -> Results:
        """Those of a file, to go on with; new ones where there is no file.

        Raises `ResultError` where GPU, versions, settings or method differ from `header`'s: rows of the two would not compare.
        """
        if not path.exists():
            return cls.begin(header, path)
        results = cls.load(path)
        there: dict[str, Any] = results.data
        differ = []
        for part in ("gpu", "versions", "settings", "method"):
            for name in {**there[part], **header[part]}:
                old, new = there[part].get(name), header[part].get(name)
                if old != json.loads(json.dumps(new)):
                    differ.append(f"{part}.{name} is {old} there and {new} here")
        if differ:
            raise ResultError(f"{path} is of another run, and stays as it is: {'; '.join(differ)}. Name another file with --out")
        there.setdefault("resumed", []).append({"date": header["date"], "command": header["command"]})
        return results

    @property
    def keys(self) -> set[str]:
        """The keys of the rows that are there, as `Row.key` gives them."""
        return {str(row["key"]) for row in self.data["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and write the file."""
        self.data["rows"].append(row)
        self.save()

    def save(self) -> None:
        """Write the file: all of it, or what was there stays, whenever the process ends. Raises `ResultError` where it cannot."""
        if self.path is None:
            return
        other = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with other.open("w", encoding="utf-8") as file:
                json.dump(self.data, file, indent=1, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(other, self.path)
        except OSError as error:
            raise ResultError(f"{self.path} cannot be written: {error.strerror or error}") from error


def failed(row: dict[str, Any]) -> str | None:
    """Why mlpdsl itself failed on a row, in one line; None where it did not."""
    whole = row["candidates"].get("mlpdsl", {}).get("failed")
    parts = (part.get("failed", {}).get("mlpdsl") for part in row["measured"])
    return whole or next((reason for reason in parts if reason), None)
