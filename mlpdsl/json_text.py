"""JSON text of a spec, read strictly: what a file or a stranger hands over."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from mlpdsl.errors import SpecError, describe

__all__ = ["MAX_JSON", "read_object"]

MAX_JSON = 1_000_000
"""Characters (or bytes) of JSON that `MLPSpec.from_json` reads at most."""


def read_object(text: object) -> dict[str, Any]:
    """The one JSON object of a text: no repeated keys, no infinities. Raises `SpecError` for anything else."""
    where = "MLPSpec.from_json"
    step = "Pass what to_json() returned."
    if not issubclass(type(text), str | bytes):
        raise SpecError(describe(where, text, "JSON text as str or bytes", step))
    source: str | bytes = text  # type: ignore[assignment]
    if len(source) > MAX_JSON:
        raise SpecError(describe(where, source, f"at most {MAX_JSON} characters, not {len(source)}", step))
    try:
        decoded = source.decode("utf-8") if isinstance(source, bytes) else source
        content = json.loads(decoded, object_pairs_hook=_unrepeated, parse_constant=_constant)
    except SpecError:
        raise
    except RecursionError:
        raise SpecError(describe(where, source, "one JSON object, not nested so deeply", step)) from None
    except UnicodeDecodeError as error:
        allowed = f"UTF-8 (byte {error.start} is not)"
        raise SpecError(describe(where, source, allowed, step)) from None
    except json.JSONDecodeError as error:
        raise SpecError(describe(where, source, f"one JSON object ({error})", step)) from None
    except ValueError:  # Python refuses to read integers of more than 4300 digits
        raise SpecError(describe(where, source, "integers of a sensible size", step)) from None
    if type(content) is not dict:
        raise SpecError(describe(where, source, "one JSON object", step))
    return content


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            step = "Remove all but one: readers disagree about which one counts."
            raise SpecError(describe("MLPSpec.from_json, repeated key", name, "every key once", step))
        content[name] = value
    return content


def _constant(name: str) -> NoReturn:
    raise SpecError(describe("MLPSpec.from_json", name, "finite numbers", "Remove it: no field of a spec is a float."))
