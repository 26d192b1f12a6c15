"""Mutants of the library strategy: its products, and the passes between them."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = [
    mutant("the library: gate and up swapped", "gated_library wide_library", "activate_rows",
           ("activate(gate, up)", "activate(up, gate)")),
    mutant("the library: up from gate's plane", "gated_library wide_library", "activate_rows",
           ("preact_ptr + stride_preact_p + flat", "preact_ptr + flat")),
    mutant("the library: planes taken as dense", "gated_library", "activate_rows",
           ("preact_ptr + stride_preact_p + flat", "preact_ptr + M.to(tl.int64) * N + flat")),
    mutant("one batch: up's plane beyond gate's, up first", "gated_batched biased_batched", "launch_hidden",
           ("to_up = -to_up if gate == 1 else to_up", "pass")),
    mutant("one batch: saved in order of addresses", "gated_batched", "launch_hidden",
           ("REWRITE = SAVE and gate == 1", "REWRITE = False")),
    mutant("one batch: saved without biases", "biased_batched", "launch_hidden",
           ("REWRITE = SAVE and BATCHED", "REWRITE = SAVE and gate == 1")),
    mutant("one batch: the weights as they come", "gated_batched", "launch_hidden",
           ("weights[gate], weights[1 - gate]", "weights[0], weights[1]")),
    mutant("one batch: no biases", "biased_batched", "activate_rows", ("if BATCHED:", "if BATCHED and N > 1024:")),
    mutant("one batch: gate's bias for up", "biased_batched", "activate_rows", ("up_bias_ptr + cols", "gate_bias_ptr + cols")),
    mutant("one batch: put back swapped", "gated_batched biased_batched", "activate_rows",
           ("tl.store(saved_ptr + flat, gate", "tl.store(saved_ptr + flat, up")),
    mutant("one batch: up put back on gate", "gated_batched biased_batched", "activate_rows",
           ("saved_ptr + M.to(tl.int64) * N + flat", "saved_ptr + flat")),
    mutant("the library: no biases", "gated_library", "launch_hidden", ("preact[plane], biases[plane]", "preact[plane], None")),
    mutant("the library: no bias", "plain_library", "launch_hidden", ("preact[0], biases[0]", "preact[0], None")),
    mutant("the library: gate's bias for up", "gated_library", "launch_hidden", ("biases[plane]", "biases[0]")),
    mutant("the library: the residual left out", "wide_library", "finish_rows",
           ("finish(tile, residual)", "finish(tile, residual * 0.0)")),
    mutant("the library: the output's bias left out", "gated_library plain_library", "launch_output",
           ("tile[0], biases[0]", "tile[0], None")),
    mutant("the library: the residual scaled", "plain_library", "finish_rows",
           ("finish(tile, residual, scale)", "finish(tile, residual * 1.0078125, scale)")),
    mutant("the library: the epilogue rounded early", "plain_library", "finish_rows",
           (".to(tl.float32)\n    residual_tile", ".to(tl.bfloat16).to(tl.float32)\n    residual_tile")),
    mutant("the library: the derivative at the hidden value", "plain_library", "activate_grad_rows",
           ("activate_grad(grad, x)", "activate_grad(grad, activate(x))")),
    mutant("the library: the hidden value not written again", "gated_library", "activate_grad_rows",
           ("hidden.to({dtype})", "grad.to({dtype})")),
    mutant("the library: bias sums of one block", "gated_library plain_library", "activate_grad_rows",
           ("bias_rows_ptr + tl.program_id(0).to(tl.int64)", "bias_rows_ptr + 0 * tl.program_id(0).to(tl.int64)")),
    mutant("the library: up's share of the input's gradient left out", "wide_library", "launch_input_grad",
           ("launch.product(preact_grad[1], weights[1], x_grad, x_grad)", "pass")),
    mutant("the library: gate's share overwritten", "wide_library", "launch_input_grad",
           ("weights[1], x_grad, x_grad", "weights[1], x_grad")),
    mutant("the library: gate's weight gradient for up", "gated_library wide_library", "launch_weight_grad",
           ("launch.product(grad[plane].t(), x, out)", "launch.product(grad[0].t(), x, out)")),
]  # fmt: skip
