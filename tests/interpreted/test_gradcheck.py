"""Derivatives against finite differences: the generated text, with float64 for its float32, under `torch.autograd.gradcheck`.

Nothing of ours says here what a derivative should be. In float64 nothing but the differences themselves rounds, so that a
derivative that is off in the fourth digit shows.
"""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

import mlpdsl
from mlpdsl import MLPSpec, loader, source
from mlpdsl.cache import digest
from mlpdsl.dispatch import Runner, runner
from mlpdsl.names import ACTIVATIONS
from mlpdsl.tape import Tapes

torch.set_num_threads(1)

CPU = torch.device("cpu")
TOLERANCES = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}
"""Differences of float64 are good to about 1e-9 here. The printed formulas are float32's: their constants have 8 digits, so that
value and derivative, each right to 2⁻²⁴, differ from one another by as much."""

SNAKE = mlpdsl.activation(lambda x: x + torch.sin(1.3 * x) ** 2 / 1.3)
CLAMPED = mlpdsl.activation(
    lambda gate, up: gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0)) * (up.clamp(-7.0, 7.0) + 1.0)
)
EVERY_KIND = mlpdsl.epilogue(
    lambda y, gamma, keep, skip, t: skip + keep * gamma * torch.tanh(y / t) * t, gamma="column", keep="row", skip="tile", t="scalar"
)


def in_float64(text: str) -> str:
    """Generated text of a float32 spec, computing, keeping and returning float64."""
    changed, count = re.subn(r"\b(tl|torch)\.float32\b", r"\1.float64", text)
    assert count > 10 and "float16" not in text
    dots = changed.count('input_precision="ieee"')
    assert dots == changed.count("tl.dot(") > 0
    return changed.replace('input_precision="ieee"', 'input_precision="ieee", out_dtype=tl.float64')


def loaded(text: str, folder: Path) -> ModuleType:
    return loader.load(folder / "kernel.py", text, digest(text))


class _Kernels(torch.autograd.Function):
    """forward and backward of a generated module, on tensors of any dtype that it was written for."""

    @staticmethod
    def forward(ctx: Any, run: Runner, count: int, x: Tensor, *inputs: Tensor) -> Tensor:
        y, *saved = run.module.forward(x, list(inputs[:count]), flat(run, inputs[count:]), True, run.pick)
        ctx.save_for_backward(x, *inputs, *saved)
        ctx.run, ctx.count, ctx.inputs = run, count, len(inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        inputs, saved, run = rest[: ctx.inputs], rest[ctx.inputs :], ctx.run
        parameters, operands = inputs[: ctx.count], flat(run, inputs[ctx.count :])
        needs = list(ctx.needs_input_grad[2:])
        found = run.module.backward(grad.contiguous(), x, parameters, operands, saved, needs, run.pick)
        same = ("",) * (1 + ctx.count) + tuple(run.plan.epilogue.same_as)
        grads = [grad if kind == "grad" else g for g, kind in zip(found, same, strict=True)]
        return None, None, *(g.reshape(t.shape) for g, t in zip(grads, (x, *inputs), strict=True))


def flat(run: Runner, operands: Sequence[Tensor]) -> list[Tensor]:
    kinds = [o.kind for o in run.plan.epilogue.operands]
    return [o if kind == "tile" else o.reshape(-1) for o, kind in zip(operands, kinds, strict=True)]


def double(shape: Sequence[int], generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).requires_grad_()


def case(spec: MLPSpec, rows: int, scale: float = 2.0) -> list[Tensor]:
    """x, parameters and operands in float64. Preactivations spread over a few units: every branch, and no kink within 1e-6."""
    generator = torch.Generator().manual_seed(3)
    inputs = [double((rows, spec.d_in), generator, scale)]
    inputs += [double(s, generator, s[-1] ** -0.5 if len(s) == 2 else 0.5) for s in spec.parameter_shapes().values()]
    shapes = {"tile": (rows, spec.d_out), "column": (spec.d_out,), "row": (rows, 1), "scalar": ()}
    for kind in spec.operands().values():
        inputs.append((double(shapes[kind], generator, 0.3).detach() + 1.2).requires_grad_())
    return inputs


def differentiated(spec: MLPSpec, text: str, folder: Path, rows: int = 5, fast: bool = True, scale: float = 2.0) -> None:
    """Raises `GradcheckError` where the text's backward is not the derivative of its forward."""
    own = runner(spec.to_json(), CPU)
    run = own._replace(module=loaded(in_float64(text), folder), tapes=Tapes(False))
    mlp: Callable[..., Tensor] = functools.partial(_Kernels.apply, run, len(spec.parameter_shapes()))
    assert gradcheck(mlp, tuple(case(spec, rows, scale)), fast_mode=fast, check_undefined_grad=not fast, **TOLERANCES)


def text_of(spec: MLPSpec) -> str:
    return source.generate(spec).text


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, gated: bool, tmp_path: Path) -> None:
    """Between layers and, with every operand that a name stands for, on the output."""
    epilogue = ("layer_scale", activation, "residual", "scale")
    spec = MLPSpec(dims=(7, 20, 6), activation=activation, gated=gated, bias=True, epilogue=epilogue)
    wide = 8.0 if activation in ("gelu_10", "relu6") else 2.0  # beyond where they are cut off
    differentiated(spec, text_of(spec), tmp_path, scale=wide)


OWN = {
    "snake": MLPSpec(dims=(7, 20, 6), activation=SNAKE, bias=True, epilogue=(EVERY_KIND,)),
    "snake, gated": MLPSpec(dims=(7, 20, 6), activation=SNAKE, gated=True, epilogue=(EVERY_KIND, "gelu")),
    "gate and up": MLPSpec(dims=(7, 20, 6), activation=CLAMPED, gated=True, bias=True, epilogue=("silu", EVERY_KIND)),
    "deep": MLPSpec(dims=(7, 33, 5, 40, 6), activation="mish", bias=True, epilogue=(EVERY_KIND,)),
    "one linear": MLPSpec(dims=(40, 6), activation="identity", bias=True, epilogue=(SNAKE, EVERY_KIND)),
}


@pytest.mark.parametrize("name", OWN)
def test_functions_of_ones_own(name: str, tmp_path: Path) -> None:
    differentiated(OWN[name], text_of(OWN[name]), tmp_path)


def test_sums_over_several_tiles(tmp_path: Path) -> None:
    """70 rows and 40 columns: partial sums of biases and operands, and split sums of the weight gradients."""
    differentiated(OWN["one linear"], text_of(OWN["one linear"]), tmp_path, rows=70)


def test_element_by_element(tmp_path: Path) -> None:
    """The whole Jacobian, each element by differences of its own, where fast mode takes one random projection."""
    spec = MLPSpec(dims=(2, 3, 2), activation="gelu", gated=True, bias=True, epilogue=("layer_scale", "residual"))
    differentiated(spec, text_of(spec), tmp_path, rows=2, fast=False)


MUTATED = MLPSpec(dims=(2, 3, 1), activation="gelu", gated=True, bias=True, epilogue=("layer_scale", "silu", "residual", "scale"))
WRONG: dict[str, tuple[str, str, str]] = {  # what: function, its text, in place of that
    "gate's gradient without up": ("activate_grad", "(grad * up)", "grad"),
    "up's gradient with the gate": ("activate_grad", "grad * t9", "grad * gate"),
    "a constant of the derivative off in the fourth digit": ("activate_grad", "0.3989422804014327", "0.3988422804014327"),
    "hidden value without up": ("activate_grad", "t9 * up", "t9"),
    "bias gradient of the gate for up": ("hidden_grad_masked", "bias_row_ptr + N + cols, tl.sum(tl.where(inside, up_grad",
                                         "bias_row_ptr + N + cols, tl.sum(tl.where(inside, gate_grad"),
    "input gradient without up": ("input_grad_masked", "tl.static_range(2)", "tl.static_range(1)"),
    "a tile gradient that is not multiplied": ("finish_grad", "return t8 * layer_scale", "return t8"),
}  # fmt: skip


def function_of(text: str, name: str) -> tuple[int, int]:
    """Where a function's text begins and ends."""
    start = text.index(f"def {name}(")
    end = re.compile(r"\n(?=@|def |[A-Z#])").search(text, start)
    return start, end.start() if end else len(text)


def test_the_text_that_is_mutated_passes(tmp_path: Path) -> None:
    differentiated(MUTATED, text_of(MUTATED), tmp_path, rows=2)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_derivative_is_refused(what: str, tmp_path: Path) -> None:
    name, old, new = WRONG[what]
    text = text_of(MUTATED)
    start, end = function_of(text, name)
    assert old in text[start:end], f"{name} no longer has {old!r}:\n{text[start:end]}"
    wrong = text[:start] + text[start:end].replace(old, new) + text[end:]
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        differentiated(MUTATED, wrong, tmp_path, rows=2)  # small: where fast mode fails, torch goes through every element
