"""`mlpdsl fuzz`: draw calls of specs for as long as there is time. The work is done in `mlpdsl.testing.night`."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mlpdsl.errors import SpecError, describe
from mlpdsl.spec import MLPSpec

if TYPE_CHECKING:
    import click

    from mlpdsl.testing.night import Night, Progress

__all__ = ["command", "fuzz", "read_specs"]

NOTHING_RAN = 3
"""The exit status where no kernel could run here."""

EXAMPLES = 1000
"""Calls a spec, where neither --examples nor --seconds says otherwise."""

LINES_EVERY = 30.0
"""Seconds between lines of a log."""

_FORMS = "JSON text, the path of a .json file, module:attribute, or a module"


def read_specs(texts: Sequence[str]) -> dict[str, MLPSpec]:
    """By name, the specs that SPEC… name: each as for `mlpdsl show`, or a module, for every spec at its top level.

    Raises `SpecError` for what names none. A spec that is named twice is there once, under its first name.
    """
    from mlpdsl.cli import read_spec

    found: dict[str, MLPSpec] = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            spec = read_spec(text)
            given = {spec.short_name: spec}
        elif os.path.isfile(text) or text.endswith(".json"):
            given = {Path(text).stem: read_spec(text)}
        elif ":" in text:
            given = {text.replace(":", "::", 1): read_spec(text)}
        else:
            given = _in_module(text)
        for name, spec in given.items():
            if spec in found.values():
                continue
            free = (name, *(f"{name}-{n}" for n in range(2, len(found) + 3)))
            found[next(each for each in free if each not in found)] = spec
    return found


def _in_module(name: str) -> dict[str, MLPSpec]:
    from mlpdsl.cli import import_module
    from mlpdsl.testing.fuzzing import specs_in

    if not all(part.isidentifier() for part in name.split(".")):
        raise SpecError(describe("SPEC", name, _FORMS, "There is no file of that name, and no module can have it."))
    module = import_module(name)
    specs = specs_in(module)
    if not specs:
        raise SpecError(f"SPEC {name!r}: no MLPSpec, mlpdsl.MLP or compiled MLP at the module's top level")
    return {f"{name}::{attribute}": spec for attribute, spec in specs.items()}


def fuzz(
    specs: tuple[str, ...],
    examples: int | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    widths: str = "auto",
    compile: str = "auto",
    resume: bool = False,
    database: Path = Path(".hypothesis/examples"),
    out: Path = Path("mlpdsl-fuzz"),
) -> int:
    """Draw calls of each SPEC and hold them against float64, for a night.

    Each call goes forward and backward through the generated kernels: on a GPU if there is one, else in Triton's interpreter, and
    then the kernels are also compiled without running. What fails is shrunk, told, and written as a script of its own into --out;
    then the search goes on, with the same spec (for other failures) and with the others. Calls that are known to fail, by
    --database, come first.

    Exit status: 0 every call passed; 1 something failed; 2 a mistake in what was asked; 3 no kernel could run here, or none in the
    time; 130 ended by Ctrl-C. After an interruption of any kind, --resume goes on where it was, and draws no call again.
    """
    import click
    import torch

    from mlpdsl.backends import interpreting
    from mlpdsl.testing.compiling import compile_target
    from mlpdsl.testing.night import Night, locked

    declared = read_specs(specs)
    interpret = interpreting() or not torch.cuda.is_available()
    narrow = widths == "narrow" or (widths == "auto" and interpret)
    compile_for = compile_target().name if interpret and compile == "auto" else None
    if examples is None and seconds is None:
        examples = EXAMPLES
    with locked(out):
        night = Night.resume(out, declared, seed, narrow, interpret) if resume else None
        resumed = night is not None
        if night is None:
            night = Night.begin(out, declared, secrets.randbits(32) if seed is None else seed, narrow, interpret)
        _introduce(night, resumed, compile_for)
        began = time.monotonic()
        end = began + (float("inf") if seconds is None else seconds)
        try:
            with _watching(night, examples, end) as tell:
                night.run(examples, end, compile_for, database, tell)
        except KeyboardInterrupt:
            _say(f"interrupted after {_calls(night):,} calls; the same command with --resume goes on")
            raise
        click.echo(_summary(night, time.monotonic() - began))
        return _status(night)


def _status(night: Night) -> int:
    if any(p.failures for p in night.progress):
        return 1
    return 0 if _calls(night) else NOTHING_RAN


def _introduce(night: Night, resumed: bool, compile_for: str | None) -> None:
    where = (
        "no GPU: kernels run in Triton's interpreter, in a process of their own" if night.interpret else "kernels run on the GPU"
    )
    widths = ", at narrow widths" if night.narrow else ""
    compiled = f", and are compiled for {compile_for}" if compile_for is not None else ""
    calls = sum(p.calls for p in night.progress)
    how = f"going on after {calls:,} calls" if resumed else "a new run"
    _say(f"{where}{widths}{compiled}")
    _say(f"{how}, seed {night.seed}, {len(night.progress)} {'spec' if len(night.progress) == 1 else 'specs'}, in {night.folder}")


def _say(text: str) -> None:
    print(f"mlpdsl: {text}", file=sys.stderr, flush=True)


def _summary(night: Night, seconds: float) -> str:
    rows = [f"{_calls(night):,} calls in {_time(seconds)}"]
    for p in night.progress:
        state = f"{len(p.failures)} failed" if p.failures else "passed" if p.calls else "not run"
        rows.append(f"{state:<9} {p.name}: {p.calls:,} calls" + (f", kernels compiled for {p.compiled}" if p.compiled else ""))
        if p.reason or not (p.calls or p.failures):
            rows.append(f"          {p.reason or 'the time was up before its first call'}")
        if p.worst_call:
            rows.append(f"          nearest to its bound, {p.worst:.2f} of it: {p.worst_call}")
        rows += [f"          {night.folder / f.script}: {f.origin}" for f in p.failures]
    return "\n".join(rows)


def _calls(night: Night) -> int:
    return sum(p.calls for p in night.progress)


def _time(seconds: float) -> str:
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


class _Status:
    """What there is to say about a run under way."""

    def __init__(self, night: Night, examples: int | None, end: float) -> None:
        self.night, self.examples, self.end = night, examples, end
        self.began, self.before = time.monotonic(), _calls(night)
        self.now: Progress | None = None

    def left(self) -> str:
        """The time left, by the clock or by the rate so far."""
        now = time.monotonic()
        lasts = [self.end - now] if self.end != float("inf") else []
        rate = self.rate()
        if self.examples is not None and rate:
            lasts.append(sum(max(0, self.examples - p.calls) for p in self.night.progress if not p.reason) / rate)
        return f"about {_time(min(lasts))} left" if lasts else ""

    def rate(self) -> float:
        """Calls a second."""
        return (_calls(self.night) - self.before) / max(time.monotonic() - self.began, 1e-9)

    def line(self) -> str:
        night = self.night
        worst = max(night.progress, key=lambda p: p.worst)
        failures = sum(len(p.failures) for p in night.progress)
        parts = [f"{_calls(night):,} calls", f"{self.rate():.1f}/s", f"worst {worst.worst:.2f} of its bound ({worst.name})"]
        parts += [f"{failures} failed", self.left()]
        if self.now is not None:
            parts.append(f"{'shrinking a failure' if night.shrinking else 'at'} {self.now.name}")
        return ", ".join(part for part in parts if part)


@contextlib.contextmanager
def _watching(night: Night, examples: int | None, end: float) -> Iterator[Callable[[str, Progress], None]]:
    """What tells of events: a failure on stdout, progress on stderr, live where that is a terminal, and lines in the log."""
    status = _Status(night, examples, end)
    with (night.folder / "fuzz.log").open("a", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        live = stack.enter_context(_live(status)) if sys.stderr.isatty() else None
        last = time.monotonic()

        def lines(text: str, *files: IO[str]) -> None:
            for file in files:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=file, flush=True)

        def tell(event: str, p: Progress) -> None:
            nonlocal last
            status.now = p
            if event == "failure":
                failure = p.failures[-1]
                lines(f"failure of {p.name}: {night.folder / failure.script}", log)
                _print_failure(f"\n{p.name} failed: {night.folder / failure.script}\n\n{failure.message}\n", live)
            elif event in ("passes", "skip"):
                what = f"{p.name}: " + (p.reason if event == "skip" else "a call that failed passes now")
                lines(what, log)
                if live is None:
                    _say(what)
            elif time.monotonic() - last >= LINES_EVERY:
                last = time.monotonic()
                lines(status.line(), log, *([] if live is not None else [sys.stderr]))

        lines(f"begin: {len(night.progress)} specs, seed {night.seed}, after {_calls(night)} calls", log)
        try:
            yield tell
        finally:
            lines(f"end: {_calls(night):,} calls, {sum(len(p.failures) for p in night.progress)} failed", log)


def _print_failure(text: str, live: Any) -> None:
    if live is not None and sys.stdout.isatty():
        live.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, flush=True)


@contextlib.contextmanager
def _live(status: _Status) -> Iterator[Any]:
    """A table on the terminal that stderr is, drawn twice a second."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    class View:
        def __rich__(self) -> Group:
            table = Table(box=None, padding=(0, 2, 0, 0))
            for title, side in (("spec", "left"), ("calls", "right"), ("worst/bound", "right"), ("", "left")):
                table.add_column(title, justify=side)  # type: ignore[arg-type]
            for p in status.night.progress:
                state = Text("not run", "yellow") if p.reason else Text("")
                if p.failures:
                    state = Text(f"{len(p.failures)} failed", "bold red")
                elif p is status.now and status.night.shrinking:
                    state = Text("shrinking a failure", "red")
                table.add_row(p.name, f"{p.calls:,}", f"{p.worst:.2f}", state)
            return Group(table, Text(status.line()))

    with Live(View(), console=Console(stderr=True), refresh_per_second=2) as live:
        yield live


def command() -> click.Command:
    """The command, made when it is asked for, because click may not be installed."""
    import inspect

    import click

    folder = click.Path(file_okay=False, path_type=Path)
    options: list[click.Parameter] = [
        click.Argument(["specs"], nargs=-1, required=True, metavar="SPEC..."),
        click.Option(
            ["--examples"], type=click.IntRange(min=1), metavar="N", help=f"Calls of each spec, in all; default {EXAMPLES}."
        ),
        click.Option(["--seconds"], type=click.FloatRange(min=0), metavar="S", help="End after this time."),
        click.Option(["--seed"], type=click.IntRange(min=0), help="Equal seeds draw equal calls; default: random."),
        click.Option(
            ["--widths"],
            type=click.Choice(("auto", "own", "narrow")),
            default="auto",
            help="The spec's own widths, or narrow ones; auto: narrow where kernels are interpreted.",
        ),
        click.Option(
            ["--compile"],
            type=click.Choice(("auto", "off")),
            default="auto",
            help="Compile the kernels too, without running: where they are interpreted (auto), or never.",
        ),
        click.Option(["--resume"], is_flag=True, help="Go on with the run in --out, if there is one."),
        click.Option(
            ["--database"],
            type=folder,
            default=".hypothesis/examples",
            show_default=True,
            help="Hypothesis's database of failures.",
        ),
        click.Option(["--out"], type=folder, default="mlpdsl-fuzz", show_default=True, help="Where scripts, log and state lie."),
    ]
    about = f"{inspect.getdoc(fuzz)}\n\nSPEC is {_FORMS}, for every spec at its top level."
    return click.Command("fuzz", callback=fuzz, params=options, help=about)
