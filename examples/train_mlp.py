"""A small network trained twice from the same start, by eager PyTorch and by mlpdsl's generated kernels; the losses must agree.

    pip install 'mlpdsl[examples]'                        # for the data (scikit-learn) and the figure (matplotlib)
    python examples/train_mlp.py                          # prints both curves, writes them to train_mlp.png
    python examples/train_mlp.py --dtype bfloat16 --epochs 20 --out curve.png

The data are the 1797 handwritten digits of 8x8 pixels that are part of scikit-learn: nothing is downloaded. The network is one
gated block and a linear head. Its activation, the clamped SwiGLU of gpt-oss, and its epilogue, a residual and a LayerScale whose
scale is learned, are the two Python functions below; no derivative is written. `--dtype bfloat16` trains under autocast.

On a GPU the kernels are compiled. Without one they run in Triton's interpreter on the CPU, which takes half a minute or so.
Exit status 0 where the two curves agree, 1 where they do not, 2 where the example cannot run.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl

DIMS = (64, 128, 64)
CLASSES = 10
BACKENDS = {"eager": "eager PyTorch", "triton": "generated kernels"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""The largest difference of two losses of one epoch, relative to eager's. The order of sums differs, and training amplifies what it
changes: with the other options at their defaults, starts that differed by 1e-6 of each parameter (float32) or 4e-3 (bfloat16) gave
losses up to 6e-7 and 1.4e-2 apart, over 12 seeds. A higher learning rate amplifies more."""


class ExampleError(Exception):
    """Something the user can put right; the message says how."""


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """The activation."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1.0)


def scaled_residual(tile: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    """The epilogue."""
    return residual + gamma * tile


def declare() -> mlpdsl.MLPSpec:
    epilogue = mlpdsl.epilogue(scaled_residual, residual="tile", gamma="column")
    return mlpdsl.MLPSpec(dims=DIMS, activation=clamped_swiglu, gated=True, bias=True, epilogue=(epilogue,))


class Network(nn.Module):
    """x (M, 64) to logits (M, 10): the block, run by the backend named, then a linear head."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.mlp = mlpdsl.MLP(declare(), backend=backend)
        self.gamma = nn.Parameter(torch.full((DIMS[-1],), 0.1))
        self.head = nn.Linear(DIMS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mlp(x, residual=x, gamma=self.gamma))
        return logits


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) with values from 0 to 1, and what they show; a quarter of them for testing, the same ones every time."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Digits:
        return Digits(*(t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)))


def load_digits() -> Digits:
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ExampleError(f"scikit-learn cannot be imported ({error}): pip install 'mlpdsl[examples]'") from error
    pixels, shown = load(return_X_y=True)
    parts = train_test_split(pixels / 16.0, shown, test_size=0.25, random_state=0, stratify=shown)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x.float(), train_y.long(), test_x.float(), test_y.long())


@dataclass
class Curve:
    """One training run."""

    backend: str
    losses: list[float] = field(default_factory=list)
    """The mean training loss of each epoch."""
    accuracy: float = math.nan
    seconds: float = math.nan


def train(backend: str, start: dict[str, Tensor], data: Digits, args: argparse.Namespace) -> Curve:
    """Train from the given parameters. The order of the images depends on the seed alone."""
    device = data.train_x.device
    network = Network(backend).to(device)
    network.load_state_dict(start)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    order = torch.Generator().manual_seed(args.seed)
    mixed = torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")
    curve = Curve(backend)
    began = time.perf_counter()
    for _ in range(args.epochs):
        total = torch.zeros((), device=device, dtype=torch.float64)
        shuffled = torch.randperm(len(data.train_x), generator=order)
        for batch in shuffled.to(device).split(args.batch):
            with mixed:
                logits = network(data.train_x[batch])
            loss = F.cross_entropy(logits.float(), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        curve.losses.append(float(total) / len(shuffled))
    with torch.no_grad(), mixed:
        curve.accuracy = float((network(data.test_x).argmax(1) == data.test_y).float().mean())
    curve.seconds = time.perf_counter() - began
    return curve


def differences(eager: Curve, kernels: Curve) -> list[float]:
    """|difference| of the two losses of every epoch, relative to eager's."""
    return [abs(a - b) / abs(a) for a, b in zip(eager.losses, kernels.losses, strict=True)]


def agree(found: list[float], tolerance: float) -> bool:
    """Whether every difference is within the tolerance; NaN is not."""
    return all(difference <= tolerance for difference in found)


def print_table(curves: list[Curve], found: list[float]) -> None:
    titles = [f"{BACKENDS[c.backend]:>17}" for c in curves] + ["  difference"] * bool(found)
    print(f"\n{'epoch':<14} {' '.join(titles)}")
    for epoch, losses in enumerate(zip(*(c.losses for c in curves), strict=True), 1):
        difference = f"    {found[epoch - 1]:8.1e}" if found else ""
        print(f"{epoch:<14} {' '.join(f'{loss:17.6f}' for loss in losses)}{difference}")
    print(f"{'test accuracy':<14} {' '.join(f'{c.accuracy:17.4f}' for c in curves)}")
    compiling = "  compiling included" if found else ""
    print(f"{'seconds':<14} {' '.join(f'{c.seconds:17.1f}' for c in curves)}{compiling}\n")


def figure_class() -> Any:
    """matplotlib's Figure, which needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExampleError(f"matplotlib cannot be imported ({error}): pip install 'mlpdsl[examples]'") from error
    return Figure


def draw(path: Path, curves: list[Curve], found: list[float], tolerance: float, title: str) -> None:
    """The losses as a PNG; below them, where there are two, how far they are apart."""
    figure = figure_class()(figsize=(7.0, 5.5 if found else 4.0), layout="constrained")
    axes = figure.subplots(2 if found else 1, sharex=True, height_ratios=[2, 1] if found else None, squeeze=False)[:, 0]
    epochs = range(1, len(curves[0].losses) + 1)
    styles = {"eager": {"color": "0.6", "linewidth": 5}, "triton": {"color": "tab:blue", "marker": "o", "markersize": 4}}
    for curve in curves:
        axes[0].plot(
            epochs, curve.losses, label=f"{BACKENDS[curve.backend]} (test accuracy {curve.accuracy:.3f})", **styles[curve.backend]
        )
    axes[0].set(ylabel="training loss", yscale="log", title=title)
    axes[0].legend()
    if found:
        axes[1].plot(epochs, [d or math.nan for d in found], color="tab:blue", marker="o", markersize=4)  # no log of 0
        axes[1].axhline(tolerance, color="tab:red", linestyle="--", label="tolerance")
        axes[1].set(ylabel="relative difference", yscale="log")
        axes[1].legend()
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ExampleError(f"cannot write {path}: {error.strerror}. Name another file with --out.") from None


def device_for(backends: list[str]) -> tuple[torch.device, str]:
    """Where to train, and how the kernels run there. Without a GPU, sets TRITON_INTERPRET=1: triton is not imported yet."""
    interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    if torch.cuda.is_available() and not interpreting:
        return torch.device("cuda"), f"compiled, on {torch.cuda.get_device_name()}"
    if "triton" in backends:
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # products this small are slower on several, most of all where other programs run
    return torch.device("cpu"), "in Triton's interpreter, on the CPU"


def run(args: argparse.Namespace) -> bool:
    """Train, print, draw; whether the curves agree."""
    backends = list(BACKENDS) if args.backend == "both" else [args.backend]
    device, how = device_for(backends)
    figure_class()  # what is missing is said before the training
    if not args.out.parent.is_dir():
        raise ExampleError(f"cannot write {args.out}: there is no folder {args.out.parent}. Name another file with --out.")
    data = load_digits().to(device)
    torch.manual_seed(args.seed)
    start = Network("eager").state_dict()
    title = f"digits, {'x'.join(map(str, DIMS))} gated, {args.dtype}, batch {args.batch}, seed {args.seed}"
    print(f"data     {len(data.train_x)} digits to train on, {len(data.test_x)} to test")
    print(f"MLP      {declare().short_name}, epilogue {declare().epilogue[0]}")
    print(f"training {args.dtype}, {args.epochs} epochs, batch {args.batch}, AdamW, lr {args.lr:g}, seed {args.seed}, {device}")
    if "triton" in backends:
        print(f"kernels  {how}", flush=True)
    curves = []
    for backend in backends:
        try:
            curves.append(train(backend, start, data, args))
        except mlpdsl.UnsupportedError as error:
            raise ExampleError(f"{error}\nWithout the kernels: --backend eager") from error
    found = differences(*curves) if len(curves) == 2 else []
    print_table(curves, found)
    draw(args.out, curves, found, args.tolerance, title)
    print(f"The curve is in {args.out}.")
    if not found:
        return True
    good = agree(found, args.tolerance)
    largest = max(found, key=lambda d: math.inf if math.isnan(d) else d)
    verdict = "they agree" if good else "THEY DO NOT AGREE"
    print(f"Largest difference of two losses: {largest:.1e} of eager's; {args.tolerance:g} is allowed: {verdict}.")
    return good


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 100000")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**32 - 1")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", metavar="N", type=positive, default=10, help="default: %(default)s")
    parser.add_argument("--batch", metavar="N", type=positive, default=64, help="images in a step (default: %(default)s)")
    parser.add_argument("--lr", type=above_zero, default=2e-3, help="AdamW's learning rate (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("train_mlp.png"), help="a PNG (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=seed, default=0, help="of parameters and order (default: %(default)s)")
    parser.add_argument("--backend", choices=("both", *BACKENDS), default="both", help="one alone compares nothing (default: both)")
    allowed = ", ".join(f"{tolerance:g} for {dtype}" for dtype, tolerance in TOLERANCE.items())
    parser.add_argument("--tolerance", metavar="T", type=above_zero, help=f"relative difference of two losses (default: {allowed})")
    args = parser.parse_args(given)
    args.tolerance = args.tolerance or TOLERANCE[args.dtype]
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    try:
        return 0 if run(args) else 1
    except ExampleError as error:
        print(f"train_mlp: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
