"""How every result file begins: the command, the day, the machine, the versions."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

from mlpdsl import __version__


def header(gpu: str | None, *packages: str) -> dict[str, Any]:
    """`command`, `date` in UTC, `gpu` and `versions`: of python, mlpdsl and the packages named (default: torch and triton)."""
    found = {name: metadata.version(name) for name in packages or ("torch", "triton")}
    return {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": gpu,
        "versions": found | {"python": platform.python_version(), "mlpdsl": __version__},
    }
