"""Which tile sizes a launch gets where no measured table says otherwise: a rule of few lines, the same on every rank.

Sizes are in elements. The rule looks at the product (M, N, K), the element type and the target only. For sm_90 it holds what was
timed on an H200. Elsewhere nothing was timed, and the first concern is that every value stays in a register, which
tests/compiled/test_matrix.py sees to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mlpdsl.target import Target

from .plan import Config

STRATEGIES = ("two_stage", "skinny", "library")
"""Every strategy that a config can have."""

SKINNY_ROWS = 64
"""The most rows of x for which there is a kernel of the strategy "skinny"."""

INVARIANT_ROWS = 192
"""The number of rows for which configs are chosen, whatever the batch, where a row's bits may not depend on it: tiles of 128 rows
where they may be so large, which waste little of a large batch and still leave many programs for a small one."""


def _power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, between low and high."""
    size = low
    while size < n and size < high:
        size *= 2
    return size


@lru_cache(maxsize=4096)
def usual(role: str, path: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target) -> Config:
    """The config of one launch where rows may depend on the batch: the library's product where a generated kernel is not known to
    be as fast, else what `choose` says; arguments as there."""
    chosen = choose(role, path, m, n, k, dtype=dtype, planes=planes, target=target)
    if chosen.strategy == "skinny" or target.kind != "cuda":
        return chosen
    exact = dtype == "float32" and precision == "ieee"  # by FMA, where cuBLAS has three times the speed
    # Gate and up in one kernel save passes over two tensors, which many rows make up for a product that is no faster.
    short = role == "hidden" and planes == 1 and k <= 1024 and m <= 1024 and k % 8 == n % 8 == 0
    if short and path == "tma" and target.name == "sm_90":  # many small tiles
        return Config(64 if m <= 256 else 128, 64, 64, num_warps=4, num_stages=4, residency=2)
    slower = role == "output" or (role == "hidden" and not short and (planes == 1 or 128 < m < 512))
    other = library(role, m, n, dtype=dtype, planes=planes) if exact or (slower and dtype != "float32") else None
    return other or chosen


@lru_cache(maxsize=4096)
def choose(role: str, path: str, m: int, n: int, k: int, *, dtype: str, planes: int, target: Target) -> Config:
    """The config of one launch by a generated kernel.

    `role` is the kernel's ("hidden", "output", "hidden_grad", "input_grad", "weight_grad"), `path` is "tma" or "masked";
    the product has m rows, n columns and sums over k. `planes` is 2 where the kernel computes gate and up.
    """
    few = skinny(role, m, n, k, dtype=dtype, planes=planes, target=target)
    if few is not None:
        return few
    return _tiled(role, path, m, n, k, dtype, planes, target)


def _tiled(role: str, path: str, m: int, n: int, k: int, dtype: str, planes: int, target: Target) -> Config:
    if path == "tma":
        config = _descriptors(role, m, n, k, planes, target)
    elif dtype == "float32":
        config = _float32(role, m, n, planes, target)
    else:
        config = _pointers(role, m, n, k, planes, target)
    return _split(config, m, n, k) if role == "weight_grad" else config


def skinny(role: str, m: int, n: int, k: int, *, dtype: str, planes: int, target: Target) -> Config | None:
    """The config of a forward kernel for few rows; None where there is none (more rows, other roles, float32 beyond one row), and
    on AMD, where nothing was timed and loops of plain loads are not pipelined.

    Of what was timed on an H200: small matrices are read in one piece, by a thousand programs; larger ones, and several rows, in
    three steps and more at once. Where the columns are too few for tiles that feed four warps, the warps share each step of K
    instead. From 17 rows on the product is wgmma's, which takes 64.
    """
    if role not in ("hidden", "output") or m > SKINNY_ROWS or target.kind != "cuda":
        return None
    if m == 1:
        return _one_row(role, n, k, dtype, planes)
    if dtype == "float32":
        return None
    few, roomy = m <= 16, target.shared_memory > 128 * 1024
    wide, deep, stages, splits = 32, 128, 3, 1
    if k % 8:  # loads of single elements
        wide, deep = 16, 32
    elif n <= 32 or k < 256:
        deep = 64
    elif planes == 2:
        wide, deep, stages = 64, 128 if few and roomy else 64, 3 if few and k < 8192 else 4
    elif n >= 8192:
        wide, deep, stages = 64, 64 if not roomy else 256 if few else 128, 4
    elif k <= 1024 and n >= 3072:
        pass
    elif not few:
        wide, stages = 32 if n >= 4096 else 16, 6 if roomy else 3
    else:
        wide, deep, splits = 16 if n >= 2048 else 8, 512 if k >= 2048 and roomy else 256, 4
    deep = _power_of_two(k, 16, deep)
    return Config(_padded(m), wide, deep, num_warps=4, num_stages=stages, splits=splits, strategy="skinny")


def _padded(m: int) -> int:
    """How many rows a program is given for a few: what the matrix instruction takes."""
    return 1 if m == 1 else 16 if m <= 16 else SKINNY_ROWS


def fitted(config: Config, role: str, m: int, *, dtype: str, planes: int, target: Target) -> Config | None:
    """A config of the strategy "skinny", timed at about m rows, for m; None where its tile is not what m rows are padded to."""
    if role not in ("hidden", "output") or m > SKINNY_ROWS or config.block_m != _padded(m) or (dtype == "float32" and m > 1):
        return None
    return config if _fits(config, role, planes, dtype, target) else None


def _one_row(role: str, n: int, k: int, dtype: str, planes: int) -> Config:
    wide = 2 if dtype == "float32" else 1
    whole = k <= 4096 if role == "output" else planes * n * k < 2**24
    block_n = 8
    while block_n > 1 and n < 500 * block_n:
        block_n //= 2
    block_k = _power_of_two(k, 32, 4096)
    if not whole or k > block_k or wide * planes * block_k > 8192 or k % 8:  # in steps
        return Config(1, block_n if planes == 1 else min(block_n, 4), min(block_k, 512), num_stages=3, strategy="skinny")
    block_n = min(block_n, 16384 // (wide * block_k))
    return Config(1, block_n, block_k, num_warps=8 if block_n * block_k == 8192 else 4, num_stages=1, strategy="skinny")


def _skinny_candidates(default: Config, m: int, n: int, k: int, planes: int) -> Iterator[Config]:
    """Other tiles of the strategy "skinny", around what was found good."""
    if m == 1:
        whole = _power_of_two(k, 32, 16384)
        for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), sorted({whole, 512, 1024, 2048}), (4, 8)):
            held = block_n * block_k * planes // (32 * num_warps)
            if block_n <= n and block_k <= whole and 8 <= held <= 256 and (block_k < k or held >= 16):
                stages = 1 if block_k >= k else 3
                yield replace(default, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=stages, splits=1)
        return
    for block_n, block_k, stages in itertools.product((16, 32, 64), (64, 128, 256), (3, 4, 6)):
        # A program has 32 KiB and more on the way, and there are enough of them to fill the chip once.
        if block_k <= k and stages * planes * block_n * block_k >= 2**14 and n >= 32 * block_n:
            yield replace(default, block_n=block_n, block_k=block_k, num_stages=stages, splits=1)
    if m <= 16 and planes == 1:
        for block_n, block_k, stages in itertools.product((8, 16), (256, 512), (3, 4, 6)):
            if block_k <= k:
                yield replace(default, block_n=block_n, block_k=block_k, num_stages=stages, splits=4)


def library(role: str, m: int, n: int, *, dtype: str, planes: int) -> Config | None:
    """Torch's product in place of a generated kernel; None where that would round once more than eager PyTorch does: gate's and
    up's shares of the input's gradient are two products, added in 16 bits.

    `m` and `n` are those of the pass that follows it."""
    if role == "input_grad" and planes == 2 and dtype != "float32":
        return None
    # Small blocks, of 16 bytes a thread; in backward larger ones, of which each leaves a sum to be summed.
    block_m, block_n = _power_of_two(m, 1, 16 if role == "hidden_grad" else 4), _power_of_two(n, 16, 256)
    return Config(block_m, block_n, 16, num_warps=8 if block_m * block_n > 1024 else 4, num_stages=1, strategy="library")


def candidates(
    role: str, path: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target
) -> list[Config]:
    """Configs worth timing for one launch, each once, the usual one first; arguments as for `usual` and `library`.

    The library's product; every tile that registers and the target's shared memory allow, by estimate, where it is no larger than
    the product asks for; and the rule's config with other groups, stages, residency and splits: ten to sixty.
    """
    first = usual(role, path, m, n, k, dtype=dtype, precision=precision, planes=planes, target=target)
    default = choose(role, path, m, n, k, dtype=dtype, planes=planes, target=target)
    other = library(role, m, n, dtype=dtype, planes=planes)
    found = [default] + ([] if other is None else [other])
    if default.strategy == "skinny":
        found += _skinny_candidates(default, m, n, k, planes)
        default = _tiled(role, path, m, n, k, dtype, planes, target)
        found.append(default)
    for tile in _tiles(path, m, n, k, dtype, target):
        config = replace(default, **tile, registers=0, splits=1)
        found.append(_split(config, m, n, k) if role == "weight_grad" else config)
    for group_m in (1, 4, 16):
        if m > 2 * default.block_m:
            found.append(replace(default, group_m=group_m))
    for num_stages in (default.num_stages - 1, default.num_stages + 1, default.num_stages + 2):
        found.append(replace(default, num_stages=max(1, num_stages)))
    if path == "tma":
        found += [replace(default, residency=count) for count in (1, 2)]
    if role == "weight_grad":
        found += [replace(default, splits=s) for s in (1, default.splits // 2, 2 * default.splits) if 0 < s <= max(1, k // 256)]
    fit = [c for c in dict.fromkeys(found) if c.strategy == "library" or _fits(c, role, planes, dtype, target)]
    return [first, *(config for config in fit if config != first)]


def _tiles(path: str, m: int, n: int, k: int, dtype: str, target: Target) -> Iterator[dict[str, Any]]:
    """Tiles with their warps, stages and residency; none of twice the product's size or more."""
    few, tma, wide = m <= 64, path == "tma", dtype == "float32"
    heights = [h for h in ((16, 32, 64) if few else (64, 128)) if min(m, 128) <= 2 * h < 4 * max(m, 16)]
    widths = [w for w in ((64, 128, 256) if tma else (32, 64, 128)) if w < 2 * max(n, 64 if tma else 32)]
    # 128 bytes of K at a time are what descriptors move best; where a few rows wait for memory, more is in flight.
    depths = (64, 128) if tma and few else (64,) if tma else (16, 32) if wide else (32, 64) if few else (32,)
    stages = (2,) if wide else ((4, 6) if few else (3, 4)) if tma and target.shared_memory > 128 * 1024 else (2, 3)
    for block_m, block_n, block_k in itertools.product(heights, widths, depths):
        for num_warps in (4, 8):
            # A warp that holds few elements of the tile has too little to do, one with more than 4096 spills.
            if not (256 if few else 1024 if tma else 512) <= block_m * block_n // num_warps <= 4096:
                continue
            for num_stages in stages:
                for residency in (1, 2) if tma and num_warps == 4 else (1,):
                    yield dict(
                        block_m=block_m, block_n=block_n, block_k=block_k,
                        num_warps=num_warps, num_stages=num_stages, residency=residency,
                    )  # fmt: skip


def _fits(config: Config, role: str, planes: int, dtype: str, target: Target) -> bool:
    """Whether the operands of every stage find room in shared memory, for every program resident at once, and the accumulator in
    half of a thread's registers."""
    columns = config.block_n * _wide(role, planes)
    if config.block_m == 1:  # registers alone, or little more
        return True
    held = config.num_stages * (config.block_m + columns) * config.block_k * (4 if dtype == "float32" else 2)
    accumulated = config.block_m * columns // (config.num_warps * target.warp_size)
    return held * config.residency <= target.shared_memory and accumulated <= (64 if _tight(target) or dtype == "float32" else 128)


def interpreted(role: str, path: str, m: int, n: int, k: int, **_: object) -> Config:
    """Tiles for Triton's CPU interpreter, which costs by the step: small products still get several of each, so that edges and
    split sums are tried; large ones get large tiles."""
    least = 64 if role == "hidden_grad" else 32  # a strip of 64 / 8 columns is the 16 bytes that a descriptor needs
    rows, columns, depth = (_power_of_two(size, 16, 64) if size <= 128 else 128 for size in (m, n, k))
    return Config(rows, max(least, columns if n > 128 else 32), max(32, depth if k > 128 else 32), group_m=2, num_stages=1,
                  splits=2 if k > 64 else 1)  # fmt: skip


def interpreted_skinny(role: str, m: int, n: int, k: int, *, dtype: str, **_: object) -> Config | None:
    """Tiles of the strategy "skinny" for the interpreter; None where it has no kernel. Long sums are taken in steps, and shared."""
    if role not in ("hidden", "output") or m > SKINNY_ROWS or (dtype == "float32" and m > 1):
        return None
    if m == 1:
        return Config(1, 64, 32 if k > 64 else _power_of_two(k, 16, 64), num_stages=1, strategy="skinny")
    return Config(_padded(m), 32, 64, num_stages=1, splits=2 if k > 40 else 1, strategy="skinny")


def _tight(target: Target) -> bool:
    """Whether accumulators crowd out what else a thread holds: everywhere but on sm_90, whose tiles were timed, on sm_100 and
    sm_103, which accumulate in a memory of their own, and on CDNA, which has 512 registers a thread."""
    return target.warp_size == 32 and target.name not in ("sm_90", "sm_100", "sm_103")


def _wide(role: str, planes: int) -> int:
    """How many tiles of n columns one accumulator holds side by side."""
    return planes if role == "hidden" else 1


def _descriptors(role: str, m: int, n: int, k: int, planes: int, target: Target) -> Config:
    roomy = target.shared_memory > 128 * 1024
    if m <= 64 or not roomy:
        block_n = 128 // _wide(role, planes) if role != "hidden_grad" else 64
        return Config(64, block_n, 64, num_warps=4, num_stages=4 if roomy else 2)
    if role == "hidden" and planes == 2:
        return Config(128, 128, 64, num_warps=8, num_stages=4 if m <= 128 else 3)
    if role == "hidden_grad":
        # Its epilogue moves five tiles and more for one product, so two small programs take turns: 0.96 ms against 1.40 for
        # one of 8 warps at 4096x14336, m = 4096 on an H200. These take up to 255 registers; elsewhere, and where the last tile
        # would be half empty at least, smaller ones do.
        half_empty = 0 < n % 128 <= 64
        if target.name == "sm_90":
            return Config(128, 64 if half_empty else 128, 64, num_warps=4, num_stages=3, residency=2)
        # Left alone, ptxas stops here at 128 registers and spills a few bytes, for one more program than the memory holds.
        return Config(64, 128, 64, num_warps=4, num_stages=3, residency=2, registers=255)
    if role == "hidden" and k <= 2048:
        # A short sum: the activation is a large share, and two tiles in place of a wide one let it overlap (80 us against 86 at
        # 1024x4096 gelu, m = 4096 on an H200).
        return Config(128, 128, 64, num_warps=8, num_stages=4)
    # A wide tile reads least from shared memory; where it leaves processors idle, a square one is better.
    if -(-m // 128) * -(-n // 256) >= 132:
        return Config(128, 256, 64, num_warps=8, num_stages=3)
    if role == "weight_grad":  # its programs are not persistent, and of these two fit a multiprocessor
        return Config(128, 128, 64, num_warps=4, num_stages=3)
    return Config(128, 128, 64, num_warps=8, num_stages=4)


def _pointers(role: str, m: int, n: int, k: int, planes: int, target: Target) -> Config:
    # What finishes its tile with several others in registers, and addresses that are no multiple of anything, want smaller tiles.
    ragged, tight = n % 8 > 0 or k % 8 > 0, _tight(target)
    through = role == "hidden_grad"
    block_m = _power_of_two(m, 16, 64 if ragged or (through and (tight or n <= 32)) else 128)
    block_n = _power_of_two(n, 32, 64 if through or tight or (ragged and role == "hidden") else 128)
    full = block_m * block_n >= (64 * 64 if ragged or tight else 128 * (64 if through else 128))
    stages = 3 if target.kind == "cuda" and target.shared_memory > 64 * 1024 else 2
    return Config(block_m, max(16, block_n // _wide(role, planes)), 32, num_warps=8 if full else 4, num_stages=stages)


def _float32(role: str, m: int, n: int, planes: int, target: Target) -> Config:
    block_m, block_n = _power_of_two(m, 16, 64), _power_of_two(n, 16, 64 // _wide(role, planes))
    if _tight(target):  # RDNA has no instruction for the product, and multiplies what it read of K in one piece
        return Config(block_m, block_n, 16 if target.kind == "hip" else 32, num_warps=8, num_stages=2)
    short = role in ("input_grad", "weight_grad") if target.name == "sm_90" else role == "hidden" and planes == 2
    return Config(block_m, block_n, 16 if short else 32, num_warps=4, num_stages=2)


def _split(config: Config, m: int, n: int, k: int) -> Config:
    """Share a long sum among programs until about two hundred of them run, each with 512 rows or more to sum."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    splits = max(1, min(200 // tiles, k // 512))
    return replace(config, splits=splits)
