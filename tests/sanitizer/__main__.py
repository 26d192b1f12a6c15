"""Twenty specs, forward and backward, under compute-sanitizer's memcheck and racecheck. Needs a GPU and the CUDA toolkit.

    python -m tests.sanitizer --out benchmarks/results/sanitizer.json

First two controls, so that silence means something: a kernel that writes beyond its tensor, and one with a race, must be reported.
Each spec runs once without a tool, held against the oracle and so that its kernels are compiled; under a tool only its kernels run,
because a tool instruments every module that is loaded, and the oracle's float64 products are minutes of that.
Every tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), because memcheck knows allocations and not tensors.
Exit status 0 where both controls are reported and nothing else is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
REPORTED = 86
"""What compute-sanitizer is told to exit with where it reports something."""


def specs() -> dict[str, Any]:
    from mlpdsl import MLPSpec
    from mlpdsl.names import ACTIVATIONS
    from tests.sixteen import SPECS

    rest = [name for name in ACTIVATIONS if name not in {str(s.activation) for s in SPECS.values()}]
    more = {
        f"more-{i}": MLPSpec(
            dims=((72, 136, 104), (50, 70, 41))[i % 2], activation=rest[i], gated=i % 4 < 2, bias=True,
            dtype=("bfloat16", "float16")[i // 2], epilogue=("residual", rest[i]),
        )
        for i in range(4)
    }  # fmt: skip
    return {**SPECS, **more}


def control(tool: str) -> None:
    """What the tool must report."""
    import torch

    if tool == "memcheck":
        source = 'extern "C" __global__ void f(float* x) { x[threadIdx.x + 1000000] = 1.0f; }'
    else:
        source = (
            'extern "C" __global__ void f(float* x) { __shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x];'
            " x[threadIdx.x] = s[(threadIdx.x + 40) % 64]; }"
        )
    kernel = torch.cuda._compile_kernel(source, "f")
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[torch.zeros(64, device="cuda")])
    torch.cuda.synchronize()


def exercise(name: str, tool: str | None) -> None:
    """A few calls of one spec, both paths, with every gradient; held against the oracle where no tool looks on."""
    import torch

    import mlpdsl
    from mlpdsl import dispatch
    from mlpdsl.testing.calls import check_call, make_call, run_call

    spec = specs()[name]
    for rows, lies in ((1, "dense"), (70, "dense"), (129, "strided"), (33, "offset")):
        call = make_call(spec, (rows,), rows, x=lies, dy=lies, operands=lies, pair="up_first", device="cuda", guard=0)
        with dispatch.forcing("generated"):  # the library's are not ours to look at
            if tool:
                run_call(call, mlpdsl.compile(spec, backend="triton"))
            else:
                check_call(call)
        torch.cuda.synchronize()
    print(f"{name}: 4 calls")


def sanitized(sanitizer: str, tool: str, what: str) -> dict[str, Any]:
    """Run one spec (or the tool's control) in a process of its own under the tool."""
    under = [sanitizer, "--tool", tool, "--error-exitcode", str(REPORTED), "--print-limit", "5"] if tool in TOOLS else []
    command = [*under, sys.executable, "-m", "tests.sanitizer", "--only", what, *(["--tool", tool] if under else [])]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    text = done.stdout + done.stderr
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    lines = [line for line in text.splitlines() if line.startswith("=========")][:30]
    ok = done.returncode == 0
    found = {
        "tool": tool,
        "what": what,
        "status": done.returncode,
        "summary": summary,
        "seconds": round(time.monotonic() - began, 1),
    }
    return found if ok else {**found, "report": lines, "output": done.stderr.splitlines()[-15:]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizer", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the findings there as JSON")
    parser.add_argument("--tool", choices=TOOLS, help="this tool alone")
    parser.add_argument("--only", help="run this spec here, not under a tool; a word for what main() starts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no run after so many")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.only:
        control(args.tool) if args.only == "control" else exercise(args.only, args.tool)
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    tools = (args.tool,) if args.tool else TOOLS
    until = time.monotonic() + args.seconds

    def one(pair: tuple[str, str]) -> dict[str, Any]:
        if time.monotonic() > until:
            return {"tool": pair[0], "what": pair[1], "status": "not run"}
        found = sanitized(sanitizer, *pair)
        print(json.dumps(found), flush=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        plain = list(pool.map(one, [("none", name) for name in specs()]))
        controls = list(pool.map(one, [(tool, "control") for tool in tools]))
        runs = list(pool.map(one, [(tool, name) for name in specs() for tool in tools]))
    seen = all(found["status"] == REPORTED for found in controls)
    clean = all(found["status"] == 0 for found in (*plain, *runs))
    print(f"controls {'reported' if seen else 'NOT REPORTED'}; {sum(f['status'] == 0 for f in runs)} of {len(runs)} runs clean")
    if args.out:
        args.out.write_text(json.dumps(report(sanitizer, controls, runs), indent=1) + "\n")
    return 0 if seen and clean else 1


def report(sanitizer: str, controls: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    import torch
    import triton

    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return {
        "command": "make sanitize",
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0],
                     "compute-sanitizer": version[-1] if version else ""},
        "controls": controls,
        "runs": runs,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
