"""`mlpdsl cache`: the commands that show, check and remove what was generated. The work is done in `mlpdsl.cache_tools`."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdsl.cache import DISK_ERRORS, KERNEL_FILE, MANIFEST_FILE, default_root, in_words
from mlpdsl.errors import MLPError, describe

if TYPE_CHECKING:
    import click

    from mlpdsl.cache_tools import Entry

__all__ = ["age_text", "clear", "commands", "info", "ls", "show", "size_text", "verify"]


@contextlib.contextmanager
def _usable(root: Path | None) -> Iterator[None]:
    try:
        yield
    except MLPError:  # some are ValueErrors, which is also what the disk raises
        raise
    except DISK_ERRORS as error:
        step = "`mlpdsl cache info` says where it comes from; MLPDSL_CACHE_DIR names another."
        raise MLPError(f"the cache in {str(root)!r} cannot be used: {in_words(error)}. {step}") from error


def _entries() -> tuple[Path | None, list[Entry]]:
    from mlpdsl.cache_tools import listing

    root = default_root()
    with _usable(root):
        return root, listing(root)[0]


def _say_empty(root: Path | None) -> None:
    from mlpdsl.cache_tools import plain

    where = f"the cache in {plain(str(root))} is empty" if root is not None else "there is no cache: no home directory was found"
    print(f"mlpdsl: {where}", file=sys.stderr)


def _print(text: str) -> None:
    import click

    click.echo(text, nl=False)


def _print_json(value: object) -> None:
    _print(json.dumps(value, indent=1) + "\n")


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def size_text(size: int) -> str:
    """A number of bytes for people: "812 B", "24.3 KB", "1.2 GB"."""
    if size < 1000:
        return f"{size} B"
    power = next((p for p in (1, 2, 3) if size < 999.95 * 1000**p), 4)
    return f"{size / 1000**power:.1f} {'KMGT'[power - 1]}B"


def age_text(seconds: float) -> str:
    """A time for people, in its largest unit: "12 s", "3 min", "5 h", "40 d"; what lies in the future is "0 s"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def _count(number: int, word: str = "entry") -> str:
    return f"{number} {word if number == 1 else 'entries'}"


def info(as_json: bool = False) -> int:
    """Say where the cache is, why there, whether it can be used, and what is in it."""
    from mlpdsl.cache_info import info as ask
    from mlpdsl.cache_tools import plain

    found = ask()
    if as_json:
        _print_json(found.to_dict())
        return 0
    state = "yes" if found.usable else f"no: {plain(found.reason or '')}"
    if found.usable and not found.exists:
        state = "yes; it is made at the first use"
    rows = [("root", f"{plain(found.root)} (from {found.origin})" if found.root is not None else "none"), ("usable", state)]
    rows += [("entries", f"{found.entries}, {size_text(found.bytes)}"), ("incomplete", str(found.incomplete))]
    if found.foreign:
        rows.append(("foreign", f"{found.foreign} that mlpdsl did not make, and does not touch"))
    rows.append(("written by", ", ".join(f"{v} ({n})" for v, n in (found.versions or {}).items()) or "-"))
    _print(_columns(rows))
    return 0


def ls(as_json: bool = False) -> int:
    """List the entries, sorted by name: key, backend, target, size and age of each."""
    root, found = _entries()
    if not found:
        _say_empty(root)
    now = time.time()
    if as_json:
        fields = ("directory", "name", "key", "backend", "target", "version", "size", "written", "complete")
        entries = [{name: getattr(e, name) for name in fields} for e in found]
        _print_json({"root": None if root is None else str(root), "entries": entries})
    elif found:
        rows = [("name", "key", "backend", "target", "size", "age")]
        for e in found:
            age = age_text(now - e.written) if e.written else "-"
            rows.append((e.name, e.key, e.backend or "-", e.target or "-", size_text(e.size), age))
        _print(_columns(rows))
    return 0


def _nearest(found: Sequence[Entry], query: str) -> str:
    from difflib import get_close_matches

    if not found:
        return "The cache is empty."
    names = list(dict.fromkeys(e.name for e in found))
    close = get_close_matches(query[:64], names, n=3, cutoff=0.4) or names[:3]
    return f"The nearest names are {', '.join(map(repr, close))}."


def _matches(found: Sequence[Entry], query: str) -> list[Entry]:
    """What `query` names, at least one. Raises `MLPError`."""
    from mlpdsl.cache_tools import find

    matches = find(found, query)
    if not matches:
        raise MLPError(describe("NAME_OR_KEY", query, "the beginning of a name or key in the cache", _nearest(found, query)))
    return matches


def show(name_or_key: str, manifest: bool = False) -> int:
    """Print the kernel.py of the entry whose name or key begins so.

    It comes from the disk and never runs: what runs is rendered anew. Where its sha256 is not the one in its manifest,
    that is said on stderr.
    """
    import click

    from mlpdsl.cache_tools import DamagedError, plain, read

    root, found = _entries()
    matches = _matches(found, name_or_key)
    if len(matches) > 1:
        lines = "".join(f"\n  {e.directory}" for e in matches[:20])
        more = f"\n  and {len(matches) - 20} more" if len(matches) > 20 else ""
        raise MLPError(f"{describe('NAME_OR_KEY', name_or_key, 'what begins one entry only', 'It begins these:')}{lines}{more}")
    directory, file = matches[0].directory, MANIFEST_FILE if manifest else KERNEL_FILE
    try:
        with _usable(root):
            content, doubt = read(root, directory, file)
    except DamagedError as error:
        step = "`mlpdsl cache clear --damaged` removes it; the next use writes it anew."
        raise MLPError(f"{directory}: {plain(str(error))}. {step}") from error
    if doubt:
        print(f"mlpdsl: warning: this may not be what mlpdsl wrote: {plain(doubt)}", file=sys.stderr)
    if sys.stdout.isatty():  # a terminal obeys what it is shown
        text = content.decode("utf-8", "backslashreplace")
        content = "\n".join(plain(line, len(line)) for line in text.split("\n")).encode()
    click.echo(content, nl=False)
    return 0


def verify(as_json: bool = False) -> int:
    """Check every entry: is it whole, unchanged, and what this version writes?

    An entry is ok, stale (another version or generator wrote it) or damaged; with a damaged one the exit status is 1.
    """
    from mlpdsl.cache_tools import verify as check

    root, found = _entries()
    if not found:
        _say_empty(root)
    with _usable(root):
        verdicts = list(check(root, [e.directory for e in found]))
    counts = {status: sum(v.status == status for v in verdicts) for status in ("ok", "stale", "damaged")}
    if as_json:
        entries = [{"directory": v.directory, "status": v.status, "reason": v.reason} for v in verdicts]
        _print_json({"root": None if root is None else str(root), "counts": counts, "entries": entries})
    elif verdicts:
        _print(_columns([(v.status, v.directory, v.reason) for v in verdicts]))
    if counts["damaged"]:
        step = "`mlpdsl cache clear --damaged` removes what is damaged; the next use writes it anew."
        print(f"mlpdsl: {counts['damaged']} of {_count(len(verdicts))} damaged. {step}", file=sys.stderr)
    return 1 if counts["damaged"] else 0


def clear(
    name_or_key: tuple[str, ...] = (), stale: bool = False, damaged: bool = False, yes: bool = False, dry_run: bool = False
) -> int:
    """Remove entries: those whose name or key begins so, or all; with --stale or --damaged only those among them.

    Asks first. Only the cache's own files are removed, and a directory with anything else in it stays. The exit status is 1
    where an entry could not be removed, or the answer was no.
    """
    import click

    from mlpdsl import cache_tools

    root, found = _entries()
    if name_or_key:
        named = {e.directory for query in name_or_key for e in _matches(found, query)}
        found = [e for e in found if e.directory in named]
    if stale or damaged:
        wanted = {status for status, chosen in (("stale", stale), ("damaged", damaged)) if chosen}
        with _usable(root):
            chosen = {v.directory for v in cache_tools.verify(root, [e.directory for e in found]) if v.status in wanted}
        found = [e for e in found if e.directory in chosen]
    if not found:
        print("mlpdsl: there is nothing to remove", file=sys.stderr)
        return 0
    if dry_run:
        _print("".join(f"would remove {e.directory}\n" for e in found))
        return 0
    if not yes and not _confirmed(found, root):
        print("mlpdsl: nothing was removed", file=sys.stderr)
        return 1
    with _usable(root):
        outcomes = list(cache_tools.remove(root, [e.directory for e in found]))
    for outcome in outcomes:
        if outcome.status == "removed":
            click.echo(f"removed {outcome.directory}")
        elif outcome.status in _LEFT:
            print(f"mlpdsl: {outcome.directory} {_LEFT[outcome.status]}: {outcome.reason}", file=sys.stderr)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


_LEFT = {"kept": "is emptied, but stays", "republished": "is there again", "failed": "could not be removed"}


def _confirmed(found: Sequence[Entry], root: Path | None) -> bool:
    """Ask. Raises `click.UsageError` where there is nobody to ask."""
    import click

    from mlpdsl.cache_tools import plain

    if not sys.stdin.isatty():
        raise click.UsageError(
            f"this would remove {_count(len(found))}, and there is no terminal to ask on: add --yes or --dry-run."
        )
    click.echo(
        "".join(f"{e.directory}\n" for e in found[:20]) + (f"and {len(found) - 20} more\n" if len(found) > 20 else ""), err=True
    )
    size = size_text(sum(e.size for e in found))
    return click.confirm(f"Remove {_count(len(found))} ({size}) from {plain(str(root))}?", err=True)


def commands() -> click.Group:
    """The group `cache`, made when a command line is read."""
    import click

    def flag(name: str, about: str, *more: str) -> click.Option:
        return click.Option([name, *more], is_flag=True, help=about)

    as_json = flag("--json", "Print one JSON object.", "as_json")
    made: dict[Callable[..., int], list[click.Parameter]] = {
        info: [as_json],
        ls: [as_json],
        show: [click.Argument(["name_or_key"]), flag("--manifest", "Print manifest.json instead.")],
        verify: [as_json],
        clear: [
            click.Argument(["name_or_key"], nargs=-1),
            flag("--stale", "Those that another version or generator wrote."),
            flag("--damaged", "Those that `verify` finds damaged."),
            flag("--yes", "Do not ask."),
            flag("--dry-run", "Say what would be removed."),
        ],
    }
    group = click.Group("cache", help="Look at, check and clear the cache of generated source.")
    for function, parameters in made.items():
        keywords: dict[str, Any] = {"params": parameters, "help": inspect.getdoc(function)}
        group.add_command(click.Command(function.__name__, callback=function, **keywords))
    return group
