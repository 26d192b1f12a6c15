"""What those found who tried to break the declaration of functions."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import mlpdsl
from mlpdsl import SpecError, UnstableWarning, UnsupportedError, traced
from mlpdsl import plain as plain_form
from mlpdsl.codegen.expr.torch_code import to_torch
from mlpdsl.traced import activation, epilogue
from tests.functions import ACTIVATIONS
from tests.unit.traced.tools import as_json, check_formulas, spec_of


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
