"""The proof, on the device itself, that one tensor descriptor may span two allocations."""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mlpdsl.launch import run
from mlpdsl.tape import unheard

_log = logging.getLogger("mlpdsl")


@triton.jit
def _copy(source, target, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK_N
    k = tl.program_id(1) * BLOCK_K
    target.store([0, n, k], source.load([0, n, k]))


def pair_descriptor_works(device: torch.device) -> bool | None:
    """Whether a descriptor [2, N, K] with an outer stride that is no multiple of a row reads both matrices rightly. None where an
    error kept it from being seen: an encoder or a compiler that refuses, or memory that there was none of just then.

    Two matrices of 40×72 bfloat16 lie 16 bytes past a multiple of the row apart; neither extent is a multiple of the tile.
    """
    rows, columns, apart = 40, 72, 40 * 72 + 24
    try:
        with torch.cuda.device(device), unheard():
            # Numbers that bfloat16 holds, and not torch's random ones: those are the program's.
            memory = torch.arange(apart + rows * columns, device=device).remainder(251).to(torch.bfloat16)
            pair = TensorDescriptor(memory, [2, rows, columns], [apart, columns, 1], [2, 32, 64])
            copied = torch.zeros(2, rows, columns, dtype=torch.bfloat16, device=device)
            run(_copy, (2, 2), {"num_warps": 4}, pair, TensorDescriptor.from_tensor(copied, [2, 32, 64]), 32, 64)
            expected = torch.stack([memory[s : s + rows * columns].view(rows, columns) for s in (0, apart)])
            works = torch.equal(copied, expected)
    except Exception as error:  # no failure of the call
        _log.warning("mlpdsl: one descriptor over two weights does not work on %s (%s)", device, error)
        return None
    if not works:
        _log.warning("mlpdsl: one descriptor over two weights reads wrongly on %s; gated layers take the masked path", device)
    return works
