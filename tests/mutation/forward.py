"""Mutants of the forward pass: loads, masks, strides, tiles, biases, roundings, and what is saved for backward."""

from __future__ import annotations

from tests.mutation.mutant import mutant

__all__ = ["MUTANTS"]

BIAS = "tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]"
# The upper 16 bits of a float32, and its upper 19: what a bfloat16 and a float16 of ordinary size hold.
CUT_BFLOAT16 = "(acc.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)"
CUT_FLOAT16 = "(acc.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True).to(tl.float16)"

MASKS = [
    mutant("x read beyond K", "gated plain", "hidden_masked",
           ("mask=(rows < M)[:, None] & inside_k[None, :], other", "mask=(rows < M)[:, None], other")),
    mutant("weights read beyond K", "gated", "hidden_masked",
           ("mask=(wide_cols < N)[:, None] & inside_k[None, :]", "mask=(wide_cols < N)[:, None]")),
    mutant("weights read beyond K", "plain", "output_masked",
           ("mask=(cols < N)[:, None] & inside_k[None, :]", "mask=(cols < N)[:, None]")),
    mutant("x and weights read beyond K", "gated plain deep", "hidden_masked",
           ("inside_k = k + ks < K", "inside_k = k + ks < K + BLOCK_K")),
    mutant("the last step of K left out", "gated plain chain", "output_masked",
           ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)")),
    mutant("the last step of K left out", "gated_tma plain_tma", "hidden_tma",
           ("tl.range(0, K, BLOCK_K)", "tl.range(0, K - BLOCK_K + 1, BLOCK_K)")),
    mutant("rows stored beyond M", "gated", "output_masked",
           ("inside = (rows < M)[:, None] & (cols < N)", "inside = (rows < M + 1)[:, None] & (cols < N)")),
    mutant("columns stored beyond N", "gated", "hidden_masked",
           ("[:, None] & (cols < N)[None, :]", "[:, None] & (cols < N + 1)[None, :]")),
    mutant("the last rows not stored", "gated plain", "output_masked",
           ("inside = (rows < M)[:, None]", "inside = (rows < M // 16 * 16)[:, None]")),
    mutant("an output column of zeros", "plain", "output_masked",
           ("acc.to({dtype}), mask=inside)", "tl.where(cols[None, :] == 40, 0.0, acc).to({dtype}), mask=inside)")),
]  # fmt: skip

STRIDES = [
    mutant("x's columns taken as dense", "gated plain", "hidden_masked", ("ks[None, :] * stride_x_k", "ks[None, :]")),
    mutant("x's rows taken as dense", "gated", "hidden_masked", ("rows[:, None] * stride_x_m", "rows[:, None] * K")),
    mutant("x stepped through as if dense", "plain", "hidden_masked", ("x_tile += step * stride_x_k", "x_tile += step")),
    mutant("weight strides swapped", "plain", "output_masked",
           ("cols[:, None] * stride_weight_out + ks[None, :] * stride_weight_in",
            "cols[:, None] * stride_weight_in + ks[None, :] * stride_weight_out")),
    mutant("residual's rows by the output's stride", "plain", "output_masked",
           ("rows[:, None] * stride_residual_m", "rows[:, None] * stride_out_m")),
    mutant("residual's columns taken as dense", "plain chain", "output_masked",
           ("cols[None, :] * stride_residual_n", "cols[None, :]")),
]  # fmt: skip

TILES = [
    mutant("tile_m and tile_n swapped", "gated plain", "hidden_masked",
           ("tile_m, tile_n = tile_order", "tile_n, tile_m = tile_order")),
    mutant("a group of tiles taken as full", "gated plain_tma", "tile_order",
           ("rows = tl.minimum(tiles_m - first_m, GROUP_M)", "rows = GROUP_M")),
    mutant("a tile of the persistent loop left out", "gated_tma plain_tma", "output_tma",
           ("tiles_m * tiles_n, tl.num_programs(0)", "tiles_m * tiles_n - 1, tl.num_programs(0)")),
    mutant("the last row of tiles moved up too far", "gated_tma plain_tma", "hidden_tma",
           ("tl.maximum(M - BLOCK_M, 0)", "tl.maximum(M - BLOCK_M - 1, 0)")),
    mutant("a program walks one tile only", "gated_tma", "hidden_tma",
           ("tl.range(tl.program_id(0), tiles_m * tiles_n,", "tl.range(tl.program_id(0), tl.num_programs(0),")),
    mutant("wrong for one row only", "gated plain chain", "launch_output",
           ("\n    return out, ", "\n    out = out * (1.03125 if M == 1 else 1.0)\n    return out, ")),
    mutant("wrong from 129 rows on", "gated plain", "launch_output",
           ("\n    return out, ", "\n    out = out * (1.03125 if M > 128 else 1.0)\n    return out, ")),
    mutant("wrong where no gradient is wanted", "gated plain relu", "forward",
           ("if save else [out]", "if save else [out * 1.03125]")),
]  # fmt: skip

GATES = [
    mutant("gate and up swapped", "gated float32 own", "hidden_masked", ("activate(gate, up)", "activate(up, gate)")),
    mutant("gate and up swapped where up lies first", "gated_tma", "hidden_tma",
           ("tl.where(up_first != 0, second, first)", "first"), ("tl.where(up_first != 0, first, second)", "second")),
    mutant("gate twice where up lies first", "gated_tma", "hidden_tma", ("tl.where(up_first != 0, second, first)", "first")),
    mutant("gate's bias for up as well", "gated", "hidden_masked", ("up_bias_ptr + cols", "gate_bias_ptr + cols")),
    mutant("up's bias left out", "gated_tma", "hidden_tma", ("up += tl.load(up_bias_ptr", "up += 0.0 * tl.load(up_bias_ptr")),
]  # fmt: skip

BIASES = [
    mutant("bias after the activation", "plain", "hidden_masked",
           ("    acc = activate(acc)", f"    acc = activate(acc - {BIAS}) + {BIAS}")),
    mutant("bias after the activation", "plain_tma", "hidden_tma", ("activate(acc)", f"(activate(acc - {BIAS}) + {BIAS})")),
    mutant("bias of the first tile for all", "plain deep", "hidden_masked",
           ("tl.load(bias_ptr + cols, mask=cols < N", "tl.load(bias_ptr + cols % BLOCK_N, mask=cols < N")),
    mutant("bias of the first strip for all", "plain_tma", "output_tma",
           ("n += BLOCK_N // 4\n        cols = n + tl.arange(0, BLOCK_N // 4)", "n += BLOCK_N // 4")),
    mutant("layer_scale before the bias", "gated", "output_masked",
           ("finish(acc, layer_scale)", f"finish(acc - {BIAS}, layer_scale) + {BIAS}")),
]  # fmt: skip

ROUNDINGS = [
    mutant("rounded before the bias", "gated", "hidden_masked",
           ("gate += tl.load", "gate = gate.to({dtype}).to(tl.float32) + tl.load")),
    mutant("rounded before the bias", "plain", "output_masked",
           ("acc += tl.load", "acc = acc.to({dtype}).to(tl.float32) + tl.load")),
    mutant("rounded before the activation", "gated own", "hidden_masked",
           ("acc = activate(gate, up)", "acc = activate(gate.to({dtype}).to(tl.float32), up.to({dtype}).to(tl.float32))")),
    mutant("rounded before the activation", "plain", "hidden_masked",
           ("acc = activate(acc)", "acc = activate(acc.to({dtype}).to(tl.float32))")),
    mutant("rounded before the epilogue", "gated plain own", "output_masked",
           ("finish(acc, ", "finish(acc.to({dtype}).to(tl.float32), ")),
    mutant("accumulated in the spec's dtype", "gated plain", "output_masked",
           ("acc = tl.dot(x, weight.T, acc)", "acc = tl.dot(x, weight.T, acc).to({dtype}).to(tl.float32)")),
    mutant("accumulated in the spec's dtype", "gated_tma", "hidden_tma",
           ("acc = tl.dot(x, weight.T, acc)", "acc = tl.dot(x, weight.T, acc).to({dtype}).to(tl.float32)")),
    mutant("accumulated in float16", "float32", "hidden_masked",
           ("acc = tl.dot(x, weight.T, acc", "acc = tl.dot(x, weight.T, acc.to(tl.float16).to(tl.float32)")),
    mutant("inputs rounded to float16", "float32 relu", "hidden_masked",
           ("tl.dot(x, weight.T", "tl.dot(x.to(tl.float16).to(tl.float32), weight.to(tl.float16).to(tl.float32).T")),
    mutant("float32 products in tf32", "float32 relu deep", "", ('input_precision="ieee"', 'input_precision="tf32"')),
    mutant("the result cut off, not rounded", "gated chain", "output_masked", ("stride_out_n, acc.to(tl.bfloat16)",
                                                                               f"stride_out_n, {CUT_BFLOAT16}")),
    mutant("the result cut off, not rounded", "plain own", "output_masked", ("acc.to(tl.float16)", CUT_FLOAT16)),
    mutant("the result through bfloat16", "plain", "output_masked", ("acc.to(tl.float16)", "acc.to(tl.bfloat16).to(tl.float16)")),
    mutant("the result through float16", "gated chain", "output_masked",
           ("stride_out_n, acc.to(tl.bfloat16)", "stride_out_n, acc.to(tl.float16).to(tl.bfloat16)")),
    mutant("hidden values cut off, not rounded", "gated", "hidden_masked", ("acc.to(tl.bfloat16)", CUT_BFLOAT16)),
]  # fmt: skip

SAVED = [
    mutant("the activation saved as the preactivation", "plain", "hidden_masked",
           ("tl.store(preact_tile, acc.to(", "tl.store(preact_tile, activate(acc).to(")),
    mutant("the preactivation saved without its bias", "plain", "hidden_masked",
           ("tl.store(preact_tile, acc.to(", f"tl.store(preact_tile, (acc - {BIAS}).to(")),
    mutant("gate and up saved the wrong way round", "gated_tma", "hidden_tma",
           ("preact_desc.store([0, m, n], gate.to", "preact_desc.store([0, m, n], up.to"),
           ("preact_desc.store([1, m, n], up.to", "preact_desc.store([1, m, n], gate.to")),
    mutant("the preactivation rounded twice", "gated", "hidden_masked",
           ("tl.store(preact_tile, gate.to(tl.bfloat16)", "tl.store(preact_tile, gate.to(tl.float16).to(tl.bfloat16)")),
    mutant("the preactivation through bfloat16", "plain", "hidden_masked",
           ("tl.store(preact_tile, acc.to(tl.float16)", "tl.store(preact_tile, acc.to(tl.bfloat16).to(tl.float16)")),
    mutant("the tile saved after the epilogue", "chain", "output_masked",
           ("stride_tile_n, acc.to({dtype})", "stride_tile_n, (acc * tl.load(layer_scale_ptr + cols, mask=cols < N, other=0.0)"
            ".to(tl.float32)[None, :]).to({dtype})")),
    mutant("the tile saved without its bias", "gated", "output_masked",
           ("stride_tile_n, acc.to({dtype})", f"stride_tile_n, (acc - {BIAS}).to({{dtype}})")),
]  # fmt: skip

MUTANTS = [*MASKS, *STRIDES, *TILES, *GATES, *BIASES, *ROUNDINGS, *SAVED]
