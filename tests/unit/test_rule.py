"""The rule for configs: what it takes where, and what must hold wherever it is asked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mlpdsl.codegen import config as rule
from mlpdsl.codegen import few_rows
from mlpdsl.codegen.few_rows import PROCESSORS
from mlpdsl.codegen.plan import Config
from mlpdsl.target import TARGETS

SM_90 = TARGETS["sm_90"]
COPIES = {
    ("hidden", 131): 2**24, ("hidden", 577): 2**24, ("output", 131): 2**24, ("output", 577): 2**24, ("hidden_grad", 577): 2**29,
    ("input_grad", 577): 2**29, ("weight_grad", 577): 2**29,
}  # fmt: skip
"""For how many multiplications rows of no whole 16 bytes are copied on sm_90, by role and K (of weight gradients, M)."""
CUDA = [target for target in TARGETS.values() if target.kind == "cuda"]
WIDTHS = (1, 13, 64, 96, 333, 768, 1024, 2048, 2560, 4096, 5120, 8192, 10240, 14336, 28672)
WIDEST = 16384
"""From here on a plain first linear of more than 16 rows has tiles of descriptors on sm_90, where sums are long."""
ROWS = (1, 2, 8, 16, 17, 32, 33, 64)


def usual(role: str, m: int, n: int, k: int, planes: int = 1, path: str = "", **words: Any) -> Config:
    path = path or ("masked" if n % 8 or k % 8 else "tma")
    given = {"dtype": "bfloat16", "precision": "ieee", "target": SM_90} | words
    return rule.usual(role, path, m, n, k, planes=planes, **given)


def held(c: Config, planes: int) -> int:
    """Bytes of shared memory that the operands of all stages take."""
    return 2 * c.num_stages * (c.block_m + planes * c.block_n) * c.block_k


@pytest.mark.parametrize("target", CUDA, ids=lambda t: t.name)
def test_kernels_for_few_rows_hold_the_rows_and_fit(target: Any) -> None:
    for m, n, k, planes in itertools.product(ROWS, WIDTHS, WIDTHS, (1, 2)):
        for role in ("hidden", "output") if planes == 1 else ("hidden",):
            c = few_rows.skinny(role, m, n, k, dtype="bfloat16", planes=planes, target=target)
            if (role, planes, target.name) == ("hidden", 1, "sm_90") and m > 16 and n >= WIDEST and k >= 4096:
                assert c is None and usual(role, m, n, k).strategy == "two_stage"
                continue
            assert c is not None and c.block_m >= m and (c.block_m == 1) == (m == 1), (m, n, k)
            assert few_rows.fitted(c, role, m, dtype="bfloat16"), (m, n, k)
            if m > 1:
                assert held(c, planes) <= target.shared_memory and c.num_stages >= 2, (m, n, k, c)
                assert c.block_k >= 16 * c.splits, (m, n, k, c)


@pytest.mark.parametrize(("role", "m", "n", "k", "planes"), [
    ("output", 8, 5120, 13824, 1), ("output", 64, 5120, 13824, 1), ("hidden", 64, 18944, 3584, 2), ("hidden", 64, 24576, 3072, 2),
    ("hidden", 8, 10240, 2560, 1), ("hidden", 64, 10240, 2560, 1),
])  # fmt: skip
def test_one_wave_where_less_in_flight_makes_it_one(role: str, m: int, n: int, k: int, planes: int) -> None:
    """As many stages as a block may hold would leave a second wave of a few programs."""
    c = few_rows.skinny(role, m, n, k, dtype="bfloat16", planes=planes, target=SM_90)
    assert c is not None
    programs, resident = -(-n // c.block_n), SM_90.shared_memory // (held(c, planes) + 2**10)
    assert PROCESSORS < programs <= PROCESSORS * resident
    more = SM_90.shared_memory // (held(c, planes) // c.num_stages * (c.num_stages + 2) + 2**10)
    assert programs > PROCESSORS * more or more == resident


def test_thirty_two_rows_have_tiles_of_two_heights() -> None:
    for m, heights in ((1, {1}), (2, {16}), (16, {16}), (17, {32, 64}), (32, {32, 64}), (33, {64}), (64, {64})):
        fits = {h for h in (1, 16, 32, 64) if few_rows.fitted(Config(h, 16, 64, strategy="skinny"), "hidden", m, dtype="bfloat16")}
        found = {c.block_m for c in few_rows.candidates(m, 4096, 4096, 1)}
        assert fits == heights and found == heights, m


TWO = dict(block_m=128, num_warps=8, residency=2, registers=128)
BATCHED = dict(strategy="library", batched=True)
LOW = dict(block_m=64, num_warps=8, num_stages=5, residency=1)


@pytest.mark.parametrize(("m", "n", "k", "planes", "wanted"), [
    (4096, 4096, 1024, 1, TWO | {"block_n": 128}),
    (4096, 14336, 4096, 2, {"block_m": 128, "block_n": 128, "residency": 1}),  # sustained, at the power limit
    (2056, 4096, 2048, 2, {"strategy": "library"}),  # the last wave would be nearly empty
    (2056, 4096, 640, 2, TWO | {"block_n": 64}),  # of a short sum that is no matter
    (4096, 5120, 1280, 2, TWO | {"block_n": 64}),
    (512, 16384, 2048, 2, TWO | {"block_n": 64}),
    (512, 14336, 4096, 2, BATCHED),  # `_two` would leave the last of four waves three fifths empty
    (768, 14336, 4096, 2, TWO | {"block_n": 64}),
    (768, 4096, 2048, 2, LOW | {"block_n": 128}),
    (4096, 28672, 8192, 2, {"block_m": 128, "block_n": 128, "residency": 1}),
    (256, 14336, 4096, 2, {"strategy": "library"}),
    (256, 28672, 8192, 2, {"block_m": 128, "block_n": 64, "num_stages": 6}),  # 896 tiles, nearly seven waves
    (192, 28672, 8192, 2, {"strategy": "library"}),  # half of every second row of tiles would be empty
    (257, 28672, 8192, 2, BATCHED),
    (128, 18944, 3584, 2, BATCHED),  # a second wave of 16 tiles
    (128, 11008, 4096, 2, BATCHED),  # a third of the processors idle
    (96, 14336, 4096, 2, BATCHED),  # a quarter of each tile empty
    (112, 14336, 4096, 2, TWO | {"block_n": 64}),
    (128, 14336, 4096, 2, TWO | {"block_n": 64}),
    (512, 11008, 4096, 2, BATCHED),
    (513, 11008, 4096, 2, {"strategy": "two_stage"}),
    (600, 13824, 5120, 2, {"strategy": "library", "batched": False}),
    (96, 4096, 4096, 2, BATCHED | {"batched": False}),  # too few tiles: a sum might be shared, and parts of it added in 16 bits
    (96, 11008, 1024, 2, TWO | {"block_n": 64}),
    (4096, 4096, 4096, 1, {"strategy": "library"}),
    (257, 1111, 333, 1, {"block_m": 64, "strategy": "padded"}),
    (100, 333, 333, 1, {"block_m": 64, "strategy": "two_stage"}),
    (4093, 2749, 1021, 2, {"strategy": "padded"}),
    (64, 2749, 1021, 2, {"strategy": "padded"}),
    (17, 2749, 1021, 1, {"strategy": "skinny"}),
    (197, 4096, 1024, 1, {"block_m": 64, "block_n": 128, "residency": 1}),  # 128 tiles: one wave
    (128, 1024, 1024, 1, {"block_m": 64, "block_n": 32}),
    (4096, 128, 128, 1, {"block_m": 64, "block_n": 64}),
    (257, 4096, 1024, 1, {"strategy": "library"}),  # 96 tiles of 128x128, which cuBLAS has better
    (1576, 4096, 1024, 1, {"strategy": "library"}),  # a second wave of a few tiles
    (3136, 384, 96, 1, {"strategy": "two_stage"}),  # short sums: nothing but the pass matters
    (65, 512, 479, 1, {"block_m": 64, "block_n": 16, "num_warps": 8}),
])  # fmt: skip
def test_first_linears_on_hopper(m: int, n: int, k: int, planes: int, wanted: dict[str, Any]) -> None:
    found = usual("hidden", m, n, k, planes).to_dict()
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(("m", "n", "k", "precision", "target", "batched"), [
    (4096, 1536, 512, "ieee", "sm_90", True), (16, 2749, 1021, "ieee", "sm_90", True), (17, 2749, 1021, "ieee", "sm_90", False),
    (9, 11008, 4097, "ieee", "sm_90", False), (4096, 1536, 512, "tf32", "sm_90", False), (4096, 1536, 512, "ieee", "sm_80", False),
])  # fmt: skip
def test_float32_gate_and_up_at_once(m: int, n: int, k: int, precision: str, target: str, batched: bool) -> None:
    """Where that was timed to be faster, by FMA on an H200; and nothing else is a batch."""
    words = {"dtype": "float32", "precision": precision, "target": TARGETS[target]}
    assert usual("hidden", m, n, k, 2, path="masked", **words).batched is batched
    assert not usual("hidden", m, n, k, 1, path="masked", **words).batched
    assert not usual("input_grad", m, n, k, 2, path="masked", **words).batched


@pytest.mark.parametrize(("m", "n", "k", "strategy"), [
    (1, 1024, 4096, "skinny"), (16, 1024, 4096, "skinny"), (32, 1024, 4096, "skinny"), (64, 1024, 4096, "library"),
    (32, 2048, 8192, "skinny"), (32, 2048, 16384, "library"), (64, 4096, 14336, "skinny"), (64, 64, 64, "skinny"),
    (13, 577, 1111, "skinny"), (64, 1021, 2749, "padded"), (64, 577, 1111, "library"), (1, 577, 1111, "skinny"),
    (4096, 1024, 4096, "library"),
    (4093, 577, 1111, "padded"), (100, 577, 1111, "padded"),
])  # fmt: skip
def test_last_linears_on_hopper(m: int, n: int, k: int, strategy: str) -> None:
    assert usual("output", m, n, k).strategy == strategy


@pytest.mark.parametrize("target", CUDA, ids=lambda t: t.name)
def test_up_to_16_rows_are_never_the_librarys_where_rows_of_weights_are_no_whole_16_bytes(target: Any) -> None:
    """Above, small products are not; large ones are on copies, where there are such kernels, or the library's."""
    for m, n, k, planes in itertools.product(ROWS, WIDTHS, (1, 13, 101, 333, 2749, 14335), (1, 2)):
        for role in ("hidden", "output") if planes == 1 else ("hidden",):
            found = usual(role, m, n, k, planes, target=target).strategy
            if m <= 16 or (m * n * k * planes < 2**25 and (role == "hidden" or k <= 512)):
                assert found == "skinny", (role, m, n, k)
            assert (found == "padded") <= (target.name == "sm_90")
        assert usual("hidden", 1, n, k, planes, dtype="float32", target=target).strategy == "skinny", (n, k)


def test_one_row_in_one_piece_has_room_for_what_lies_before_it() -> None:
    """A row may begin 7 elements after a multiple of 16 bytes, of float32 3."""
    pieces = {k: few_rows.skinny("hidden", 1, 1024, k, dtype="bfloat16", planes=1, target=SM_90) for k in (1016, 1017, 1021, 1024)}
    assert {k: c and c.block_k for k, c in pieces.items()} == {1016: 1024, 1017: 1024, 1021: 2048, 1024: 1024}
    wide = {k: few_rows.skinny("hidden", 1, 1024, k, dtype="float32", planes=1, target=SM_90) for k in (1020, 1021, 1023, 1024)}
    assert {k: c and c.block_k for k, c in wide.items()} == {1020: 1024, 1021: 1024, 1023: 2048, 1024: 1024}


def test_whether_the_library_multiplies_does_not_depend_on_the_path() -> None:
    """What is rounded must not follow alignment."""
    for m, n, k, planes in itertools.product((1, 16, 64, 65, 128, 256, 512, 1000, 4096), WIDTHS, WIDTHS, (1, 2)):
        for role, target in itertools.product(("hidden", "output") if planes == 1 else ("hidden",), (SM_90, TARGETS["sm_100"])):
            by_path = {usual(role, m, n, k, planes, path, target=target).strategy == "library" for path in ("tma", "masked")}
            assert len(by_path) == 1, (role, m, n, k, planes, target.name)


@pytest.mark.parametrize(("m", "n", "k", "wanted"), [
    (4096, 4096, 14336, {"strategy": "two_stage", "block_n": 256}),
    (512, 1024, 4096, {"strategy": "two_stage", "block_k": 128}),
    (200, 1024, 4096, {"strategy": "two_stage", "block_k": 128}),
    (512, 4096, 14336, {"strategy": "library"}),
    (4096, 1024, 4096, {"strategy": "library"}),
])  # fmt: skip
def test_an_epilogue_may_make_the_last_linear_a_kernel(m: int, n: int, k: int, wanted: dict[str, Any]) -> None:
    found = usual("output", m, n, k, epilogue=True).to_dict()
    assert {name: found[name] for name in wanted} == wanted
    assert usual("output", m, n, k, epilogue=False).strategy == "library"
    masked = usual("output", m, n, k, path="masked", epilogue=True)
    assert (masked.strategy == "library") == (wanted["strategy"] == "library")


@pytest.mark.parametrize(("n", "k", "deep"), [(14336, 4096, 4096), (18944, 3584, 4096), (24576, 3072, 512), (13824, 5120, 512)])
def test_gate_and_up_of_a_large_layer_in_one_piece_where_it_is_nearly_full(n: int, k: int, deep: int) -> None:
    """Or a quarter of the threads would read nothing."""
    assert usual("hidden", 1, n, k, 2).block_k == deep


def test_outputs_of_a_few_columns_and_of_odd_widths_on_hopper() -> None:
    assert usual("output", 256, 2, 768).strategy == "two_stage"
    assert usual("output", 100, 333, 333).strategy == "two_stage"
    assert usual("output", 4093, 1021, 2749).strategy == "padded"
    assert usual("output", 127, 1021, 2749).strategy == "padded"


def test_masked_kernels_of_whole_rows_have_small_tiles_too() -> None:
    """Whose first element lies off every alignment."""
    small = usual("hidden", 128, 1024, 1024, path="masked")
    assert (small.block_m, small.block_n) == (64, 32)
    large = usual("hidden", 2048, 1024, 1024, path="masked")
    assert large.block_m * large.block_n > 64 * 64


@pytest.mark.parametrize(("role", "m", "n", "k", "planes", "wanted"), [
    ("hidden_grad", 4096, 8192, 2048, 2, "library"),
    ("hidden_grad", 4096, 4096, 1024, 1, "two_stage"),
    ("hidden_grad", 64, 8192, 2048, 2, "two_stage"),
    ("weight_grad", 768, 3072, 4096, 1, "library"),
    ("weight_grad", 768, 3072, 4093, 1, "library"),  # rows of any number
    ("weight_grad", 1021, 2749, 4096, 1, "padded"),
    ("weight_grad", 333, 577, 1024, 1, "two_stage"),
    ("weight_grad", 1024, 4096, 64, 1, "two_stage"),
    ("input_grad", 1024, 1024, 4096, 1, "library"),
    ("input_grad", 4096, 2048, 8192, 2, "two_stage"),  # the sum of gate's and up's shares would be rounded once more
])  # fmt: skip
def test_large_products_of_backward_on_hopper(role: str, m: int, n: int, k: int, planes: int, wanted: str) -> None:
    assert usual(role, m, n, k, planes).strategy == wanted


RAGGED = (13, 333, 577, 1111, 2749)
ROLES = (("hidden", 1), ("hidden", 2), ("output", 1), ("hidden_grad", 1), ("hidden_grad", 2), ("input_grad", 1), ("input_grad", 2),
         ("weight_grad", 1))  # fmt: skip


@pytest.mark.parametrize(("role", "k"), COPIES)
def test_from_where_on_products_are_on_copies(role: str, k: int) -> None:
    """Gate and up count twice."""
    for planes in (1, 2) if role == "hidden" else (1,):
        rows = -(-COPIES[role, k] // (1111 * k * planes))
        for m, copied in ((rows, True), (rows - 1, False)):
            shape = (k, 1111, m) if role == "weight_grad" else (m, 1111, k)
            few = m <= 64 and m * 1111 * k * planes < 3 * 2**24  # for which there are other kernels
            assert (usual(role, *shape, planes).strategy == "padded") == (copied and not few), m


def test_large_products_of_other_widths_are_on_copies() -> None:
    """Whichever width is no multiple of 8; of weight gradients, whatever the number of rows. What fits as it lies has no copies,
    and no product by the library either."""
    seen = set()
    for (role, planes), m, n, k in itertools.product(ROLES, (1, 64, 65, 200, 1000, 4096), (64, 1024, *RAGGED), (64, 1024, *RAGGED)):
        shape = (n, k, m) if role == "weight_grad" else (m, n, k)
        found, fits = (usual(role, *shape, planes, path) for path in ("masked", "tma"))
        copied = rule.padded(role, *shape, dtype="bfloat16", precision="ieee", planes=planes, target=SM_90)
        assert (copied is None) == (n % 8 == k % 8 == 0)
        assert found.strategy != "padded" or (found == copied and min(n, k) > 64 and m > 16), (role, shape, planes)
        assert found.strategy != "padded" or fits.strategy == "two_stage", (role, shape, planes)
        assert found.strategy == "padded" or copied is None or min(m, n, k) <= 64 or m * n * k * planes < 2**29 or m <= 128
        seen.add((role, planes, found.strategy == "padded"))
    assert len(seen) == 2 * len(ROLES)


@pytest.mark.parametrize("words", [{"dtype": "float32"}, {"dtype": "float32", "precision": "tf32x3"}, {"target": TARGETS["sm_80"]},
                                   {"target": TARGETS["sm_120"]}, {"target": TARGETS["gfx942"]},
                                   {"dtype": "float32", "precision": "tf32", "target": TARGETS["sm_100"]}], ids=str)  # fmt: skip
def test_where_none_are_on_copies(words: dict[str, Any]) -> None:
    """In 32 bits but for TF32, where there are no descriptors, and where nobody measured; nor where rows are of whole 16 bytes."""
    for role, planes in ROLES:
        assert usual(role, 4095, 4095, 4095, planes, "masked", **words).strategy != "padded"
        assert usual(role, 4096, 4096, 4096, planes, "masked").strategy != "padded"
        if words.get("dtype") == "float32" or not words["target"].has_tma:
            given = {"dtype": "bfloat16", "precision": "ieee", "planes": planes, "target": SM_90} | words
            assert rule.padded(role, 4095, 4095, 4095, **given) is None
    given = {"dtype": "bfloat16", "precision": "ieee", "planes": 1, "target": SM_90}
    assert rule.padded("weight_grad", 4096, 4096, 4095, **given) is None  # any number of rows
    assert rule.padded("output", 4096, 4096, 4095, **given) is not None


def test_in_tf32_what_rule_and_request_put_on_descriptors_is_the_same() -> None:
    """Forward's products alone, and over an odd width with an epilogue never the widest tile: registers hold addresses, too."""
    words = {"dtype": "float32", "precision": "tf32", "target": SM_90}
    seen = set()
    for m, n, k in itertools.product((65, 300, 1021, 4096), (100, 1021, 1024, 4096), (100, 260, 1021, 4096)):
        for (role, planes), epilogue in itertools.product(ROLES, (False, True)):
            copied = rule.padded(role, m, n, k, planes=planes, epilogue=epilogue, **words)
            assert (copied is None) == (role not in ("hidden", "output"))
            found = usual(role, m, n, k, planes, "masked", epilogue=epilogue, **words)
            assert found.strategy != "padded" or found == copied
            seen.add((role, found.strategy == "padded"))
            assert copied is None or rule.has_room(copied, role, planes, "float32", SM_90)
            if role == "output":
                assert copied is not None and copied.block_n <= (128 if epilogue and n % 4 else 256)
    assert {("hidden", True), ("output", True), ("hidden", False), ("output", False)} <= seen


IEEE, TF32, X3 = "ieee", "tf32", "tf32x3"
OURS, FEW, TMA = {"strategy": "two_stage"}, {"strategy": "skinny"}, {"strategy": "padded"}
CUBLAS = {"strategy": "library", "bias_pass": False}
APART = {"strategy": "library", "bias_pass": True}


@pytest.mark.parametrize(("role", "m", "n", "k", "planes", "precision", "wanted"), [
    # With a bias cuBLAS shares no sum: long ones that leave processors idle have it in a pass.
    ("output", 256, 768, 3072, 1, IEEE, APART),
    ("output", 4096, 768, 3072, 1, IEEE, APART),
    ("output", 2048, 1024, 4096, 1, IEEE, CUBLAS),  # nobody is idle
    ("output", 4096, 577, 1111, 1, IEEE, CUBLAS),  # a pass over so much costs as much
    ("output", 16, 1111, 333, 1, IEEE, CUBLAS),
    ("output", 16, 577, 1111, 1, IEEE, CUBLAS),
    # A few rows, exactly, whatever is asked for: where tensor cores may be used, fewer.
    ("output", 16, 768, 3072, 1, IEEE, FEW | {"block_m": 16, "block_n": 2}),
    ("output", 3, 1024, 4096, 1, IEEE, FEW | {"block_m": 4}),
    ("hidden", 8, 1111, 333, 1, IEEE, FEW),
    ("hidden", 16, 512, 13, 1, IEEE, FEW | {"block_n": 8, "block_k": 32}),
    ("hidden", 4, 11008, 4096, 2, TF32, FEW),
    ("hidden", 8, 11008, 4096, 2, X3, FEW),
    ("hidden", 16, 3072, 768, 1, X3, FEW),
    ("hidden", 16, 11008, 4096, 2, X3, OURS),
    ("hidden", 17, 3072, 768, 1, IEEE, APART),
    ("output", 64, 128, 512, 1, IEEE, CUBLAS),
    ("hidden", 64, 1536, 384, 1, IEEE, APART),  # a pass follows anyway
    ("hidden", 1024, 1536, 384, 1, IEEE, CUBLAS),
    ("hidden", 512, 4096, 1024, 1, IEEE, CUBLAS),
    ("input_grad", 256, 768, 3072, 1, IEEE, CUBLAS),
    # TF32: cuBLAS, but where sums are short or rows few.
    ("hidden", 4096, 1536, 384, 1, TF32, OURS | {"block_m": 64, "block_n": 128}),
    ("hidden", 256, 1536, 384, 1, TF32, OURS | {"block_m": 64, "block_n": 32}),
    ("hidden", 16, 4096, 1024, 1, TF32, OURS | {"block_m": 16, "block_k": 128}),
    ("hidden", 256, 4096, 1024, 1, TF32, CUBLAS),
    ("hidden", 64, 11008, 4096, 2, TF32, OURS | {"block_n": 32}),
    ("output", 64, 768, 3072, 1, TF32, APART),
    ("output", 64, 4096, 4096, 1, TF32, CUBLAS),
    ("hidden", 96, 512, 784, 1, TF32, APART),  # three times as long with a bias in it, as is some of what follows
    ("output", 96, 512, 784, 1, TF32, APART),
    ("output", 72, 512, 784, 1, TF32, CUBLAS),
    ("hidden", 112, 512, 784, 1, TF32, CUBLAS),
    ("hidden", 96, 1024, 784, 1, TF32, CUBLAS),
    ("output", 128, 768, 3072, 1, TF32, APART),
    ("output", 160, 768, 3072, 1, TF32, CUBLAS),
    # On descriptors: gate and up of tiles enough; one plane where an epilogue follows and waves are full.
    ("hidden", 96, 5632, 2048, 2, TF32, TMA | {"block_m": 128, "block_n": 64, "num_stages": 4}),
    ("hidden", 4096, 5632, 2048, 2, TF32, TMA | {"block_m": 128, "block_n": 128, "num_stages": 3}),
    ("hidden", 256, 11008, 4096, 2, TF32, TMA | {"block_n": 64}),
    ("hidden", 512, 1536, 512, 2, TF32, TMA | {"block_n": 64}),
    ("hidden", 256, 1536, 512, 2, TF32, OURS | {"block_m": 64, "block_n": 32}),  # of few tiles the small ones
    ("hidden", 4096, 1536, 256, 2, TF32, OURS),  # nobody timed it
    ("hidden", 4096, 512, 512, 1, TF32, TMA | {"block_m": 128, "block_n": 128}),
    ("hidden", 8192, 512, 784, 1, TF32, TMA | {"block_n": 256}),
    ("hidden", 1024, 3072, 768, 1, TF32, CUBLAS),  # three processors in ten are idle
    ("hidden", 2048, 3072, 768, 1, TF32, CUBLAS),  # several waves of small tiles
    ("hidden", 8192, 3072, 768, 1, TF32, CUBLAS),  # more waves than three: power
    ("output", 4096, 1024, 4096, 1, TF32, CUBLAS),  # nothing follows
    # And on copies: odd widths, but for few tiles and short sums.
    ("hidden", 127, 2749, 1021, 2, TF32, TMA | {"block_m": 64, "block_n": 64}),
    ("hidden", 4093, 2749, 1021, 2, TF32, TMA | {"block_m": 128, "block_n": 128}),
    ("output", 4093, 1021, 2749, 1, TF32, TMA | {"block_n": 256}),
    ("output", 1021, 1021, 2749, 1, TF32, TMA | {"block_m": 64, "block_n": 128}),
    ("output", 128, 1021, 2749, 1, TF32, APART),
    ("hidden", 4093, 1111, 333, 1, TF32, TMA | {"block_m": 64, "residency": 2}),
    ("hidden", 127, 401, 307, 1, TF32, OURS | {"block_m": 32}),
    ("hidden", 1021, 307, 203, 1, TF32, TMA | {"block_m": 64, "block_n": 64}),
    ("hidden", 4093, 307, 203, 1, TF32, OURS),
    ("hidden", 4093, 203, 101, 1, TF32, OURS),
    ("hidden", 64, 2749, 1021, 2, TF32, CUBLAS),
    ("hidden_grad", 4093, 2749, 1021, 2, TF32, CUBLAS),
    ("output", 16, 4096, 11008, 1, TF32, OURS),
    ("output", 256, 10, 512, 1, TF32, OURS),
    ("hidden_grad", 256, 4096, 1024, 1, TF32, CUBLAS),
    ("weight_grad", 4096, 1024, 256, 1, TF32, CUBLAS),
    # Three products in TF32 against one that is exact, which a few rows and odd widths are better off with.
    ("hidden", 4096, 4096, 1024, 1, X3, OURS | {"block_m": 64, "block_n": 128}),
    ("output", 4096, 1024, 4096, 1, X3, OURS | {"block_m": 128, "block_n": 64}),
    ("hidden", 256, 11008, 4096, 2, X3, OURS),
    ("output", 64, 4096, 11008, 1, X3, APART),
    ("hidden", 24, 5632, 2048, 2, X3, {"strategy": "library"}),
    ("hidden", 1021, 2749, 1021, 2, X3, {"strategy": "library"}),
    ("input_grad", 256, 1024, 4096, 1, X3, CUBLAS),
])  # fmt: skip
def test_float32_on_hopper(role: str, m: int, n: int, k: int, planes: int, precision: str, wanted: dict[str, Any]) -> None:
    found = usual(role, m, n, k, planes, path="masked", dtype="float32", precision=precision).to_dict()
    assert {name: found[name] for name in wanted} == wanted
    assert not usual(role, m, n, k, planes, path="masked").bias_pass, "in 16 bits what a pass reads is rounded"


def test_tf32_elsewhere_is_the_librarys() -> None:
    """Where nothing was timed; but three products in TF32 are what was asked for."""
    for role in ("hidden", "output", "hidden_grad", "weight_grad"):
        found = [
            usual(role, 512, 512, 512, path="masked", dtype="float32", precision=p, target=TARGETS["sm_80"])
            for p in (IEEE, TF32, X3)
        ]
        assert [c.strategy for c in found] == ["library", "library", "two_stage"] and not any(c.bias_pass for c in found), role
    assert usual("hidden", 512, 512, 512, path="masked", dtype="float32", precision=TF32, target=TARGETS["gfx942"]) == rule.choose(
        "hidden", "masked", 512, 512, 512, dtype="float32", precision=TF32, planes=1, target=TARGETS["gfx942"]
    )


def test_tf32_has_small_tiles_where_there_are_few() -> None:
    words = {"dtype": "float32", "precision": "tf32"}
    assert (usual("hidden", 127, 401, 307, path="masked", **words).block_m, usual("hidden", 13, 401, 307, **words).block_m) == (
        32,
        16,
    )
    assert usual("hidden", 127, 401, 307, path="masked", dtype="float32").strategy == "library"
