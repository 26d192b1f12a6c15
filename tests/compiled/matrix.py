"""The specs, targets and rows whose kernels are compiled without a GPU, and what is wrong with one that was.

`test_matrix.py` tests them. `python -m tests.compiled.matrix` compiles all of them and writes benchmarks/results/compiled.json.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mlpdsl import MLPSpec, UnsupportedError
from mlpdsl.codegen.lower import lower
from mlpdsl.resources import Resources, resources
from mlpdsl.target import TARGETS
from mlpdsl.version import __version__

CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")

_OWN = """{
    "dims": %s, "gated": true, "dtype": "%s", "bias": %s,
    "activation": {"expr": "(up + 1.0) * gate * sigmoid(gate * 1.702)"},
    "epilogue": [{"expr": "skip + keep * gamma * tile / t",
                  "operands": [["gamma", "column"], ["keep", "row"], ["t", "scalar"], ["skip", "tile"]]}, "gelu"]
}"""
"""(gate, up) of one's own, and an epilogue with an operand of each kind."""

SPECS = {
    # MLPs of models
    "swiglu-4096x14336": MLPSpec(dims=(4096, 14336, 4096), activation="silu", gated=True, dtype="bfloat16"),
    "geglu-2048x16384": MLPSpec(dims=(2048, 16384, 2048), activation="gelu_tanh", gated=True, dtype="bfloat16"),
    "gelu-768x3072": MLPSpec(dims=(768, 3072, 768), activation="gelu", bias=True, dtype="float16", epilogue=("residual",)),
    "siglip-1152x4304": MLPSpec(dims=(1152, 4304, 1152), activation="gelu_tanh", bias=True, dtype="bfloat16"),
    "clip-1024x4096": MLPSpec(dims=(1024, 4096, 1024), activation="quick_gelu", bias=True, dtype="float16", epilogue=("scale",)),
    "relu2-3072x12288": MLPSpec(dims=(3072, 12288, 3072), activation="relu2", dtype="bfloat16", epilogue=("residual",)),
    "minilm-384x1536": MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True),
    # every built-in epilogue, and users' functions
    "gated-everything": MLPSpec(
        dims=(4096, 14336, 4096), activation="gelu", gated=True, bias=True, dtype="float16",
        epilogue=("layer_scale", "residual", "scale"),
    ),
    "single": MLPSpec(dims=(1024, 1024), activation="identity", bias=True, dtype="bfloat16", epilogue=("gelu", "scale")),
    "own": MLPSpec.from_json(_OWN % ([2880, 2880, 2880], "bfloat16", "true")),
    "own-odd": MLPSpec.from_json(_OWN % ([50, 70, 97], "float16", "false")),
    "own-ieee": MLPSpec.from_json(_OWN % ([512, 1024, 512], "float32", "true")),
    # activations that keep many values at once
    "mish-gated": MLPSpec(dims=(1024, 4096, 1024), activation="mish", gated=True, bias=True, dtype="float16"),
    "laplace": MLPSpec(
        dims=(1024, 4096, 1024), activation="laplace", bias=True, dtype="bfloat16", epilogue=("tanh", "layer_scale")
    ),
    "gelu_10": MLPSpec(dims=(512, 2048, 512), activation="gelu_10", bias=True, dtype="bfloat16"),
    "mish-gated-ieee": MLPSpec(
        dims=(512, 1536, 512), activation="mish", gated=True, bias=True, epilogue=("layer_scale", "residual")
    ),
    # float32
    "swiglu-ieee": MLPSpec(dims=(1024, 2816, 1024), activation="silu", gated=True),
    "tf32": MLPSpec(dims=(1024, 4096, 1024), activation="silu", gated=True, bias=True, precision="tf32"),
    "tf32x3": MLPSpec(dims=(1024, 4096, 1024), activation="gelu", bias=True, precision="tf32x3"),
    # depth and widths
    "deep": MLPSpec(dims=(256, 512, 256, 512, 128), activation="relu", bias=True, dtype="bfloat16"),
    "odd": MLPSpec(
        dims=(767, 3071, 769), activation="silu", gated=True, bias=True, dtype="bfloat16", epilogue=("gelu", "layer_scale")
    ),
    "odd-tf32": MLPSpec(dims=(333, 1001, 335), activation="softplus", bias=True, precision="tf32", epilogue=("elu", "residual")),
    "tiny": MLPSpec(dims=(8, 24, 16), activation="silu", gated=True, bias=True, dtype="float16", epilogue=("hardswish",)),
    "tiny-ieee": MLPSpec(dims=(1, 3, 1), activation="sigmoid", bias=True, epilogue=("leaky_relu", "scale")),
}  # fmt: skip

ROWS = {
    "swiglu-4096x14336": (4096, 64, 16, 1), "gated-everything": (4096, 1), "minilm-384x1536": (4096, 1),
    "odd": (4096, 1024, 64, 16, 1),
}  # fmt: skip
"""How many rows a call has, where it is not 4096 alone."""

REFUSED = {("tf32x3", chip): "tf32x3" for chip in ("gfx942", "gfx1100")} | {
    (name, "gfx1100"): "tf32" for name in ("tf32", "odd-tf32")
}
"""What Triton cannot compile, and a word of the reason."""


_PRODUCT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma", "gfx1100": "wmma"}
"""The matrix instruction of each chip."""


@dataclass(frozen=True)
class Case:
    """One spec on one chip."""

    name: str
    chip: str

    def __str__(self) -> str:
        return f"{self.name}-{self.chip}"

    def calls(self, brief: bool = False) -> list[tuple[str, int]]:
        """Path and number of rows of each call: every path that is printed, and every number. With `brief`, on Blackwell the first
        path alone, and everywhere the most rows and the fewest."""
        plan = lower(SPECS[self.name], TARGETS[self.chip])
        paths = ("tma", "masked") if plan.uses_tma or plan.copies else ("masked",)
        rows = ROWS.get(self.name, (4096,))
        if brief:
            paths = paths[:1] if self.chip in ("sm_100", "sm_120") else paths
            rows = tuple(dict.fromkeys((rows[0], rows[-1])))
        return [(path, m) for path in paths for m in rows]


CASES = [Case(name, chip) for name in SPECS for chip in CHIPS]

_COVERING = {
    "sm_80": """geglu-2048x16384 siglip-1152x4304 clip-1024x4096 relu2-3072x12288 gated-everything own-ieee tf32x3 deep odd odd-tf32
                tiny""",
    "sm_90": "swiglu-4096x14336 gelu-768x3072 minilm-384x1536 single own swiglu-ieee tf32 odd-tf32 tf32x3 tiny-ieee",
    "sm_100": "single own-odd mish-gated laplace gelu_10 tf32 tf32x3 tiny-ieee",
    "sm_120": "single own-odd mish-gated-ieee tf32 tf32x3 tiny",
    "gfx942": "geglu-2048x16384 relu2-3072x12288 single own-odd tf32 tf32x3 tiny-ieee",
    "gfx1100": "relu2-3072x12288 single own-odd laplace tf32 tf32x3 odd-tf32 tiny tiny-ieee",
}
COVERING = [Case(name, chip) for name in SPECS for chip in CHIPS if name in _COVERING[chip].split()]
"""A third of them, about the cheapest for which `test_the_covering_part_covers` holds."""


@dataclass(frozen=True)
class Row:
    """One kernel of one call, as compiled; `tile` is of the config, in elements. What is wrong with it is in `faults`, in words."""

    spec: str
    chip: str
    path: str
    m: int
    kernel: str
    stage: int
    tile: str
    warps: int
    registers: int | None
    spills: int | None
    shared: int
    instruction: str
    faults: tuple[str, ...]


def compile_case(case: Case, brief: bool = False) -> list[Row]:
    """Every kernel of forward and backward, of each of the case's calls. Raises `UnsupportedError` where Triton cannot."""
    rows = []
    for path, m in case.calls(brief):
        for r in resources(SPECS[case.name], case.chip, m, path=path, library=m == 4096):
            c = r.config
            tile = f"{c.block_m}x{c.block_n}x{c.block_k}x{c.num_stages}" if c else ""
            rows.append(
                Row(case.name, case.chip, path, m, r.name, r.stage, tile, r.warps, r.registers, r.spills, r.shared, r.instruction,
                    tuple(faults(r, case)))
            )  # fmt: skip
    return rows


def expected(r: Resources, case: Case) -> str:
    """The instruction that the kernel's product has to use."""
    spec = SPECS[case.name]
    if r.config is None or r.config.strategy == "library" or r.config.block_m == 1:
        return "fma"
    if spec.dtype == "float32" and spec.precision == "ieee":
        return "mfma" if case.chip == "gfx942" else "fma"  # CDNA multiplies whole float32
    small = r.config.block_m < 64 and case.chip in ("sm_90", "sm_100")  # wgmma and tcgen05 want 64 rows
    return "mma" if small else _PRODUCT[case.chip]


def faults(r: Resources, case: Case) -> list[str]:
    """What is wrong with one kernel, in words."""
    found = []
    limit = TARGETS[case.chip].shared_memory
    if not r.fits or r.shared > limit:
        found.append(f"{r.shared} bytes of shared memory, of {limit}")
    if r.instruction != expected(r, case):
        found.append(f"its product is by {r.instruction}, not {expected(r, case)}")
    if r.serialised:
        found.append("wgmma is serialised")
    if r.registers is None or r.spills is None:
        found.append("registers and spills are not told")
    elif r.spills:
        found.append(f"{r.spills} bytes spilled, {r.registers} registers")
    return [f"{r.name}, stage {r.stage}, {r.config}: {fault}" for fault in found]


def attempt(case: Case, brief: bool = False) -> list[Row] | str:
    """`compile_case`, or why it was refused. For another process: an error with reasons does not travel."""
    try:
        return compile_case(case, brief)
    except UnsupportedError as error:
        return str(error)


def pool() -> ProcessPoolExecutor:
    """Two processes that compile."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def main(path: Path) -> int:
    """Compile every case, write what came out, and say what is wrong."""
    start = time.monotonic()
    with pool() as executor:
        found = dict(zip(CASES, executor.map(attempt, CASES), strict=True))
    compiled = [row for rows in found.values() if not isinstance(rows, str) for row in rows]
    columns = [f.name for f in fields(Row) if f.name != "faults"]
    versions = {name: version(name) for name in ("triton", "torch")}
    head: dict[str, Any] = {
        "command": "make test-compiled",
        "date": f"{date.today()}",
        "versions": {**versions, "mlpdsl": __version__, "python": platform.python_version()},
        "processes": 2,
        "seconds": round(time.monotonic() - start),
        "specs": len(SPECS), "chips": len(CHIPS), "kernels": len(compiled),
        "refused": {f"{case}": text.replace("\n", " ") for case, text in found.items() if isinstance(text, str)},
        "spilling": sum(bool(row.spills) for row in compiled),
        "columns": columns,
        "units": "tile: rows x columns x depth x pipeline stages, in elements; spills: bytes a thread; shared: bytes a block",
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    rows = [f"    {json.dumps([getattr(row, name) for name in columns])}" for row in compiled]
    path.write_text("{\n" + ",\n".join([*lines, '  "rows": [\n' + ",\n".join(rows) + "\n  ]"]) + "\n}\n")
    wrong = [fault for row in compiled for fault in row.faults]
    wrong += [f"{case}: {text}" for case, text in found.items() if isinstance(text, str) and (case.name, case.chip) not in REFUSED]
    print(*wrong, f"{len(compiled)} kernels of {len(CASES)} cases in {head['seconds']} s: {len(wrong)} faults", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[2] / "benchmarks/results/compiled.json"))
