"""Mutants of narrow MLPs in one launch."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    mutant("network: x's columns taken as dense", "narrow_whole", "network", ("ks[None, :] * stride_x_k", "ks[None, :]")),
    mutant("network: x's rows taken as dense", "narrow_whole", "network", ("rows[:, None] * stride_x_m", "rows[:, None] * 13")),
    mutant("network: weights' rows taken as dense", "narrow_whole gated_whole", "padded_matrix",
           ("ns * stride_n", "ns * K")),
    mutant("network: weights' columns taken as dense", "anew_whole", "padded_matrix", ("ks * stride_k", "ks")),
    mutant("network: a weight's last row left out", "narrow_whole", "padded_matrix", ("(ns < N)", "(ns < N - 1)")),
    mutant("network: a weight's last column left out", "anew_whole", "padded_matrix", ("(ks < K)", "(ks < K - 1)")),
    mutant("network: a bias's last element left out", "narrow_whole", "padded_row", ("cols < N", "cols < N - 1")),
    mutant("network: a bias left out", "narrow_whole", "network", ("acc += padded_row(bias1_ptr, 33, 64)", "acc += 0.0")),
    mutant("network: up's bias is gate's", "gated_whole", "network", ("padded_row(up_bias_ptr", "padded_row(gate_bias_ptr")),
    mutant("network: gate and up swapped", "gated_whole", "network", ("activate(gate, up)", "activate(up, gate)")),
    mutant("network: up kept where gate is", "gated_whole", "network", (" + M.to(tl.int64) * 40", "")),
    mutant("network: the activation kept for what it is of", "narrow_whole", "network",
           ("keep_rows(preact1_ptr, acc.to", "keep_rows(preact1_ptr, activate(acc).to")),
    mutant("network: a sum rounded to the spec's dtype", "narrow_whole anew_whole", "network",
           ("acc = tl.dot(hidden, weight1.T)", "acc = tl.dot(hidden, weight1.T).to({dtype}).to(tl.float32)")),
    mutant("network: a linear without its activation", "anew_whole", "network", ("activate(acc)", "acc")),
    mutant("network: every second tile left out", "narrow_whole", "network", ("tl.num_programs(0)", "2 * tl.num_programs(0)")),
    mutant("network: the last tile left out", "anew_whole", "launch_network", ("(tiles,)", "(max(tiles - 1, 1),)")),
    mutant("network: rows stored beyond M", "narrow_whole", "network", ("inside = (rows < M)", "inside = (rows < M + BLOCK_M)")),
    mutant("network: kept in rows beyond M", "narrow_whole", "keep_rows", ("(rows < M)", "(rows < M + 32)")),
]  # fmt: skip
