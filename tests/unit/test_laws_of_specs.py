"""Specs as data: JSON, hashes, pickles, keys and rendered text are functions of what is declared, and of nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpdsl
from mlpdsl import MLPSpec
from mlpdsl.backends import backend_named
from mlpdsl.codegen.lower import _lower, lower
from mlpdsl.names import ACTIVATIONS, EPILOGUE_OPERANDS
from mlpdsl.source import source_key, source_text
from mlpdsl.target import TARGETS
from mlpdsl.testing.strategies import NUMBERS, specs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 500
SM_90 = TARGETS["sm_90"]

OWN = [
    mlpdsl.activation(lambda x: x + torch.sin(1.3 * x) ** 2 / 1.3),
    mlpdsl.activation(lambda gate, up: torch.tanh(gate) * (up + 1.0)),
]
ENTRIES = [
    *EPILOGUE_OPERANDS,
    *ACTIVATIONS[:6],
    mlpdsl.epilogue(lambda y, gamma, keep, skip: skip + keep * gamma * y, gamma="column", keep="row", skip="tile"),
    mlpdsl.epilogue(lambda y, t: torch.tanh(y / t) * t, t="scalar"),
]
ANY = specs(activations=[*ACTIVATIONS, *OWN], epilogue_entries=ENTRIES)


def seeded(seed: int) -> MLPSpec:
    """A spec from a number alone, for processes that must agree on it."""
    pick = random.Random(seed).choice
    gated = pick((False, True))
    dims = tuple(pick((1, 7, 8, 20, 33, 64, 72, 768, 4096)) for _ in range(3 if gated else pick((2, 3, 4, 5))))
    entries: list[Any] = []
    for _ in range(pick((0, 0, 1, 2, 3))):
        entry = pick(ENTRIES)
        taken = {name for e in entries for name in (e.operands if hasattr(e, "operands") else {e})}
        if not taken & set(entry.operands if hasattr(entry, "operands") else {entry} & set(EPILOGUE_OPERANDS)):
            entries.append(entry)
    activation = "identity" if len(dims) == 2 else pick([*ACTIVATIONS, OWN[0], *(OWN[1:] if gated else ())])
    dtype, precision = pick(NUMBERS)
    return MLPSpec(dims=dims, activation=activation, gated=gated, bias=pick((False, True)), dtype=dtype, precision=precision,
                   epilogue=tuple(entries))  # fmt: skip


def key_of(spec: MLPSpec, target: str = "sm_90") -> str:
    return source_key(spec, TARGETS[target], "triton")


@settings(max_examples=300)
@given(spec=ANY)
def test_every_copy_is_the_spec(spec: MLPSpec) -> None:
    """Through JSON, a pickle, copy, deepcopy and its own fields: equal, with equal hash, JSON and key."""
    text = spec.to_json()
    copies = [
        MLPSpec.from_json(text),
        MLPSpec.from_json(json.dumps(json.loads(text), indent=3)),  # order and space mean nothing
        MLPSpec.from_json(json.dumps(dict(reversed(json.loads(text).items())))),
        *(pickle.loads(pickle.dumps(spec, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        copy.copy(spec),
        copy.deepcopy(spec),
        MLPSpec(**{f.name: getattr(spec, f.name) for f in fields(MLPSpec)}),
        spec.replace(),
    ]
    for again in copies:
        assert again == spec and hash(again) == hash(spec)
        assert again.to_json() == text
        assert key_of(again) == key_of(spec)
        assert lower(again, SM_90) == lower(spec, SM_90)


@settings(max_examples=300)
@given(one=ANY, other=ANY)
def test_equality_json_and_key_agree(one: MLPSpec, other: MLPSpec) -> None:
    """Two specs have one key where they are equal, and two where they are not."""
    assert (one == other) == (one.to_json() == other.to_json()) == (key_of(one) == key_of(other))


@settings(max_examples=200)
@given(spec=ANY, data=st.data())
def test_every_field_is_in_the_key(spec: MLPSpec, data: st.DataObject) -> None:
    """One field changed, and everything that identifies the spec is another: the spec, its JSON, its key, on every target."""
    changes: dict[str, Any] = {
        "dims": (*spec.dims[:-1], spec.dims[-1] + 8),
        "bias": not spec.bias,
        "dtype": "bfloat16" if spec.dtype == "float16" else "float16",
        "epilogue": (*spec.epilogue, "mish"),
    }
    if spec.dtype == "float32":
        changes["precision"] = "tf32" if spec.precision == "ieee" else "ieee"
    if len(spec.dims) == 3 and not (spec.gated and spec.activation == OWN[1]):
        changes["gated"] = not spec.gated
    if len(spec.dims) > 2:
        changes["activation"] = "mish" if spec.activation != "mish" else "silu"
    name = data.draw(st.sampled_from(sorted(changes)))
    more = {"precision": "ieee"} if name == "dtype" else {}
    changed = spec.replace(**{name: changes[name], **more})
    assert changed != spec and changed.to_json() != spec.to_json()
    assert len({key_of(s, target) for s in (spec, changed) for target in TARGETS}) == 2 * len(TARGETS)


def test_rendered_text_is_whole_and_stable() -> None:
    """Five hundred specs over every target: Python that compiles, nothing of Jinja left, a key in it that is its own, and the same
    bytes when everything is worked out again."""
    keys: dict[str, str] = {}
    targets, backend = list(TARGETS.values()), backend_named("triton")
    for seed in range(EXAMPLES):
        spec, target = seeded(seed), targets[seed % len(targets)]
        if backend.supports(lower(spec, target), target):
            target = SM_90  # refused there, with a reason
        key, text = source_text(spec, target, "triton")
        whole_and_own(text, key)
        keys.setdefault(key, spec.to_json() + target.name)
        assert keys[key] == spec.to_json() + target.name
        if seed % 10 == 0:
            again = MLPSpec.from_json(spec.to_json())
            assert backend.emit(_lower.__wrapped__(again, target, "triton"), key) == text
    assert len(keys) > 0.95 * EXAMPLES


def whole_and_own(text: str, key: str) -> None:
    """Raises unless text is complete: compiles, has no remains of a template, and bears its key."""
    compile(text, "<generated>", "exec", dont_inherit=True)
    for remains in ("{{", "}}", "{%", "%}", "{#", "#}", "Undefined", "\t", " \n"):
        assert remains not in text, remains
    assert key in text
    names = re.findall(r"^def (\w+)", text, re.M)
    assert len(names) == len(set(names)) and {"forward", "backward"} <= set(names)


@pytest.mark.parametrize("spoiled", ["{{ x }}", "{% if %}", "def f(:", "x = Undefined", "def forward():\n    pass"])
def test_the_check_of_rendered_text_sees_remains(spoiled: str) -> None:
    key, text = source_text(seeded(3), SM_90, "triton")
    whole_and_own(text, key)
    with pytest.raises((AssertionError, SyntaxError)):
        whole_and_own(f"{text}\n# {spoiled}\n" if spoiled.startswith(("{", "x")) else f"{text}\n{spoiled}\n", key)


def test_same_bytes_in_every_process() -> None:
    """Other hash seeds, another working directory, the specs in another order: the same JSON, keys and text."""
    code = textwrap.dedent(f"""
        import hashlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.unit.test_laws_of_specs import digests
        print(digests(range({{}})))
    """)
    runs = []
    for hash_seed, order in (("1", "30"), ("4242", "29, -1, -1")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code.format(order)], env=env, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout)
    assert runs[0] == runs[1] == f"{digests(range(30))}\n"


def digests(seeds: range) -> list[str]:
    """The digest of JSON, key and text of each seeded spec, in the order of the seeds."""
    found = {}
    for seed in seeds:
        spec = seeded(seed)
        key, text = source_text(spec, SM_90, "triton")
        found[seed] = hashlib.sha256("\0".join((spec.to_json(), key, text)).encode()).hexdigest()[:12]
    return [found[seed] for seed in sorted(found)]
