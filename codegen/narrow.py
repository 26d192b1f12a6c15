"""Configs of the strategy "whole_network": every linear of a narrow MLP in one launch, what is between them in registers.

Between the linears nothing is written or read, and nothing is launched: what is left are x, the weights and the result. In 16 bits,
by what was timed on an H200 (benchmarks/results/searches-h200.json); none in float32, whose products are not for the matrix units.
"""

from __future__ import annotations

from dataclasses import replace

from .few_rows import power_of_two
from .plan import Config, Plan

__all__ = ["LINEAR_BY_LINEAR", "interpreted", "limit", "network", "padded", "printed", "reasons", "resident"]

LINEAR_BY_LINEAR = Config(16, 16, 16)
"""What is picked for the network where it is not one launch: each linear asks for a config of its own."""

WIDEST = 128
"""The widest layer: a tile of rows of it, in float32, and the next one's sums have to find room in registers."""

RESIDENT = 64
"""The widest layer where all weights stay in shared memory, so that a program reads them once for all of its tiles."""

DEEPEST = 8
"""The most linears: each is text of its own, and compiled."""

MOST_ROWS = 16384
"""The most rows where weights are read for each tile: beyond, a kernel a linear reads them less often."""


def padded(width: int) -> int:
    """A width as products want it: a power of two, 16 at least."""
    return power_of_two(width, 16, WIDEST)


def _widths(plan: Plan) -> list[int]:
    return [plan.linears[0].width_in, *(linear.width_out for linear in plan.linears)]


def reasons(plan: Plan) -> list[str]:
    """Why there is no such kernel. Else empty."""
    found = []
    if plan.hidden is None:
        found.append("a single linear is one launch already")
    if plan.target.kind != "cuda":
        found.append("for NVIDIA GPUs")
    if plan.dtype == "float32":
        found.append("for 16 bits")
    if max(_widths(plan)) > WIDEST:
        found.append(f"a width of {max(_widths(plan))}, and {WIDEST} at most find room")
    if len(plan.linears) > DEEPEST:
        found.append(f"{len(plan.linears)} linears, and {DEEPEST} at most are printed")
    return found


def printed(plan: Plan) -> bool:
    """Whether there is such a kernel."""
    return not reasons(plan)


def resident(plan: Plan) -> bool:
    """Whether all weights stay in shared memory: more would find room there, but not each thread's share of all, in registers; of
    widths that are no multiples of 8 each element has an address there too."""
    held = 2 * sum(linear.planes * padded(linear.width_in) * padded(linear.width_out) for linear in plan.linears)
    return max(_widths(plan)) <= RESIDENT and held <= 48 * 1024 and (len(plan.linears) <= 4 or not plan.ragged)


def network(plan: Plan, m: int, batch_invariant: bool = False) -> Config | None:
    """The config for m rows of x; None where there is no such kernel, or a kernel a linear is as fast. Where batch-invariant, one
    for every m, and only where that is fast for all."""
    if not printed(plan) or limit(plan, m, batch_invariant):
        return None
    stops = plan.target.name in ("sm_100", "sm_103")  # ptxas, at 80 registers, and spills a few bytes
    if not resident(plan):
        if plan.gated:  # two weights pass through registers at once: those of eight warps, in vectors
            return _config(plan, 32, num_warps=8)
        return _config(plan, 16 if m <= 2048 or plan.ragged else 32)
    if m <= 8192 and not batch_invariant:  # many small programs, of which none has much to wait for
        return replace(_config(plan, 16, residency=8), registers=255 if stops else 0)
    if plan.target.name != "sm_90":
        return _config(plan, 32 if plan.gated else 64, stages=3, residency=2)  # of two accumulators registers hold half
    if m < 2**18 or batch_invariant or len(plan.linears) > 4:
        return _config(plan, 128, num_warps=8, stages=2, residency=2)
    return _config(plan, 64, stages=3, residency=3)


def limit(plan: Plan, m: int, batch_invariant: bool) -> str:
    """Why the kernel that there is is not for m rows; "" where it is."""
    if plan.ragged:  # elements of a weight have an address each, and registers hold those of low tiles
        where, most, none = "where rows are of no whole 16 bytes", 8192, plan.gated and not resident(plan)
    elif resident(plan):
        return ""
    else:
        where, most, none = "where weights find no room in shared memory together", MOST_ROWS // (2 if plan.gated else 1), False
    least = 1 if resident(plan) else 2  # one row is for sums without matrix instructions
    if batch_invariant or none:
        return f"{where}, not {'gated and wide' if none else 'with batch_invariant'}"
    return "" if least <= m <= most else f"{where}, for {least} to {most} rows"


def interpreted(plan: Plan) -> Config | None:
    """Tiles for the interpreter; None where there is no such kernel."""
    return _config(plan, 32) if printed(plan) else None


def _config(plan: Plan, block_m: int, num_warps: int = 4, stages: int = 1, residency: int = 1) -> Config:
    first, last = padded(plan.linears[0].width_in), padded(plan.linears[-1].width_out)
    return Config(block_m, last, first, num_warps=num_warps, num_stages=stages, residency=residency, strategy="whole_network")
