"""Products in TF32 of copies: what is copied, and that nothing else comes out. No GPU: on the CPU products are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlpdsl import library
from mlpdsl.codegen.float32 import worth_padding
from mlpdsl.tape import Recorder


def lying(how: str, m: int, n: int) -> Tensor:
    made = torch.randn(m, n)
    if how == "transposed":
        return made.t().contiguous().t()
    if how == "apart":
        return torch.stack([made, made], -1)[..., 0]
    return made


SIZES = [(5, 7, 9), (8, 7, 9), (5, 8, 9), (5, 7, 12), (8, 8, 12), (8, 8, 9), (1, 4, 3)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("b", ["dense", "transposed"])
@pytest.mark.parametrize("a", ["dense", "transposed", "apart"])
def test_a_product_of_copies(a: str, b: str, bias: bool, autocast: bool) -> None:
    """Autocast would make 16 bits of it."""
    for m, n, k in SIZES:
        left, right, out = lying(a, m, k), lying(b, k, n), torch.full((m, n), torch.nan)
        addend = torch.randn(n) if bias else None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            library.of_copies(left, right, out, addend)
        exact = left.double() @ right.double() + (0.0 if addend is None else addend.double())
        assert torch.allclose(out.double(), exact, atol=1e-5), (m, n, k)


def test_a_sum_goes_on_in_the_result() -> None:
    """As gate's and up's shares of a gradient do."""
    for m, n, k in SIZES:
        left, right, out = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
        exact = left.double() @ right.double() + out.double()
        library.of_copies(left, right, out, out)
        assert torch.allclose(out.double(), exact, atol=1e-5), (m, n, k)


@pytest.mark.parametrize(("a", "b", "sizes", "multiplied"), [
    ("dense", "transposed", (5, 7, 9), [(5, 12), (12, 8), (5, 8)]),  # x and a weight: along K, and whole columns of the result
    ("transposed", "dense", (7, 9, 5), [(8, 5), (5, 12), (8, 12)]),  # a gradient of one: the rows of x are only summed over
    ("dense", "transposed", (5, 8, 9), [(5, 12), (12, 8), (5, 8)]),
    ("dense", "dense", (5, 7, 12), [(5, 12), (12, 8), (5, 8)]),
])  # fmt: skip
def test_no_more_is_copied_than_is_odd(
    a: str, b: str, sizes: tuple[int, int, int], multiplied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    m, n, k = sizes
    left, right, out = lying(a, m, k), lying(b, k, n), torch.empty(m, n)
    heard: list[list[Tensor]] = []
    inner = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: (heard.append([*args, out]), inner(*args, out=out))[1])
    library.of_copies(left, right, out, None)
    assert [tuple(t.shape) for t in heard[0]] == multiplied and all(map(library.has_whole_rows, heard[0]))
    assert (heard[0][2].data_ptr() == out.data_ptr()) == (n % 4 == 0)
    assert (heard[0][0].data_ptr() == left.data_ptr()) == (library.has_whole_rows(left) and left.shape == multiplied[0])


def test_which_have_whole_rows() -> None:
    assert library.has_whole_rows(torch.empty(3, 8)) and not library.has_whole_rows(torch.empty(8, 3))
    assert library.has_whole_rows(torch.empty(8, 12).t()) and not library.has_whole_rows(torch.empty(3, 7))
    assert library.has_whole_rows(torch.empty(5, 16)[:, :7]), "what matters is where rows begin"
    assert not library.has_whole_rows(torch.empty(5, 16)[:, 1:8]) and not library.has_whole_rows(torch.empty(5, 8, 2)[..., 0])


def test_worth_it_where_there_is_much_to_multiply() -> None:
    assert worth_padding(1021, 2749, 1021) and worth_padding(2749, 1021, 4093)
    assert not worth_padding(64, 2749, 1021) and not worth_padding(4093, 401, 307) and not worth_padding(2**20, 2**10, 3)


@pytest.mark.parametrize("tf32", [False, True])
def test_recordings_keep_the_precision(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either way of repeating one: else a repeated call would have other bits than the first."""
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    heard = Recorder([x], [weight])
    y, both = x.new_empty(8, 4), x.new_empty(2, 8, 4)
    heard.allocated(y)
    heard.allocated(both)
    heard.multiplied(x, weight.t(), y, None, tf32=tf32)
    heard.multiplied_two(x, weight, weight, both, tf32=tf32)
    tape = heard.tape([y, both], direct=True)
    assert tape is not None
    said: list[Any] = []
    for name in ("multiply", "multiply_two"):
        monkeypatch.setattr(library, name, lambda *args, **words: said.append(words.get("tf32", False)))
    tape.replay([x, weight], [x.data_ptr(), weight.data_ptr()])
    assert said == [tf32, tf32]
    tape._replay_indirectly([x, weight, None, None], x)
    assert said == [tf32] * 4
