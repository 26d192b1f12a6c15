"""Where the cache is, and under which name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mlpdsl.cache import SourceCache, default_root, digest
from tests.unit.source_cache.tools import FIELDS, KEY, TEXT

# digest


def test_digest_is_sha256_of_length_prefixed_parts() -> None:
    assert digest("ab", "λ") == hashlib.sha256(b"\0\0\0\0\0\0\0\2ab\0\0\0\0\0\0\0\2\xce\xbb").hexdigest()


def test_digest_keeps_parts_apart() -> None:
    parts = [(), ("",), ("", ""), ("abc",), ("ab", "c"), ("a", "bc"), ("a", "b", "c"), ("c", "ab"), ("\ud800",)]
    assert len({digest(*p) for p in parts}) == len(parts)


# default_root


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MLPDSL_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"MLPDSL_CACHE_DIR": "~/a", "HOME": "/c"}, "/c/a"),
        ({"MLPDSL_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/mlpdsl"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"HOME": "/c"}, "/c/.cache/mlpdsl"),
        ({"HOME": "/"}, None),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
    ],
)
def test_default_root(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_root() == (None if expected is None else Path(expected))


@pytest.mark.parametrize("answer", [RuntimeError("no home"), KeyError("uid"), "~"])
def test_default_root_of_a_user_that_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch, answer: Exception | str) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def expanduser(_path: str) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os.path, "expanduser", expanduser)
    assert default_root() is None


def test_default_root_when_the_working_directory_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("MLPDSL_CACHE_DIR", "relative")
    assert default_root() is None


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = SourceCache()
    for name in ("one", "two"):
        monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / name))
        assert not cache.present("mlp", KEY)
        path = cache.publish("mlp", KEY, TEXT, FIELDS)
        assert path.is_relative_to(tmp_path / name)
        assert path.read_text("utf-8") == TEXT
        assert cache.present("mlp", KEY)
