"""`mlpdsl tune`: measure configs on this GPU, and write a table of those that gained. The work is done in `mlpdsl.tuning`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdsl.cli_bench import read_rows
from mlpdsl.cli_fuzz import NOTHING_RAN
from mlpdsl.errors import UnsupportedError

if TYPE_CHECKING:
    import click

    from mlpdsl.tuning.device import Device
    from mlpdsl.tuning.job import Job
    from mlpdsl.tuning.run import Found, Tell

__all__ = ["command", "tune"]

FOLDER = Path("mlpdsl-tables")


def tune(
    specs: tuple[str, ...],
    m: tuple[int, ...] = (),
    passes: tuple[str, ...] = (),
    budget: float | None = None,
    resume: bool = False,
    out: Path | None = None,
    compilers: int | None = None,
) -> int:
    """Time every product of MLPs with many configs on this GPU, and write a table of those that beat the default.

    Each product of every SPEC or suite at every --m: configs are compiled in processes of their own, left out where they spill
    registers, timed in turns with the default, and checked by the float64 oracle before they may win; a crash or a hang loses one
    config. A row stands only where it beat the default beyond noise. The table, and beside it the state with every timing, are
    written after each product; after an interruption of any kind, --resume goes on.

    Exit status: 0 every product was tuned, or the time was up; 1 a product could not be timed at all; 2 a mistake in what was
    asked; 3 there is no GPU to run on; 130 ended by Ctrl-C.
    """
    import click

    from mlpdsl.tuning import run

    rows = read_rows(specs, m, passes or ("train",))
    device = _device(compilers)
    try:
        try:
            target = device.describe()["target"]
        except UnsupportedError as error:
            _say(str(error))
            return NOTHING_RAN
        table = out or FOLDER / f"{target}.json"
        try:
            with _watching() as tell:
                found = run(rows, out=table, budget=budget, resume=resume, device=device, tell=tell)
        except KeyboardInterrupt:
            _say(f"interrupted; what was measured is in {table}, and the same command with --resume goes on")
            raise
    finally:
        device.close()
    if found.left:
        _say(f"the time is up: {found.left} of {len(found.jobs)} products are left, and the same command with --resume goes on")
    click.echo(_text(found), nl=False)
    if table.exists():
        _say(f"MLPDSL_TABLES={table} uses the table")
    broken = [job for job in found.jobs if found.state.jobs.get(job.key, {}).get("failed")]
    for job in broken:
        _say(f"{job} could not be timed: {found.state.jobs[job.key]['failed']}")
    return 1 if broken else 0


def _device(compilers: int | None) -> Device:
    from mlpdsl.tuning.children import Children

    return Children(compilers)


def _say(text: str) -> None:
    print(f"mlpdsl: {text}", file=sys.stderr, flush=True)


_TITLES = ("product", "M", "default µs", "best µs", "gain", "config")


def _text(found: Found) -> str:
    """A line for each product that was asked for and done: times a launch, and the config that gained, if one did."""
    lines = [_TITLES]
    for job in found.jobs:
        result = found.state.jobs.get(job.key)
        if result is None:
            continue
        p = job.product
        name = f"{p.role} {job.m}x{job.n}x{job.k} {p.dtype}{' gated' if p.planes == 2 else ''}"
        lines.append((name, str(job.rows), *_cells(result)))
    if not found.jobs:
        return "nothing to tune: all linears are one launch, whose tiles are the rule's\n"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gains = sum(line[4] != "-" for line in lines[1:])
    table = "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)
    return f"{table}{gains} of {len(lines) - 1} products gained on {found.state.data['gpu']}\n"


def _cells(result: dict[str, Any]) -> tuple[str, str, str, str]:
    point = result["point"]
    if point is None:
        return "-", "-", "-", "could not be timed" if result["failed"] else "nothing else to time"
    if point["config"] is None:
        return f"{point['default_us']:.2f}", f"{point['us']:.2f}", "-", "the default"
    c = point["config"]
    tile = f"{c['block_m']}x{c['block_n']}x{c['block_k']}, {c['num_warps']} warps, {c['num_stages']} stages"
    rest = "".join(f", {name} {c[name]}" for name in ("splits", "residency") if c[name] > 1)
    told = ("library, batched" if c.get("batched") else "library") if c["strategy"] == "library" else f"{tile}{rest}"
    return f"{point['default_us']:.2f}", f"{point['us']:.2f}", f"{point['default_us'] / point['us']:.2f}x", told


def _in_short(result: dict[str, Any]) -> str:
    default, best, gain, config = _cells(result)
    tried = f"{len(result['tried'])} configs in {result['seconds']:.0f} s"
    return f"{config} ({tried})" if gain == "-" else f"{default} µs to {best} µs, {gain}: {config} ({tried})"


@contextlib.contextmanager
def _watching() -> Iterator[Tell]:
    """What tells of progress on stderr: a line for each product done, and on a terminal what is under way beneath them."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        say: Callable[[str], None] = _say
        status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            status = stack.enter_context(Console(stderr=True, highlight=False).status("", refresh_per_second=4))
            say = lambda text: status.console.print(text, markup=False)  # noqa: E731

        def tell(event: str, job: Job, at: int, found: dict[str, Any] | None) -> None:
            if found is not None:
                say(f"{job}: {_in_short(found)}")
            elif status is not None:
                from rich.text import Text

                status.update(Text(f"{at} done, {time.monotonic() - began:.0f} s: {job}"))

        yield tell


def command() -> click.Command:
    """The command, made when it is asked for, because click may not be installed."""
    import inspect

    import click

    from mlpdsl.bench.suites import PASSES, SUITES
    from mlpdsl.cli_bench import several

    options: list[click.Parameter] = [
        click.Argument(["specs"], nargs=-1, required=True, metavar="SPEC|SUITE[/MLP]..."),
        several(["--m"], (), "Rows of x; default: the suite's own, else 1,16,256,4096."),
        several(["--passes"], PASSES, "forward: its products alone; train (default): backward's too."),
        click.Option(["--budget"], type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="End after this time."),
        click.Option(["--resume"], is_flag=True, help="Go on with the run that wrote --out, if there was one."),
        click.Option(
            ["--out"],
            type=click.Path(dir_okay=False, path_type=Path),
            help=f"The table, merged with what it holds; default: {FOLDER}/TARGET.json.",
        ),
        click.Option(
            ["--compilers"],
            type=click.IntRange(min=1),
            metavar="N",
            help="Processes that compile; default: one a core, at most 16.",
        ),
    ]
    forms = "SPEC is JSON text, the path of a .json file, module:attribute, or a module, for every spec at its top level."
    about = f"{inspect.getdoc(tune)}\n\n{forms} Suites: {', '.join(SUITES)}. llm/gpt-2 is one MLP of a suite."
    return click.Command("tune", callback=tune, params=options, help=about)
