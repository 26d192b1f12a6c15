"""The blocks of a Pallas kernel: a rule, from the shape of a product and, on a TPU, what VMEM holds.

A block's last two dimensions must be multiples of (8, 128), or the whole of the array. What lies beyond an array's end is never
stored and is set to zero where it is summed over, so any shape goes. A pipeline keeps two blocks of every input and output.
"""

from __future__ import annotations

from functools import cache

from .plan import Config, Plan, products

ROWS, LANES = 16, 128
"""A tile of 16-bit numbers; one of float32 has half the rows."""

GPU_ROWS = 64
"""Rows that a kernel for a GPU takes together: the batch is padded to a multiple of these."""

_LARGEST = {"rows": 512, "columns": 512, "sum": 1024}


@cache
def block(plan: Plan, role: str, M: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows, columns and depth of the blocks of the product (M, K) times (K, N) in a role: "hidden", "output", "hidden_grad",
    "input_grad" or "weight_grad". Positive sizes."""
    if plan.target.kind == "cuda":
        # One warpgroup holds 64 columns of accumulators a thread at most: a gated tile has two.
        wide = M % 128 == 0 and not (role == "hidden" and plan.gated)
        return 128 if wide else GPU_ROWS, 128 if N % 128 == 0 else 64, 64
    # The gradient of a weight sums over the batch, which is then not the last dimension of any block.
    along_m = LANES if role == "weight_grad" else ROWS
    along_k = ROWS if role == "weight_grad" else LANES
    m, n, k = (_fitted(size, most, step) for size, most, step in
               ((M, _LARGEST["rows"], along_m), (N, _LARGEST["columns"], LANES), (K, _LARGEST["sum"], along_k)))  # fmt: skip
    while footprint(plan, role, m, n, k) > plan.target.shared_memory * 3 // 4:
        # The depth first: it costs bandwidth nothing.
        if k >= 512 and k % 2 == 0:
            k = _fitted(K, k // 2, along_k)
        elif n >= m and n > LANES:
            n = _fitted(N, n // 2, LANES)
        elif m > along_m:
            m = _fitted(M, m // 2, along_m)
        else:
            break
    return m, n, k


def configs(plan: Plan, rows: int) -> dict[str, Config]:
    """The blocks of every product of a training step on so many rows, by "role[stage]"."""
    found = {}
    padded = -(-rows // GPU_ROWS) * GPU_ROWS if plan.target.kind == "cuda" else rows
    for role, i, m, n, k in products(plan, padded):
        if plan.target.kind == "cuda" and role not in ("hidden", "output"):
            continue  # XLA's own product
        block_m, block_n, block_k = block(plan, role, m, n, k)
        found[f"{role}[{i}]"] = Config(block_m, block_n, block_k, group_m=1, num_warps=1, num_stages=2, strategy="blocks")
    return found


def _fitted(size: int, most: int, step: int) -> int:
    """The whole of `size`, where that is no more than `most`; else the largest multiple of `step` that divides it well."""
    if size <= most:
        return size
    blocks = -(-size // most)
    even = -(-size // (blocks * step)) * step  # equal blocks waste least at the end
    return min(even, most // step * step)


def footprint(plan: Plan, role: str, m: int, n: int, k: int) -> int:
    """Bytes of VMEM: two blocks of every input and output, the accumulators, and about four tiles of what is computed on them."""
    size = 4 if plan.dtype == "float32" else 2
    planes = plan.linears[0].planes if role in ("hidden", "input_grad") else 1
    products = (m * k + planes * k * n) if role == "hidden" else planes * (m * k + k * n)
    outputs = {"hidden": 1 + planes, "output": 2, "hidden_grad": 2 * plan.linears[0].planes + 1}.get(role, 1)
    tiles = sum(o.kind == "tile" for o in plan.epilogue.operands) if role == "output" else 0
    accumulators = planes if role == "hidden" else 1
    return 2 * size * (products + (outputs + tiles) * m * n) + 4 * accumulators * m * n + 4 * 4 * m * n
