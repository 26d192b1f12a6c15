"""Configs of the strategy "skinny": forward kernels for up to 64 rows of x, which wait for weights and for nothing else.

Mostly of what was timed on an H200, each linear in a whole call, weights in the L2 and not (benchmarks/results/searches-h200.json).
On AMD nothing was timed, and loops of plain loads are not pipelined, so there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from mlpdsl.target import Target

from .plan import Config

__all__ = ["EXACT_ROWS", "PROCESSORS", "SKINNY_ROWS", "candidates", "few_registers", "fitted", "granule", "interpreted", "period",
           "power_of_two", "skinny", "tiles_of"]  # fmt: skip

SKINNY_ROWS = 64
"""The most rows of x for which there is a kernel of the strategy "skinny"."""

EXACT_ROWS = 16
"""The same in float32."""

PROCESSORS = 132
"""Multiprocessors of an H100 or H200, whose waves of programs the rules count."""


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, between low and high."""
    size = low
    while size < n and size < high:
        size *= 2
    return size


def granule(dtype: str) -> int:
    """How many elements are 16 bytes, which is what a thread loads at once."""
    return 4 if dtype == "float32" else 8


def period(stride: int, granule: int) -> int:
    """After how many rows, so many elements apart, they are as far from a multiple of 16 bytes as before."""
    return granule // math.gcd(stride, granule)


def few_registers(target: Target) -> bool:
    """Whether accumulators crowd out what else a thread holds: everywhere but on sm_90, whose tiles were timed, on sm_100 and
    sm_103, which accumulate in a memory of their own, and on CDNA, which has 512 registers a thread."""
    return target.warp_size == 32 and target.name not in ("sm_90", "sm_100", "sm_103")


def tiles_of(block_m: int, block_n: int, m: int, n: int) -> int:
    """How many tiles cover (m, n)."""
    return -(-m // block_m) * -(-n // block_n)


def skinny(role: str, m: int, n: int, k: int, *, dtype: str, planes: int, target: Target) -> Config | None:
    """The config of a forward kernel for few rows; None where there is none: more rows, other roles, float32 beyond one row, AMD,
    and the widest plain first linears.

    Small matrices are read in one piece, by a thousand programs; larger ones, and several rows, in steps with many on the way.
    Where the columns are too few for tiles that feed four warps, the warps share each step of K instead (`splits`). wgmma takes
    64 rows; up to 32 are cheaper by mma where the warps share K.
    """
    if role not in ("hidden", "output") or m > SKINNY_ROWS or target.kind != "cuda":
        return None
    if m == 1:
        return _one_row(role, n, k, dtype, planes)
    if dtype == "float32":
        return _exact(m, n, k, planes) if m <= EXACT_ROWS and target.name == "sm_90" else None
    if role == "hidden" and planes == 1 and m > 16 and n >= 16384 and k >= 4096 and k % 8 == 0 and target.name == "sm_90":
        return None  # rather wider tiles, by descriptors
    if k % 8:
        return _ragged(m, n, k, target, planes)
    if n <= 32 or k < 256:
        return _steps(m, n, k, target, planes, 32, 64, 3)
    return (_sixteen if m <= 16 else _sixty_four)(m, n, k, planes, target)


def _sixteen(m: int, n: int, k: int, planes: int, target: Target) -> Config:
    if planes == 2:
        return _steps(m, n, k, target, 2, 32, 64, 3) if k < 8192 else _steps(m, n, k, target, 2, 32, 128, 8)
    if n >= 8192:
        return _steps(m, n, k, target, 1, 64, 256, 4)
    if k <= 1024 and n >= 3072:
        return _steps(m, n, k, target, 1, 32, 128, 6)
    if n >= 4096:
        return _steps(m, n, k, target, 1, 32, 128, 8) if k <= 8192 else _steps(m, n, k, target, 1, 32, 256, 6, splits=4)
    return _steps(m, n, k, target, 1, 16 if n >= 2048 else 8, 256, 6, splits=4)


def _ragged(m: int, n: int, k: int, target: Target, planes: int) -> Config:
    """Rows of no whole 16 bytes. Weights are loaded as others are; x, element by element, is most of the work: small steps, or,
    where columns are few, as many warps as share a long one."""
    reach = k + granule("bfloat16") - 1
    if k < 256:  # in one step, or two
        return _steps(m, n, reach, target, planes, 16, 128, 3)
    if m > 16:
        config = _steps(m, n, reach, target, planes, 32 if planes == 2 or n >= 4096 else 16, 128, 4)
        return replace(config, num_warps=8)
    if planes == 1 and n < 4096 and k > 512:
        return replace(_steps(m, n, reach, target, 1, 8, 512, 3, splits=8), num_warps=8)
    return _steps(m, n, reach, target, planes, 16 if n < 8192 else 32, 128, 4)


def _sixty_four(m: int, n: int, k: int, planes: int, target: Target) -> Config:
    if planes == 2 and m <= 32 and k >= 8192 and n >= 16384 and target.shared_memory > 160 * 1024:
        return Config(32, 128, 128, num_warps=8, num_stages=2, strategy="skinny")
    if planes == 2:
        wide, stages = (32, 6) if n <= 8192 else (64, 4)
        return _steps(m, n, k, target, 2, wide, 64, stages, rows=64)
    if n >= 8192:
        return _steps(m, n, k, target, 1, 64, 128, 4, rows=64)
    if k <= 1024 and n >= 3072:
        return _steps(m, n, k, target, 1, 32, 64, 8, rows=64)
    if n >= 4096:
        return _steps(m, n, k, target, 1, 32, 128, 6, rows=64)
    if m <= 32:
        return _steps(m, n, k, target, 1, 16 if n >= 2048 else 8, 256, 6 if n >= 2048 else 4, splits=4)
    return _steps(m, n, k, target, 1, 16, 128, 6, rows=64)


def _steps(
    m: int, n: int, k: int, target: Target, planes: int, wide: int, deep: int, stages: int, splits: int = 1, rows: int = 0
) -> Config:
    """Tiles of `wide` columns and `deep` of K, with as many of the stages as the target's shared memory holds.

    A second wave of a few programs takes as long as one of many: where a little less in flight makes one wave of all, it is less.
    """
    height, deep = rows or _padded(m), power_of_two(k, 16, deep)

    def resident(deep: int, stages: int) -> int:
        return target.shared_memory // (2 * (height + planes * wide) * deep * stages + 2**10)

    while not resident(deep, stages):
        deep, stages = (deep // 2, stages) if stages == 3 and deep > 64 else (deep, stages - 1)
    programs = -(-n // wide)
    if 1 < programs / (PROCESSORS * resident(deep, stages)) < 2:
        fewer = [(deep, s) for s in range(stages - 1, 2, -1)]
        if deep >= max(128 if height == SKINNY_ROWS else 32, 32 * splits):  # 64 rows of x want 128 bytes of each at a time
            fewer += [(deep // 2, s) for s in range(6, 2, -1)]
        deep, stages = next((d for d in fewer if programs <= PROCESSORS * resident(*d)), (deep, stages))
    return Config(height, wide, deep, num_warps=4, num_stages=stages, splits=splits, strategy="skinny")


def _padded(m: int) -> int:
    """How many rows a program is given for a few: what the matrix instruction takes."""
    return 1 if m == 1 else power_of_two(m, 16, SKINNY_ROWS)


def _heights(m: int) -> tuple[int, ...]:
    """The heights of tiles for so many rows: the least, and the one that wgmma takes."""
    return (_padded(m), SKINNY_ROWS) if 16 < m <= 32 else (_padded(m),)


def fitted(config: Config, role: str, m: int, *, dtype: str) -> bool:
    """Whether a config of the strategy "skinny", timed at about m rows, is one for m: of its own for one row, else of a tile that
    holds them."""
    if role not in ("hidden", "output") or m > SKINNY_ROWS:
        return False
    if dtype == "float32":
        return m <= EXACT_ROWS and config.block_m == power_of_two(m, 1, EXACT_ROWS)
    return config.block_m in _heights(m)


def _reach(k: int, size: int) -> int:
    """How many elements a step has room for that holds a whole row: one may begin just before a multiple of 16 bytes."""
    return k + size - 1 if k % size else k


_EXACT = {
    # planes, whether columns and sums are many: columns, depth and warps for 2, 4, 8 and 16 rows
    (2, True, False): ((1, 512, 4), (1, 512, 4), (4, 128, 4), (4, 128, 8)),
    (2, True, True): ((1, 512, 4), (1, 512, 4), (2, 128, 4), (2, 128, 8)),
    (1, True, False): ((4, 512, 4), (4, 128, 4), (8, 128, 4), (4, 128, 4)),
    (1, True, True): ((1, 512, 4), (4, 512, 4), (8, 256, 8), (8, 128, 8)),
    (1, False, False): ((2, 512, 4), (2, 512, 4), (1, 512, 4), (2, 256, 4)),
    (1, False, True): ((1, 512, 4), (2, 512, 8), (2, 512, 8), (2, 256, 4)),
}


def _exact(m: int, n: int, k: int, planes: int) -> Config:
    """A few rows of float32, multiplied in registers, on an H200."""
    block_m = power_of_two(m, 2, EXACT_ROWS)
    kind = (2, True, k >= 4096) if planes == 2 else (1, n >= 2048, k > 2048)
    block_n, deep, num_warps = _EXACT[kind][block_m.bit_length() - 2]
    block_k = power_of_two(k, 32, deep)
    while deep > block_k and block_n < 8:  # of short sums more columns
        block_n, deep = 2 * block_n, deep // 2
    return Config(block_m, power_of_two(n, 1, block_n), block_k, num_warps=num_warps, num_stages=1, strategy="skinny")


def _one_row(role: str, n: int, k: int, dtype: str, planes: int) -> Config:
    wide = 2 if dtype == "float32" else 1
    block_n = 8
    while block_n > 1 and n < (384 if role == "hidden" else 500) * block_n:
        block_n //= 2
    size = granule(dtype)
    reach = _reach(k, size)
    block_k = power_of_two(reach, 32, 4096)
    if reach > block_k or wide * planes * block_k > 8192:
        whole = False
    elif role == "output":
        whole = n < 2048 or wide == 2
    else:  # a large layer's rows where they nearly fill what is a power of two
        whole = planes * n * k < 2**24 or (planes == 2 and 5 * k >= 4 * block_k)
    if whole and k % size:  # x, shifted, is read by every program: few of them
        return Config(1, min(4, 16384 // (wide * planes * block_k)), block_k, num_warps=4, num_stages=1, strategy="skinny")
    if whole:
        block_n = min(block_n, 16384 // (wide * block_k))
        if planes * n * k >= 2**24:  # gate and up of a large layer, a row of each at a time
            block_n = 2 if n >= 16384 and block_k <= 2048 else 1
            return Config(1, block_n, block_k, num_warps=8, num_stages=1, strategy="skinny")
        return Config(1, block_n, block_k, num_warps=8 if block_n * block_k == 8192 else 4, num_stages=1, strategy="skinny")
    if role == "output" and wide == 1 and n >= 2048:
        if k <= 4096:
            return Config(1, 4, min(block_k, 2048), num_warps=8, num_stages=4, strategy="skinny")
        if n < 4096:
            return Config(1, 8, 1024, num_warps=8, num_stages=3, strategy="skinny")
    return Config(1, block_n if planes == 1 else min(block_n, 4), min(block_k, 512), num_stages=3, strategy="skinny")


def candidates(m: int, n: int, k: int, planes: int, dtype: str = "bfloat16") -> Iterator[Config]:
    """Other tiles of the strategy "skinny", around what was found good."""
    if m > 1 and dtype == "float32":
        block_m = power_of_two(m, 2, EXACT_ROWS)
        for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), (128, 256, 512), (4, 8)):
            if block_n <= n and block_k < 2 * k and 8 <= block_m * block_n * planes * block_k // (32 * num_warps) <= 128:
                yield Config(block_m, block_n, block_k, num_warps=num_warps, num_stages=1, strategy="skinny")
        return
    if m == 1:
        reach = _reach(k, granule("bfloat16"))
        whole = power_of_two(reach, 32, 16384)
        for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), sorted({whole, 512, 1024, 2048}), (4, 8)):
            held = block_n * block_k * planes // (32 * num_warps)
            if block_n <= n and block_k <= whole and 8 <= held <= 256 and (block_k < reach or held >= 16):
                stages = 1 if block_k >= reach else 3
                yield Config(1, block_n, block_k, num_warps=num_warps, num_stages=stages, strategy="skinny")
        return
    heights = _heights(m)
    some = (3, 4, 6) if len(heights) == 1 else (3, 6)
    for block_m, block_n, block_k, stages in itertools.product(heights, (16, 32, 64), (64, 128, 256), some):
        # A program has 32 KiB and more on the way, and there are enough of them to fill the chip once.
        if block_k <= k and stages * planes * block_n * block_k >= 2**14 and n >= 32 * block_n:
            yield Config(block_m, block_n, block_k, num_warps=4, num_stages=stages, strategy="skinny")
    if m <= 32 and planes == 1:
        for block_n, block_k, stages in itertools.product((8, 16, 32), (256, 512), (3, 4, 6)):
            if block_k <= k:
                yield Config(heights[0], block_n, block_k, num_warps=4, num_stages=stages, splits=4, strategy="skinny")


def interpreted(role: str, m: int, n: int, k: int, *, dtype: str, **_: object) -> Config | None:
    """Tiles of the strategy "skinny" for the interpreter; None where it has no kernel. Long sums are taken in steps, and shared."""
    if role not in ("hidden", "output") or m > (EXACT_ROWS if dtype == "float32" else SKINNY_ROWS):
        return None
    if m > 1 and dtype == "float32":
        return Config(power_of_two(m, 2, EXACT_ROWS), 32, 32, num_stages=1, strategy="skinny")
    if m == 1:
        return Config(1, 64, 32 if k > 64 else power_of_two(k, 16, 64), num_stages=1, strategy="skinny")
    return Config(_padded(m), 32, 64, num_stages=1, splits=2 if k > 40 else 1, strategy="skinny")
