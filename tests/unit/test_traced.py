"""Users' own functions as data: what is accepted and refused, what the formulas are, and how they travel."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import math
import pickle
import re
import subprocess
import sys
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLPSpec, SpecError, UnstableWarning, UnsupportedError, traced
from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.function import REGISTERED, Function
from mlpdsl.traced import activation, epilogue, register_activation
from tests.functions import ACTIVATIONS, EPILOGUES, GATED, REFUSED

WARNED = {"squareplus", "polar_gate"}  # they cancel far out, where the test of soundness says so
IN_FLOAT32 = {"silu_upcast", "gelu_tensor_constant"}  # what they compute in float32 whatever they are given


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing traced or registered by another test, so that every declaration traces and warns."""
    monkeypatch.setattr(traced, "_traced", {})
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def snake(x: Tensor) -> Tensor:
    return x + torch.sin(x).square()


def other(x: Tensor) -> Tensor:
    return x * torch.cos(x)


def scaled(x: Tensor, gamma: Tensor) -> Tensor:
    return x * torch.tanh(gamma)


def spec_of(act: Any = "relu", epilogue: Any = (), dims: tuple[int, ...] = (4, 5, 6), **fields: Any) -> MLPSpec:
    return MLPSpec(dims=dims, activation=act, epilogue=epilogue, **fields)


def call_of(spec: MLPSpec, seed: int = 0) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """x, parameters and operands of a call of three rows."""
    torch.manual_seed(seed)
    shapes = {"tile": (3, spec.d_out), "column": (spec.d_out,), "row": (3, 1), "scalar": ()}
    operands = {name: torch.randn(shapes[kind]) for name, kind in spec.operands().items()}
    return torch.randn(3, spec.d_in), [torch.randn(s) for s in spec.parameter_shapes().values()], operands


def reference(spec: MLPSpec) -> Tensor:
    x, params, operands = call_of(spec)
    return mlpdsl.reference(spec)(x, *params, **operands)


def as_json(act: object = "relu", epilogue: object = (), **fields: object) -> MLPSpec:
    return MLPSpec.from_json(json.dumps({"dims": [4, 5, 6], "activation": act, "epilogue": epilogue, **fields}))


def points(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 4.0, 15.0], dtype=torch.float64).repeat(64)
    return [torch.randn(256, dtype=torch.float64, generator=generator) * scale for _ in range(count)]


def by_torch(fn: Callable[..., Tensor], at: list[Tensor]) -> list[Tensor]:
    """The value and every derivative, by the function and autograd."""
    leaves = [t.clone().requires_grad_() for t in at]
    value = fn(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)]


def by_formula(function: Function, at: list[Tensor]) -> list[Tensor]:
    value, partials = plain_form.expressions(function)
    return list(to_torch((value, *partials), function.inputs)(*at))


def check_formulas(name: str, fn: Callable[..., Tensor], function: Function) -> None:
    at = points(len(function.inputs))
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-8
    for found, expected in zip(by_formula(function, at), by_torch(fn, at), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


ON_A_LINE = ("reduction", "control flow", "integer", "complex", "random")


class TestCorpus:
    @pytest.mark.parametrize("name", [*ACTIVATIONS, *GATED])
    def test_activations(self, name: str) -> None:
        fn = {**ACTIVATIONS, **GATED}[name]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function = activation(fn)
        assert [w.category for w in caught] == [UnstableWarning] * (name in WARNED)
        assert function.inputs == (("gate", "up") if name in GATED else ("x",))
        check_formulas(name, fn, function)

    def test_a_way_through_numpy(self) -> None:
        def detour(x: Tensor) -> Tensor:
            y = x.detach().numpy()
            return torch.from_numpy(abs(y))

        with pytest.raises(UnsupportedError, match=r"numpy on a tensor|test_traced\.py:\d+: (y|return)"):
            activation(detour)

    def test_a_threshold_that_is_seen(self) -> None:
        fn = partial(F.softplus, threshold=8.0)
        check_formulas("softplus", fn, activation(fn))

    @pytest.mark.parametrize("name", EPILOGUES)
    @pytest.mark.filterwarnings("error")
    def test_epilogues(self, name: str) -> None:
        fn, kinds = EPILOGUES[name]
        function = epilogue(fn, **kinds)
        assert function.operands == kinds
        check_formulas(name, fn, function)

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, name: str) -> None:
        fn, inputs, word = REFUSED[name]
        assert inputs in (1, 2)
        with pytest.raises((UnsupportedError, SpecError)) as caught:
            activation(fn)
        assert word in str(caught.value)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("captured_parameter", "through_numpy")])
    def test_the_line_is_named(self, name: str) -> None:
        """The line of the fault where there is one; else the function's first."""
        fn, _, word = REFUSED[name]
        with pytest.raises((UnsupportedError, SpecError)) as caught:
            activation(fn)
        found = re.search(r"\(functions\.py:(\d+): (.*?)\)?:? ", str(caught.value))
        assert found, str(caught.value)
        lines, first = inspect.getsourcelines(fn)
        at = int(found[1]) - first
        on_a_line = (word in ON_A_LINE and name != "python_random") or name in ("shifted_tokens", "doubly_transposed")
        assert 0 <= at < len(lines)
        assert (at > 0) == on_a_line
        assert lines[at].strip()[:60] in str(caught.value)


TORCHS = [
    (F.silu, "silu"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    (lambda x: F.gelu(x), "gelu"),
    (torch.relu, "relu"),
    (torch.Tensor.relu, "relu"),
    (nn.ReLU(), "relu"),
    (F.relu6, "relu6"),
    (F.leaky_relu, "leaky_relu"),
    (nn.ELU(), "elu"),
    (torch.sigmoid, "sigmoid"),
    (torch.tanh, "tanh"),
    (nn.Softplus(), "softplus"),
    (F.mish, "mish"),
    (nn.Hardswish(), "hardswish"),
    (lambda x: torch.relu(x).square(), "relu2"),
    (lambda x: x, "identity"),
    (nn.Identity(), "identity"),
]


class TestCanonical:
    @pytest.mark.parametrize(("fn", "name"), TORCHS)
    def test_what_has_a_name_becomes_it(self, fn: Callable[..., Tensor], name: str) -> None:
        spec = spec_of(fn, epilogue=(fn,))
        assert spec == spec_of(name, epilogue=(name,))
        assert type(spec.activation) is str

    @pytest.mark.parametrize("fn", [nn.LeakyReLU(0.2), nn.ELU(0.5), partial(F.softplus, beta=2.0), nn.Hardtanh(), F.logsigmoid])
    def test_what_only_looks_like_it_does_not(self, fn: Callable[..., Tensor]) -> None:
        assert isinstance(spec_of(fn).activation, Function)

    def test_equal_formulas_are_equal_functions(self) -> None:
        one, two = activation(lambda x: torch.sin(x) * 3.0), activation(lambda y: 3.0 * y.sin())
        third = activation(lambda x: torch.sin(x) * 4.0)
        assert one == two and hash(one) == hash(two) and one is not two
        assert one != third
        assert spec_of(one) == spec_of(two) and hash(spec_of(one)) == hash(spec_of(two))
        assert spec_of(one).short_name == spec_of(two).short_name != spec_of(third).short_name
        assert mlpdsl.generate(spec_of(one)).key == mlpdsl.generate(spec_of(two)).key != mlpdsl.generate(spec_of(third)).key

    def test_kinds_and_names_of_operands_are_part_of_it(self) -> None:
        kinds: tuple[Any, ...] = ("column", "row", "tile", "scalar")
        assert len({epilogue(scaled, gamma=kind) for kind in kinds}) == 4
        assert epilogue(lambda x, beta: x * torch.tanh(beta), beta="row") != epilogue(scaled, gamma="row")

    def test_declared_twice_traced_once(self) -> None:
        assert activation(snake) is activation(snake)

    def test_a_derivative_of_ones_own_may_be_that_of_a_name(self) -> None:
        own = activation(lambda x: x, derivative=lambda x: torch.ones_like(x))
        assert MLPSpec.from_json(spec_of(own).to_json()) == spec_of(own)


class TestJSON:
    @pytest.mark.parametrize("name", [*ACTIVATIONS, *GATED])
    @pytest.mark.filterwarnings("ignore::mlpdsl.errors.UnstableWarning")
    def test_round_trips(self, name: str) -> None:
        spec = spec_of({**ACTIVATIONS, **GATED}[name], gated=name in GATED)
        self.check(spec)

    @pytest.mark.parametrize("name", EPILOGUES)
    def test_epilogues_round_trip(self, name: str) -> None:
        fn, kinds = EPILOGUES[name]
        spec = spec_of(epilogue=("gelu", epilogue(fn, **kinds)))
        self.check(spec)
        assert MLPSpec.from_json(spec.to_json()).operands() == kinds

    @staticmethod
    def check(spec: MLPSpec) -> None:
        text = spec.to_json()
        assert text.isascii()
        for again in (MLPSpec.from_json(text), pickle.loads(pickle.dumps(spec))):
            assert again == spec and hash(again) == hash(spec)
            assert again.to_json() == text
            assert again.short_name == spec.short_name

    def test_a_function_pickles_as_its_formulas(self) -> None:
        function = activation(lambda x: torch.sin(x) * 3.0)
        again = pickle.loads(pickle.dumps(function))
        assert again == function and again.call is None and repr(again) == repr(function)

    def test_formulas_are_brought_to_one_form(self) -> None:
        one = as_json({"expr": "t = sin((x)); 3*t", "grads": ["cos(x)*3.0"]})
        assert one == spec_of(activation(lambda x: torch.sin(x) * 3.0))
        assert one.to_json() == spec_of(activation(lambda x: torch.sin(x) * 3.0)).to_json()

    @pytest.mark.parametrize(
        "expr", ["x + sin(x) * sin(x)", "x / (1.0 + abs(x))", "x * rsqrt(1.0 + x * x)", "x * tanh(exp(min(x, 20.0)))"]
    )
    def test_grads_left_out_are_derived(self, expr: str) -> None:
        declared = as_json({"expr": expr}).activation
        assert isinstance(declared, Function) and declared.call is None
        run = to_torch((plain_form.expressions(declared)[0],), ("x",))
        check_formulas(expr, lambda x: run(x)[0], declared)

    def test_grads_of_operands_and_of_a_pair_are_derived(self) -> None:
        pair = as_json({"expr": "sigmoid(gate) * up"}, gated=True).activation
        constant = as_json({"expr": "2.5"}).activation
        assert isinstance(constant, Function) and constant.partials == ("0.0",)
        assert isinstance(pair, Function) and pair.inputs == ("gate", "up") and pair.partials[1] == "sigmoid(gate)"
        (entry,) = as_json(epilogue=[{"expr": "tile * s + r", "operands": [["s", "scalar"], ["r", "row"]]}]).epilogue
        assert isinstance(entry, Function) and entry.partials == ("s", "tile", "1.0")

    def test_eager_runs_the_formulas(self) -> None:
        for spec in (spec_of(snake, epilogue=(epilogue(scaled, gamma="row"),)), spec_of(GATED["gated_snake"], gated=True)):
            again = MLPSpec.from_json(spec.to_json())
            x, params, operands = call_of(spec)
            leaves = [t.requires_grad_() for t in (x, *params, *operands.values())]
            results = []
            for each in (spec, again):
                y = mlpdsl.reference(each)(x, *params, **operands)
                results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
            torch.testing.assert_close(*results)

    @pytest.mark.parametrize(
        "act",
        [
            {"expr": None},
            {"expr": 1},
            {"expr": ["x"]},
            {"expr": {"expr": "x"}},
            {"expr": ""},
            {"expr": "x", "grad": ["1.0"]},
            {"expr": "x", "name": "f"},
            {"expr": "sin(x)", "grads": "cos(x)"},
            {"expr": "sin(x)", "grads": []},
            {"expr": "sin(x)", "grads": ["cos(x)", "x", "x"]},
            {"expr": "sin(x)", "grads": [None]},
            {"expr": "sin(x)", "grads": ["cos(y)"]},
            {"expr": "sin(x)", "grads": {"x": "cos(x)"}},
            {"expr": "sin(x)", "operands": [["gamma", "row"]]},
            {"expr": "sin(x)", "operands": {}},
            {"expr": "sin(x) * y"},
            {"expr": "sin(x) * gate"},
            {"expr": "sin(x)", "snippets": []},
            {"expr": "sin(x)", "snippets": {"cuda": ["sinf(x)", "cosf(x)"]}},
            {"expr": "sin(x)", "snippets": {"triton": "tl.sin(x)"}},
            {"expr": "sin(x)", "snippets": {"triton": ["tl.sin(x)"]}},
            {"expr": "sin(x)", "snippets": {"triton": ["tl.sin(x)", 1]}},
            {"expr": "x.__class__"},
            {"expr": "x.__class__.__base__.__subclasses__()"},
            {"expr": "__import__('os').system('true')"},
            {"expr": "eval(x)"},
            {"expr": "open(x)"},
            {"expr": "sin(x)(x)"},
            {"expr": "sin(x=x)"},
            {"expr": "sin(*x)"},
            {"expr": "sin(x, x)"},
            {"expr": "x[0]"},
            {"expr": "x if x else x"},
            {"expr": "lambda x: x"},
            {"expr": "[x for x in x]"},
            {"expr": "(y := x)"},
            {"expr": "x ** 2"},
            {"expr": "x < 1"},
            {"expr": "'x'"},
            {"expr": "f'{x}'"},
            {"expr": "x + True"},
            {"expr": "x + 1j"},
            {"expr": "x + 1e999"},
            {"expr": "x; x"},
            {"expr": "x = 1.0; x"},
            {"expr": "import os; x"},
            {"expr": "t: 1 = x; t"},
            {"expr": "x\x00"},
            {"expr": "\ud800"},
            {"expr": "(" * 5000 + "x" + ")" * 5000},
            {"expr": "-" * 50_000 + "x"},
            {"expr": "x" + "+x" * 40_000},
            {"expr": "sin(" * 3000 + "x" + ")" * 3000},
            {"expr": "x" * 200_000},
            {"expr": "x + " + "9" * 5000},
        ],
        ids=lambda act: str(act)[:50],
    )
    def test_hostile_activations(self, act: object) -> None:
        with pytest.raises(SpecError) as caught:
            as_json(act)
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize(
        "operands",
        [
            None,
            {"s": "row"},
            ["s", "row"],
            [["s"]],
            [["s", "row", "row"]],
            [[1, "row"]],
            [["s", 1]],
            [["s", "diagonal"]],
            [["s", "row"], ["s", "row"]],
            [["x", "row"]],
            [["tile", "row"]],
            [["grad", "row"]],
            [["self", "row"]],
            [["lambda", "row"]],
            [["None", "row"]],
            [["a b", "row"]],
            [["a\nb", "row"]],
            [["", "row"]],
            [["é", "row"]],
            [["s" * 65, "row"]],
        ],
        ids=str,
    )
    def test_hostile_operands(self, operands: object) -> None:
        with pytest.raises(SpecError):
            as_json(epilogue=[{"expr": "tile", "operands": operands}])

    @pytest.mark.parametrize(
        "text",
        [
            "tl.load(x)",
            "tl.store(x, x)",
            "tl.atomic_add(x, x)",
            "tl.device_print(x)",
            "tl.device_assert(x)",
            "tl.inline_asm_elementwise(x)",
            "tl.program_id(0)",
            "tl.sum(x)",
            "tl.zeros(x)",
            "tl.core.load(x)",
            "tl.math.math.exp(x)",
            "tl.exp.__call__(x)",
            "tl.__class__(x)",
            "tl.exp",
            "tl",
            "tl.exp(tl)",
            "libdevice",
            "libdevice.core.load(x)",
            "libdevice.exp.fn(x)",
            "x.to(tl.float16)",
            "x.__class__",
            "(1).real",
            "x[0]",
            "exp(x)",
            "print(x)",
            "y",
            "tl.exp(x)(x)",
            "tl.exp(x=x)",
            "tl.exp(*x)",
            "tl.where(x > 0, x, 'a')",
            "'x'",
            "f'{x}'",
            "lambda x: x",
            "[x]",
            "{x: x}",
            "(x, x)",
            "x if x > 0 else x",
            "x and x",
            "not x",
            "x ** 2",
            "x @ x",
            "x << 2",
            "(y := x)",
            "x; x",
            "x\nx",
            "x # and a comment\n, x",
            "1e999 * x",
            "9" * 400 + " * x",
            "1j * x",
            "None",
            "",
            "x" * 20_000,
            "-" * 5000 + "x",
            "\ud800",
        ],
        ids=lambda text: ascii(text)[:40],
    )
    def test_hostile_snippets(self, text: str) -> None:
        with pytest.raises(SpecError):
            as_json({"expr": "sin(x)", "grads": ["cos(x)"], "snippets": {"triton": [text, "tl.cos(x)"]}})
        with pytest.raises(SpecError):
            activation(torch.sin, triton=("tl.sin(x)", text))


class TestMoreOfJSON:
    """Forms that parse, and mean nothing."""

    @pytest.mark.parametrize("expr", ["lt(x, 0.0)", "both(x, x)", "invert(x)", "where(x, 1.0, 2.0)", "sin(lt(x, 0.0))"])
    def test_truth_values_and_numbers(self, expr: str) -> None:
        with pytest.raises(SpecError):
            as_json({"expr": expr, "grads": ["1.0"]})

    @pytest.mark.parametrize("inputs", ["two", 3, [], True])
    def test_number_of_inputs(self, inputs: object) -> None:
        with pytest.raises(SpecError):
            as_json({"expr": "sin(x)", "grads": ["cos(x)"], "inputs": inputs})

    def test_deeply_nested_snippet(self) -> None:
        with pytest.raises(SpecError):
            as_json({"expr": "sin(x)", "snippets": {"triton": ["-" * 900 + "x", "x"]}})

    @pytest.mark.parametrize("text", ["libdevice.__class__(x)", "libdevice.__getattr__(x)", "libdevice.__loader__(x)"])
    def test_dunder_functions_of_libdevice(self, text: str) -> None:
        with pytest.raises(SpecError):
            as_json({"expr": "sin(x)", "snippets": {"triton": [text, "x"]}})

    @pytest.mark.parametrize("name", ["tl", "libdevice"])
    def test_an_operand_with_the_name_of_a_module(self, name: str) -> None:
        texts = [f"tl.sin(tile) * {name}", "tl.cos(tile)", "libdevice.sin(tile)"]
        with pytest.raises(SpecError):
            as_json(epilogue=[{"expr": "tile", "operands": [[name, "row"]], "snippets": {"triton": texts}}])


class TestGeneratedText:
    @pytest.mark.parametrize("target", ["sm_80", "sm_90"])
    def test_operands_go_by_words_of_ours(self, target: str) -> None:
        """A user's name stands in comments and docstrings only."""
        names = {"flux": "tile", "rows": "column", "M": "row", "weight": "scalar", "launch": "scalar"}

        def mix(x: Tensor, flux: Tensor, rows: Tensor, M: Tensor, weight: Tensor, launch: Tensor) -> Tensor:
            return x * flux + rows * M - weight * launch

        spec = spec_of(epilogue=(epilogue(mix, **names),), dims=(16, 32, 16), dtype="float16")
        renamed = spec.replace(epilogue=({**epilogue(mix, **names).to_plain()},))
        generated = mlpdsl.generate(renamed, target)
        assert "flux" not in generated.path.parent.name
        tokens = list(tokenize.generate_tokens(io.StringIO(generated.text).readline))
        assert "flux" in generated.text
        assert not [t for t in tokens if "flux" in t.string and t.type not in (tokenize.COMMENT, tokenize.STRING)]
        params = re.findall(r"^def finish\((.*)\):", generated.text, re.M)
        assert params == ["tile, operand0, operand1, operand2, operand3, operand4"]

    def test_no_name_of_a_function_is_in_it(self) -> None:
        def unmistakable(x: Tensor) -> Tensor:
            return torch.sin(x) * 0.75

        text = mlpdsl.generate(spec_of(unmistakable, epilogue=(unmistakable,))).text
        assert "unmistakable" not in text
        assert "sin(x) * 0.75" in text


class TestRegister:
    def test_a_name_stands_for_the_function(self) -> None:
        made = register_activation("my_snake", snake)
        assert made == activation(snake)
        spec = spec_of("my_snake", epilogue=("my_snake",))
        assert spec == spec_of(snake, epilogue=(snake,))
        assert "my_snake" not in spec.to_json()
        REGISTERED.clear()
        assert MLPSpec.from_json(spec.to_json()) == spec
        with pytest.raises(SpecError):
            spec_of("my_snake")

    def test_again(self) -> None:
        register_activation("mine", snake)
        register_activation("mine", lambda y: y + torch.sin(y).square())
        with pytest.raises(SpecError, match="replace=True"):
            register_activation("mine", other)
        before = spec_of("mine")
        register_activation("mine", other, replace=True)
        assert spec_of("mine") == spec_of(other) != before == spec_of(snake)

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "Mine",
            "1st",
            "a-b",
            "a b",
            "a.b",
            "_a",
            "a" * 41,
            "é",
            "a\n",
            None,
            3,
            "silu",
            "swish",
            "prelu",
            "residual",
        ],
    )
    def test_names_that_cannot_be(self, name: Any) -> None:
        with pytest.raises(SpecError, match="register_activation, name"):
            register_activation(name, snake)
        assert name not in REGISTERED

    def test_what_cannot_be_registered(self) -> None:
        with pytest.raises(SpecError, match="an activation"):
            register_activation("mine", epilogue(scaled, gamma="row"))
        with pytest.raises(UnsupportedError):
            register_activation("mine", REFUSED["softmax"][0])  # type: ignore[arg-type]
        assert "mine" not in REGISTERED

    def test_a_gated_one(self) -> None:
        register_activation("pair", GATED["wavenet"])
        assert spec_of("pair", gated=True) == spec_of(GATED["wavenet"], gated=True)
        with pytest.raises(SpecError, match="one tensor where gated=False"):
            spec_of("pair")
        with pytest.raises(SpecError, match="a function of one tensor"):
            spec_of(epilogue=("pair",))

    def test_what_has_a_name_already(self) -> None:
        register_activation("mine", F.silu)
        assert spec_of("mine") == spec_of("silu")
        assert MLPSpec.from_json(spec_of("mine").to_json()) == spec_of("mine")


def hard_step(x: Tensor) -> Tensor:
    return torch.round(x)


def straight_through(x: Tensor) -> Tensor:
    return torch.ones_like(x)


class TestDerivative:
    def test_it_goes_into_the_formulas_and_into_eager(self) -> None:
        function = activation(hard_step, derivative=straight_through, check=False)
        assert function.partials == ("1.0",)
        for declared in (function, pickle.loads(pickle.dumps(function))):
            spec = spec_of(declared)
            x, params, _ = call_of(spec)
            x.requires_grad_()
            mlpdsl.reference(spec)(x, *params).backward(torch.ones(3, 6))
            torch.testing.assert_close(x.grad, torch.ones(3, 6) @ params[1] @ params[0])
            torch.testing.assert_close(reference(spec), torch.round(x.detach() @ params[0].T) @ params[1].T)

    def test_one_that_agrees_is_accepted(self) -> None:
        function = activation(torch.tanh, derivative=lambda x: 1.0 / torch.cosh(x.clamp(-40, 40)).square())
        assert "cosh" in function.partials[0]
        assert isinstance(spec_of(function).activation, Function)

    @pytest.mark.parametrize("wrong", [lambda x: -torch.cos(x), lambda x: torch.cos(x) * 1.02, straight_through])
    def test_disagreement_is_refused(self, wrong: Callable[[Tensor], Tensor]) -> None:
        def sine(x: Tensor) -> Tensor:
            return torch.sin(x)

        with pytest.raises(SpecError, match=r"derivative you gave disagrees.*check=False") as caught:
            activation(sine, derivative=wrong)
        assert "test_traced.py:" in str(caught.value)
        activation(sine, derivative=wrong, check=False)

    def test_a_pair_and_operands(self) -> None:
        pair = activation(
            lambda gate, up: torch.sin(gate) * up, derivative=lambda gate, up: (torch.cos(gate) * up, torch.sin(gate))
        )
        assert pair.partials == ("cos(gate) * up", "sin(gate)")
        ste = epilogue(
            lambda x, step: torch.round(x / step) * step,
            derivative=lambda x, step: (torch.ones_like(x), torch.round(x / step) - x / step),
            step="scalar",
            check=False,
        )
        assert ste.partials[0] == "1.0" and "step" in ste.partials[1]
        spec = spec_of(epilogue=(ste,))
        x, params, operands = call_of(spec)
        step = operands["step"].requires_grad_()
        (grad,) = torch.autograd.grad(mlpdsl.reference(spec)(x, *params, step=step).sum(), step)
        y = torch.relu(x @ params[0].T) @ params[1].T
        torch.testing.assert_close(grad, (torch.round(y / step) - y / step).sum())

    @pytest.mark.parametrize("wrong", [lambda gate, up: up, lambda gate, up: (up, gate, up)])
    def test_as_many_as_inputs(self, wrong: Callable[..., Any]) -> None:
        with pytest.raises(UnsupportedError, match="results where 2 are needed"):
            activation(torch.mul, derivative=wrong)

    def test_it_replaces_what_torch_lacks(self) -> None:
        with pytest.raises(SpecError, match="check=False"):
            activation(torch.floor, derivative=straight_through)
        assert activation(torch.floor, derivative=straight_through, check=False).value == "floor(x)"


class TestTriton:
    SINE = ("tl.sin(x)", "tl.cos(x)")

    def test_the_text_is_in_the_kernel_with_renamed_inputs(self) -> None:
        function = activation(torch.sin, triton=("1.0*tl.sin( x )", "tl.cos(x)"))
        assert function.snippets == (("triton", ("1.0 * tl.sin(x)", "tl.cos(x)")),)
        assert "return 1.0 * tl.sin(x)" in mlpdsl.generate(spec_of(function)).text
        gated = mlpdsl.generate(spec_of(function, gated=True)).text
        gated = gated[gated.index("@triton.jit") :]
        assert "tl.sin(gate)" in gated and "tl.cos(gate)" in gated and "tl.sin(x)" not in gated
        assert "tl.sin(tile)" in mlpdsl.generate(spec_of(epilogue=(function,))).text
        own = epilogue(scaled, gamma="column", triton=("tile * libdevice.tanh(gamma)", "libdevice.tanh(gamma)", "tile"))
        text = mlpdsl.generate(spec_of(epilogue=(own,))).text
        assert "tile * libdevice.tanh(operand0)" in text and "import libdevice" in text

    def test_eager_runs_the_python_function(self) -> None:
        spec = spec_of(activation(torch.sin, triton=("tl.exp(x)", "x")))
        torch.testing.assert_close(reference(spec), reference(spec_of(torch.sin)))

    def test_what_cannot_be_traced(self) -> None:
        with pytest.raises(UnsupportedError, match=r"erfinv.*triton="):
            activation(torch.erfinv)
        function = activation(torch.erfinv, triton=("libdevice.erfinv(x)", "libdevice.erfinv(x)"))
        assert (function.value, function.partials) == ("", ())
        assert "libdevice.erfinv(x)" in mlpdsl.generate(spec_of(function)).text
        again = MLPSpec.from_json(spec_of(function).to_json())
        assert again == spec_of(function)
        assert mlpdsl.generate(again).text == mlpdsl.generate(spec_of(function)).text

    def test_text_alone_has_no_eager_form(self) -> None:
        text_only = as_json({"expr": "", "grads": [], "snippets": {"triton": ["libdevice.erfinv(x)", "x * x"]}})
        with pytest.raises(UnsupportedError, match="text for triton only"):
            reference(text_only)

    @pytest.mark.parametrize("gated", [False, True])
    def test_round_trip(self, gated: bool) -> None:
        texts = ("tl.sin(gate) * up", "tl.cos(gate) * up", "tl.sin(gate)") if gated else self.SINE
        fn = (lambda gate, up: torch.sin(gate) * up) if gated else torch.sin
        spec = spec_of(activation(fn, triton=texts), gated=gated)
        assert MLPSpec.from_json(spec.to_json()) == spec != spec_of(fn, gated=gated)
        assert pickle.loads(pickle.dumps(spec)) == spec

    @pytest.mark.parametrize("texts", ["tl.sin(x)", ("tl.sin(x)",), ("tl.sin(x)",) * 3, 1, (1, 2), {"x": "x", "y": "y"}])
    def test_one_text_for_each(self, texts: Any) -> None:
        with pytest.raises(SpecError, match="triton"):
            activation(torch.sin, triton=texts)


class TestGated:
    def test_a_function_of_one_tensor_is_the_gate(self) -> None:
        spec = spec_of(snake, gated=True)
        x, (gate, up, down), _ = call_of(spec)
        torch.testing.assert_close(reference(spec), (snake(x @ gate.T) * (x @ up.T)) @ down.T)
        assert "snake" not in mlpdsl.generate(spec).text

    def test_a_function_of_two_is_all_of_it(self) -> None:
        fn = GATED["polar_gate"]
        spec = spec_of(activation(fn, check=False), gated=True)
        x, (gate, up, down), _ = call_of(spec)
        torch.testing.assert_close(reference(spec), fn(x @ gate.T, x @ up.T) @ down.T)

    def test_it_needs_both(self) -> None:
        with pytest.raises(SpecError, match="one tensor where gated=False"):
            spec_of(GATED["wavenet"])
        with pytest.raises(SpecError, match="of one tensor"):
            spec_of(epilogue=(activation(GATED["wavenet"]),))

    def test_optional_arguments_do_not_count(self) -> None:
        assert activation(GATED["gpt_oss_swiglu"]).inputs == ("gate", "up")
        assert activation(ACTIVATIONS["xielu"]).inputs == ("x",)
        with pytest.raises(SpecError, match="not of \\(a, b, c\\)"):
            activation(lambda a, b, c: a * b * c)


class TestEpilogue:
    def test_several_in_a_row(self) -> None:
        def add(x: Tensor, extra: Tensor) -> Tensor:
            return x + extra

        entries = (epilogue(scaled, gamma="column"), "residual", snake, epilogue(add, extra="row"), "gelu")
        spec = spec_of(epilogue=entries)
        assert list(spec.operands().items()) == [("gamma", "column"), ("residual", "tile"), ("extra", "row")]
        x, params, given = call_of(spec)
        y = torch.relu(x @ params[0].T) @ params[1].T
        expected = F.gelu(snake(scaled(y, given["gamma"]) + given["residual"]) + given["extra"])
        torch.testing.assert_close(reference(spec), expected)
        assert MLPSpec.from_json(spec.to_json()) == spec

    def test_an_operand_comes_once(self) -> None:
        one = epilogue(scaled, gamma="row")
        with pytest.raises(SpecError, match=r"epilogue\[1\].*operand 'gamma' once"):
            spec_of(epilogue=(one, one))
        with pytest.raises(SpecError, match="operand 'scale' once"):
            spec_of(epilogue=("scale", epilogue(lambda x, scale: x * scale, scale="row")))

    def test_a_function_without_operands_may_come_twice(self) -> None:
        assert len(spec_of(epilogue=(snake, snake)).epilogue) == 2

    @pytest.mark.parametrize(
        ("fn", "kinds", "says"),
        [
            (scaled, {}, "missing gamma.*Give each its kind"),
            (scaled, {"gamma": "colum"}, "Did you mean 'column'"),
            (scaled, {"gamma": None}, "'tile', 'column', 'row', 'scalar'"),
            (scaled, {"gamma": "row", "beta": "row"}, "no parameter beta"),
            (scaled, {"beta": "row"}, "missing gamma; no parameter beta"),
            (lambda: None, {}, "first parameter is the output tile"),
            (lambda x, grad: x * grad, {"grad": "row"}, "none of 'x', 'self', 'tile', 'grad'"),
            (nn.SiLU, {}, r"SiLU\(\)"),
            ("silu", {}, "a function of torch tensors"),
        ],
    )
    def test_errors(self, fn: Any, kinds: dict[str, Any], says: str) -> None:
        with pytest.raises(SpecError, match=says):
            epilogue(fn, **kinds)

    def test_operands_want_kinds_where_a_spec_is_declared(self) -> None:
        with pytest.raises(SpecError, match="kind"):
            spec_of(epilogue=(scaled,))
        with pytest.raises(SpecError, match=r"mlpdsl\.activation"):
            spec_of(epilogue(scaled, gamma="row"))

    def test_optional_parameters_stay_numbers(self) -> None:
        def shifted(x: Tensor, gamma: Tensor, eps: float = 0.5) -> Tensor:
            return x * gamma + eps

        assert epilogue(shifted, gamma="row").value == "tile * gamma + 0.5"
        assert epilogue(shifted, gamma="row", eps="scalar").value == "tile * gamma + eps"

    def test_an_operand_after_an_optional_number(self) -> None:
        def shifted(x: Tensor, a: Tensor, eps: float = 100.0, b: Tensor | None = None) -> Tensor:
            return x * a + eps if b is None else x * a + eps + b

        assert epilogue(shifted, a="row", b="row").value == "tile * a + 100.0 + b"

    def test_a_function_that_leaves_the_tile_out(self) -> None:
        spec = spec_of(epilogue=(epilogue(lambda x, b: torch.sin(b), b="column"),))
        assert reference(spec).shape == (3, 6)


class TestDeclaring:
    def test_it_is_fast(self) -> None:
        """The first declaration loads torch's tracer; the others must not be noticed."""
        code = """if True:
            import time, torch, mlpdsl
            start = time.perf_counter()
            mlpdsl.activation(lambda x: x * torch.sin(x))
            print(time.perf_counter() - start)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 30
        activation(snake)
        took = []
        for k in range(3):
            traced._traced.clear()
            start = time.perf_counter()
            activation(ACTIVATIONS["gelu_new"], check=True)
            epilogue(scaled, gamma=("row", "column", "tile")[k])
            took.append((time.perf_counter() - start) / 2)
        assert min(took) < 0.2

    def test_no_gpu_is_touched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("CUDA was initialised")

        monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
        monkeypatch.setattr(torch._C, "_cuda_init", refuse, raising=False)
        spec = spec_of(snake, epilogue=(epilogue(scaled, gamma="row"), other))
        MLPSpec.from_json(spec.to_json())
        as_json({"expr": "sin(x)"})
        assert not torch.cuda.is_initialized()

    def test_formulas_with_grads_need_no_torch(self) -> None:
        spec = spec_of(snake, epilogue=(epilogue(scaled, gamma="row"), activation(torch.sin, triton=("tl.sin(x)", "tl.cos(x)"))))
        code = """if True:
            import sys
            from mlpdsl import MLPSpec
            text = sys.stdin.read()
            spec = MLPSpec.from_json(text)
            assert spec.to_json() == text and spec.epilogue and hash(spec)
            print(*(name for name in ("torch", "triton", "numpy") if name in sys.modules))
        """
        done = subprocess.run([sys.executable, "-c", code], input=spec.to_json(), capture_output=True, text=True, check=True)
        assert done.stdout.split() == []

    @pytest.mark.parametrize("fn", [snake, REFUSED["noisy"][0]])
    def test_the_random_state_is_left_alone(self, fn: Any) -> None:
        before = torch.get_rng_state()
        with suppress(UnsupportedError):
            activation(fn)
        assert torch.equal(before, torch.get_rng_state())

    def test_options(self) -> None:
        with pytest.raises(SpecError, match="check"):
            activation(snake, check=1)  # type: ignore[arg-type]
        for wrong in (None, 3, "silu", torch.ones(2), nn.SiLU, print):
            with pytest.raises(SpecError):
                activation(wrong)  # type: ignore[arg-type]

    def test_a_function_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            activation(snake).value = "x"  # type: ignore[misc]

    def test_a_comparison_of_constants(self) -> None:
        assert activation(lambda x: torch.xlogy(x, x.abs() + 1.0)).value
        assert activation(lambda x: torch.where(torch.ones_like(x) > 0.5, torch.sin(x), x)).value

    def test_an_infinite_constant(self) -> None:
        def masked(x: Tensor) -> Tensor:
            return torch.where(x > 0, x, torch.tensor(float("inf")))

        with pytest.raises(UnsupportedError, match="finite"):
            activation(masked)

    @pytest.mark.parametrize(
        "fn",
        [
            lambda x: x.mul_(2.0),
            lambda x: F.relu(x, inplace=True),
            lambda x: x.double(),
            lambda x: x.half().float(),
            lambda x: x > 0,
            lambda x: x[0],
            lambda x: None,
            lambda x: x.masked_fill(x < 0, float("-inf")),
            lambda x: 1 / 0,
            lambda x: undefined_name(x),  # type: ignore[name-defined] # noqa: F821
            lambda x: x.no_such_method(),
        ],
    )
    def test_other_refusals_are_our_own(self, fn: Any) -> None:
        with pytest.raises(UnsupportedError, match=r"cannot be fused \(test_traced\.py:\d+") as caught:
            activation(fn)
        assert caught.value.reasons and len(str(caught.value)) < 500


class TestReviewed:
    """Found by those who tried to break it."""

    def test_infinities_in_comparisons(self) -> None:
        check_formulas("nan_to_num", torch.nan_to_num, activation(lambda x: torch.nan_to_num(x)))
        for compare in (torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne):
            for end in (math.inf, -math.inf):

                def fn(x: Tensor, compare: Any = compare, end: float = end) -> Tensor:
                    return torch.where(compare(x, end), x, 2.0 * x)

                check_formulas(compare.__name__, fn, activation(fn))

    def test_logit_has_a_derivative(self) -> None:
        def fn(x: Tensor) -> Tensor:
            return torch.logit(torch.sigmoid(x), 1e-3)

        check_formulas("logit", fn, activation(fn))

    @pytest.mark.parametrize("fn", [lambda x: x * math.exp(x), lambda x: max(x, 0.0), lambda x: x if x > 0 else -x])
    def test_python_numbers_are_control_flow(self, fn: Any) -> None:
        with pytest.raises(UnsupportedError, match=r"control flow.*torch\.where"):
            activation(fn)

    def test_complex_numbers_are_called_so(self) -> None:
        with pytest.raises(UnsupportedError, match="complex arithmetic"):
            activation(lambda x: torch.exp(1j * x).abs() * x)

    def test_what_is_written_in_place_and_shared(self) -> None:
        def behind(x: Tensor) -> Tensor:
            y = x * 1.0
            y.detach().mul_(2.0)
            return y

        def through(x: Tensor) -> Tensor:
            y = x.clone()
            y[...] = y.sin()
            return y

        for fn in (behind, through):
            with pytest.raises(UnsupportedError, match=r"in place|in-place"):
                activation(fn)
        assert activation(lambda x: x.clone().mul_(2.0).add_(1.0)).value == "x * 2.0 + 1.0"

    def test_it_warns_each_time(self) -> None:
        for _ in range(2):
            with pytest.warns(UnstableWarning, match="squareplus"):
                activation(ACTIVATIONS["squareplus"])

    @pytest.mark.parametrize("name", ["check", "derivative", "triton"])
    def test_operands_that_are_options(self, name: str) -> None:
        fn = eval(f"lambda x, {name}: x * {name}")
        with pytest.raises(SpecError, match=f"'{name}'.*rename"):
            epilogue(fn, **{name: "column"})

    @pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"),
                                        lambda: torch.autocast("cpu", dtype=torch.bfloat16)])  # fmt: skip
    def test_the_program_around_it_does_not_matter(self, around: Any) -> None:
        traced._traced.clear()
        with around():
            inside = activation(lambda x: torch.tanh(x) * torch.tensor(2.0))
        traced._traced.clear()
        assert inside == activation(lambda x: torch.tanh(x) * torch.tensor(2.0)) and inside.value == "tanh(x) * 2.0"

    def test_the_first_trace_imports_no_compiler(self) -> None:
        code = """if True:
            import sys, mlpdsl
            mlpdsl.activation(lambda x: x + x.sin().square())
            print([m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules])
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_the_default_dtype_does_not_matter(self) -> None:
        def act(x: Tensor) -> Tensor:
            return torch.tensor(1.7) * torch.tanh(x) + torch.where(x > 0, 1.7, 0.3)

        traced._traced.clear()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            value = activation(act).value
            assert torch.get_default_dtype() == torch.bfloat16
        finally:
            torch.set_default_dtype(before)
        assert value == "tanh(x) * 1.7000000476837158 + where(gt(x, 0.0), 1.7, 0.3)"

    def test_nan_goes_through_a_mask_of_a_value(self) -> None:
        spec = spec_of(activation(lambda gate, up: up * gate.masked_fill(gate < 0, 0.0)), gated=True)
        value = plain_form.expressions(spec.activation)[0]
        got = to_torch((value,), ("gate", "up"))(torch.tensor([-1.0, 1.0]), torch.tensor([math.nan, 2.0]))[0]
        assert got[0].isnan() and got[1] == 2.0

    def test_arithmetic_of_truth_values(self) -> None:
        for name, fn in {
            "isfinite": lambda x: torch.where(torch.isfinite(x), torch.tanh(x), torch.zeros_like(x)),
            "product": lambda x: torch.where((x > 0) * (x < 1), x, 0.5 * x),
            "sum": lambda x: ((x > 0) + (x > 1)) * x,
            "logical": lambda x: torch.where(torch.logical_and(x, x > 0), torch.sin(x), x),
        }.items():
            check_formulas(name, fn, activation(fn))

    def test_fmax_ignores_nan(self) -> None:
        value = plain_form.expressions(activation(lambda x: torch.fmax(x, torch.sin(x) * 0.0)))[0]
        assert to_torch((value,), ("x",))(torch.tensor([math.nan, -1.0]))[0].isnan().tolist() == [True, False]

    @pytest.mark.parametrize(
        "fn",
        [
            lambda x: x + torch.tensor(1.0) / torch.tensor(0.0),
            lambda x: x.clamp_(-1.0, 1.0),
            lambda x: x.double() if x.dtype == torch.float64 else (_ for _ in ()).throw(TypeError("no")),
        ],
    )
    def test_typed_errors_for_anything(self, fn: Any) -> None:
        with pytest.raises(UnsupportedError):
            activation(fn, derivative=torch.ones_like, check=False)

    @pytest.mark.parametrize("wrong", [None, math.nan, "a", (1.0, 2.0)])
    def test_derivatives_that_are_none(self, wrong: Any) -> None:
        with pytest.raises(UnsupportedError):
            activation(torch.sin, derivative=lambda x: wrong, check=False)

    def test_a_derivative_that_writes_into_its_inputs(self) -> None:
        with pytest.raises(UnsupportedError, match="in place"):
            epilogue(lambda t, r: t * r, r="tile", derivative=lambda t, r: (r.mul_(2.0), t), check=False)

    def test_functions_that_ask_for_a_dtype_or_two_dimensions(self) -> None:
        def two(x: Tensor) -> Tensor:
            assert x.dim() == 2
            return torch.sin(x) * 0.3

        def single(x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return x

        assert activation(two).value == "sin(x) * 0.3"
        with pytest.raises(UnsupportedError, match="float64"):
            activation(single)

    def test_operands_by_keyword_only(self) -> None:
        made = epilogue(lambda tile, *, gamma: tile * gamma, gamma="column")
        assert made.value == "tile * gamma" and made.operands == {"gamma": "column"}
        assert epilogue(lambda tile, fn: tile * fn, fn="row").value == "tile * fn"

    @pytest.mark.parametrize("expr", ["x + 1.0 / 0.0", "log(0.0) * x", "exp(1000.0) + x"])
    def test_numbers_that_are_not_finite(self, expr: str) -> None:
        with pytest.raises(SpecError, match="finite"):
            as_json({"expr": expr, "grads": ["1.0"]})

    def test_a_long_chain_is_refused_at_once(self) -> None:
        chain = "; ".join(["a0 = exp(x)", *(f"a{i} = sin(a{i - 1})" for i in range(1, 2000)), "a1999"])
        began = time.perf_counter()
        with pytest.raises(SpecError, match="operations"):
            as_json({"expr": chain})
        assert time.perf_counter() - began < 2.0

    @pytest.mark.parametrize("texts", [("tl.where(x)", "x"), ("x > 0.0", "x"), ("libdevice.nosuch(x)", "x"), ("tl.exp(x, x)", "x")])
    def test_snippets_that_cannot_run(self, texts: tuple[str, str]) -> None:
        with pytest.raises(SpecError):
            activation(torch.sin, triton=texts, check=False)

    def test_text_alone_is_compiled_and_copied(self) -> None:
        spec = as_json({"expr": "", "snippets": {"triton": ["tl.sin(x)", "tl.cos(x)"]}})
        assert "tl.sin(x)" in mlpdsl.generate(spec, "sm_90").text
        mlp = mlpdsl.compile(pickle.loads(pickle.dumps(spec)))
        with pytest.raises(UnsupportedError, match="text for triton only"):
            mlp(torch.randn(2, spec.d_in), *(torch.randn(s) for s in spec.parameter_shapes().values()))


def test_an_activation_as_an_epilogue_reads_back() -> None:
    """The input is another word there, and a formula's canonical form follows its words."""
    own = mlpdsl.activation(lambda x: 0.5 * x * torch.special.erfc(-x * 0.7071067811865476))
    spec = MLPSpec(dims=(4, 4), activation="identity", epilogue=(own,))
    assert MLPSpec.from_json(spec.to_json()) == spec
    assert spec.replace(bias=True).epilogue == spec.epilogue
