"""What GPUs were measured to do at most, and the least time that a forward can take on them."""

from __future__ import annotations

from typing import NamedTuple

from mlpdsl.spec import MLPSpec

__all__ = ["KNOWN", "Rates", "floor_us", "known_gpu", "numbers_of"]


class Rates(NamedTuple):
    """A GPU's architecture, bytes a second of its memory, and FLOP a second of large products by number format."""

    target: str
    bandwidth: float
    products: dict[str, float]


KNOWN: dict[str, Rates] = {
    "NVIDIA H200": Rates("sm_90", 4.37e12, {"bfloat16": 790e12, "float16": 790e12}),
}
"""By the GPU's name. Measured: a read of device memory, a product of 8192³."""


def numbers_of(spec: MLPSpec) -> str:
    """The number format of the products: "bfloat16", "float16", "float32 ieee", "float32 tf32", "float32 tf32x3"."""
    return f"float32 {spec.precision}" if spec.dtype == "float32" else spec.dtype


def known_gpu(target: str) -> str | None:
    """The GPU of an architecture that was measured, where there is one and no other."""
    found = [gpu for gpu, rates in KNOWN.items() if rates.target == target]
    return found[0] if len(found) == 1 else None


def floor_us(spec: MLPSpec, m: int, gpu: str | None) -> float | None:
    """The larger of `spec.flops(m)` and `spec.bytes_moved(m)`, each over its rate, in microseconds; None for what was not measured.

    Where all that moves fits the L2 and lies there, a forward can take less.
    """
    rates = KNOWN.get(gpu or "")
    product = rates.products.get(numbers_of(spec)) if rates is not None else None
    if rates is None or product is None:
        return None
    return 1e6 * max(spec.flops(m) / product, spec.bytes_moved(m) / rates.bandwidth)
