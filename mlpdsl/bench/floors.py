"""The least time a row can take: its arithmetic at the rate of the matrix units, or its bytes at the rate of the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mlpdsl.bench.suites import Row
from mlpdsl.ceilings import KNOWN, numbers_of
from mlpdsl.names import DTYPES
from mlpdsl.spec import MLPSpec

__all__ = ["Ceilings", "Floor", "ceilings", "floor_of", "footprint", "held_bytes", "traffic"]


@dataclass(frozen=True)
class Ceilings:
    """The two rates of a GPU: bytes a second of its memory, and FLOP a second of large products by number format."""

    bandwidth: float
    products: dict[str, float]
    sources: dict[str, str]
    """Where each rate comes from: "table", or "measured"; keys "bandwidth" and the formats."""

    def to_dict(self) -> dict[str, Any]:
        return {"bytes_per_s": self.bandwidth, "flop_per_s": dict(self.products), "sources": dict(self.sources)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ceilings:
        """Raises `KeyError`, `TypeError` where `data` is not what `to_dict` gave."""
        return cls(float(data["bytes_per_s"]), dict(data["flop_per_s"]), dict(data["sources"]))


def ceilings(
    gpu: str,
    formats: Iterable[str],
    bandwidth: Callable[[], float],
    product: Callable[[str], float],
    before: Ceilings | None = None,
) -> Ceilings:
    """The rates of a GPU for all `formats`: those of an earlier part of the run, else those known, else measured by the callables.

    `product` is asked for "float32 tf32" where the format is "float32 tf32x3", which takes three such products.
    """
    rates = KNOWN.get(gpu)
    known, table = (rates.bandwidth, rates.products) if rates is not None else (0.0, {})
    products = dict(before.products) if before else {}
    sources = dict(before.sources) if before else {"bandwidth": "table" if known else "measured"}
    rate = before.bandwidth if before else known or bandwidth()
    for name in formats:
        if name in products:
            continue
        sources[name] = "table" if name in table else "measured"
        thirds = name == "float32 tf32x3"
        products[name] = table[name] if name in table else product("float32 tf32" if thirds else name) / (3 if thirds else 1)
    return Ceilings(rate, products, sources)


@dataclass(frozen=True)
class Floor:
    """The least time, in microseconds, with the FLOP and bytes it comes from; `by` is "arithmetic" or "memory"."""

    us: float
    by: str
    flops: int
    bytes: int


def traffic(spec: MLPSpec, m: int, train: bool) -> int:
    """Bytes that must move: in `forward` what `spec.bytes_moved(m)` counts, each tensor once.

    In training forward reads x and the parameters and writes y; backward reads dy, x and the parameters again and writes their
    gradients; an operand is read once and its gradient written. Hidden tensors and what is kept for backward do not count.
    """
    forward = spec.bytes_moved(m)
    if not train:
        return forward
    return 2 * forward + DTYPES[spec.dtype] * (m * spec.d_in + _parameters(spec))


def _parameters(spec: MLPSpec) -> int:
    count = 0
    for shape in spec.parameter_shapes().values():
        size = 1
        for length in shape:
            size *= length
        count += size
    return count


def floor_of(row: Row, rates: Ceilings) -> Floor:
    """max(FLOP / rate of products, bytes / bandwidth); in training three times forward's FLOP. An L2 that is hot can beat it."""
    train = row.passes == "train"
    flops = row.spec.flops(row.m) * (3 if train else 1)
    moved = traffic(row.spec, row.m, train)
    arithmetic, memory = flops / rates.products[numbers_of(row.spec)], moved / rates.bandwidth
    return Floor(1e6 * max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory", flops, moved)


def footprint(row: Row) -> int:
    """Bytes that one call touches, about: parameters, input, output and hidden tensors; twice that in training."""
    spec = row.spec
    hidden = sum(spec.dims[1:-1]) * (2 if spec.gated else 1)
    return (spec.bytes_moved(row.m) + DTYPES[spec.dtype] * row.m * hidden) * (2 if row.passes == "train" else 1)


def held_bytes(row: Row, graphs: int) -> int:
    """Bytes of device memory that timing a row takes, about, with `graphs` CUDA graphs alive, each with memory of its own."""
    spec = row.spec
    train = row.passes == "train"
    fixed = spec.bytes_moved(row.m) * (2 if train else 1)
    planes = 4 if spec.gated else 2  # eager PyTorch keeps gate, up, the activation and the product
    call = DTYPES[spec.dtype] * row.m * (sum(spec.dims[1:-1]) * planes * (2 if train else 1) + spec.d_out)
    results = fixed if train else DTYPES[spec.dtype] * row.m * spec.d_out
    return fixed + 3 * results + (graphs + 1) * (call + (results if train else 0))
