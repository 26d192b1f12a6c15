"""Room for frames changes nothing but where they lie."""

from __future__ import annotations

import sys

import pytest

from mlpdsl.frames import with_room


def test_arguments_and_results_go_through() -> None:
    assert with_room(lambda *args, **named: (args, named), 1, 2, function=3) == ((1, 2), {"function": 3})


def test_exceptions_go_through() -> None:
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)


def test_it_nests_and_recursion_ends_where_it_did() -> None:
    def deep(left: int) -> int:
        return 1 + (with_room(deep, left - 1) if left else 0)

    assert deep(50) == 51

    def endless() -> None:
        endless()

    with pytest.raises(RecursionError):
        with_room(endless)


def test_the_frame_asks_for_more_than_half_a_chunk_of_1_mb() -> None:
    slots = with_room.__code__.co_stacksize
    assert 2**19 < 8 * slots < 2**20 - 2**18  # CPython doubles 16 KB until it fits, and a quarter at least is left for others
    assert sys.maxsize > 2**32, "slots of 8 bytes"
