"""mlpdsl in one or two screens: declare an MLP, read its kernel, see what it compiles to, run it, measure its error.

    python examples/demo.py           # or: make demo

Everything up to "Run" needs no GPU: the kernels are compiled for an H100 (sm_90) on any machine. With a GPU the MLP then runs
at its real size. Without one it runs small: PyTorch's own operations first, then the generated kernels in Triton's
interpreter. Coloured where `rich` is installed and the output is a terminal.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mlpdsl

TARGET = "sm_90"
ROWS = 4096


def declare() -> mlpdsl.MLPSpec:
    return mlpdsl.MLPSpec(
        dims=(4096, 14336, 4096),  # Llama-3-8B: input, hidden, output
        activation="silu",
        gated=True,  # SwiGLU: (silu(x @ gate.T) * (x @ up.T)) @ down.T
        dtype="bfloat16",
    )


class Screen:
    """Headings, code and tables: in colour on a terminal that rich can use, else as plain text."""

    def __init__(self) -> None:
        self._console = None
        if sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                return
            console = Console(highlight=False)
            self._console = console if console.color_system else None

    def heading(self, text: str) -> None:
        if self._console is None:
            print(f"\n{text}\n{'-' * len(text)}", flush=True)
        else:
            self._console.print(f"\n[bold cyan]{text}[/]")

    def code(self, text: str) -> None:
        if self._console is None:
            print("\n".join(f"    {line}".rstrip() for line in text.splitlines()))
        else:
            from rich.syntax import Syntax

            self._console.print(Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column to the left, the others to the right."""
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in (columns, *rows)
        ]
        if self._console is not None:
            lines[0] = f"\033[1m{lines[0]}\033[0m"
        print("\n".join(["", *lines, ""]))

    def line(self, text: str) -> None:
        print(text, flush=True)


def functions(text: str) -> dict[str, str]:
    """The source of every top-level function of a module, decorators included."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def for_people(path: Path) -> str:
    """The path, with ~ for the home directory."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def show_source(screen: Screen) -> None:
    """The declaration, and the kernel that runs first."""
    screen.heading("Declare")
    screen.code(inspect.getsource(declare))
    generated = mlpdsl.generate(declare(), target=TARGET)
    parts = functions(generated.text)
    kernel = next(name for name in parts if name.startswith("hidden"))
    screen.heading(f"Read: {kernel}, the first kernel of the forward pass, as generated for {TARGET}")
    screen.code(f"{parts['activate']}\n\n\n{parts[kernel]}")
    screen.line(f"\nAll {len(generated.text.splitlines())} lines, every kernel and launcher, forward and backward:")
    screen.line(f"{for_people(generated.path)}")


def show_resources(screen: Screen) -> None:
    """What the kernels compile to for the target, which need not be here."""
    from mlpdsl.resources import resources

    screen.heading(f"Compile: for {TARGET} and m = {ROWS} rows; it needs no GPU")
    start = time.perf_counter()
    found = resources(declare(), target=TARGET, m=ROWS)
    rows = [
        (
            f"{r.name}[{r.stage}]",
            f"{r.config.block_m}x{r.config.block_n}x{r.config.block_k}" if r.config else "",
            str(r.warps),
            "?" if r.registers is None else str(r.registers),
            f"{r.shared / 1024:.0f} KiB",
            "?" if r.spills is None else f"{r.spills} B",
            r.instruction,
        )
        for r in found
    ]
    screen.table(("kernel[layer]", "tile", "warps", "registers", "shared", "spills", "instruction"), rows)
    screen.line(f"{len(rows)} kernels, forward and backward, in {time.perf_counter() - start:.1f} s")


def random_call(spec: mlpdsl.MLPSpec, m: int, device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, parameters and dy; every layer keeps the scale of its input."""
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(m, spec.d_in, device=device).to(dtype)
    shapes = spec.parameter_shapes().values()
    params = [(torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype) for shape in shapes]
    return x, params, torch.randn(m, spec.d_out, device=device).to(dtype)


def with_gradients(mlp: Callable[..., Tensor], x: Tensor, params: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dx, and the gradient of every parameter."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *params)]
    y = mlp(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The formula itself, for float64."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def errors(spec: mlpdsl.MLPSpec, m: int, device: str, mlp: Callable[..., Tensor]) -> dict[str, tuple[float, float]]:
    """Name of each result to its error from float64, mlp's and eager PyTorch's: root mean squares, error over values."""
    x, params, dy = random_call(spec, m, device)
    exact = with_gradients(swiglu, x.double(), [p.double() for p in params], dy.double())
    results = with_gradients(mlp, x, params, dy), with_gradients(mlpdsl.reference(spec), x, params, dy)
    names = ["y", "dx", *(f"d {name}" for name in spec.parameter_shapes())]
    mine, eager = ([float((r.double() - e).norm() / e.norm()) for r, e in zip(each, exact, strict=True)] for each in results)
    return dict(zip(names, zip(mine, eager, strict=True), strict=True))


def show_errors(screen: Screen, found: dict[str, tuple[float, float]]) -> bool:
    """A table; whether every error is at most twice eager's."""
    rows = [(name, f"{mine:.2e}", f"{eager:.2e}", f"{mine / eager:.2f}") for name, (mine, eager) in found.items()]
    screen.table(("relative RMSE, from float64", "mlpdsl", "eager PyTorch", "ratio"), rows)
    good = all(mine <= 2 * eager + 1e-5 for mine, eager in found.values())
    screen.line("Every error is at most twice eager PyTorch's." if good else "AN ERROR IS MORE THAN TWICE EAGER PYTORCH'S.")
    return good


def run_on_gpu(screen: Screen) -> bool:
    """The declared MLP at its real size: errors, then times."""
    from triton.testing import do_bench

    spec = declare()
    screen.heading(f"Run: {spec.short_name}, m = {ROWS} rows, generated kernels on {torch.cuda.get_device_name()}")
    mlp, eager = mlpdsl.compile(spec, backend="triton"), mlpdsl.reference(spec)
    good = show_errors(screen, errors(spec, ROWS, "cuda", mlp))

    x, params, dy = random_call(spec, ROWS, "cuda")
    rows = []
    for name, run in (("mlpdsl", mlp), ("eager PyTorch", eager)):
        forward = do_bench(lambda run=run: run(x, *params), return_mode="median")
        both = do_bench(lambda run=run: with_gradients(run, x, params, dy), return_mode="median")
        tflops = [f"{count * spec.flops(ROWS) / ms / 1e9:.0f}" for count, ms in ((1, forward), (3, both))]
        rows.append((name, f"{forward:.2f} ms", tflops[0], f"{both:.2f} ms", tflops[1]))
    screen.table(("median time", "forward", "TFLOP/s", "forward and backward", "TFLOP/s"), rows)
    return good


def run_on_cpu(screen: Screen) -> bool:
    """The same MLP, small: PyTorch's own operations here, the generated kernels in a process whose Triton interprets."""
    spec, m = declare().replace(dims=(256, 896, 256)), 64
    screen.heading("Run: no GPU here, so smaller, and by two ways")
    start = time.perf_counter()
    found = errors(spec, m, "cpu", mlpdsl.compile(spec, backend="eager"))
    worst = max(mine for mine, _ in found.values())
    took = time.perf_counter() - start
    screen.line(f"1. backend eager, PyTorch's own operations: {spec.short_name}, m = {m}")
    screen.line(f"   forward, backward and float64 in {took * 1e3:.0f} ms; errors up to {worst:.2e}, those of bfloat16")
    command = [sys.executable, str(Path(__file__).resolve()), "--interpreted"]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode == 0


def run_interpreted(screen: Screen) -> bool:
    """The generated kernels in Triton's interpreter, tiny."""
    spec, m = declare().replace(dims=(64, 176, 64)), 48
    start = time.perf_counter()
    found = errors(spec, m, "cpu", mlpdsl.compile(spec, backend="triton"))
    screen.line(f"2. backend triton, the generated kernels in Triton's CPU interpreter: {spec.short_name}, m = {m}")
    screen.line(f"   forward and backward in {time.perf_counter() - start:.1f} s")
    return show_errors(screen, found)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--interpreted", action="store_true", help="only the last step of the demo on a CPU: the kernels in Triton's interpreter"
    )
    args = parser.parse_args(given)
    screen = Screen()
    if args.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        return 0 if run_interpreted(screen) else 1
    os.environ.pop("TRITON_INTERPRET", None)  # this process compiles
    show_source(screen)
    show_resources(screen)
    good = run_on_gpu(screen) if torch.cuda.is_available() else run_on_cpu(screen)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
