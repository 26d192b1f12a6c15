"""A pytest plugin: `pytest --mlpdsl-specs=package.module` tests every spec at the top level of that module, one item each.

Loaded by pytest wherever mlpdsl is installed, so at the top it imports pytest and nothing else: without the option, or a use of the
fixture, neither torch nor Hypothesis is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mlpdsl.spec import MLPSpec

EXAMPLES = 50
"""Calls a spec, where neither --mlpdsl-examples nor --hypothesis-profile says otherwise."""

MARKER = "mlpdsl_spec"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlpdsl", "mlpdsl: specs held against float64")
    group.addoption(
        "--mlpdsl-specs",
        action="append",
        default=[],
        metavar="MODULE",
        help="test every MLPSpec, mlpdsl.MLP and compiled MLP at the top level of this module (dotted name; repeatable)",
    )
    group.addoption(
        "--mlpdsl-examples",
        type=int,
        default=None,
        metavar="N",
        help=f"calls drawn for each spec (default: {EXAMPLES}, or what --hypothesis-profile says)",
    )
    group.addoption(
        "--mlpdsl-compile",
        choices=("auto", "off"),
        default="auto",
        help="whether the kernels of each spec are compiled too, without running: where they are interpreted (auto), or never",
    )


@pytest.hookimpl(tryfirst=True)  # Hypothesis loads --hypothesis-profile in the same hook
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: a spec of --mlpdsl-specs")
    if config.getoption("mlpdsl_specs") or config.getoption("--hypothesis-profile", default=None) in ("ci", "fuzz"):
        _register_profiles()


def _register_profiles() -> None:
    """Give Hypothesis the profiles "ci" (the same examples every time, no deadline, no database) and "fuzz" (random, 1,000
    examples, no deadline, the database of failures that "default" has), each unless there is one of that name."""
    from hypothesis import HealthCheck, settings
    from hypothesis.errors import InvalidArgument

    calm: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    kept = settings.get_profile("default").database
    profiles: dict[str, dict[str, Any]] = {
        "ci": {**calm, "derandomize": True, "database": None, "print_blob": True},
        "fuzz": {**calm, "derandomize": False, "database": kept, "max_examples": 1000},
    }
    for name, options in profiles.items():
        try:
            settings.get_profile(name)
        except InvalidArgument:
            settings.register_profile(name, **options)


@pytest.fixture
def mlpdsl_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`mlpdsl.testing.check`, with --mlpdsl-examples and --mlpdsl-compile unless a call says otherwise."""
    from mlpdsl.testing.fuzzing import check

    def checked(spec: object, examples: int | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("compile", request.config.getoption("mlpdsl_compile"))
        check(spec, _examples(request.config) if examples is None else examples, *args, **kwargs)

    return checked


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in dict.fromkeys(config.getoption("mlpdsl_specs")):
        items.extend(SpecModule.from_parent(session, name=name, nodeid=name).collect())


class SpecModule(pytest.Collector):
    """A module named by --mlpdsl-specs. Its node ID is its dotted name."""

    def collect(self) -> Iterator[SpecItem]:
        """One item a spec, in the order in which the module names them. Raises `pytest.UsageError` where there is none."""
        module = self._imported()
        from mlpdsl.testing.fuzzing import specs_in

        self.path = Path(module.__file__ or self.path)
        specs = specs_in(module)
        if not specs:
            raise pytest.UsageError(f"--mlpdsl-specs={self.name}: no MLPSpec, mlpdsl.MLP or compiled MLP at the module's top level")
        for name, spec in specs.items():
            yield SpecItem.from_parent(self, name=name, spec=spec)

    def _imported(self) -> ModuleType:
        folder = str(self.config.invocation_params.dir)
        if folder not in sys.path:  # `pytest`, unlike `python -m pytest`, leaves it out
            sys.path.insert(0, folder)
        try:
            return importlib.import_module(self.name)
        except Exception as error:
            message = f"--mlpdsl-specs={self.name}: importing the module raised {type(error).__name__}: {error}"
            if ":" in self.name or "/" in self.name or self.name.endswith((".py", ".json")):
                message += ". It takes a module's name, as Python imports it, and checks every spec at its top level"
            raise pytest.UsageError(message) from error


class SpecItem(pytest.Item):
    """One spec, checked. Its node ID is module::name."""

    def __init__(self, *, spec: MLPSpec, **rest: Any) -> None:
        super().__init__(**rest)
        self.spec = spec
        self.add_marker(MARKER)

    def runtest(self) -> None:
        """Raises as `mlpdsl.testing.check` does; where no kernel can run, the item is skipped with the reason."""
        from unittest import SkipTest

        from mlpdsl.testing.fuzzing import check

        try:
            check(self.spec, _examples(self.config), compile=self.config.getoption("mlpdsl_compile"))
        except SkipTest as skip:
            pytest.skip(str(skip))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A failed call is told by its message, which says all; anything else with its traceback."""
        from mlpdsl.testing.fuzzing import FuzzError

        if isinstance(excinfo.value, FuzzError):
            return f"{self.spec!r}\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.nodeid


def _examples(config: pytest.Config) -> int | None:
    """None leaves it to the Hypothesis profile."""
    asked: int | None = config.getoption("mlpdsl_examples")
    if asked is not None or config.getoption("--hypothesis-profile", default=None):
        return asked
    return EXAMPLES
