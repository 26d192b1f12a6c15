"""What stands for `mlpdsl.tuning.questions` in children that tests start: the number of stages says what becomes of a config."""

from __future__ import annotations

import os
import time
from typing import Any

ABORTS, HANGS, SPILLS, RAISES = 7, 6, 5, 4


def _act(stages: int) -> None:
    if stages == ABORTS:
        os.abort()
    if stages == HANGS:
        time.sleep(600)
    if stages == RAISES:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")


def _describe() -> dict[str, Any]:
    return {"gpu": "NVIDIA H200", "target": "sm_90", "versions": {"torch": "2.13"}}


def _compile(config: dict[str, Any], **_: Any) -> dict[str, str]:
    _act(config["num_stages"])
    return {"reason": "spills 8 bytes" if config["num_stages"] == SPILLS else ""}


def _time(config: dict[str, Any], rounds: int, **_: Any) -> dict[str, Any]:
    _act(config["num_stages"])
    if config["num_stages"] == SPILLS:
        return {"failed": "OutOfMemoryError: too large"}
    return {"default": [2.0] * rounds, "candidate": [1.0] * rounds}


def _check(config: dict[str, Any], **_: Any) -> dict[str, str]:
    _act(config["num_stages"])
    return {"reason": "wrong: by far" if config["num_stages"] == SPILLS else ""}


QUESTIONS = {"describe": _describe, "compile": _compile, "time": _time, "check": _check}
