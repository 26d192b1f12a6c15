"""Mutants of the backward pass: derivatives, products, partial sums, and what one backward leaves for the next."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

CUT_BFLOAT16 = "(acc.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)"

DERIVATIVES = [
    mutant("derivative at the incoming gradient", "plain deep", "hidden_grad_masked",
           ("activate_grad(acc, x)", "activate_grad(x, acc)")),
    mutant("derivative at the activation's value", "plain deep", "hidden_grad_masked",
           ("x_grad, hidden = activate_grad(acc, x)",
            "_, hidden = activate_grad(acc, x)\n    x_grad, _ = activate_grad(acc, activate(x))")),
    mutant("derivative at the activation's value", "plain_tma", "strip_grad",
           ("x_grad, hidden = activate_grad(acc, x)",
            "_, hidden = activate_grad(acc, x)\n    x_grad, _ = activate_grad(acc, activate(x))")),
    mutant("derivative of the up half", "gated", "hidden_grad_masked",
           ("activate_grad(acc, gate, up)", "activate_grad(acc, up, gate)")),
    mutant("no derivative at all", "plain deep", "hidden_grad_masked",
           ("x_grad, hidden = activate_grad(acc, x)", "_, hidden = activate_grad(acc, x)\n    x_grad = acc")),
    mutant("gate's gradient without up", "gated float32", "activate_grad", ("(grad * up)", "grad")),
    mutant("up's gradient without the gate", "gated float32", "activate_grad", ("grad * t9", "grad")),
    mutant("up's gradient without the gate", "own", "activate_grad", ("grad * (t6 * gate)", "grad * t6")),
    mutant("gate's and up's gradients swapped", "gated own", "hidden_grad_masked",
           ("gate_grad, up_grad, hidden = ", "up_grad, gate_grad, hidden = ")),
    mutant("gate's and up's gradients swapped", "gated_tma", "strip_grad",
           ("gate_grad, up_grad, hidden = ", "up_grad, gate_grad, hidden = ")),
    mutant("a strip's gradient in its neighbour", "gated_tma plain_tma", "hidden_grad_tma",
           ("strip0_right, m, n + 1", "strip1_left, m, n + 1")),
    mutant("the hidden gradient's last step of K left out", "gated", "hidden_grad_masked",
           ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)")),
    mutant("incoming gradient read beyond K", "plain", "hidden_grad_masked",
           ("mask=(rows < M)[:, None] & inside_k[None, :], other", "mask=(rows < M)[:, None], other")),
    mutant("incoming gradient's columns taken as dense", "relu", "hidden_grad_masked",
           ("ks[None, :] * stride_grad_k", "ks[None, :]"), ("step * stride_grad_k", "step")),
    mutant("incoming gradient's rows taken as dense", "plain", "hidden_grad_masked",
           ("rows[:, None] * stride_grad_m", "rows[:, None] * K")),
]  # fmt: skip

HIDDEN = [
    mutant("the gradient emitted as the hidden value", "plain", "hidden_grad_masked", ("hidden.to(", "x_grad.to(")),
    mutant("the gradient emitted as the hidden value", "plain_tma", "strip_grad", ("hidden.to(", "x_grad.to(")),
    mutant("the hidden value emitted without up", "gated", "activate_grad", ("t9 * up", "t9")),
    mutant("the hidden value emitted through float16", "gated", "hidden_grad_masked",
           ("hidden.to(tl.bfloat16)", "hidden.to(tl.float16).to(tl.bfloat16)")),
    mutant("the preactivation's gradient over the preactivation", "gated plain deep gated_tma", "launch_hidden_grad",
           ("preact_grad = launch.empty_like(preact)", "preact_grad = preact")),
]  # fmt: skip

INPUT_GRADS = [
    mutant("gate's gradient with gate's weight twice", "gated own", "input_grad_masked", ("* up_distance", "* 0")),
    mutant("x's gradient through the gate only", "gated float32", "input_grad_masked",
           ("tl.static_range(2)", "tl.static_range(1)")),
    mutant("x's gradient through the lower address only", "gated_tma", "input_grad_tma",
           ("tl.range(0, 2 * tiles_k)", "tl.range(0, tiles_k)")),
    mutant("gate's and up's gradients by address, not by name", "gated_tma", "input_grad_tma", ("plane ^ up_first", "plane")),
    mutant("a tile of x's gradient left out", "gated_tma plain_tma", "input_grad_tma",
           ("tiles_m * tiles_n, tl.num_programs(0)", "tiles_m * tiles_n - 1, tl.num_programs(0)")),
    mutant("x's gradient cut off, not rounded", "gated", "input_grad_masked", ("acc.to(tl.bfloat16)", CUT_BFLOAT16)),
    mutant("x's gradient through float16", "float32 deep", "input_grad_masked",
           ("stride_x_grad_n, acc", "stride_x_grad_n, acc.to(tl.float16)")),
    mutant("x's gradient summed in the spec's dtype", "plain", "input_grad_masked",
           ("acc = tl.dot(grad, weight, acc)", "acc = tl.dot(grad, weight, acc).to({dtype}).to(tl.float32)")),
]  # fmt: skip

WEIGHT_GRADS = [
    mutant("only the first split of a sum", "plain gated", "weight_grad_masked",
           ("split = tl.program_id(1)", "split = tl.program_id(1) * 0")),
    mutant("splits overlap", "plain", "weight_grad_masked", ("tl.minimum(first_row + rows_per_split, M)", "M")),
    mutant("the last split left out", "plain gated_tma", "launch_weight_grad",
           ("splits = triton.cdiv(M, rows_per_split)", "splits = max(1, M // rows_per_split)")),
    mutant("partial sums in the spec's dtype", "plain gated", "launch_weight_grad",
           ("N * K), torch.float32)", "N * K), dtype=x.dtype)")),
    mutant("weight gradients swapped", "gated float32", "weight_grad_masked",
           ("first_ptr if plane == 0 else second_ptr", "second_ptr if plane == 0 else first_ptr")),
    mutant("weight gradients swapped where the sum is split", "gated own", "weight_grad_masked",
           ("(split * PLANES + plane)", "(split * PLANES + (PLANES - 1 - plane))")),
    mutant("weight gradients swapped where the sum is split", "gated_tma", "weight_grad_tma",
           ("(split * PLANES + plane)", "(split * PLANES + (PLANES - 1 - plane))")),
    mutant("x read beyond its rows", "gated plain", "weight_grad_masked",
           ("mask=inside_rows & (ks < K)[None, :]", "mask=(ks < K)[None, :]")),
    mutant("x's columns taken as dense by its weight's gradient", "plain gated", "weight_grad_masked",
           ("ks[None, :] * stride_x_k", "ks[None, :]")),
    mutant("weight gradient cut off, not rounded", "gated", "weight_grad_masked", ("acc.to(tl.bfloat16)", CUT_BFLOAT16)),
    mutant("weight gradient of the second half of a strip of rows", "plain_tma gated_tma", "weight_grad_tma",
           ("tl.range(first_row, last_row, BLOCK_K)", "tl.range(first_row, last_row, 2 * BLOCK_K)")),
]  # fmt: skip

BIAS_GRADS = [
    mutant("bias gradient of one tile of rows", "gated plain", "backward",
           ("launch_sum_rows(bias_rows[:, plane]", "launch_sum_rows(bias_rows[:1, plane]")),
    mutant("bias sums of every tile in one place", "plain", "epilogue_grad",
           ("bias_rows_ptr + tile_m.to(tl.int64) * N", "bias_rows_ptr")),
    mutant("bias gradients of gate and up swapped", "gated", "backward",
           ("launch_sum_rows(bias_rows[:, plane]", "launch_sum_rows(bias_rows[:, bias_rows.shape[1] - 1 - plane]")),
    mutant("bias gradient of rounded values", "gated", "hidden_grad_masked",
           ("tl.where(inside, gate_grad, 0.0)", "tl.where(inside, gate_grad.to({dtype}).to(tl.float32), 0.0)")),
    mutant("bias gradient of rounded values", "plain_tma", "strip_grad",
           ("tl.where(inside, x_grad, 0.0)", "tl.where(inside, x_grad.to({dtype}).to(tl.float32), 0.0)")),
    mutant("bias gradient before the epilogue's", "gated chain", "epilogue_grad",
           ("bias_row = tl.sum(tl.where(inside, tile_grad, 0.0), 0)", "bias_row = tl.sum(tl.where(inside, grad, 0.0), 0)")),
    mutant("partial sums read beyond their end", "gated plain own", "sum_rows", ("r < count", "r < count + 1")),
    mutant("partial sums from the 17th on left out", "gated", "sum_rows",
           ("range(0, count, BLOCK_R)", "range(0, 1, BLOCK_R)")),
    mutant("partial sums of the first columns only", "gated plain", "launch_sum_rows",
           ("out.numel(), launch.SUM_COLUMNS),)", "out.numel(), 2 * launch.SUM_COLUMNS),)")),
]  # fmt: skip

MUTANTS = [*DERIVATIVES, *HIDDEN, *INPUT_GRADS, *WEIGHT_GRADS, *BIAS_GRADS]
