"""Mutants of the epilogue: its order, its operands, and the gradients through it."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

VALUES = [
    mutant("epilogue entries in the other order", "chain", "finish", ("(t3 * scale) + residual", "(t3 + residual) * scale")),
    mutant("the residual scaled", "plain plain_tma", "finish", ("tile + residual", "tile + residual * 1.0078125")),
    mutant("the residual rounded with the tile", "plain", "finish",
           ("tile + residual", "tile.to({dtype}).to(tl.float32) + residual")),
    mutant("the residual of the first strip for all", "plain_tma", "output_tma",
           ("residual_desc.load([m, n])", "residual_desc.load([m, tile_n * BLOCK_N])")),
    mutant("layer_scale of the first strip for all", "scaled_tma", "output_tma",
           ("n += BLOCK_N // 4\n        cols = n + tl.arange(0, BLOCK_N // 4)", "n += BLOCK_N // 4")),
    mutant("layer_scale of the first tile for all", "gated chain", "output_masked",
           ("layer_scale_ptr + cols, mask", "layer_scale_ptr + cols % BLOCK_N, mask")),
    mutant("a row operand by the column", "own", "output_masked",
           ("operand1_ptr + rows, mask=rows < M", "operand1_ptr + rows * 0, mask=rows < M")),
    mutant("an operand rounded to the spec's dtype", "own", "output_masked",
           ("other=0.0).to(tl.float32)[None, :]", "other=0.0).to({dtype}).to(tl.float32)[None, :]")),
    mutant("an operand rounded to the spec's dtype", "gated", "output_masked",
           ("tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0)",
            "tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0).to({dtype})")),
    mutant("up without its 1", "own", "activate", ("(up + 1.0) * gate", "up * gate")),
]  # fmt: skip

GRADIENTS = [
    mutant("no derivative of the epilogue's activation", "chain", "finish_grad", ("(grad * scale) * t6", "grad * scale")),
    mutant("the epilogue's derivative at its value", "chain", "finish_grad",
           ("    t7 = ", "    x = t5 * t4\n    s = 1.0 / (1.0 + tl.exp(-x))\n    t6 = s + x * s * (1.0 - s)\n    t7 = ")),
    mutant("the tile's gradient without layer_scale", "chain", "finish_grad", ("t7 * layer_scale", "t7")),
    mutant("the tile's gradient without layer_scale", "gated", "finish_grad", ("grad * layer_scale", "grad")),
    mutant("layer_scale's gradient from the result", "gated", "finish_grad", ("grad * tile", "grad * (tile * layer_scale)")),
    mutant("scale's gradient from the result", "chain", "finish_grad", ("grad * (t5 * t4)", "grad * ((t5 * t4) * scale)")),
    mutant("layer_scale's gradient of one tile of rows", "gated chain", "launch_epilogue_grad",
           ("launch_sum_rows(layer_scale_rows,", "launch_sum_rows(layer_scale_rows[:1],")),
    mutant("layer_scale's gradient of rounded values", "gated", "epilogue_grad",
           ("tl.where(inside, layer_scale_grad, 0.0)", "tl.where(inside, layer_scale_grad.to({dtype}).to(tl.float32), 0.0)")),
    mutant("incoming gradient's columns taken as dense by the epilogue", "gated chain own", "epilogue_grad",
           ("cols[None, :] * stride_grad_n", "cols[None, :]")),
    mutant("incoming gradient's rows taken as dense by the epilogue", "plain", "epilogue_grad",
           ("rows[:, None] * stride_grad_m", "rows[:, None] * N")),
    mutant("the tile's gradient not rounded but cut off", "gated", "epilogue_grad",
           ("tile_grad.to(tl.bfloat16)",
            "(tile_grad.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)")),
    mutant("a row operand's gradient of one tile of columns", "own", "epilogue_grad", ("tile_n.to(tl.int64) * M + rows", "rows")),
    mutant("a row operand's gradient of the first columns", "own", "epilogue_grad",
           ("tl.where(inside, operand1_grad", "tl.where(inside & (cols < 64)[None, :], operand1_grad")),
    mutant("a scalar's gradient of one tile of columns", "own chain", "epilogue_grad",
           ("tl.num_programs(1) + tile_n", "tl.num_programs(1)")),
    mutant("two operands' gradients swapped", "own", "epilogue_grad",
           ("operand0_grad, operand1_grad", "operand1_grad, operand0_grad")),
]  # fmt: skip

MUTANTS = [*VALUES, *GRADIENTS]
