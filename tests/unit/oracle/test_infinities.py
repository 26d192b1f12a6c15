"""Bounds of products and sums with infinities, NaN, and sums that may overflow."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mlpdsl.testing import oracle
from mlpdsl.testing.oracle import Bounded


def in_any_order(a: Tensor, b: Tensor, bias: Tensor | None, shuffle: random.Random) -> Tensor:
    """a·b + bias in float32, as some kernel may sum it: terms in any order, in blocks of any length."""
    order = list(range(a.shape[1]))
    shuffle.shuffle(order)
    terms = [a[:, k : k + 1] * b[k] for k in order]
    size = shuffle.choice((1, 2, 3))
    blocks = []
    for first in range(0, len(terms), size):
        block = terms[first]
        for term in terms[first + 1 : first + size]:
            block = block + term
        blocks.append(block)
    acc = torch.zeros(a.shape[0], b.shape[1])
    for block in blocks:
        acc = acc + block
    return acc if bias is None else acc + bias


EXTREME = (0.0, -0.0, 1.0, -2.5, 3e38, -3e38, 1e20, -1e20, 1e-30, 1e-42, torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("seed", range(8))
def test_a_product_accepts_every_order(seed: int) -> None:
    """What no order of float32 additions disagrees on is asked for, and nothing else."""
    shuffle = random.Random(seed)
    a = torch.tensor([[shuffle.choice(EXTREME[:4] * 4 + EXTREME) for _ in range(5)] for _ in range(120)])
    b = torch.tensor([[shuffle.choice((0.5, -1.0, 2.0, 1e-3, 0.0, 1e18)) for _ in range(7)] for _ in range(5)])
    bias = torch.tensor([shuffle.choice((0.0, 1.0, 2e38, -2e38)) for _ in range(7)]) if seed % 2 else None
    exactly = [oracle.bounded.exact(t) for t in (a, b)]
    expected = oracle.bounded.matmul(*exactly, "ieee", None if bias is None else oracle.bounded.exact(bias))
    for _ in range(12):
        oracle.check(in_any_order(a, b, bias, shuffle), expected, "any order")
    asked = ~expected.bound.isinf()
    assert float(asked.double().mean()) > 0.6
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 20


@pytest.mark.parametrize("seed", range(4))
def test_a_sum_accepts_every_order(seed: int) -> None:
    shuffle = random.Random(seed)
    terms = torch.tensor([[shuffle.choice(EXTREME[:4] * 6 + EXTREME) for _ in range(300)] for _ in range(5)])
    expected = oracle.bounded.total(oracle.bounded.exact(terms), [0])
    for _ in range(12):
        oracle.check(in_any_order(torch.ones(1, 5), terms, None, shuffle)[0], expected, "any order")
    asked = ~expected.bound.isinf()
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 5


@pytest.mark.parametrize("count", [2, 3])
def test_a_product_of_uncertain_factors_accepts_all_of_them(count: int) -> None:
    """Factors anywhere within their bounds, multiplied in any order; results below the normal numbers, and subnormals beside an
    infinity, flushed or not."""
    shuffle = random.Random(count)
    draw = (0.0, 1.0, -2.5, 1e-3, 3e38, -3e38, 1e-30, 1e-42, torch.inf, -torch.inf, torch.nan)
    values = [torch.tensor([shuffle.choice(draw[:4] + draw) for _ in range(4000)]) for _ in range(count)]
    errors = [torch.tensor([shuffle.choice((0.0, 1e-6, 2e-3)) for _ in range(4000)]) for _ in range(count)]
    errors = [torch.where(v.isfinite(), e, 0.0) for v, e in zip(values, errors, strict=True)]
    expected = oracle.bounded.mul(*(Bounded(v.double(), e.double()) for v, e in zip(values, errors, strict=True)))
    expected = oracle.bounded.rounded(expected, torch.float32)
    beside = torch.stack(values).isinf().any(0)
    for _ in range(20):
        order = list(range(count))
        shuffle.shuffle(order)
        found = None
        flush = shuffle.random() < 0.5
        for i in order:
            near = (values[i].double() + shuffle.choice((-0.999, 0, 0.999)) * errors[i].double()).float()
            near = torch.where((near.abs() < 2.0**-126) & beside, 0.0, near) if flush else near
            if found is None:
                found = near
                continue
            found = found * near
            found = torch.where(found.abs() < 2.0**-126, 0.0, found) if flush else found
        oracle.check(found, expected, "a product")
    asked = ~expected.bound.isinf()
    for kind in (Tensor.isfinite, Tensor.isnan, Tensor.isinf):
        assert int((kind(expected.value) & asked).sum()) > 100


def test_an_infinity_asks_for_what_is_certain() -> None:
    inf, nan = torch.inf, torch.nan
    certain, sure, faint = (oracle.bounded.exact(torch.tensor([[v]])) for v in (inf, 2.0, 1e-40))
    open_sign = Bounded(torch.tensor([[0.001]]).double(), torch.tensor([[0.01]]).double())
    settled_sign = Bounded(torch.tensor([[-0.1]]).double(), torch.tensor([[0.01]]).double())
    zero = oracle.bounded.exact(torch.zeros(1, 1))
    cases = ((sure, inf, 0.0), (settled_sign, -inf, 0.0), (open_sign, None, inf), (faint, None, inf), (zero, nan, 0.0))
    for rule in (oracle.bounded.mul, lambda a, b: oracle.bounded.matmul(a, b, "ieee")):
        for by, value, bound in cases:
            for found in (rule(certain, by), rule(by, certain)):
                assert float(found.bound) == bound
                if value is not None:
                    assert torch.equal(found.value.isnan(), torch.tensor([[value != value]]))
                    assert value != value or float(found.value) == value
    # Beside an infinity, sums that may overflow the other way; NaN is NaN beside anything.
    ones = oracle.bounded.exact(torch.ones(3, 1))
    for row, bound in (([inf, 1.0, -2.0], 0.0), ([inf, -3e38, -3e38], inf), ([nan, -3e38, -3e38], 0.0), ([inf, -inf, 1.0], 0.0)):
        assert float(oracle.bounded.matmul(oracle.bounded.exact(torch.tensor([row])), ones, "ieee").bound) == bound, row


def test_a_shut_gate_may_end_what_is_not_finite() -> None:
    inf = torch.inf
    gradient = Bounded(torch.tensor([torch.nan, inf, 2.0, 3e38, inf]).double(), torch.zeros(5).double())
    slope = Bounded(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).double(), torch.zeros(5).double())
    up = Bounded(torch.tensor([1.0, 1.0, 1.0, 10.0, 1.0]).double(), torch.zeros(5).double())
    assert oracle.bounded.chained(gradient, slope).bound.isinf().tolist() == [True, True, False, False, False]
    assert oracle.bounded.chained(gradient, up, slope).bound.isinf().tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_the_largest_numbers_are_infinite_in_tf32(precision: str) -> None:
    largest, small = (oracle.bounded.exact(torch.tensor([[v]])) for v in (torch.finfo(torch.float32).max, 1e-6))
    assert bool(oracle.bounded.matmul(largest, small, precision).bound.isinf()) == (precision != "ieee")
    assert bool(oracle.bounded.matmul(small, largest, precision).bound.isinf()) == (precision != "ieee")
