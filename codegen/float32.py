"""Configs of float32: which tiles, when the library, and where biases are added. For sm_90 they were timed on an H200."""

from __future__ import annotations

import math

from mlpdsl.target import Target

from .few_rows import EXACT_ROWS, PROCESSORS, few_registers, power_of_two, tiles_of
from .plan import Config

__all__ = ["batched", "bias_pass", "by_library", "exact_rows", "on_descriptors", "padded", "tile", "worth_padding"]


def by_library(role: str, m: int, n: int, k: int, planes: int, precision: str, target: Target) -> bool:
    """Whether the library's product is faster than a generated kernel, at more rows than one.

    Exactly, by fused multiply-adds, cuBLAS has three times the speed. `tf32x3` it multiplies exactly too, which is more than was
    asked for."""
    sums = k > 64 or role == "weight_grad" or m * n > 2**18
    if precision == "ieee" or role not in ("hidden", "output"):
        return sums and (precision != "tf32x3" or target.name == "sm_90")
    if target.name != "sm_90":
        return sums and precision == "tf32"
    if k % 4 or n % 4:  # kernels load single elements, and cuBLAS has others for these, too
        return sums and (k > 512 or precision == "tf32x3")
    if precision == "tf32x3":  # up to 16 rows one of the kernels is faster
        return m > 16 and ((role == "output" and m <= 64 and n >= 2048) or (planes == 2 and m <= 32 and n * k >= 2**23))
    if role == "hidden":
        return not (k <= 512 or (m <= 64 and (planes == 2 or k <= 1024)))
    return not (n <= 64 or (m <= 16 and n >= 4096) or (k <= 512 and tiles_of(64, 64, m, n) <= PROCESSORS // 4))


def exact_rows(n: int, k: int, planes: int, precision: str) -> int:
    """How many rows, from two on, the kernel for few is the fastest way to multiply, exactly, whatever is asked for: by plain
    multiply-adds, so that more rows are better off with tensor cores, if those may be used, or cuBLAS."""
    if precision == "tf32":
        return 4
    if (k % 4 and k > 64) or (precision == "tf32x3" and planes * n * k > 2**23):
        return 8
    return EXACT_ROWS


def batched(m: int, n: int, k: int, precision: str, target: Target) -> bool:
    """Whether gate and up are better one batched product of the library's than two, on an H200."""
    return target.name == "sm_90" and precision != "tf32" and (n * k <= 2**20 or (m <= 16 and n * k <= 2**22))


def bias_pass(role: str, m: int, n: int, k: int, precision: str, target: Target, epilogue: bool) -> bool:
    """Whether biases, if there are any, are better added by a pass over the library's product than in it, on an H200: with a bias
    cuBLAS shares no sum among processors, and long ones that leave most of them idle take two to four times as long. After a first
    linear, and with an `epilogue`, a pass follows anyway."""
    if target.name != "sm_90" or role not in ("hidden", "output"):
        return False
    free = role == "hidden" or epilogue
    if precision == "tf32" and k % 4 == n % 4 == 0:  # where cuBLAS has a tile for nearly everything
        # But with a bias and few columns it takes 20 microseconds at 80 and 96 rows, for 7 at 72 and 112.
        slow = n <= 512 and m <= 96 and (free or m > 72)
        return m <= 128 and n <= 1024 and (k >= 2048 or slow)
    tiles = tiles_of(128, 128, m, n)
    waves = -(-tiles // PROCESSORS)
    if tiles >= 0.9 * waves * PROCESSORS:  # nobody is idle
        return False
    long = k >= 1024 and waves <= (2 if k >= 2048 else 1)
    if m <= 16:
        return k >= 1536 and m >= (7 if k >= 4096 else 16)
    return long or (free and precision != "tf32" and (k > 512 or m <= 512))


def worth_padding(m: int, n: int, k: int) -> bool:
    """Whether a product in TF32, of rows of no whole 16 bytes, is faster of copies that have such rows: cuBLAS's fast kernels take
    no others. On an H200 they are three times as fast, not counting the copies."""
    return m * n * k >= 2**29 and min(m, n, k) >= 128


def on_descriptors(role: str, m: int, n: int, k: int, planes: int, precision: str, target: Target, epilogue: bool) -> Config | None:
    """What `padded` says, where that is the fastest way to multiply on an H200, else None: of odd widths but for few tiles and
    short sums; of others for gate and up, and for an epilogue where no processor is idle."""
    found = padded(role, m, n, k, planes, precision, target, epilogue)
    if found is None or m <= 64 or min(n, k) <= 64:
        return None
    if k % 4 or n % 4:
        tiles = tiles_of(64, 64, m, n)
        worth = tiles > PROCESSORS // 4 and (k > 256 or (k > 128 and tiles <= PROCESSORS))
    elif role == "hidden" and planes == 2:
        worth = k > 256 and tiles_of(128, 64, m, n) >= 0.6 * PROCESSORS  # shorter sums, here and below, nobody timed
    else:
        waves = tiles_of(found.block_m, found.block_n, m, n) / PROCESSORS
        large = found.block_m == 128 and waves <= (3 if found.block_n == 256 else 1)
        worth = k > 256 and large and waves >= 0.95 * math.ceil(waves) and (role == "hidden" or epilogue)
    return found if worth else None


def padded(role: str, m: int, n: int, k: int, planes: int, precision: str, target: Target, epilogue: bool) -> Config | None:
    """A kernel on descriptors, of copies where tensors do not fit them: in TF32, and of forward, because wgmma takes no operands of
    32 bits that lie as backward's do."""
    if precision != "tf32" or target.name != "sm_90" or role not in ("hidden", "output"):
        return None
    crowded = epilogue and n % 4 > 0  # registers hold the addresses of a dense result beside what the epilogue reads
    return _on_descriptors(m, n, k, planes if role == "hidden" else 1, crowded)


def _on_descriptors(m: int, n: int, k: int, wide: int, crowded: bool) -> Config:
    """The tile whose waves take the least time: what one takes, in units of a tile of 128x128, is next to it."""

    def tile(block_m: int, columns: int, warps: int, stages: int, residency: int = 1) -> Config:
        return Config(block_m, columns // wide, 32, 8, warps, stages, residency=residency, strategy="padded")

    def waves(config: Config) -> int:
        return math.ceil(tiles_of(config.block_m, config.block_n, m, n) / PROCESSORS)

    costs = [(1.8, tile(128, 256, 8, 3)), (1.0, tile(128, 128, 8, 4)), (0.75, tile(64, 128, 4, 4)), (0.5, tile(64, 64, 4, 4))]
    found = [(cost * waves(config), config) for cost, config in costs[crowded:]]  # whose widest spills where registers are crowded
    if wide == 1 and k <= 512:  # two programs a processor: while one finishes its tile, the other multiplies, and no wave ends
        config = tile(64, 128, 4, 3, residency=2)
        found.append((max(0.75, 0.575 * tiles_of(64, 128, m, n) / PROCESSORS), config))
    return min(found, key=lambda each: each[0])[1]


def tile(role: str, m: int, n: int, k: int, planes: int, precision: str, target: Target) -> Config:
    """What a generated kernel multiplies at a time."""
    wide = planes if role == "hidden" else 1
    if target.name == "sm_90" and precision != "ieee":
        if role not in ("hidden", "output"):  # which only batch_invariant has: larger tiles would spill
            return Config(64, 32, 32, num_warps=4, num_stages=4)
        if n % 4 == k % 4 == 0:
            return _gate_and_up(m, n, precision) if wide == 2 else _by_tensor_cores(role, m, n, precision)
        if wide == 1 and tiles_of(64, 64, m, n) <= PROCESSORS // 4:  # many tiles in place of few
            return Config(16, 32, 64, num_warps=8, num_stages=4) if m <= 16 else Config(32, 16, 32, num_warps=8, num_stages=4)
    if target.name == "sm_90" and role != "weight_grad" and k <= 64 and m * n <= 2**18:  # little to multiply: many small programs
        return Config(16 if m <= 256 else 32, 16, power_of_two(k, 16, 64), num_warps=4 if m <= 256 else 2, num_stages=2)
    block_m, block_n = power_of_two(m, 16, 64), power_of_two(n, 16, 64 // wide)
    if few_registers(target):  # RDNA has no instruction for the product, and multiplies what it read of K in one piece
        return Config(block_m, block_n, 16 if target.kind == "hip" else 32, num_warps=8, num_stages=2)
    short = role in ("input_grad", "weight_grad") if target.name == "sm_90" else role == "hidden" and planes == 2
    return Config(block_m, block_n, 16 if short else 32, num_warps=4, num_stages=2)


def _by_tensor_cores(role: str, m: int, n: int, precision: str) -> Config:
    """TF32 on Hopper: of few rows as much of K as there is room for, of many the largest tile that there are enough of."""
    if m <= 16 or (m <= 64 and precision == "tf32x3" and n <= 1024):
        return Config(16, 32, 128, num_warps=4, num_stages=4)
    if m <= 64 and precision == "tf32x3":
        return Config(16, 64, 64, num_warps=4, num_stages=4)
    if m <= 64 and n <= 2048:
        return Config(64, 16, 128, num_warps=4, num_stages=4)
    if tiles_of(64, 32, m, n) <= 2 * PROCESSORS:
        return Config(64, 32, 64, num_warps=4, num_stages=4)
    if tiles_of(64, 64, m, n) <= 3 * PROCESSORS:
        return Config(64, 64, 32, num_warps=4, num_stages=4)
    if role == "hidden":
        return Config(64, 128, 32, num_warps=4, num_stages=3)
    return Config(128, 64, 32, num_warps=8, num_stages=4)


def _gate_and_up(m: int, n: int, precision: str) -> Config:
    if m <= 16:
        return Config(16, 32, 64, num_warps=4, num_stages=4)
    if m <= 64 or tiles_of(64, 32, m, n) <= 2 * PROCESSORS:
        return Config(64, 32, 32, num_warps=4, num_stages=4)
    if precision == "tf32x3":
        return Config(64, 64, 32, num_warps=4, num_stages=3)
    return Config(128, 64, 32, num_warps=8, num_stages=3)
