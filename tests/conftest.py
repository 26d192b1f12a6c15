"""What every test runs under: caches of its own, and none of the user's settings."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator

import pytest

from mlpdsl.frames import with_room

_INTERPRET = "TRITON_INTERPRET"
_INTERPRETING = os.environ.get(_INTERPRET)

# At import, because some tests and the modules they import read the environment while they are collected. The processes of
# pytest-xdist share one place, so that what one has compiled the others need not.
_SHARED = "MLPDSL_TESTS_SCRATCH"
_WORKER = "PYTEST_XDIST_WORKER" in os.environ and _SHARED in os.environ
_SCRATCH = os.environ[_SHARED] if _WORKER else tempfile.mkdtemp(prefix="mlpdsl-tests-")
os.environ[_SHARED] = _SCRATCH
_OWNER = 0 if _WORKER else os.getpid()
os.environ["MLPDSL_CACHE_DIR"] = os.path.join(_SCRATCH, "mlpdsl")
os.environ["TRITON_CACHE_DIR"] = os.path.join(_SCRATCH, "triton")
# Processes that tests start would compile every module anew where nobody may keep bytecode.
for _name in ("PYTHONDONTWRITEBYTECODE", "MLPDSL_BACKEND", "MLPDSL_ON_JIT", "MLPDSL_TABLES", "MLPDSL_TARGET"):
    os.environ.pop(_name, None)


@atexit.register
def _remove_scratch() -> None:
    if os.getpid() == _OWNER:  # a forked child ends too, and must not take its parent's cache along
        shutil.rmtree(_SCRATCH, ignore_errors=True)


with contextlib.suppress(ImportError):  # a GPU machine may have pytest and nothing else
    from hypothesis import settings

    # The same examples every time, and no clock: a slow machine is not a failure.
    # To look for new ones: pytest --hypothesis-profile=default
    settings.register_profile("mlpdsl", deadline=None, derandomize=True, database=None)
    settings.load_profile("mlpdsl")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Run a test as pytest does, with room for its frames."""
    names = pyfuncitem._fixtureinfo.argnames
    with_room(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """A test that leaves Triton's interpreter switched on, or off, would fail others, in the same process and far away."""
    yield
    now = os.environ.get(_INTERPRET)
    if now != _INTERPRETING:
        os.environ.pop(_INTERPRET, None)
        if _INTERPRETING is not None:
            os.environ[_INTERPRET] = _INTERPRETING
        pytest.fail(f"the test left {_INTERPRET}={now}, which was {_INTERPRETING}")
