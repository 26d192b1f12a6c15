"""Mutants of products on copies: of the copies, and of what launchers make of them."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    mutant("copies: columns taken as dense", "gated_padded plain_padded", "copy_rows",
           ("cols[None, :] * stride_src_n", "cols[None, :]")),
    mutant("copies: rows taken as dense", "plain_padded", "copy_rows", ("rows[:, None] * stride_src_m", "rows[:, None] * N")),
    mutant("copies: rows stored at N", "gated_padded plain_padded", "copy_rows",
           ("rows[:, None] * stride_dst_m", "rows[:, None] * N")),
    mutant("copies: columns beyond N", "gated_padded plain_padded", "copy_rows", ("cols < N", "cols < N + 8")),
    mutant("copies: rows beyond M", "plain_padded", "copy_rows", ("rows < M", "rows < M + BLOCK_M")),
    mutant("copies: the last column left out", "plain_padded", "copy_rows", ("cols < N", "cols < N - 1")),
    mutant("copies: one block of rows", "gated_padded", "launch_copy_rows", ("(triton.cdiv(M, 16), ", "(1, ")),
    mutant("copies: up's weight from gate's", "gated_padded", "padded",
           ("launch_copy_rows(matrix, copy)", "launch_copy_rows(matrices[0], copy)")),
    mutant("copies: gate's and up's weights swapped", "gated_padded mixed_padded", "launch_hidden",
           ("padded(*weights)", "padded(*weights[::-1])")),
    mutant("copies: gate's and up's weights swapped in backward", "gated_padded", "launch_input_grad",
           ("padded(*weights)", "padded(*weights[::-1])")),
    mutant("copies: gate's plane for up's", "gated_padded", "fitting", ("padded(*t)", "padded(t[0], t[0])")),
    mutant("copies: gate's plane saved for up's", "gated_padded mixed_padded", "dense",
           ("zip(t, out)", "zip((t[0], t[0]), out)")),
    mutant("copies: results not copied back", "gated_padded", "dense", ("launch_copy_rows(src, dst)", "pass")),
    mutant("copies: a result in rows of whole 16 bytes", "plain_padded", "dense", ("% 8 == 0", "% 8 >= 0")),
    mutant("copies: the hidden value saved for the preactivation", "plain_padded", "launch_hidden",
           ("dense(preact)", "dense(out.unsqueeze(0))")),
    mutant("copies: the result saved for the tile", "plain_padded", "launch_output",
           ("dense(tile)", "dense(out.unsqueeze(0))")),
]  # fmt: skip
