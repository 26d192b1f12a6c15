"""Which tile sizes a launch gets where no measured table says otherwise: a rule of few lines, the same on every rank.

Sizes are in elements. The rule looks at the product (M, N, K), the element type and the target only. For sm_90 it holds what was
timed on an H200. Elsewhere nothing was timed, and the first concern is that every value stays in a register, which
tests/compiled/test_matrix.py sees to.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from mlpdsl.target import Target

from . import few_rows, float32, ragged
from .few_rows import PROCESSORS, SKINNY_ROWS, few_registers, power_of_two, skinny, tiles_of
from .plan import Config

__all__ = ["INVARIANT_ROWS", "SKINNY_ROWS", "STRATEGIES", "choose", "fitted", "has_room", "interpreted", "interpreted_skinny",
           "library", "padded", "skinny", "split", "tiled", "usual"]  # fmt: skip

STRATEGIES = ("two_stage", "skinny", "padded", "library")
"""Every strategy that a config can have."""

INVARIANT_ROWS = 192
"""The number of rows for which configs are chosen, whatever the batch, where a row's bits may not depend on it: tiles of 128 rows
where they may be so large (of short sums they are smaller), which waste little of a large batch and still leave many programs for a
small one."""


@lru_cache(maxsize=4096)
def usual(
    role: str, path: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target, epilogue: bool = False
) -> Config:
    """The config of one launch where rows may depend on the batch: the library's product where a generated kernel is not known to
    be as fast, copies where masked loads are slower, else what `choose` says; arguments as there. `epilogue`: whether anything
    follows the last linear's product, which after the library's is a pass."""
    chosen = choose(role, path, m, n, k, dtype=dtype, precision=precision, planes=planes, target=target)
    if target.kind != "cuda":
        return chosen
    if dtype != "float32" and ragged.worth_copies(role, m, n, k, planes, target):
        copied = padded(role, m, n, k, dtype=dtype, precision=precision, planes=planes, target=target, epilogue=epilogue)
        if copied is not None:  # what fits already takes the same tiles: whether the library multiplies is no matter of alignment
            return copied if path == "masked" else replace(copied, strategy="two_stage")
    on_descriptors = float32.on_descriptors(role, m, n, k, planes, precision, target, epilogue) if dtype == "float32" else None
    if on_descriptors is not None:
        return on_descriptors
    if chosen.strategy == "skinny":
        slower = _long(role, m, n, k, planes)
    elif dtype == "float32":
        slower = float32.by_library(role, m, n, k, planes, precision, target)
    else:
        if role == "hidden":
            slower = not _fused(m, n, k, planes, target)
        elif role == "output":
            slower = not ragged.worth_a_kernel(m, n, k, target)
        else:
            slower = _large(role, m, n, k, planes, target)
        if epilogue and target.name == "sm_90" and _worth_a_kernel(role, m, n, k):
            # Few columns of a long sum: many small tiles, deep ones.
            return Config(64, 64, 128, num_warps=4, num_stages=6) if m <= 512 and path == "tma" else chosen
    other = library(role, m, n, dtype=dtype, planes=planes) if slower else None
    if other is None:
        return chosen
    if dtype == "float32":
        both = role == "hidden" and planes == 2 and float32.batched(m, n, k, precision, target)
        return replace(other, batched=both, bias_pass=float32.bias_pass(role, m, n, k, precision, target, epilogue))
    if role == "hidden" and planes == 2 and target.name == "sm_90":
        return replace(other, batched=_fits_batch(m, n, k))
    return other


def _fits_batch(m: int, n: int, k: int) -> bool:
    """Whether gate and up in 16 bits are better one batched product of the library's than two, where no kernel is better than both,
    on an H200: it then has tiles for twice as many columns, and a fuller last wave. Sums of a length that was timed, and so many
    tiles that none is shared: its parts might be added in 16 bits, which torch's flags forbid for two products, but not
    everywhere for a batch."""
    return SKINNY_ROWS < m <= 512 and k > 1024 and n % 8 == k % 8 == 0 and tiles_of(128, 128, m, 2 * n) >= PROCESSORS


def _worth_a_kernel(role: str, m: int, n: int, k: int) -> bool:
    """Whether the last linear with its epilogue in one kernel is faster than the library's product and a pass, on an H200."""
    return role == "output" and k % 8 == n % 8 == 0 and ((k >= 8192 and m >= 1024) or (n <= 1024 and k >= 2048 and 64 < m <= 512))


def _long(role: str, m: int, n: int, k: int, planes: int) -> bool:
    """Whether the library's product is faster than a kernel for few rows: a long sum for a narrow output, with rows enough for the
    library's split of it; earlier where each program would read so many rows of x element by element."""
    if m > 16 and k % 8:
        return m * n * k * planes >= ragged.MANY or (role == "output" and k > 512)
    return role == "output" and m > 16 and n < 4096 <= 2 * k and (m > 32 or (n >= 2048 and k > 8192))


def _fused(m: int, n: int, k: int, planes: int, target: Target) -> bool:
    """Whether a first linear by one kernel is as fast as the library's product and a pass over it, at more rows than a few. It
    saves what short sums and many rows make large: passes over activations."""
    if k % 8 or n % 8:
        return (m <= 1024 or target.name == "sm_90") if planes == 2 else ragged.worth_a_kernel(m, n, k, target)
    if planes == 2 and target.name != "sm_90":
        return not 128 < m < 512
    if planes == 2:
        if m <= SKINNY_ROWS or k <= 1024 <= m:
            return True
        large, batch = _long_sum(m, n, 2), _fits_batch(m, n, k)
        if m <= 128:  # the weights are most of the traffic, but for tiles that are not full, or a last wave that is not
            tile = _hopper_hidden(m, n, k, 2)
            return _busy(tile, m, n) >= 0.7 if batch else _filled(tile, m, n) >= 0.6
        if _deep(m, n, k):
            return True
        if batch:
            return _busy(large if k > 4096 else _two(2), m, n) >= 0.9
        tiles = (large,) if k > 4096 else (_two(2), _low(2) if m < 1024 else large)
        return max(_filled(tile, m, n) for tile in tiles) >= (0.9 if m < 1024 else 0.85)
    if m <= SKINNY_ROWS:  # of those, what skinny has no kernel for
        return True
    if target.name != "sm_90" or k <= 512 or k > 1024 >= m:
        return k <= (1024 if m <= 1024 else 2048)
    tile = _one_wave(m, n) or _two(1)
    # Large tiles that leave processors idle lose to the library's, small ones to nothing.
    return k <= 2048 and (tile.block_m * tile.block_n < 64 * 128 or _filled(tile, m, n) > 0.85)


def _large(role: str, m: int, n: int, k: int, planes: int, target: Target) -> bool:
    """Whether a product of backward is so large that the library's is faster. Nothing follows the gradients of weights and of x;
    back through a gate, the epilogue moves five tiles and more for one product, and a pass does that better."""
    if target.name != "sm_90" or n % 8 or (m if role == "weight_grad" else k) % 8:
        return False
    if role == "input_grad":
        return m * n * k >= 2**32
    return m * n * k >= 2**33 and (role == "weight_grad" or planes == 2)


@lru_cache(maxsize=4096)
def choose(role: str, path: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target) -> Config:
    """The config of one launch by a generated kernel.

    `role` is the kernel's ("hidden", "output", "hidden_grad", "input_grad", "weight_grad"), `path` is "tma" or "masked";
    the product has m rows, n columns and sums over k. `planes` is 2 where the kernel computes gate and up.
    """
    few = skinny(role, m, n, k, dtype=dtype, planes=planes, target=target)
    if few is not None and (dtype != "float32" or m == 1 or m <= float32.exact_rows(n, k, planes, precision)):
        return few
    return tiled(role, path, m, n, k, dtype, precision, planes, target)


def tiled(role: str, path: str, m: int, n: int, k: int, dtype: str, precision: str, planes: int, target: Target) -> Config:
    """As `choose`, of the kernels for any number of rows."""
    if path == "tma":
        config = _descriptors(role, m, n, k, planes, target)
    elif dtype == "float32":
        config = float32.tile(role, m, n, k, planes, precision, target)
    else:
        config = _pointers(role, m, n, k, planes, target)
    return split(config, m, n, k) if role == "weight_grad" else config


def fitted(config: Config, role: str, m: int, *, dtype: str, planes: int, target: Target) -> Config | None:
    """A config of the strategy "skinny", timed at about m rows, for m; None where it is none for them."""
    return config if few_rows.fitted(config, role, m, dtype=dtype) and has_room(config, role, planes, dtype, target) else None


def library(role: str, m: int, n: int, *, dtype: str, planes: int) -> Config | None:
    """Torch's product in place of a generated kernel; None where that would round once more than eager PyTorch does: gate's and
    up's shares of the input's gradient are two products, added in 16 bits.

    `m` and `n` are those of the pass that follows it."""
    if role == "input_grad" and planes == 2 and dtype != "float32":
        return None
    # Small blocks, of 16 bytes a thread, or 8 of a small tensor; in backward larger ones, of which each leaves a sum to be summed.
    block_m, block_n = power_of_two(m, 1, 16 if role == "hidden_grad" else 4), power_of_two(n, 16, 256)
    if role != "hidden_grad" and m * n <= 2**19:
        block_n = power_of_two(n, 16, 512)
        block_m = power_of_two(m, 1, 512 // block_n)
    return Config(block_m, block_n, 16, num_warps=8 if block_m * block_n > 1024 else 4, num_stages=1, strategy="library")


def padded(
    role: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target, epilogue: bool = False
) -> Config | None:
    """A kernel on descriptors of copies whose rows are of whole 16 bytes; None where rows are so already and get descriptors
    anyway, or there is no such kernel. Arguments as for `usual`."""
    if dtype == "float32":
        return float32.padded(role, m, n, k, planes, precision, target, epilogue)
    whole = n % 8 == (m if role == "weight_grad" else k) % 8 == 0
    if whole or not target.has_tma:
        return None
    crowded = epilogue and n % 8 > 0  # registers hold the addresses of a dense result beside what the epilogue reads
    if role == "output" and target.name == "sm_90" and m > 64:
        return replace(ragged.last(m, n, k, crowded), strategy="padded")
    tile = tiled(role, "tma", m, n, k, dtype, "", planes, target)
    if crowded and tile.block_n == 256:
        tile = Config(128, 128, 64, num_warps=8, num_stages=4)
    return replace(tile, strategy="padded")


def has_room(config: Config, role: str, planes: int, dtype: str, target: Target) -> bool:
    """Whether the operands of every stage find room in shared memory, for every program resident at once, and the accumulator in
    half of a thread's registers, or a quarter: where there are few, and for masked loads of float32. On descriptors what is stored
    passes through shared memory as well, which counts in 32 bits: two strips of a quarter of the tile at most."""
    columns = config.block_n * _wide(role, planes)
    if config.block_m == 1 or (dtype == "float32" and config.strategy == "skinny"):  # registers alone, or little more
        return True
    held = config.num_stages * (config.block_m + columns) * config.block_k * (4 if dtype == "float32" else 2)
    if dtype == "float32" and config.strategy == "padded":
        held += 2 * config.block_m * columns + 256  # and barriers
    accumulated = config.block_m * columns // (config.num_warps * target.warp_size)
    return held * config.residency <= target.shared_memory and accumulated <= (
        64 if few_registers(target) or (dtype == "float32" and config.strategy != "padded") else 128
    )


def interpreted(role: str, path: str, m: int, n: int, k: int, **_: object) -> Config:
    """Tiles for Triton's CPU interpreter, which costs by the step: small products still get several of each, so that edges and
    split sums are tried; large ones get large tiles."""
    least = 64 if role == "hidden_grad" else 32  # a strip of 64 / 8 columns is the 16 bytes that a descriptor needs
    rows, columns, depth = (power_of_two(size, 16, 64) if size <= 128 else 128 for size in (m, n, k))
    return Config(rows, max(least, columns if n > 128 else 32), max(32, depth if k > 128 else 32), group_m=2, num_stages=1,
                  splits=2 if k > 64 else 1)  # fmt: skip


interpreted_skinny = few_rows.interpreted


def _wide(role: str, planes: int) -> int:
    """How many tiles of n columns one accumulator holds side by side."""
    return planes if role == "hidden" else 1


def _descriptors(role: str, m: int, n: int, k: int, planes: int, target: Target) -> Config:
    roomy = target.shared_memory > 128 * 1024
    if target.name == "sm_90" and role == "hidden" and m > 64:
        return _hopper_hidden(m, n, k, planes)
    if m <= 64 or not roomy:
        block_n = 128 // _wide(role, planes) if role != "hidden_grad" else 64
        # As below, ptxas stops early for this kernel where it is left alone.
        bounded = role == "hidden_grad" and target.name != "sm_90"
        return Config(64, block_n, 64, num_warps=4, num_stages=4 if roomy else 2, registers=255 if bounded else 0)
    if role == "hidden" and planes == 2:
        return Config(128, 128, 64, num_warps=8, num_stages=4 if m <= 128 else 3)
    if role == "hidden_grad":
        # Its epilogue moves three tiles and more for one product, so two small programs take turns. These take up to 255 registers;
        # elsewhere, where the last tile would be half empty at least, and on copies, smaller ones do. Short sums want more warps.
        if target.name == "sm_90":
            small = 0 < n % 128 <= 64 or n % 8 > 0 or k % 8 > 0
            if k <= 1024 and not small:
                return Config(128, 128, 64, num_warps=8, num_stages=3, residency=2, registers=128)
            return Config(128, 64 if small else 128, 64, num_warps=4, num_stages=3, residency=2)
        # Left alone, ptxas stops here at 128 registers and spills a few bytes, for one more program than the memory holds.
        return Config(64, 128, 64, num_warps=4, num_stages=3, residency=2, registers=255)
    # A wide tile reads least from shared memory; where it leaves a third of the processors idle, a square one is better.
    if tiles_of(128, 256, m, n) >= 0.7 * PROCESSORS:
        return Config(128, 256, 64, num_warps=8, num_stages=3)
    if role == "weight_grad":  # its programs are not persistent, and of these two fit a multiprocessor
        return Config(128, 128, 64, num_warps=4, num_stages=3)
    # Left alone, ptxas stops at 80 registers elsewhere than on sm_90, and spills a few bytes.
    return Config(128, 128, 64, num_warps=8, num_stages=4, registers=255 if role == "hidden" and target.name != "sm_90" else 0)


def _one_wave(m: int, n: int) -> Config | None:
    """Of a short sum: the smallest tile of which all find a multiprocessor at once; None where none is so large."""
    for tile in (
        Config(64, 32, 64, num_warps=4, num_stages=5),
        Config(64, 64, 64, num_warps=8, num_stages=4),
        Config(64, 128, 64, num_warps=8, num_stages=5),
        Config(128, 128, 64, num_warps=8, num_stages=4),
    ):
        if tiles_of(tile.block_m, tile.block_n, m, n) <= PROCESSORS:
            return tile
    return None


def _two(planes: int) -> Config:
    """Two programs a multiprocessor, of which one finishes its tile while the other multiplies."""
    return Config(128, 128 // planes, 64, num_warps=8, num_stages=3, residency=2, registers=128)


def _low(planes: int) -> Config:
    """Half as many rows, twice as many columns: another number of tiles, where those of `_two` leave a last wave half empty."""
    return Config(64, 256 // planes, 64, num_warps=8, num_stages=5)


_DEEP = Config(128, 64, 64, num_warps=8, num_stages=6)
"""Gate and up of half as many columns, with twice as much on its way: of long sums, another number of tiles."""


def _deep(m: int, n: int, k: int) -> bool:
    """Whether gate and up of a few hundred rows are for `_DEEP`: its waves are full, the large tile's are not."""
    return k > 4096 and 128 < m <= 256 and _busy(_DEEP, m, n) >= 0.9 > _filled(_long_sum(m, n, 2), m, n)


def _long_sum(m: int, n: int, planes: int) -> Config:
    """Where the product is nearly all there is: the largest tile that there are enough of."""
    wide = planes == 2 or tiles_of(128, 256, m, n) >= PROCESSORS
    return Config(128, (256 if wide else 128) // planes, 64, num_warps=8, num_stages=3 if wide and planes == 1 else 4)


def _filled(config: Config, m: int, n: int) -> float:
    """The share of the time of all waves, the last one's too, that there are tiles for."""
    tiles, at_once = tiles_of(config.block_m, config.block_n, m, n), PROCESSORS * config.residency
    return tiles / (at_once * -(-tiles // at_once))


def _busy(config: Config, m: int, n: int) -> float:
    """The share of that time which is spent on rows that there are."""
    return _filled(config, m, n) * m / (config.block_m * -(-m // config.block_m))


def _hopper_hidden(m: int, n: int, k: int, planes: int) -> Config:
    if planes == 1 and k <= 1024:
        return _one_wave(m, n) or _two(1)
    two, low, large = _two(planes), _low(planes), _long_sum(m, n, planes)
    # For a while, two programs a multiprocessor are as fast or faster; once the power limit is reached, one of large tiles is,
    # because it reads less: 1 to 6% of whole calls at K from 2048 to 4096.
    if planes == 2 and _deep(m, n, k):
        return _DEEP
    if k > 2048 * planes or (planes == 2 and k >= 2048 and m >= 1024 and _filled(large, m, n) > 0.9):
        return large
    if planes == 2 and n <= 128:  # `two` would spill where users' functions meet odd widths
        return Config(128, 64, 64, num_warps=8, num_stages=4)
    return low if planes == 2 and m < 1024 and _filled(two, m, n) < 0.9 and _filled(low, m, n) > 0.95 else two


def _pointers(role: str, m: int, n: int, k: int, planes: int, target: Target) -> Config:
    # What finishes its tile with several others in registers, and addresses that are no multiple of anything, want smaller tiles.
    odd, tight = n % 8 > 0 or k % 8 > 0, few_registers(target)
    through = role == "hidden_grad"
    block_m = power_of_two(m, 16, 64 if odd or (through and (tight or n <= 32)) else 128)
    block_n = power_of_two(n, 32, 64 if through or tight or (odd and role == "hidden") else 128)
    if odd and target.name == "sm_90" and role in ("hidden", "output"):
        return ragged.masked(block_m, m, n, k, _wide(role, planes))
    if not odd and target.name == "sm_90" and planes == 1 and m > SKINNY_ROWS and role in ("hidden", "output"):
        tile = _one_wave(m, n)
        if tile is not None and tile.block_n <= 64:
            return tile
    full = block_m * block_n >= (64 * 64 if odd or tight else 128 * (64 if through else 128))
    stages = 3 if target.kind == "cuda" and target.shared_memory > 64 * 1024 else 2
    return Config(block_m, max(16, block_n // _wide(role, planes)), 32, num_warps=8 if full else 4, num_stages=stages)


def split(config: Config, m: int, n: int, k: int) -> Config:
    """Share a long sum among programs until about two hundred of them run, each with 512 rows or more to sum."""
    tiles = tiles_of(config.block_m, config.block_n, m, n)
    splits = max(1, min(200 // tiles, k // 512))
    return replace(config, splits=splits)
