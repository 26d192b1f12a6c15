"""Mutants of products on copies: of the copies, of what launchers make of them, and of what is written by pointers."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    mutant("copies: columns taken as dense", "gated_padded plain_padded", "copy_rows",
           ("cols[None, :] * stride_src_n", "cols[None, :]")),
    mutant("copies: rows taken as dense", "plain_padded", "copy_rows", ("rows[:, None] * stride_src_m", "rows[:, None] * N")),
    mutant("copies: rows stored at N", "gated_padded plain_padded tf32_padded", "copy_rows",
           ("rows[:, None] * WIDTH", "rows[:, None] * N")),
    mutant("copies: columns beyond the row", "gated_padded plain_padded", "copy_rows", ("cols < WIDTH", "cols < WIDTH + 8")),
    mutant("copies: rows beyond M", "plain_padded", "copy_rows", ("rows < M", "rows < M + BLOCK_M")),
    mutant("copies: the last column left out", "plain_padded", "copy_rows", ("cols < N", "cols < N - 1")),
    mutant("copies: one plane read for both", "gated_padded", "copy_rows", ("plane * distance + ", "")),
    mutant("copies: one plane stored over the other", "gated_padded", "copy_rows", ("plane * M * WIDTH + ", "")),
    mutant("copies: one block of rows", "gated_padded", "launch_copy_rows", ("PLANES * triton.cdiv(M, 16)", "PLANES")),
    mutant("copies: one block of columns", "plain_padded", "launch_copy_rows", ("triton.cdiv(WIDTH, 256)", "1")),
    mutant("copies: up's weight from gate's", "gated_padded", "padded", ("launch.distance(matrices[0], matrices[-1])", "0")),
    mutant("copies: gate's and up's weights swapped", "gated_padded mixed_padded tf32_padded", "launch_hidden",
           ("fitting_pair(*weights, ", "fitting_pair(*weights[::-1], ")),
    mutant("copies: gate's and up's weights swapped in backward", "gated_padded", "launch_input_grad",
           ("fitting_pair(*weights)", "fitting_pair(*weights[::-1])")),
    mutant("copies: gate's plane for up's", "gated_padded", "fitting", ("padded(*t, ", "padded(t[0], t[0], ")),
    mutant("copies: gate's plane saved for up's", "gated_padded mixed_padded tf32_padded", "dense", ("planes.stride(0)", "0")),
    mutant("copies: what is saved not copied back", "gated_padded", "dense",
           ("launch_copy_rows(planes[0], planes.stride(0), launch.empty_like(planes))", "launch.empty_like(planes)")),
    mutant("copies: the hidden value saved for the preactivation", "plain_padded", "launch_hidden",
           ("dense(preact)", "dense(out.unsqueeze(0))")),
    mutant("copies: the result saved for the tile", "plain_padded", "launch_output",
           ("dense(tile)", "dense(out.unsqueeze(0))")),
    mutant("by pointer: a column too many", "gated_padded plain_padded tf32_padded", "output_tma", ("cols < N", "cols <= N")),
    mutant("by pointer: a column too few", "plain_padded", "output_tma", ("cols < N)[None", "cols < N - 1)[None")),
    mutant("by pointer: a row too many", "gated_padded plain_padded", "output_tma", ("rows < M", "rows <= M")),
    mutant("by pointer: every tile in the first rows", "plain_padded", "output_tma", ("rows = m + ", "rows = ")),
    mutant("by pointer: every strip in the first", "gated_padded", "output_tma", ("        n += BLOCK_N // 4\n", "")),
    mutant("by pointer: the gradient of x a column too far", "gated_padded plain_padded", "input_grad_tma",
           ("cols < N", "cols <= N")),
    mutant("by pointer: the gradient of x a row too far", "plain_padded", "input_grad_tma", ("rows < M", "rows <= M")),
]  # fmt: skip
