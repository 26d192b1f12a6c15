"""What is worth timing for one launch, where somebody tunes: the rule's config, the library's product, and every tile that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlpdsl.target import Target

from . import few_rows, float32
from .config import choose, has_room, library, padded, split, tiled, usual
from .few_rows import SKINNY_ROWS
from .plan import Config

__all__ = ["candidates"]


def candidates(
    role: str, path: str, m: int, n: int, k: int, *, dtype: str, precision: str, planes: int, target: Target, epilogue: bool = False
) -> list[Config]:
    """Configs worth timing for one launch, each once, the usual one first; arguments as for `usual` and `library`.

    The library's product; every tile that registers and the target's shared memory allow, by estimate, where it is no larger than
    the product asks for; and the rule's config with other groups, stages, residency and splits: ten to ninety.
    """
    first = usual(role, path, m, n, k, dtype=dtype, precision=precision, planes=planes, target=target, epilogue=epilogue)
    default = choose(role, path, m, n, k, dtype=dtype, precision=precision, planes=planes, target=target)
    other = library(role, m, n, dtype=dtype, planes=planes)
    if other is not None and dtype == "float32":
        other = replace(other, bias_pass=float32.bias_pass(role, m, n, k, precision, target, epilogue))
    found = [default] + ([] if other is None else [other])
    if other is not None and role == "hidden" and planes == 2:
        found.append(replace(other, batched=True))
    exact = dtype == "float32" and 1 < m <= few_rows.EXACT_ROWS and role in ("hidden", "output") and target.kind == "cuda"
    if default.strategy == "skinny" or exact:
        found += few_rows.candidates(m, n, k, planes, dtype)
    if default.strategy == "skinny":
        default = tiled(role, path, m, n, k, dtype, precision, planes, target)
        found.append(default)
    starts = [(path, default)]
    words: dict[str, Any] = {"dtype": dtype, "precision": precision, "planes": planes, "target": target}
    copied = padded(role, m, n, k, **words, epilogue=epilogue) if path == "masked" and m > SKINNY_ROWS else None
    if copied is not None:
        found.append(copied)
        starts.append(("tma", copied))
    for way, start in starts:
        for tile in _tiles(way, m, n, k, dtype, precision, target):
            config = replace(start, **{"registers": 0, **tile}, splits=1)
            found.append(split(config, m, n, k) if role == "weight_grad" else config)
    for group_m in (1, 4, 16):
        if m > 2 * default.block_m:
            found.append(replace(default, group_m=group_m))
    for num_stages in (default.num_stages - 1, default.num_stages + 1, default.num_stages + 2):
        found.append(replace(default, num_stages=max(1, num_stages)))
    if path == "tma":
        found += [replace(default, residency=count) for count in (1, 2)]
    if role == "weight_grad":
        found += [replace(default, splits=s) for s in (1, default.splits // 2, 2 * default.splits) if 0 < s <= max(1, k // 256)]
    fit = [c for c in dict.fromkeys(found) if c.strategy == "library" or has_room(c, role, planes, dtype, target)]
    return [first, *(config for config in fit if config != first)]


def _tiles(path: str, m: int, n: int, k: int, dtype: str, precision: str, target: Target) -> Iterator[dict[str, Any]]:
    """Tiles with their warps, stages and residency; none of twice the product's size or more."""
    few, tma, wide = m <= 64, path == "tma", dtype == "float32"
    by_tensor_cores = wide and precision != "ieee"
    heights = [h for h in ((16, 32, 64) if few else (64, 128)) if min(m, 128) <= 2 * h < 4 * max(m, 16)]
    widths = [w for w in ((64, 128, 256) if tma else (32, 64, 128)) if w < 2 * max(n, 64 if tma else 32)]
    # 128 bytes of K at a time are what descriptors move best; where a few rows wait for memory, more is in flight.
    if tma or by_tensor_cores:
        depths = (64, 128) if few else (32 if wide else 64,) if tma else (32, 64)
    else:
        depths = (16, 32) if wide else (32, 64) if few else (32,)
    stages: tuple[int, ...]
    if wide:
        stages = (3, 4) if by_tensor_cores else (2,)
    else:
        stages = ((4, 6) if few else (3, 4, 6)) if tma and target.shared_memory > 128 * 1024 else (2, 3)
    for block_m, block_n, block_k in itertools.product(heights, widths, depths):
        for num_warps in (4, 8):
            # A warp that holds few elements of the tile has too little to do, one with more than 4096 spills.
            if not (256 if few else 1024 if tma else 512) <= block_m * block_n // num_warps <= 4096:
                continue
            for num_stages in stages:
                for residency in (1, 2) if tma else (1,):
                    if residency * num_warps == 16 and block_m * block_n > 128 * 128:
                        continue  # two of eight warps have 128 registers a thread
                    yield dict(
                        block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages,
                        residency=residency, registers=128 if residency * num_warps == 16 else 0,
                    )  # fmt: skip
