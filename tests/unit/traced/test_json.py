"""Users' own functions as JSON: there and back, and what is refused there."""

from __future__ import annotations

import pickle

import pytest
import torch

import mlpdsl
from mlpdsl import MLPSpec, SpecError
from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.function import Function
from mlpdsl.traced import activation, epilogue
from tests.functions import ACTIVATIONS, EPILOGUES, GATED
from tests.unit.traced.tools import as_json, call_of, check_formulas, scaled, snake, spec_of


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


def test_an_activation_as_an_epilogue_reads_back() -> None:
    """The input is another word there, and a formula's canonical form follows its words."""
    own = mlpdsl.activation(lambda x: 0.5 * x * torch.special.erfc(-x * 0.7071067811865476))
    spec = MLPSpec(dims=(4, 4), activation="identity", epilogue=(own,))
    assert MLPSpec.from_json(spec.to_json()) == spec
    assert spec.replace(bias=True).epilogue == spec.epilogue
