"""`fuse` and `unfuse`: replacing the MLPs of a live model. Not in this release."""

from __future__ import annotations

from typing import Any, NoReturn

from mlpdsl.errors import UnsupportedError

__all__ = ["fuse", "unfuse"]


def fuse(model: Any, **compile_options: Any) -> NoReturn:
    """Replace the MLPs of a live model in place. Not in this release: raises `UnsupportedError`, and changes nothing."""
    raise UnsupportedError("mlpdsl.fuse comes in a later release. Replace modules by mlpdsl.MLP and load their weights into it.")


def unfuse(model: Any) -> NoReturn:
    """Undo `fuse`. Not in this release: raises `UnsupportedError`, and changes nothing."""
    raise UnsupportedError("mlpdsl.unfuse comes in a later release, with mlpdsl.fuse.")
