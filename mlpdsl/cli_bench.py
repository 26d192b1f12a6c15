"""`mlpdsl bench`: time MLPs beside PyTorch and Liger. The work is done in `mlpdsl.bench`."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdsl.cli_fuzz import NOTHING_RAN, read_specs
from mlpdsl.errors import SpecError, UnsupportedError, describe
from mlpdsl.names import did_you_mean, listed

if TYPE_CHECKING:
    import click

    from mlpdsl.bench.runner import Tell
    from mlpdsl.bench.suites import Entry, Row, Suite

__all__ = ["bench", "command", "read_rows", "several"]


def bench(
    specs: tuple[str, ...] = (),
    m: tuple[int, ...] = (),
    passes: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
    no_compile: bool = False,
    launch: tuple[str, ...] = (),
    regime: tuple[str, ...] = (),
    seconds_a_row: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    out: Path = Path("mlpdsl-bench.json"),
    resume: bool = False,
    plot: Path | None = None,
    markdown: bool = False,
    report: Path | None = None,
    rows_of: tuple[Path, ...] = (),
    below: float | None = None,
    list_suites: bool = False,
) -> int:
    """Time MLPs on this GPU, beside eager PyTorch, torch.compile and Liger.

    Every SPEC or suite at every --m, in every pass, launch mode and regime: candidates take turns, in both orders. The table has
    medians, and the ratio of the best of torch to mlpdsl with its 95% interval; rows that lose are told like those that win.
    Results go into --out after each row; after an interruption of any kind, --resume goes on with it.

    Exit status: 0 every row was timed, or the time was up; 1 mlpdsl failed on a row; 2 a mistake in what was asked; 3 there is no
    GPU to run on; 130 ended by Ctrl-C.
    """
    import click

    from mlpdsl.bench import Results, Settings, run
    from mlpdsl.bench.results import failed
    from mlpdsl.bench.settings import LAUNCHES, PEERS, REGIMES

    if list_suites:
        click.echo(_suites(), nl=False)
        return 0
    if below is not None and not rows_of:
        raise click.UsageError("--below chooses among the rows of files: name one with --rows-of.")
    if below is not None and math.isnan(below):
        raise click.UsageError("--below is a number.")
    if report is not None:
        if specs or rows_of:
            raise click.UsageError("--report shows a file as it is: leave out SPEC and --rows-of, or leave out --report.")
        _show(Results.load(report).data, plot, markdown)
        return 0
    if not specs and not rows_of:
        raise click.UsageError("Missing argument '[SPEC|SUITE[/MLP]]...': name what to time; --list shows the suites.")
    if rows_of and not specs and (m or passes):
        raise click.UsageError("--rows-of has rows and passes of its own: leave out --m and --passes, or name a SPEC.")
    if out.resolve() in {file.resolve() for file in rows_of}:
        raise click.UsageError(f"{out} has those rows already: name another file for the new results with --out.")
    again = rows_again(rows_of, below)
    known = {row.key for row in again}
    rows = again + [row for row in read_rows(specs, m, passes) if row.key not in known]
    if not rows:
        _say(f"nothing to time: {listed(map(str, rows_of))} has no row{'' if below is None else f' below {below}'}")
        return 0
    chosen = tuple(name for name in peers or PEERS if not (no_compile and name in ("compile", "max-autotune")))
    settings = Settings(chosen, launch or LAUNCHES, regime or REGIMES, seed)
    if plot is not None:
        _check_plots()
    try:
        device = _device()
    except UnsupportedError as error:
        _say(str(error))
        return NOTHING_RAN
    words = "mlpdsl " + shlex.join(sys.argv[1:])
    try:
        with _watching(rows) as tell:
            results = run(rows, settings=settings, out=out, resume=resume, seconds_a_row=seconds_a_row, seconds=seconds,
                          device=device, command=words, tell=tell)  # fmt: skip
    except KeyboardInterrupt:
        _say(f"interrupted; what was measured is in {out}, and the same command with --resume goes on")
        raise
    asked = {row.key for row in rows}
    missing = len(asked - results.keys)
    if missing:
        _say(f"the time is up: {missing} of {len(asked)} rows are left, and the same command with --resume goes on")
    _show(results.data, plot, markdown)
    broken = [row for row in results.data["rows"] if row["key"] in asked and failed(row)]
    for row in broken:
        _say(f"mlpdsl failed on {row['name']}, M = {row['m']}, {row['passes']}: {failed(row)}")
    return 1 if broken else 0


def _device() -> Any:
    from mlpdsl.bench.gpu import Gpu

    return Gpu()


def _check_plots() -> None:
    """Raise before hours of measuring, not after."""
    from mlpdsl.bench.plots import load_matplotlib

    load_matplotlib()


def read_rows(texts: Sequence[str], ms: Sequence[int], passes: Sequence[str]) -> list[Row]:
    """Every row that SPEC…, suites' names, names in suites, --m and --passes ask for. Raises `SpecError`, `ShapeError`."""
    from mlpdsl.bench.suites import DEFAULT_ROWS, SUITES, Entry, rows

    given: list[Suite | Entry] = []
    for text in texts:
        suite, _, name = text.partition("/")
        if text in SUITES:
            given.append(SUITES[text])
        elif suite in SUITES and not name.endswith(".json"):
            entries = {entry.name: entry for entry in SUITES[suite].entries}
            if name not in entries:
                step = did_you_mean(name, entries) or f"`mlpdsl bench --list` has those of {suite}."
                raise SpecError(describe("SUITE/MLP", text, "the name of an MLP of that suite", step))
            given.append(entries[name])
        else:
            try:
                found = read_specs([text])
            except SpecError as error:
                if not text.isidentifier():
                    raise
                raise SpecError(f"{error} {did_you_mean(text, SUITES) or f'Suites are {listed(SUITES)}.'}") from error
            given += [Entry(name, spec, DEFAULT_ROWS) for name, spec in found.items()]
    return rows(given, ms, passes or ("forward",))


def rows_again(files: Sequence[Path], below: float | None = None) -> list[Row]:
    """The rows of files of results, each once; with `below`, those on which mlpdsl failed or that have a ratio less than it, the
    worst first. Raises `ResultError` for what is no file of results, and for a row that cannot be read."""
    from mlpdsl.bench.results import ResultError, Results

    found: dict[str, tuple[float, Row]] = {}
    for file in files:
        for at, data in enumerate(Results.load(file).data["rows"], 1):
            try:
                row, least = _read_again(data)
            except (LookupError, TypeError, AttributeError, ValueError, UnsupportedError) as error:
                raise ResultError(f"{file}, row {at}, cannot be timed again: {error}") from error
            if below is None or least < below:
                found[row.key] = min(least, found.get(row.key, (least, row))[0]), row
    kept = found.values() if below is None else sorted(found.values(), key=lambda pair: pair[0])
    return [row for _, row in kept]


def _read_again(data: dict[str, Any]) -> tuple[Row, float]:
    """A row of a file of results, and the least of its ratios: 0 where mlpdsl failed, infinity where there is none."""
    from mlpdsl.bench.results import failed
    from mlpdsl.bench.suites import PASSES, Row
    from mlpdsl.spec import MLPSpec

    missing = [name for name in ("name", "spec", "m", "passes", "candidates", "measured") if name not in data]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    name, m, passes = data["name"], data["m"], data["passes"]
    if type(name) is not str or type(m) is not int or m < 1 or passes not in PASSES:
        raise ValueError(
            f"got name {name!r}, m {m!r}, passes {passes!r}; allowed: text, an integer from 1, one of {listed(PASSES)}"
        )
    ratios = [part["ratio"] for part in data["measured"] if part.get("ratio") is not None]
    if any(type(ratio) not in (int, float) or not 0 < ratio < float("inf") for ratio in ratios):
        raise ValueError(f"got ratios {ratios}; allowed: numbers above 0")
    row = Row(name, MLPSpec.from_json(json.dumps(data["spec"])), m, passes)
    return row, 0.0 if failed(data) else min(ratios, default=float("inf"))


def _suites() -> str:
    from mlpdsl.bench.suites import SUITES

    parts = []
    for suite in SUITES.values():
        width = max(len(entry.name) for entry in suite.entries)
        told = [f"  {e.name:<{width}}  {e.spec.short_name}  M = {', '.join(map(str, e.ms))}" for e in suite.entries]
        parts.append("\n".join([f"{suite.name}: {suite.about}", *told]))
    return "\n\n".join(parts) + "\n"


def _show(data: dict[str, Any], plot: Path | None, markdown: bool) -> None:
    import click

    from mlpdsl.bench import table

    if markdown:
        click.echo(table.markdown(data), nl=False)
    elif sys.stdout.isatty():
        _print_coloured(data)
    else:
        click.echo(table.text(data), nl=False)
    if plot is not None:
        from mlpdsl.bench.plots import plot as draw

        _say(f"{len(draw(data, plot))} pictures in {plot}")


def _print_coloured(data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlpdsl.bench import table as tables

    console = Console(highlight=False)
    colours = {"slower": "red", "faster": "green"}

    def show(cells: list[list[str]]) -> None:
        shown = Table(box=None, padding=(0, 2, 0, 0))
        for at, title in enumerate(cells[0]):
            shown.add_column(title, justify="right" if tables.is_numbers([c[at] for c in cells[1:]]) else "left", no_wrap=at > 0)
        for line in cells[1:]:
            shown.add_row(*line, style=colours.get(line[-1], ""))
        console.print(shown)

    console.print(tables.heading(data), f"\n{tables.about(data)}", markup=False)
    show(tables.cells(data))
    host = tables.host_cells(data)
    if len(host) > 1:
        console.print(f"\n{tables.HOST}")
        show(host)
    for note in tables.notes(data):
        console.print(note, markup=False)


def _say(text: str) -> None:
    print(f"mlpdsl: {text}", file=sys.stderr, flush=True)


def _in_short(found: dict[str, Any]) -> str:
    """A finished row in a few words."""
    if "skipped" in found:
        return f"not timed: {found['skipped']}"
    parts = []
    for part in found["measured"]:
        ours = part["times"].get("mlpdsl")
        if ours is not None:
            ratio = "" if part["ratio"] is None else f" {part['ratio']:.2f}x"
            parts.append(f"{part['launch']} {part['cache']} {part['regime']} {ours['median_us']:.1f} µs{ratio}")
    return ", ".join(parts) or "mlpdsl was not timed"


@contextlib.contextmanager
def _watching(rows: Sequence[Row]) -> Iterator[Tell]:
    """What tells of progress on stderr: a line for each row done, and on a terminal what is under way beneath them."""
    began = time.monotonic()
    done: list[str] = []
    state = {"row": "", "step": ""}

    def line() -> str:
        return f"{len(done)} of at most {len(rows)} rows, {time.monotonic() - began:.0f} s: {state['row']}: {state['step']}"

    with contextlib.ExitStack() as stack:
        status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            status = stack.enter_context(Console(stderr=True, highlight=False).status("", refresh_per_second=4))

        def tell(event: str, row: Row, what: Any) -> None:
            if event == "done":
                done.append(row.key)
                text = f"{row}: {_in_short(what)} ({what.get('seconds', 0.0):.0f} s)"
                if status is None:
                    _say(text)
                else:
                    status.console.print(text, markup=False)
            else:
                state.update(row=str(row), step="" if event == "begin" else str(what))
            if status is not None:
                from rich.text import Text

                status.update(Text(line()))

        yield tell


def several(names: list[str], allowed: Sequence[str], help: str) -> click.Option:
    """Words, or whole numbers from 1 where none are named: with commas between, the option repeated, or both."""
    import click

    def read(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[Any, ...]:
        kind: Any = click.Choice(allowed) if allowed else click.IntRange(min=1)
        return tuple(kind.convert(word.strip(), param, ctx) for words in value for word in words.split(","))

    return click.Option(names, multiple=True, callback=read, metavar="A,B,…", help=help)


def command() -> click.Command:
    """The command, made when it is asked for, because click may not be installed."""
    import inspect

    import click

    from mlpdsl.bench.settings import LAUNCHES, PEERS, REGIMES
    from mlpdsl.bench.suites import PASSES, SUITES

    file = click.Path(dir_okay=False, path_type=Path)
    positive = click.FloatRange(min=0, min_open=True)
    options: list[click.Parameter] = [
        click.Argument(["specs"], nargs=-1, metavar="[SPEC|SUITE[/MLP]]..."),
        several(["--m"], (), "Rows of x; default: the suite's own, else 1,16,256,4096."),
        several(["--passes"], PASSES, "forward (default), train: forward and every gradient."),
        several(["--peers"], PEERS, f"Default: {','.join(PEERS)}."),
        click.Option(["--no-compile"], is_flag=True, help="Without compile and max-autotune, which take long to build."),
        several(["--launch"], LAUNCHES, "eager: plain calls; graph: replays of a CUDA graph; default: both."),
        several(["--regime"], REGIMES, "sustained, or burst (short, after a pause); default: both."),
        click.Option(
            ["--seconds-a-row"], type=positive, metavar="S", help="Of timing each row; building comes on top; default: 5."
        ),
        click.Option(
            ["--seconds"], type=positive, metavar="S", help="Begin no row after this time, and time rows for less, so that all fit."
        ),
        click.Option(["--seed"], type=click.IntRange(min=0), default=0, show_default=True, help="Of the data."),
        click.Option(["--out"], type=file, default="mlpdsl-bench.json", show_default=True, help="Where results go, as JSON."),
        click.Option(["--resume"], is_flag=True, help="Go on with the run in --out, if there is one."),
        click.Option(["--plot"], type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write PNGs there."),
        click.Option(["--markdown"], is_flag=True, help="Print the table in Markdown."),
        click.Option(["--report"], type=file, metavar="FILE", help="Only show what a file of results holds; needs no GPU."),
        click.Option(
            ["--rows-of"], type=file, multiple=True, metavar="FILE", help="Time the rows of a file of results again, too."
        ),
        click.Option(
            ["--below"],
            type=positive,
            metavar="RATIO",
            help="Of --rows-of only those that failed, or have a ratio below, worst first.",
        ),
        click.Option(["--list", "list_suites"], is_flag=True, help="Only list the suites, their MLPs and numbers of rows."),
    ]
    forms = "SPEC is JSON text, the path of a .json file, module:attribute, or a module, for every spec at its top level."
    about = f"{inspect.getdoc(bench)}\n\n{forms} Suites: {', '.join(SUITES)}. llm/gpt-2 is one MLP of a suite."
    return click.Command("bench", callback=bench, params=options, help=about)
