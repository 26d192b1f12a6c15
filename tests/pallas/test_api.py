"""The surface of `mlpdsl.jax`: names, errors in one sentence, parameters from torch and back, and who imports jax."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mlpdsl
import mlpdsl.jax
from mlpdsl import MLPSpec, ShapeError, UnsupportedError
from mlpdsl.testing.calls import make_call, same_bits
from tests.pallas.support import arrays, interpreted, to_jax, to_torch

SPEC = MLPSpec(dims=(8, 16, 4), activation="silu", gated=True, bias=True, epilogue=("residual", "scale"))


def python(code: str) -> str:
    """What a new process prints, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names


def test_every_name_is_there_and_says_what_it_is() -> None:
    assert mlpdsl.jax.__all__ == ["compile", "from_torch", "reference", "to_torch"]
    assert set(mlpdsl.jax.__all__) <= set(dir(mlpdsl.jax))
    for name in mlpdsl.jax.__all__:
        assert getattr(mlpdsl.jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlpdsl.jax.nothing  # noqa: B018


def test_a_function_is_called_after_its_spec() -> None:
    mlp = mlpdsl.jax.compile(SPEC, interpret=True)
    assert mlp.__name__ == mlp.__qualname__ == "mlp_gated_silu_8x16x4_fp32"
    assert mlp.__doc__ is not None and "(..., 8)" in mlp.__doc__ and "gate_proj.weight" in mlp.__doc__


def test_importing_mlpdsl_imports_no_jax() -> None:
    code = "import sys, mlpdsl{}; print(any(m == 'jax' or m.startswith(('jax.', 'jaxlib')) for m in sys.modules))"
    assert python(code.format("")) == python(code.format(", mlpdsl.jax")) == "False\n"
    assert python(code.format(", mlpdsl.jax; mlpdsl.jax.compile")) == "True\n"


def test_without_jax_it_says_what_to_install() -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('jax', 'jaxlib'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Blocker())
import mlpdsl, mlpdsl.jax
for name in mlpdsl.jax.__all__:
    try:
        getattr(mlpdsl.jax, name)
    except ModuleNotFoundError as error:
        print(error.name, error)
"""
    assert python(code).splitlines() == ["jax mlpdsl.jax needs jax: pip install 'mlpdsl[jax]'"] * 4


def test_without_jax_nothing_else_is_missed() -> None:
    """A module that is missing for another reason is named as it is."""
    code = """
import sys
sys.modules['mlpdsl.jax.checks'] = None
import mlpdsl.jax
try:
    mlpdsl.jax.compile
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code) == "mlpdsl.jax.checks\n"


def test_torchs_compile_names_jaxs() -> None:
    call = make_call(SPEC, (3,), 0)
    with pytest.raises(UnsupportedError, match=r"mlpdsl\.jax\.compile"):
        call.run(mlpdsl.compile(SPEC, backend="pallas"))


# Errors


def arguments() -> dict[str, Any]:
    return arrays(make_call(SPEC, (3,), 0))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "x's width": ({"x": lambda t: t[:, :7]}, r"x\.shape: got \(3, 7\); allowed: \(\.\.\., 8\)"),
    "x without a dimension": ({"x": lambda t: t[0, 0]}, r"x\.shape: got \(\); allowed: \(\.\.\., 8\)"),
    "x's dtype": ({"x": lambda t: t.astype(jnp.bfloat16)}, r"x\.dtype: got .*bfloat16.*; allowed: float32"),
    "x of numpy": ({"x": np.asarray}, r"x: .*jax\.Array"),
    "x of torch": ({"x": to_torch}, r"x: .*jax\.Array"),
    "a weight the other way": ({"up_proj.weight": lambda t: t.T}, r"up_proj\.weight\.shape: got \(8, 16\); allowed: \(16, 8\)"),
    "a weight's dtype": ({"down_proj.weight": lambda t: t.astype(jnp.float16)}, r"down_proj\.weight\.dtype"),
    "a bias of two dimensions": ({"gate_proj.bias": lambda t: t[None]}, r"gate_proj\.bias\.shape: got \(1, 16\); allowed: \(16,\)"),
    "a residual that would broadcast": ({"residual": lambda t: t[:1]}, r"residual\.shape: got \(1, 4\).*broadcast"),
    "a tile's dtype": ({"residual": lambda t: t.astype(jnp.bfloat16)}, r"residual\.dtype"),
    "a scalar of two numbers": ({"scale": lambda t: jnp.stack([t, t])}, r"scale\.shape: got \(2,\)"),
    "a scalar in Python": ({"scale": float}, r"scale: .*jax\.Array"),
}


@pytest.mark.parametrize("how", ["interpreted", "reference"])
@pytest.mark.parametrize("what", CHANGES)
def test_an_argument_that_does_not_fit(what: str, how: str) -> None:
    """Both functions say which, what it is, and what is allowed; traced or not."""
    mlp = interpreted(SPEC) if how == "interpreted" else mlpdsl.jax.reference(SPEC)
    changes, message = CHANGES[what]
    given = {name: changes[name](t) if name in changes else t for name, t in arguments().items()}
    *positional, residual, scale = given.values()
    with pytest.raises(ShapeError, match=message):
        mlp(*positional, residual=residual, scale=scale)


def test_arguments_that_are_missing_or_too_many() -> None:
    mlp = interpreted(SPEC)
    *positional, residual, scale = arguments().values()
    with pytest.raises(ShapeError, match=r"parameters: got .*5 of them.*; allowed: .*6: gate_proj\.weight, gate_proj\.bias"):
        mlp(*positional[:-1], residual=residual, scale=scale)
    with pytest.raises(ShapeError, match=r"parameters: got .*8 of them"):
        mlp(*positional, residual, scale)
    with pytest.raises(ShapeError, match=r"operands: .*residual= \(tile\), scale= \(scalar\)"):
        mlp(*positional, residual=residual)
    with pytest.raises(ShapeError, match=r"operands: .*layer_scale"):
        mlp(*positional, residual=residual, scale=scale, layer_scale=scale)


def test_errors_come_while_tracing_too() -> None:
    *positional, residual, scale = arguments().values()
    with pytest.raises(ShapeError, match=r"x\.shape"):
        jax.jit(interpreted(SPEC))(positional[0][:, :7], *positional[1:], residual=residual, scale=scale)


def test_what_fits_although_it_is_of_another_form() -> None:
    """Operands in float32 beside 16 bits, a scalar of one dimension, and keywords in any order."""
    spec = SPEC.replace(dtype="bfloat16", epilogue=("scale", "residual"))
    call = make_call(spec, (3,), 0)
    *positional, scale, residual = arrays(call).values()
    mlp = jax.jit(interpreted(spec))
    wanted = to_torch(mlp(*positional, scale=scale, residual=residual))
    assert same_bits(to_torch(mlp(*positional, residual=residual, scale=scale.reshape(1))), wanted)
    assert same_bits(to_torch(mlp(*positional, residual=residual, scale=scale.astype(jnp.float32))), wanted)


# Parameters from torch and back


def test_parameters_of_a_module_share_its_memory() -> None:
    layer = mlpdsl.MLP(SPEC)
    found = mlpdsl.jax.from_torch(SPEC, layer)
    assert list(found) == list(SPEC.parameter_shapes())
    for name, tensor in layer.state_dict().items():
        assert same_bits(to_torch(found[name]), tensor), name
        if tensor.data_ptr() % 64 == 0:  # XLA copies what lies otherwise
            assert found[name].unsafe_buffer_pointer() == tensor.data_ptr(), name
    back = mlpdsl.jax.to_torch(SPEC, found)
    assert list(back) == list(found)
    for name, array in found.items():
        assert back[name].data_ptr() == array.unsafe_buffer_pointer(), name
    mlpdsl.MLP(SPEC).load_state_dict(back)


def test_a_module_and_a_function_agree() -> None:
    """`mlp(x, *from_torch(spec, layer).values())` is the layer, whose parameters lie in another order perhaps."""
    spec = SPEC.replace(epilogue=())
    layer = mlpdsl.MLP(spec)
    x = torch.randn(5, 8)
    for source in (layer, layer.state_dict(), dict(reversed(layer.state_dict().items()))):
        y = interpreted(spec)(to_jax(x), *mlpdsl.jax.from_torch(spec, source).values())
        torch.testing.assert_close(to_torch(y), layer(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_bit_goes_there_and_back(dtype: str) -> None:
    """Dense or not."""
    spec = SPEC.replace(dtype=dtype)
    for layout in ("dense", "transposed", "strided", "offset"):
        call = make_call(spec, (3,), 1, weights=layout)
        state = dict(zip(spec.parameter_shapes(), call.params, strict=True))
        back = mlpdsl.jax.to_torch(spec, mlpdsl.jax.from_torch(spec, state))
        assert [n for n, t in state.items() if not same_bits(back[n], t)] == []


def test_parameters_that_do_not_fit() -> None:
    state = mlpdsl.MLP(SPEC).state_dict()
    params = mlpdsl.jax.from_torch(SPEC, state)
    functions: tuple[tuple[Any, Any], ...] = ((mlpdsl.jax.from_torch, state), (mlpdsl.jax.to_torch, params))
    for function, source in functions:
        with pytest.raises(ShapeError, match=r"up_proj\.bias: .*no such .*gate_proj\.weight"):
            function(SPEC, {name: t for name, t in source.items() if name != "up_proj.bias"})
        with pytest.raises(ShapeError, match=r"gate_proj\.weight: .*nothing"):
            function(SPEC, {})
        with pytest.raises(ShapeError, match=r"down_proj\.weight\.shape: got \(16, 4\); allowed: \(4, 16\)"):
            function(SPEC, {**source, "down_proj.weight": source["down_proj.weight"].T})
        with pytest.raises(ShapeError, match=r"gate_proj\.weight\.dtype: got .*float32.*; allowed: bfloat16"):
            function(SPEC.replace(dtype="bfloat16"), source)


def test_what_is_in_the_state_besides_does_not_matter() -> None:
    state = {"other": torch.zeros(3), **mlpdsl.MLP(SPEC).state_dict()}
    assert list(mlpdsl.jax.from_torch(SPEC, state)) == list(SPEC.parameter_shapes())


def test_an_array_on_several_devices_goes_to_no_tensor() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = {name: jax.device_put(jnp.ones(shape), everywhere) for name, shape in SPEC.parameter_shapes().items()}
    with pytest.raises(ShapeError, match=r"gate_proj\.weight\.sharding: got 'on 4 devices'; .*device_put"):
        mlpdsl.jax.to_torch(SPEC, found)
    assert list(mlpdsl.jax.to_torch(SPEC, {n: jax.device_put(a, jax.devices()[0]) for n, a in found.items()})) == list(found)
