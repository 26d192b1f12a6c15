"""Specs of the matrix lowered for a TPU on a machine that has none: the kernels that go into the module, by name."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import mlpdsl.jax
from mlpdsl import MLPSpec, UnsupportedError
from tests.compiled.matrix import SPECS
from tests.pallas.test_matrix import refusals

ROWS = 520


def in_what_a_tpu_has(spec: MLPSpec) -> MLPSpec:
    """The spec with bfloat16 for float16, and ieee for tf32."""
    return spec.replace(dtype="bfloat16" if spec.dtype == "float16" else spec.dtype, precision="ieee")


def types(spec: MLPSpec) -> dict[str, Any]:
    """x, parameters and operands by name, as types."""
    shapes = {"tile": (ROWS, spec.d_out), "row": (ROWS, 1), "column": (spec.d_out,), "scalar": ()}
    found = {"x": (ROWS, spec.d_in), **spec.parameter_shapes(), **{n: shapes[kind] for n, kind in spec.operands().items()}}
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype)) for name, shape in found.items()}


def of_named(spec: MLPSpec) -> Any:
    """`f(named)` for the target tpu_v5e."""
    mlp = mlpdsl.jax.compile(spec, backend="pallas", target="tpu_v5e")
    params, operands = tuple(spec.parameter_shapes()), tuple(spec.operands())
    return lambda t: mlp(t["x"], *(t[n] for n in params), **{n: t[n] for n in operands})


def exported(function: Any, *arguments: Any) -> str:
    text: str = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
    return text


def kernels(text: str) -> Counter[str]:
    """How often a module calls each kernel. Every custom call of a TPU's has a name."""
    names = Counter(re.findall(r'kernel_name = "(\w+)"', text))
    assert names.total() == text.count("@tpu_custom_call")
    return names


def loss(function: Any) -> Any:
    return lambda t: function(t).astype(jnp.float32).sum()


@pytest.mark.parametrize("name", SPECS)
def test_forward_and_gradients_cross_lower(name: str) -> None:
    """One kernel a product: gate and up share one, and so do both halves of x's gradient."""
    spec = in_what_a_tpu_has(SPECS[name])
    function, hidden = of_named(spec), len(spec.dims) - 2
    forward = Counter({"hidden": hidden, "output": 1})
    assert kernels(exported(function, types(spec))) == +forward
    weights = sum(len(shape) == 2 for shape in spec.parameter_shapes().values())
    backward = Counter({"hidden_grad": hidden, "weight_grad": weights, "input_grad": 1})
    assert kernels(exported(jax.value_and_grad(loss(function)), types(spec))) == forward + backward


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if refusals(spec)])
def test_what_a_tpu_has_not_is_refused(name: str) -> None:
    """When the function is made, not when it is called."""
    with pytest.raises(UnsupportedError) as caught:
        mlpdsl.jax.compile(SPECS[name], backend="pallas", target="tpu_v5e")
    for word, reason in zip(refusals(SPECS[name]), caught.value.reasons, strict=True):
        assert word in reason
    assert "tpu_v5e" in str(caught.value)


@pytest.mark.parametrize("name", ["swiglu-4096x14336", "minilm-384x1536", "own", "deep"])
def test_sharded_over_the_batch(name: str) -> None:
    """With `check_vma=True`, the default, forward talks to nobody, and the gradients of what is replicated are summed over all."""
    spec = SPECS[name]
    mesh = AbstractMesh((4,), ("batch",))
    rows, each = PartitionSpec("batch"), PartitionSpec()
    specs = {"x": rows, **dict.fromkeys(spec.parameter_shapes(), each)}
    specs |= {n: rows if kind in ("tile", "row") else each for n, kind in spec.operands().items()}
    sharded = jax.shard_map(of_named(spec), mesh=mesh, in_specs=(specs,), out_specs=rows)
    forward = exported(sharded, types(spec))
    assert kernels(forward)["output"] == 1 and "all_reduce" not in forward
    backward = exported(jax.grad(loss(sharded)), types(spec))
    assert kernels(backward)["input_grad"] == 1
    assert len(re.findall(r"stablehlo\.all_reduce", backward)) >= sum(specs[n] == each for n in specs)


def test_the_reference_lowers_without_a_kernel() -> None:
    spec = in_what_a_tpu_has(SPECS["own"])
    reference = mlpdsl.jax.reference(spec)
    order = ("x", *spec.parameter_shapes())
    text = exported(lambda t: reference(*(t[n] for n in order), **{n: t[n] for n in spec.operands()}), types(spec))
    assert "dot_general" in text and not kernels(text)
