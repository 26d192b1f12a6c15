"""`mlpdsl bench` from Python: MLPs timed beside PyTorch's eager mode, its compiler and Liger, on one GPU.

    from mlpdsl import bench

    found = bench.run(bench.rows(["small"], ms=(1, 4096), passes=("forward", "train")), out="small.json")
    print(bench.text(found.data))

docs/benchmarking.md has the method. Nothing here imports torch before `run`, and nothing else of mlpdsl imports this package.
"""

from mlpdsl.bench.results import ResultError, Results
from mlpdsl.bench.runner import run
from mlpdsl.bench.settings import Settings
from mlpdsl.bench.suites import SUITES, Entry, Row, Suite, rows
from mlpdsl.bench.table import markdown, text

__all__ = ["SUITES", "Entry", "ResultError", "Results", "Row", "Settings", "Suite", "markdown", "rows", "run", "text"]
