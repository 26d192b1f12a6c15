"""Configs where rows are of no whole 16 bytes: by masked loads of few elements each, or on copies that descriptors fit."""

from __future__ import annotations

from mlpdsl.target import Target

from .few_rows import PROCESSORS, SKINNY_ROWS, power_of_two, tiles_of
from .plan import Config

__all__ = ["MANY", "last", "masked", "worth_a_kernel", "worth_copies"]

MANY = 3 * 2**24
"""Multiplications of 17 to 64 rows of x, in whose kernels of few rows x is most of the work."""


def worth_a_kernel(m: int, n: int, k: int, target: Target) -> bool:
    """Whether rows are so, and a kernel of masked loads beats the library: short sums, a few columns, or tiles enough; not for a
    long sum over many rows."""
    if target.name != "sm_90" or not (k % 8 or n % 8):
        return False
    return k <= 512 or n <= 64 or (tiles_of(64, 64, m, n) >= PROCESSORS and (k <= 2048 or m <= 1024))


def worth_copies(role: str, m: int, n: int, k: int, planes: int, target: Target) -> bool:
    """Whether a product is so large that copies of its operands, which descriptors fit, cost less than masked loads, or than the
    library's product of operands as they are, on an H200."""
    if target.name != "sm_90" or min(n, k) <= 64 or m <= 16:
        return False
    if role not in ("hidden", "output"):
        return m > 64 and m * n * k * planes >= 2**29
    if m <= SKINNY_ROWS:  # kernels for few rows read weights of odd widths as they lie
        return k % 8 > 0 and m * n * k * planes >= MANY
    return m * n * k * planes >= 2**24


def masked(block_m: int, m: int, n: int, k: int, planes: int) -> Config:
    """A kernel of masked loads on Hopper."""
    if planes == 2:  # four warps are 4 to 12% faster where they fit, but spill where biases are added before some activations
        block_n = power_of_two(n, 16, 64)
        return Config(block_m, block_n, 32, num_warps=8 if block_m * block_n == 64 * 64 else 4, num_stages=3)
    for block_n in (16, 32):  # the narrowest tile of which one wave is enough
        if block_m == 64 and (n <= block_n or tiles_of(block_m, block_n, m, n) <= PROCESSORS):
            return Config(block_m, block_n, 64, num_warps=8, num_stages=3)
    if block_m == 64 and k > 1024:
        return Config(block_m, 64, 64, num_warps=8, num_stages=3)
    return Config(block_m, power_of_two(n, 32, 64), 32, num_warps=4, num_stages=3)


def last(m: int, n: int, k: int, crowded: bool) -> Config:
    """The last linear on copies, on Hopper: the tile of which one wave holds all, else the largest that there are enough of, and of
    which registers hold the epilogue too where they are `crowded`."""
    for tile in (
        Config(64, 64, 64, num_warps=8, num_stages=4),
        Config(128, 64, 64, num_warps=4, num_stages=4),
        Config(128, 128, 64, num_warps=8, num_stages=4),
    ):
        if tiles_of(tile.block_m, tile.block_n, m, n) <= PROCESSORS and (k <= 2048 or tile.block_m > 64):
            return tile
    if crowded:
        return Config(128, 128, 64, num_warps=8, num_stages=4)
    if tiles_of(128, 256, m, n) >= 0.7 * PROCESSORS:
        return Config(128, 256, 64, num_warps=8, num_stages=3)
    return Config(128, 128, 64, num_warps=8, num_stages=3, residency=2, registers=128)
