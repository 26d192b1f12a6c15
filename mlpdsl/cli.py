"""The command line: `mlpdsl show`, `explain`, `cache`, `doctor`, `fuzz`, `bench` and `tune`. Needs the extra `cli` (click,
rich), and only for `bench` and `tune` a GPU.

Exit status 0; 1 where what was looked at is not well: a kernel that does not fit its target, a damaged entry of the cache, one
that was not removed, a problem that `doctor` found, a failure that `fuzz` found, a row that mlpdsl failed on in `bench`; 2 for a
mistake in what was asked, or an answer that cannot be given, said in one message on stderr; 3 where `fuzz` or `bench` could run
no kernel; 130 after Ctrl-C. Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mlpdsl import cli_bench, cli_cache, cli_fuzz, cli_tune
from mlpdsl.errors import MLPError, SpecError, describe, shorten
from mlpdsl.json_text import MAX_JSON
from mlpdsl.names import did_you_mean, listed
from mlpdsl.spec import MLPSpec
from mlpdsl.target import TARGETS, detect, parse_target
from mlpdsl.version import __version__

if TYPE_CHECKING:
    import click

    from mlpdsl.resources import Resources

__all__ = ["doctor", "explain", "function_source", "import_module", "main", "read_spec", "show", "table"]

STAGES = ("source", "formulas", "ptx", "resources")

_FORMS = "JSON text, the path of a .json file, or module:attribute"
_SPEC_HELP = (
    "SPEC is JSON text, the path of a .json file, or module:attribute, where the attribute is an MLPSpec or has one as .spec."
)


def read_spec(text: str) -> MLPSpec:
    """The spec that SPEC names: JSON text ("{…}"), a path (it exists, or ends in .json), or "module:attribute".

    Raises `SpecError` saying what was tried.
    """
    if text.lstrip().startswith("{"):
        return MLPSpec.from_json(text)
    module, colon, attribute = text.partition(":")
    named = _module_of(module)
    if named != module and (module.endswith(".py") or not os.path.isfile(text)):
        raise SpecError(describe("SPEC", text, _FORMS, f"Write {named}:{attribute or 'the name of the spec'}."))
    if os.path.isfile(text) or (text.endswith(".json") and not colon):
        return _from_file(Path(text))
    if not colon or not module or not attribute:
        raise SpecError(describe("SPEC", text, _FORMS, "There is no file of that name, and no colon after a module's name."))
    return _from_module(text, module, attribute)


def _module_of(text: str) -> str:
    """The name that Python imports a module by, where the text is its path: ./a/my_model.py or ./my_model; else the text."""
    bare = text.removesuffix(".py").removeprefix("./")
    looks_so = (text.endswith(".py") or text.startswith("./")) and all(part.isidentifier() for part in bare.split("/"))
    return bare.replace("/", ".") if looks_so else text


def _from_file(path: Path) -> MLPSpec:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise SpecError(f"SPEC: cannot read the file {shorten(str(path))}: {error.strerror or error}. SPEC is {_FORMS}.") from error
    try:
        return MLPSpec.from_json(content)
    except SpecError as error:
        raise SpecError(f"in the file {path}: {error}") from error


def import_module(name: str) -> ModuleType:
    """A module that SPEC names, from the folder that one is in or from sys.path. Raises `SpecError` saying why it cannot be."""
    # A console script's path begins with the folder of the script; people mean the one they are in.
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the module prints is not part of the answer
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise SpecError(_import_failure(name, error)) from error


def _from_module(text: str, module: str, attribute: str) -> MLPSpec:
    value: object = import_module(module)
    reached = module
    for name in attribute.split("."):
        try:
            value = getattr(value, name)
        except Exception as error:  # a property may raise anything
            step = did_you_mean(name, [n for n in dir(value) if not n.startswith("_")]) if isinstance(error, AttributeError) else ""
            why = f"{reached} has no attribute {name!r}" if isinstance(error, AttributeError) else f"reading it {_raised(error)}"
            raise SpecError(f"SPEC {text!r}: {why}. {step or f'SPEC is {_FORMS}.'}") from error
        reached += f".{name}"
    spec = value
    if not isinstance(value, MLPSpec):
        with contextlib.suppress(Exception):
            spec = getattr(value, "spec", None)
    if not isinstance(spec, MLPSpec):
        step = "Name an MLPSpec, an mlpdsl.MLP, or what mlpdsl.compile returned."
        raise SpecError(describe(f"SPEC {text!r}", value, "an MLPSpec, or something with one as .spec", step))
    return spec


def _import_failure(module: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"SPEC: there is no module {error.name!r} in {os.getcwd()} or on sys.path. SPEC is {_FORMS}."
    return f"SPEC: importing the module {module!r} {_raised(error)}"


def _raised(error: BaseException) -> str:
    """What was raised, and the last line of the user's own code that was running."""
    ours = (str(Path(__file__).parent), "<", str(importlib.__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"raised {type(error).__name__}{where}: {error}"


def function_source(text: str, name: str) -> str:
    """The lines of one top-level function of a file, decorators included. Raises `SpecError` naming those there are."""
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise SpecError(
            describe("--kernel", name, listed(functions), did_you_mean(name, functions) or "Choose one of these names.")
        )
    node = functions[name]
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])


def table(rows: Iterable[Resources], limit: int) -> str:
    """One line a kernel as compiled, in columns; `limit` is the target's shared memory a block, in bytes."""
    titles = ("kernel", "stage", "tile", "warps", "stages", "registers", "shared", "fits", "spills", "instruction", "serialised")
    lines = [titles]
    for r in rows:
        c = r.config
        tile, stages = (_tile(r), str(c.num_stages)) if c else ("-", "-")
        shared = f"{r.shared} of {limit}"
        fits, serialised = "yes" if r.fits else "NO", "YES" if r.serialised else "no"
        compiled = (_number(r.registers), shared, fits, _number(r.spills), r.instruction, serialised)
        lines.append((r.name, str(r.stage), tile, str(r.warps), stages, *compiled))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def _tile(r: Resources) -> str:
    return f"{r.config.block_m}x{r.config.block_n}x{r.config.block_k}" if r.config else ""


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def show(
    spec: str,
    stage: str = "source",
    target: str | None = None,
    m: int | None = None,
    backward: bool | None = None,
    kernel: str | None = None,
    path: str | None = None,
    backend: str = "triton",
) -> int:
    """Print what is generated for SPEC; needs no GPU.

    Stage `source` is the file, and says on stderr where it lies; `formulas` the activation and the epilogue as they were traced,
    with their derivatives; `ptx` each kernel's PTX (AMD: assembly); `resources` a table of
    registers, shared memory and spills, with exit status 1 where a kernel does not fit the target.
    """
    import click

    if backend != "triton" and stage != "source":
        raise click.UsageError(f"--backend {backend} has no stage {stage}: its source is what it has.")
    if stage in ("source", "formulas"):
        for option, value in (("--m", m), ("--forward-only or --backward", backward), ("--path", path)):
            if value is not None:
                raise click.UsageError(f"{option} does not change the {stage}: add --stage ptx or --stage resources.")
    if target is not None:
        parse_target(target, "--target")
    declared = read_spec(spec)
    if stage == "formulas":
        from mlpdsl.formulas import formulas

        for option, given in (("--kernel", kernel), ("--target", target)):
            if given is not None:
                raise click.UsageError(f"{option} does not change the formulas.")
        click.echo(formulas(declared), nl=False)
        return 0
    if stage == "source":
        return _show_source(declared, target, kernel, backend)
    from mlpdsl.resources import resources
    from mlpdsl.source import DEFAULT_TARGET

    chosen = parse_target(target) if target is not None else detect() or parse_target(DEFAULT_TARGET)
    found = resources(declared, chosen, m or 4096, backward=backward is not False, path=path)
    if kernel is not None:
        names = {r.name: None for r in found}
        if kernel not in names:
            step = "These are the spec's kernels; a call runs those that `mlpdsl explain` names. See also --path and --backward."
            raise SpecError(describe("--kernel", kernel, listed(names), step))
        found = [r for r in found if r.name == kernel]
    if stage == "ptx":
        comment = "//" if chosen.kind == "cuda" else ";"
        for r in found:
            tile = f", tile {_tile(r)}" if r.config else ""
            title = f"{comment} {r.name}, stage {r.stage}{tile}, {r.warps} warps, for {chosen.name}\n"
            click.echo(f"{title}{r.assembly.rstrip()}\n".encode(), nl=False)
        return 0
    click.echo(table(found, chosen.shared_memory), nl=False)
    return 0 if all(r.fits for r in found) else 1


def _show_source(spec: MLPSpec, target: str | None, kernel: str | None, backend: str) -> int:
    import click

    from mlpdsl.source import generate

    made = generate(spec, target=target, backend=backend)
    text = made.text if kernel is None else function_source(made.text, kernel)
    click.echo(f"mlpdsl: {made.path}{'' if os.path.exists(made.path) else ' (could not be written)'}", err=True)
    if not (sys.stdout.isatty() and _highlight(text)):
        click.echo(text.encode(), nl=False)
    return 0


def _highlight(text: str) -> bool:
    """Print Python in colours, and say whether that could be done."""
    try:
        from rich.console import Console
        from rich.syntax import Syntax
    except ModuleNotFoundError:
        return False
    coloured = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(text)
    Console().print(coloured, soft_wrap=True, end="")
    return True


def explain(spec: str, m: int, target: str | None = None, backend: str = "triton") -> int:
    """Say what runs for SPEC on a number of rows, and why."""
    import click

    if target is not None:
        parse_target(target, "--target")
    declared = read_spec(spec)
    from mlpdsl.explanation import explain

    click.echo(str(explain(declared, m, target, backend=backend)))
    return 0


def doctor(specs: tuple[str, ...] = (), m: tuple[int, ...] = (), as_json: bool = False) -> int:
    """Check versions, devices, compiler, environment and caches, and what each SPEC gets here at each number of rows.

    What is a problem comes with a next step, and makes the exit status 1.
    """
    import json

    import click

    from mlpdsl.doctor import ROWS, diagnose

    declared = [read_spec(text) for text in specs]
    found = diagnose(declared, m or ROWS)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    return 1 if found.status == "problem" else 0


def _commands() -> click.Group:
    """The commands, made here and not by decorators so that this file can be imported without click."""
    import click

    spec = click.Argument(["spec"])
    rows = click.IntRange(min=1)
    target = click.Option(["--target"], metavar="NAME", help=f"{', '.join(TARGETS)}; default: this machine's, else sm_90.")
    backend = click.Option(["--backend"], type=click.Choice(("triton", "pallas")), default="triton", show_default=True,
                           help="pallas: kernels for JAX; target then by default tpu_v5e.")  # fmt: skip
    show_options: list[click.Parameter] = [
        spec,
        click.Option(["--stage"], type=click.Choice(STAGES), default="source", show_default=True),
        target,
        click.Option(["--m"], type=rows, metavar="ROWS", help="Rows of x, which decide the tile sizes; default: 4096."),
        click.Option(["--backward/--forward-only"], default=None, help="Compile every kernel (default), or forward's alone."),
        click.Option(["--kernel"], metavar="NAME", help="Only this kernel (stage source: any function of the file)."),
        click.Option(["--path"], type=click.Choice(("tma", "masked")), help="How kernels read memory; default: the target's best."),
        backend,
    ]
    explain_options: list[click.Parameter] = [
        spec,
        click.Option(["--m"], type=rows, metavar="ROWS", required=True),
        target,
        backend,
    ]
    group = click.Group(help="Declared MLPs, and the kernels written for them.", context_settings={"max_content_width": 100})
    click.version_option(__version__, prog_name="mlpdsl", message="%(prog)s %(version)s")(group)
    doctor_options: list[click.Parameter] = [
        click.Argument(["specs"], nargs=-1, metavar="[SPEC]..."),
        click.Option(["--m"], type=rows, metavar="ROWS", multiple=True, help="May be repeated; default: 1, 16, 256, 4096."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ]
    commands: dict[Callable[..., int], list[click.Parameter]] = {
        show: show_options,
        explain: explain_options,
        doctor: doctor_options,
    }
    for function, options in commands.items():
        about = f"{inspect.getdoc(function)}\n\n{_SPEC_HELP}"
        group.add_command(click.Command(function.__name__, callback=function, params=options, help=about))
    group.add_command(cli_cache.commands())
    group.add_command(cli_fuzz.command())
    group.add_command(cli_bench.command())
    group.add_command(cli_tune.command())
    return group


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on `args` (default: the process's) and return the exit status."""
    try:
        import click
    except ModuleNotFoundError:
        return _mistake("the command line needs click and rich: pip install 'mlpdsl[cli]'")
    try:
        status = _commands().main(args, prog_name="mlpdsl", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except MLPError as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        return _mistake(f"this command needs {error.name}, which is not installed: pip install {_NEEDED[error.name]}")
    except BrokenPipeError:
        # Whoever read has had enough (`| head`). What Python would still flush at exit must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        place = f": {error.filename!r}" if error.filename else ""
        return _mistake(f"the output could not be written: {error.strerror or error}{place}")


_NEEDED = {name: name for name in ("jinja2", "torch", "triton")} | {"hypothesis": "'mlpdsl[test]'", "rich": "'mlpdsl[cli]'"}
"""What a command may need that is not there, and what to install for it."""


def _mistake(message: str) -> int:
    print(f"mlpdsl: {message}", file=sys.stderr)
    return 2
