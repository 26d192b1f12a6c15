"""What is timed of each row, and beside what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlpdsl.errors import SpecError, describe
from mlpdsl.names import did_you_mean, listed

__all__ = ["LAUNCHES", "PEERS", "REGIMES", "Settings"]

PEERS = ("eager", "compile", "max-autotune", "liger")
LAUNCHES = ("eager", "graph")
REGIMES = ("sustained", "burst")


@dataclass(frozen=True)
class Settings:
    """What is timed of each row. Runs with other settings do not share a file.

    `peers`: of `PEERS`; `launches`: of `LAUNCHES` ("eager": plain calls; "graph": replays of a CUDA graph that holds one call);
    `regimes`: of `REGIMES`; `seed`: of the data and of the bootstrap. Raises `SpecError`.
    """

    peers: tuple[str, ...] = PEERS
    launches: tuple[str, ...] = LAUNCHES
    regimes: tuple[str, ...] = REGIMES
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("peers", PEERS), ("launches", LAUNCHES), ("regimes", REGIMES)):
            given = tuple(getattr(self, name))
            for word in given:
                if word not in allowed:
                    step = did_you_mean(str(word), allowed) or "Choose one of these."
                    raise SpecError(describe(name, word, listed(allowed), step))
            if not given and name != "peers":
                raise SpecError(describe(name, given, "one or more", "Leave it out for all of them."))
            # In the order of the full list, each once, so that equal settings are equal.
            object.__setattr__(self, name, tuple(word for word in allowed if word in given))

    def to_dict(self) -> dict[str, Any]:
        """As the file holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
