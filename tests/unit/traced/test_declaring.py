"""The ways to declare a function: by a name, with a derivative, as text, of two inputs, as an epilogue; and what that costs."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl
from mlpdsl import MLPSpec, SpecError, UnsupportedError, traced
from mlpdsl.function import REGISTERED, Function
from mlpdsl.traced import activation, epilogue, register_activation
from tests.functions import ACTIVATIONS, GATED, REFUSED
from tests.unit.traced.tools import as_json, call_of, other, reference, scaled, snake, spec_of


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
        assert "test_declaring.py:" in str(caught.value)
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
        with pytest.raises(UnsupportedError, match=r"cannot be fused \(test_declaring\.py:\d+") as caught:
            activation(fn)
        assert caught.value.reasons and len(str(caught.value)) < 500
