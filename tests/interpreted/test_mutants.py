"""Wrong kernels: generated text with one line changed must be refused by the same checks that pass the text itself.

Constants that are wrong in the sixth digit are caught by the sweeps in `test_special_values`.
"""

from __future__ import annotations

import pytest

from tests import support
from tests.support import Call, check_call, make_call

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

from dataclasses import dataclass
from pathlib import Path

from mlpdsl import MLPSpec, loader, ops, source
from mlpdsl.dispatch import Runner, runner, target_of

MASKED = MLPSpec(dims=(50, 70, 41), activation="gelu", gated=True, bias=True, dtype="bfloat16", epilogue=("layer_scale",))
PLAIN = MLPSpec(dims=(50, 70, 41), activation="silu", bias=True, dtype="float16", epilogue=("residual",))
IEEE = MLPSpec(dims=(50, 70, 41), activation="gelu", gated=True, dtype="float32")
# (gate, up) of one's own, and an epilogue with an operand of each kind.
OWN = MLPSpec.from_json("""{
    "dims": [50, 70, 97], "gated": true, "dtype": "float16",
    "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
    "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                  "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}]
}""")
TMA = MLPSpec(dims=(72, 136, 104), activation="gelu", gated=True, bias=True, dtype="bfloat16")


@dataclass(frozen=True)
class Mutant:
    what: str
    spec: MLPSpec
    old: str
    new: str
    kernel: str = ""
    """The kernel in which to replace every occurrence; "" for all of the text."""


MUTANTS = [
    Mutant(
        "x read beyond K",
        MASKED,
        "mask=(rows < M)[:, None] & inside_k[None, :], other",
        "mask=(rows < M)[:, None], other",
        "hidden_masked",
    ),
    Mutant("x and weights read beyond K", MASKED, "inside_k = k + ks < K", "inside_k = k + ks < K + BLOCK_K", "hidden_masked"),
    Mutant("last step of K left out", MASKED, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)", "output_masked"),
    Mutant(
        "rows stored beyond M",
        MASKED,
        "inside = (rows < M)[:, None] & (cols < N)",
        "inside = (rows < M + 1)[:, None] & (cols < N)",
        "output_masked",
    ),
    Mutant(
        "columns stored beyond N", MASKED, "[:, None] & (cols < N)[None, :]", "[:, None] & (cols < N + 1)[None, :]", "hidden_masked"
    ),
    Mutant("x taken as dense", MASKED, "ks[None, :] * stride_x_k", "ks[None, :]", "hidden_masked"),
    Mutant(
        "weight strides swapped",
        PLAIN,
        "cols[:, None] * stride_weight_out + ks[None, :] * stride_weight_in",
        "cols[:, None] * stride_weight_in + ks[None, :] * stride_weight_out",
        "output_masked",
    ),
    Mutant("tile_m and tile_n swapped", MASKED, "tile_m, tile_n = tile_order", "tile_n, tile_m = tile_order", "hidden_masked"),
    Mutant("gate and up swapped", MASKED, "activate(gate, up)", "activate(up, gate)", "hidden_masked"),
    Mutant("gate and up swapped where up lies first", TMA, "tl.where(up_first != 0, second, first)", "first", "hidden_tma"),
    Mutant("gate's gradient without up", MASKED, "(grad * up)", "grad"),
    Mutant("gate's gradient summed with gate's weight twice", MASKED, "* up_distance", "* 0", "input_grad_masked"),
    Mutant("gate's and up's gradients by address, not by name", TMA, "plane ^ up_first", "plane", "input_grad_tma"),
    Mutant(
        "bias after the activation",
        PLAIN,
        "    acc = activate(acc)",
        "    acc = activate(acc - bias_again) + bias_again",
        "hidden_masked",
    ),
    Mutant(
        "bias of the first tile for all",
        PLAIN,
        "tl.load(bias_ptr + cols, mask=cols < N",
        "tl.load(bias_ptr + cols % BLOCK_N, mask=cols < N",
        "hidden_masked",
    ),
    Mutant("bias gradient of one tile of rows", PLAIN, "bias_rows_ptr + tile_m.to(tl.int64) * N", "bias_rows_ptr", "epilogue_grad"),
    Mutant("bias gradient summed over padding", MASKED, "r < count", "r < count + 1", "sum_rows"),
    Mutant("derivative at the incoming gradient", PLAIN, "activate_grad(acc, x)", "activate_grad(x, acc)", "hidden_grad_masked"),
    Mutant(
        "derivative of the up half", MASKED, "activate_grad(acc, gate, up)", "activate_grad(acc, up, gate)", "hidden_grad_masked"
    ),
    Mutant(
        "no derivative at all",
        PLAIN,
        "x_grad, hidden = activate_grad(acc, x)",
        "_, hidden = activate_grad(acc, x)\n    x_grad = acc",
        "hidden_grad_masked",
    ),
    Mutant("hidden not emitted but its gradient", PLAIN, "hidden.to(", "x_grad.to(", "hidden_grad_masked"),
    Mutant("float32 product in tf32", IEEE, 'input_precision="ieee"', 'input_precision="tf32"'),
    Mutant(
        "rounded before the bias",
        MASKED,
        "gate += tl.load",
        "gate = gate.to(tl.bfloat16).to(tl.float32) + tl.load",
        "hidden_masked",
    ),
    Mutant(
        "rounded before the activation",
        MASKED,
        "acc = activate(gate, up)",
        "acc = activate(gate.to(tl.bfloat16).to(tl.float32), up.to(tl.bfloat16).to(tl.float32))",
        "hidden_masked",
    ),
    Mutant("rounded before the epilogue", MASKED, "finish(acc, ", "finish(acc.to(tl.bfloat16).to(tl.float32), ", "output_masked"),
    Mutant(
        "accumulated in bfloat16",
        MASKED,
        "acc = tl.dot(x, weight.T, acc)",
        "acc = tl.dot(x, weight.T, acc).to(tl.bfloat16).to(tl.float32)",
        "output_masked",
    ),
    Mutant(
        "only the first split of a sum", PLAIN, "split = tl.program_id(1)", "split = tl.program_id(1) * 0", "weight_grad_masked"
    ),
    Mutant("splits overlap", PLAIN, "tl.minimum(first_row + rows_per_split, M)", "M", "weight_grad_masked"),
    Mutant(
        "a tile of the persistent loop left out",
        TMA,
        "tiles_m * tiles_n, tl.num_programs(0)",
        "tiles_m * tiles_n - 1, tl.num_programs(0)",
        "output_tma",
    ),
    Mutant(
        "residual's rows by the output's stride",
        PLAIN,
        "rows[:, None] * stride_residual_m",
        "rows[:, None] * stride_out_m",
        "output_masked",
    ),
    Mutant("a row operand by the column", OWN, "operand1_ptr + rows, mask=rows < M", "operand1_ptr + rows * 0, mask=rows < M"),
    Mutant("a row operand's gradient of one tile of columns", OWN, "tile_n.to(tl.int64) * M + rows", "rows", "epilogue_grad"),
    Mutant(
        "a row operand's gradient of the first columns",
        OWN,
        "tl.where(inside, operand1_grad",
        "tl.where(inside & (cols < 64)[None, :], operand1_grad",
    ),
    Mutant("a scalar's gradient of one tile of columns", OWN, "tl.num_programs(1) + tile_n", "tl.num_programs(1)", "epilogue_grad"),
    Mutant("two operands' gradients swapped", OWN, "operand0_grad, operand1_grad", "operand1_grad, operand0_grad", "epilogue_grad"),
    Mutant("up without its 1", OWN, "(up + 1.0) * gate", "up * gate", "activate"),
    Mutant("up's gradient without the gate", OWN, "grad * (t6 * gate)", "grad * t6", "activate_grad"),
    Mutant(
        "an output column of zeros",
        PLAIN,
        "acc.to(tl.float16), mask=inside)",
        "tl.where(cols[None, :] == 40, 0.0, acc).to(tl.float16), mask=inside)",
        "output_masked",
    ),
]


def mutated(mutant: Mutant) -> str:
    text = source.generate(mutant.spec).text
    start, end = 0, len(text)
    if mutant.kernel:
        start = text.index(f"def {mutant.kernel}(")
        end = text.find("\n@triton.jit", start) if "\n@triton.jit" in text[start:] else len(text)
        after = text.find("\n# Each linear", start)
        end = min(end, after) if after >= 0 else end
    body = text[start:end]
    assert mutant.old in body, f"{mutant.what}: the text no longer has {mutant.old!r}"
    new = mutant.new.replace("bias_again", "tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]")
    return text[:start] + body.replace(mutant.old, new) + text[end:]


def call_of(spec: MLPSpec) -> Call:
    """Strided x, residual and gradient, up before gate: what a wrong kernel is likely to trip over."""
    rows, lies = (150, "padded") if spec is TMA else (70, "strided")
    return make_call(spec, (rows,), 11, x=lies, operands="ragged", dy="offset", pair="up_first" if spec.gated else "apart")


def substitute(monkeypatch: pytest.MonkeyPatch, spec: MLPSpec, text: str, name: str, folder: Path) -> None:
    """Make the op run `text` for every spec, under a key of its own."""
    call = call_of(spec)
    own = runner(spec.to_json(), call.x.device)
    module = loader.load(folder / "kernel.py", text, f"{name:x<16}".replace(" ", "_"))
    monkeypatch.setattr(ops, "runner", lambda spec_json, device: Runner(own.plan, module, own.pick))


@pytest.mark.parametrize("spec", [MASKED, PLAIN, IEEE, TMA, OWN], ids=["masked", "plain", "ieee", "tma", "own"])
def test_the_text_itself_passes(spec: MLPSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert target_of(call_of(spec).x.device).has_tma
    substitute(monkeypatch, spec, source.generate(spec).text, f"itself{spec.short_name}", tmp_path)
    check_call(call_of(spec))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what.replace(" ", "-"))
def test_refused(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = mutated(mutant)
    substitute(monkeypatch, mutant.spec, text, f"mutant {MUTANTS.index(mutant)}", tmp_path)
    with pytest.raises(AssertionError):  # the oracle's or a guard's word, not a crash
        check_call(call_of(mutant.spec))
