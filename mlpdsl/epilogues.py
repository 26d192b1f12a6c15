"""`mlpdsl.epilogue`: a user's own function as an epilogue. Not in this release."""

from __future__ import annotations

from typing import Any, NoReturn

from mlpdsl.errors import UnsupportedError
from mlpdsl.names import EPILOGUE_OPERANDS, listed

__all__ = ["epilogue"]


def epilogue(fn: Any, **kinds: str) -> NoReturn:
    """An epilogue entry from a function of the output tile and named operands. Not in this release: raises `UnsupportedError`."""
    raise UnsupportedError(
        f"mlpdsl.epilogue comes in a later release. Built in are {listed(EPILOGUE_OPERANDS)} and every activation."
    )
