"""One generated file for each structural branch, kept in full, so that a change of a template shows its effect in review."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from mlpdsl import MLPSpec, generate

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
UPDATE = "MLPDSL_UPDATE_GOLDENS"
HEADER = 4
"""Comment lines before the docstring, in every file: Triton's own key counts the lines above a kernel."""

LONGEST = 130

FUNCTIONS = """{
    "dims": [64, 128, 64], "gated": true, "dtype": "bfloat16",
    "activation": {
        "expr": "t1 = min(gate, 7.0); (min(max(up, -7.0), 7.0) + 1.0) * t1 * sigmoid(t1 * 1.702)",
        "grads": ["where(le(gate, 7.0), (min(max(up, -7.0), 7.0) + 1.0) * sigmoid(gate * 1.702), 0.0)",
                  "gate * sigmoid(gate * 1.702)"]
    },
    "epilogue": [
        {"expr": "residual + keep * gamma * tile", "grads": ["keep * gamma", "tile * keep", "tile * gamma", "1.0"],
         "operands": [["gamma", "column"], ["keep", "row"], ["residual", "tile"]]},
        {"expr": "tanh(tile / t) * t", "grads": ["tanh_grad(tile / t)", "tanh(tile / t)"], "operands": [["t", "scalar"]]}
    ]
}"""
"""Formulas as written here, and not as torch derives them: no version of torch changes this file."""

FILES = {
    "gated-bias-epilogue-bf16-sm_90": (
        "sm_90",
        MLPSpec(dims=(512, 1024, 512), activation="silu", gated=True, bias=True, dtype="bfloat16",
                epilogue=("layer_scale", "residual")),
    ),
    "ragged-gated-bias-epilogue-bf16-sm_90": (
        "sm_90",
        MLPSpec(dims=(333, 1111, 577), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("gelu", "residual")),
    ),
    "gelu-bias-fp16-sm_90": ("sm_90", MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float16")),
    "odd-fp32-sm_90": ("sm_90", MLPSpec(dims=(33, 65, 17), activation="gelu_tanh", gated=True, precision="tf32")),
    "deep-relu-fp32-sm_90": ("sm_90", MLPSpec(dims=(64, 128, 96, 128, 10), activation="relu")),
    "bias-epilogue-fp32-sm_90": (
        "sm_90",
        MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True, epilogue=("gelu", "residual")),
    ),
    "gated-bias-fp32-sm_90": ("sm_90", MLPSpec(dims=(512, 1536, 512), activation="silu", gated=True, bias=True, precision="tf32")),
    "single-epilogue-bf16-sm_90": (
        "sm_90",
        MLPSpec(dims=(1024, 256), activation="identity", dtype="bfloat16", epilogue=("gelu", "scale", "residual")),
    ),
    "narrow-bias-epilogue-bf16-sm_90": (
        "sm_90",
        MLPSpec(dims=(13, 64, 33, 20), activation="gelu", bias=True, dtype="bfloat16", epilogue=("silu", "residual")),
    ),
    "narrow-gated-fp16-sm_90": ("sm_90", MLPSpec(dims=(96, 128, 96), activation="silu", gated=True, dtype="float16")),
    "functions-bf16-sm_90": ("sm_90", MLPSpec.from_json(FUNCTIONS)),
    "gated-bf16-sm_80": ("sm_80", MLPSpec(dims=(512, 1024, 512), activation="silu", gated=True, dtype="bfloat16")),
    "gated-bias-epilogue-bf16-tpu_v5e": (
        "tpu_v5e",
        MLPSpec(dims=(512, 1024, 512), activation="silu", gated=True, bias=True, dtype="bfloat16",
                epilogue=("layer_scale", "residual")),
    ),
    "deep-relu-bias-fp32-tpu_v5e": ("tpu_v5e", MLPSpec(dims=(64, 128, 96, 128, 10), activation="relu", bias=True)),
    "single-epilogue-bf16-tpu_v5e": (
        "tpu_v5e",
        MLPSpec(dims=(1024, 256), activation="identity", dtype="bfloat16", epilogue=("gelu", "scale", "residual")),
    ),
    "gated-bf16-tpu_v5e": ("tpu_v5e", MLPSpec(dims=(512, 1024, 512), activation="silu", gated=True, dtype="bfloat16")),
    "functions-bf16-pallas-sm_90": ("sm_90", MLPSpec.from_json(FUNCTIONS).replace(bias=True)),
    "functions-bf16-tpu_v5e": ("tpu_v5e", MLPSpec.from_json(FUNCTIONS)),
}  # fmt: skip

files = pytest.mark.parametrize("name", FILES)


def text_of(name: str) -> str:
    target, spec = FILES[name]
    return generate(spec, target=target, backend="pallas" if "tpu" in name or "pallas" in name else "triton").text


def normalised(text: str) -> str:
    """Without what changes though the kernels do not: versions, and the key that they are part of."""
    text = re.sub(r"written by mlpdsl \S+ \(jinja2 \S+\)\.", "written by mlpdsl VERSION (jinja2 VERSION).", text, count=1)
    return re.sub(r"^# key   [0-9a-f]{64}$", "# key   KEY", text, count=1, flags=re.MULTILINE)


@files
def test_the_golden_files(name: str) -> None:
    file = GOLDENS / f"{name}.py.txt"
    made = normalised(text_of(name))
    if os.environ.get(UPDATE) == "1":
        file.write_text(made, encoding="utf-8")
    kept = file.read_text(encoding="utf-8") if file.exists() else ""
    assert made == kept, f"the text changed. If it was meant to: {UPDATE}=1 pytest tests/unit/test_goldens.py, and review git diff"


def test_every_golden_file_belongs_to_a_spec() -> None:
    assert {file.name for file in GOLDENS.iterdir()} == {f"{name}.py.txt" for name in FILES}


def test_versions_and_keys_are_the_only_things_normalised() -> None:
    text = text_of("gelu-bias-fp16-sm_90")
    changed = [pair for pair in zip(text.splitlines(), normalised(text).splitlines(), strict=True) if pair[0] != pair[1]]
    assert [after for _, after in changed] == [
        "# gelu-768x3072x768-fp16 for sm_90, written by mlpdsl VERSION (jinja2 VERSION).",
        "# key   KEY",
    ]


@files
def test_it_is_python_with_a_header_of_fixed_length(name: str) -> None:
    text = text_of(name)
    compile(text, name, "exec", dont_inherit=True)
    lines = text.splitlines()
    assert all(line.startswith("# ") for line in lines[:HEADER])
    assert lines[1].startswith('# spec  {"') and lines[2].startswith("# key   ")
    assert lines[HEADER].startswith('"""')  # so the docstring begins at the same line everywhere
    assert ast.get_docstring(ast.parse(text))


@files
def test_its_lines_are_short_and_clean(name: str) -> None:
    lines = text_of(name).split("\n")
    spec_line = 1
    long = [f"{i + 1}: {line}" for i, line in enumerate(lines) if len(line) > LONGEST and i != spec_line]
    assert long == []
    assert [i + 1 for i, line in enumerate(lines) if line != line.rstrip() or "\t" in line] == []
    assert lines[-1] == "" and lines[-2] != ""  # it ends with one newline
    text = "\n".join(lines)
    assert "\n\n\n\n" not in text
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert lines[first - 3 : first - 1] == ["", ""], f"two blank lines before {node.name}"


@files
def test_it_names_no_path_and_nothing_undefined(name: str) -> None:
    text = text_of(name)
    assert re.findall(r"(?:^|[\s\"'(=])/(?:[\w.-]+/)+", text) == []
    assert str(Path.home()) not in text and os.getcwd() not in text
    for word in ("Undefined", "None,)", "{{", "{%", "{#"):
        assert word not in text


@files
def test_every_kernel_is_launched_and_every_function_is_called(name: str) -> None:
    tree = ast.parse(text_of(name))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert defined - named == {"forward", "backward"}  # the two entry points


def test_line_numbers_do_not_depend_on_the_length_of_the_spec() -> None:
    widths = [MLPSpec(dims=dims, activation="silu", dtype="bfloat16") for dims in ((256, 256, 256), (2**20, 2**21, 2**20))]
    first, second = (
        [i for i, line in enumerate(generate(s, target="sm_90").text.splitlines()) if line.startswith("def ")] for s in widths
    )
    assert first == second
