"""Mutants of the kernels for few rows."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    mutant("one row: x's elements taken as dense", "plain_skinny", "hidden_row", ("(ks - skew) * stride_x_k", "(ks - skew)")),
    mutant("one row: x stepped through as if dense", "plain_skinny", "hidden_row", ("x_row += step * stride_x_k", "x_row += step")),
    mutant("one row: weights' columns taken as dense", "gated_skinny", "hidden_row",
           ("ks[None, :] * stride_weight_in", "ks[None, :]")),
    mutant("one row: up from gate's weight", "gated_skinny", "hidden_row", ("gate_tile + up_distance", "gate_tile")),
    mutant("one row: the last step of K left out", "plain_skinny", "hidden_row",
           ("else 0, end, BLOCK_K", "else 0, end - BLOCK_K, BLOCK_K")),
    mutant("one row: x read beyond K", "plain_skinny", "output_row", ("& (k + ks < K + skew)", "& (k + ks < K + skew + BLOCK_K)")),
    mutant("one row: products rounded to the spec's dtype", "plain_skinny", "hidden_row",
           ("weight.to(tl.float32) * x\n            weight_tile",
            "(weight.to(tl.float32) * x).to({dtype}).to(tl.float32)\n            weight_tile")),
    mutant("one row: up not activated by its gate", "gated_skinny", "hidden_row",
           ("up = tl.sum(up_sum, 1)", "up = tl.sum(gate_sum, 1)")),
    mutant("one row: elements of other rows kept", "plain_skinny", "output_row",
           ("weight = tl.where(inside_k[None, :], weight, 0.0)", "weight = weight")),
    mutant("one row: x not shifted as its weights are", "gated_skinny", "hidden_row",
           ("(ks - skew) * stride_x_k", "ks * stride_x_k")),
    mutant("few rows: groups of warps sum the same share", "gated_skinny plain_skinny", "hidden_skinny",
           ("[:, None, None] * DEPTH", "[:, None, None] * 0")),
    mutant("few rows: one group's share alone", "gated_skinny plain_skinny", "hidden_skinny",
           ("acc = tl.sum(sums, 0)", "acc = tl.max(sums, 0)")),
    mutant("few rows: the last step of K left out", "plain_skinny", "hidden_skinny",
           ("range(0, end, BLOCK_K)", "range(0, end - BLOCK_K, BLOCK_K)")),
    mutant("few rows: x read beyond K", "gated_skinny", "hidden_skinny", ("& (k + ks < K + skew)", "& (k + ks < K + skew + 8)")),
    mutant("few rows: elements of other rows kept", "gated_skinny", "hidden_skinny",
           ("weight = tl.where(inside_k, weight, 0.0)", "weight = weight")),
    mutant("few rows: x not shifted as its weights are", "plain_skinny", "hidden_skinny",
           ("(ks - skew) * stride_x_k", "ks * stride_x_k")),
    mutant("few rows: the row's last vector of 16 bytes left out", "gated_skinny", "output_skinny",
           ("tl.cdiv(K + skew, 8) * 8", "(K + skew) // 8 * 8")),
    mutant("few rows: x's rows taken as dense", "plain_skinny", "hidden_skinny", ("* stride_x_m", "* K")),
    mutant("few rows: weights' rows taken as dense", "gated_skinny", "hidden_skinny",
           ("wide_cols * stride_weight_out", "wide_cols * K")),
    mutant("few rows: up from gate's weight", "gated_skinny", "hidden_skinny",
           ("(wide // BLOCK_N) * up_distance", "(wide // BLOCK_N) * 0")),
    mutant("few rows: summed in the spec's dtype", "plain_skinny", "hidden_skinny",
           ("weight.permute(0, 2, 1), sums)", "weight.permute(0, 2, 1), sums).to({dtype}).to(tl.float32)")),
    mutant("few rows: rows stored beyond M", "plain_skinny", "output_skinny",
           ("inside = (rows < M)", "inside = (rows < BLOCK_M)")),
]  # fmt: skip
