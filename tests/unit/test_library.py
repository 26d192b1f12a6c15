"""Products in TF32 of copies: what is copied, and that nothing else comes out. No GPU: on the CPU products are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlpdsl import library
from mlpdsl.codegen.float32 import worth_padding


def lying(how: str, m: int, n: int) -> Tensor:
    made = torch.randn(m, n)
    if how == "transposed":
        return made.t().contiguous().t()
    if how == "apart":
        return torch.stack([made, made], -1)[..., 0]
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("b", ["dense", "transposed"])
@pytest.mark.parametrize("a", ["dense", "transposed", "apart"])
def test_a_product_of_copies(a: str, b: str, bias: bool) -> None:
    for m, n, k in ((5, 7, 9), (8, 7, 9), (5, 8, 9), (5, 7, 12), (8, 8, 12), (1, 4, 3)):
        left, right, out = lying(a, m, k), lying(b, k, n), torch.full((m, n), torch.nan)
        addend = torch.randn(n) if bias else None
        library.of_copies(left, right, out, addend)
        exact = left.double() @ right.double() + (0.0 if addend is None else addend.double())
        assert torch.allclose(out.double(), exact, atol=1e-5), (m, n, k)


@pytest.mark.parametrize("how", ["dense", "transposed", "apart"])
def test_zeros_and_whole_rows(how: str) -> None:
    for m, n in ((5, 7), (8, 7), (5, 8), (8, 8)):
        t = lying(how, m, n)
        made = library.with_zeros(t)
        assert made.shape == (-(-m // 4) * 4, -(-n // 4) * 4) and library.has_whole_rows(made)
        assert torch.equal(made[:m, :n], t) and float(made.abs().sum()) == pytest.approx(float(t.abs().sum()), rel=1e-6)
        assert (made.data_ptr() == t.data_ptr()) == (library.has_whole_rows(t) and m % 4 == n % 4 == 0)


def test_which_have_whole_rows() -> None:
    assert library.has_whole_rows(torch.empty(3, 8)) and not library.has_whole_rows(torch.empty(8, 3))
    assert library.has_whole_rows(torch.empty(8, 12).t()) and not library.has_whole_rows(torch.empty(3, 7))
    assert library.has_whole_rows(torch.empty(5, 16)[:, :7]), "what matters is where rows begin"
    assert not library.has_whole_rows(torch.empty(5, 16)[:, 1:8]) and not library.has_whole_rows(torch.empty(5, 8, 2)[..., 0])


def test_worth_it_where_there_is_much_to_multiply() -> None:
    assert worth_padding(1021, 2749, 1021) and worth_padding(2749, 1021, 4093)
    assert not worth_padding(64, 2749, 1021) and not worth_padding(4093, 401, 307) and not worth_padding(2**20, 2**10, 3)
