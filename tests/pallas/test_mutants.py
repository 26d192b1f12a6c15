"""A mutation gate for Pallas: named wrong kernels, each of which the ordinary check must refuse within a few calls.

As in `tests.mutation`, a mutant is a change of the generated text, and a kill is the oracle's word. All products have several
blocks and a remainder each way. To add one, append to `MUTANTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from mlpdsl import MLPSpec, loader
from mlpdsl.backends import BACKENDS
from mlpdsl.cache import digest
from mlpdsl.testing.calls import make_call
from mlpdsl.testing.oracle import OracleError
from tests.pallas.support import check, small_blocks

FAMILIES = {
    "plain": MLPSpec(dims=(20, 40, 24), activation="gelu", bias=True, epilogue=("residual",)),
    "gated": MLPSpec(
        dims=(20, 40, 24), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("residual", "layer_scale")
    ),
    "deep": MLPSpec(dims=(20, 24, 40, 17), activation="tanh", dtype="float16", epilogue=("scale",)),
}
ROWS, CALLS = 21, 2

Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel: in the function `within` of a family's text every occurrence of `old` becomes `new`."""

    name: str
    family: str
    within: str
    edits: Edits

    def __str__(self) -> str:
        return f"{self.name}, {self.family}"

    def text(self, text: str) -> str:
        """The generated text, changed. Raises `AssertionError` where it no longer has what is to be changed."""
        found = re.search(rf"^def {self.within}\(.*?(?=^def |\Z)", text, re.M | re.S)
        assert found is not None, f"{self}: the text has no function {self.within!r}"
        body = found[0]
        for old, new in self.edits:
            assert old in body, f"{self}: {self.within} no longer has {old!r}"
            body = body.replace(old, new)
        return text[: found.start()] + body + text[found.end() :]


def mutants(name: str, families: str, within: str, *edits: tuple[str, str]) -> list[Mutant]:
    return [Mutant(name, family, within, edits) for family in families.split()]


ALONE = "wrong where nothing is kept"
"""What forward and backward together do not show."""

BIAS = "bias_ref[...].astype(jnp.float32)"
START = "@pl.when(step == 0)"

MUTANTS = [
    *mutants("nothing is masked", "plain gated deep", "within", ("if size % length == 0", "if True")),
    *mutants("the mask is one too long", "plain gated", "within", ("index < size", "index <= size")),
    *mutants("the mask is one too short", "plain deep", "within", ("index < size", "index < size - 1")),
    *mutants("the mask of the first block for all", "plain", "within", ("step * length + ", "")),
    *mutants("x is not masked", "plain", "hidden_kernel", ("within(x_ref[...], 1, step, K)", "x_ref[...]")),
    *mutants("rows beyond the batch in a bias's gradient", "plain", "hidden_grad_kernel",
             ("within(preact_grad, 0, row, M)", "preact_grad")),
    *mutants("rows beyond the batch in a weight's gradient", "gated deep", "weight_grad_kernel",
             ("within(grad_ref[...], 0, step, K)", "grad_ref[...]")),
    *mutants("gate and up swapped", "gated", "hidden_kernel", ("activate(gate, up)", "activate(up, gate)")),
    *mutants("gate's bias for up as well", "gated", "hidden_kernel", (f"up_{BIAS}", f"gate_{BIAS}")),
    *mutants("gate's gradient without up", "gated", "activate_grad", ("(grad * up)", "grad")),
    *mutants("gate's and up's gradients swapped", "gated", "hidden_grad_kernel",
             ("gate_grad, up_grad, hidden =", "up_grad, gate_grad, hidden =")),
    *mutants("x's gradient through the gate only", "gated", "input_grad_kernel",
             ("acc[...] += dot(within(up_grad_ref[...]", "_ = dot(within(up_grad_ref[...]")),
    *mutants("bias left out", "plain gated", "output_kernel", (f" + {BIAS}", "")),
    *mutants("bias added twice", "plain", "hidden_kernel", (f"+ {BIAS}", f"+ 2.0 * {BIAS}")),
    *mutants("bias of the first tile for all", "plain", "output",
             ("(first(), j)", "(first(), first())")),
    *mutants("accumulator cleared for the first tile only", "plain", "output_kernel",
             (START, "@pl.when(pl.program_id(0) + pl.program_id(1) + step == 0)")),
    *mutants("accumulator cleared at every step", "plain", "hidden_grad_kernel", (START, "@pl.when(step >= 0)")),
    *mutants("accumulated in the spec's dtype", "gated", "output_kernel",
             ("1, step, K), 1, 1)", "1, step, K), 1, 1)\n    acc[...] = acc[...].astype(DTYPE).astype(jnp.float32)")),
    *mutants("rounded before the bias", "gated", "output_kernel",
             (f"acc[...] + {BIAS}", f"acc[...].astype(DTYPE).astype(jnp.float32) + {BIAS}")),
    *mutants("float32 products in bfloat16", "plain", "dot",
             ("dot_general(a, b,", "dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16),")),
    *mutants("the last step of K left out", "plain", "output", ("pl.cdiv(K, k)", "K // k")),
    *mutants("the last rows left out", "gated", "weight_grad", ("pl.cdiv(K, k)", "K // k")),
    *mutants("derivative at the output", "plain deep", "hidden_grad_kernel",
             ("activate_grad(acc[...], preact_ref[...].astype(jnp.float32))",
              "activate_grad(acc[...], activate(preact_ref[...].astype(jnp.float32)))")),
    *mutants("no derivative", "deep", "hidden_grad_kernel",
             ("preact_grad_ref[...] = preact_grad", "preact_grad_ref[...] = acc[...]")),
    *mutants("the activation saved as the preactivation", "plain", "hidden_kernel",
             ("preact_ref[...] = x.", "preact_ref[...] = activate(x).")),
    *mutants("the tile saved after the epilogue", "gated", "output_kernel",
             ("tile_ref[...] = tile.", "tile_ref[...] = finish(tile, 0.0, layer_scale_ref[...].astype(jnp.float32)).")),
    *mutants("residual scaled", "plain", "output_kernel", ("finish(tile, residual)", "finish(tile, residual * 1.0625)")),
    *mutants("a bias's gradient of the first tile only", "plain gated", "hidden_grad",
             ("jnp.sum(each, axis=(0, 1))", "each[0, 0]")),
    *mutants("layer_scale's gradient of the first row only", "gated", "backward",
             ("jnp.sum(layer_scale_grad, axis=0, keepdims=True)", "layer_scale_grad[:1]")),
    *mutants("a weight's gradient with x's tiles by the other index", "plain", "weight_grad",
             ("pl.BlockSpec((k, n), lambda i, j, s: (s, j))", "pl.BlockSpec((k, n), lambda i, j, s: (s, i))")),
    *mutants("the gradient emitted as the hidden value", "plain", "hidden_grad_kernel",
             ("hidden_ref[...] = hidden", "hidden_ref[...] = preact_grad")),
    *mutants(ALONE, "plain", "hidden_kernel",
             ("if preact_ref is not None:", "if preact_ref is None:\n            x = x + 1.0\n        else:")),
]  # fmt: skip


@contextmanager
def running(changed: Callable[[str], str]) -> Iterator[None]:
    """Inside, what is compiled runs the changed text, in small blocks."""

    def load(path: Path, text: str, key: str) -> ModuleType:
        text = changed(text)
        key = digest(text)
        return loader.load(f"mutant-{key[:16]}.py", text, key)

    with mock.patch.object(BACKENDS["pallas"], "load", load), small_blocks(16, 16, 16):
        yield


def check_all(family: str, alone: bool = True) -> None:
    for seed in range(CALLS):
        check(make_call(FAMILIES[family], (ROWS,), seed), alone=alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unchanged_text_passes(family: str) -> None:
    with running(lambda text: text):
        check_all(family)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_refused(mutant: Mutant) -> None:
    with running(mutant.text), pytest.raises(OracleError):
        check_all(mutant.family, alone=mutant.name == ALONE)


def test_every_name_is_of_one_change() -> None:
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
