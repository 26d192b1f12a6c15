"""`mlpdsl tune` from Python: every product of some MLPs timed with many configs on one GPU, and a table of what gained.

    from mlpdsl import bench, tuning

    found = tuning.run(bench.rows(["small"], ms=(1, 64, 4096), passes=("train",)), out="sm_90.json", budget=600.0)

docs/tuning.md has the method. Nothing else of mlpdsl imports this package.
"""

from mlpdsl.tuning.job import Job, jobs
from mlpdsl.tuning.run import run
from mlpdsl.tuning.state import State, StateError

__all__ = ["Job", "State", "StateError", "jobs", "run"]
