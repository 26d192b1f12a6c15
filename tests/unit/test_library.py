"""The flags of torch that the library's products depend on: right meanwhile, and the user's afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlpdsl.library import _exact, _flag, _precision

FLAGS = torch.backends.cuda.matmul
SAID: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"fp32_precision": "tf32"},
    torch.bfloat16: {"allow_bf16_reduced_precision_reduction": True},
    torch.float16: {"allow_fp16_reduced_precision_reduction": True, "allow_fp16_accumulation": True},
}
by_dtype = pytest.mark.parametrize("dtype", SAID, ids=str)


@pytest.fixture(autouse=True)
def _users() -> Iterator[None]:
    """Every flag as loose as it can be."""
    said = {name: value for flags in SAID.values() for name, value in flags.items()}
    before = {name: getattr(FLAGS, name) for name in said}
    for name, value in said.items():
        setattr(FLAGS, name, value)
    yield
    for name, value in before.items():
        setattr(FLAGS, name, value)


def read(dtype: torch.dtype) -> dict[str, Any]:
    return {name: getattr(FLAGS, name) for name in SAID[dtype]}


@by_dtype
def test_exact_meanwhile_and_the_users_afterwards(dtype: torch.dtype) -> None:
    with _exact(dtype):
        assert not any(value not in (False, "ieee") for value in read(dtype).values())
    assert read(dtype) == SAID[dtype]
    with pytest.raises(KeyError), _exact(dtype):
        raise KeyError
    assert read(dtype) == SAID[dtype]


@by_dtype
def test_another_thread_does_not_rely_on_what_is_taken_back(dtype: torch.dtype) -> None:
    """It comes while the flags are right for the first, and multiplies after the first has restored them."""
    inside, restored = threading.Event(), threading.Event()
    seen: list[dict[str, Any]] = []

    def second() -> None:
        with _exact(dtype):
            inside.set()
            restored.wait(0.5)
            seen.append(read(dtype))

    thread = threading.Thread(target=second)
    with _exact(dtype):
        thread.start()
        inside.wait(0.2)  # it must not get in
    restored.set()
    thread.join()
    assert all(value in (False, "ieee") for value in seen[0].values())
    assert read(dtype) == SAID[dtype]


@pytest.mark.parametrize("name", ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"])
@pytest.mark.parametrize("said", [(True, True), (False, True), (False, False)])
def test_whether_sums_may_be_split_stays_the_users(name: str, said: tuple[bool, bool]) -> None:
    """Where torch has that second value, writing the first alone makes it True."""
    if not hasattr(FLAGS, f"{name}_split_k"):
        pytest.skip("this torch has one value")
    setattr(FLAGS, name, said)

    def found() -> tuple[bool, bool]:
        return getattr(FLAGS, name), getattr(FLAGS, f"{name}_split_k")

    try:
        with _exact(torch.bfloat16 if "bf16" in name else torch.float16):
            assert found() == (False, said[1])
        assert found() == said
    finally:
        setattr(FLAGS, name, True)


@pytest.mark.parametrize(("everywhere", "meanwhile"), [("none", "none"), ("tf32", "ieee"), ("ieee", "ieee")])
def test_what_is_said_of_all_products_counts(everywhere: str, meanwhile: str) -> None:
    """Where this flag says nothing, a wider one may; where none does, there is nothing to write."""
    try:
        torch.backends.fp32_precision = everywhere
        FLAGS.fp32_precision = "none"
        with _exact(torch.float32):
            assert FLAGS.fp32_precision == meanwhile
        assert FLAGS.fp32_precision == everywhere
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("wider", ["cuda", "generic"])
def test_a_wider_setting_may_change_after_a_product(wider: str) -> None:
    """What only a wider flag said is not said by this one from then on."""
    say = torch._C._set_fp32_precision_setter
    try:
        FLAGS.fp32_precision = "none"
        say(wider, "all", "tf32")
        with _exact(torch.float32):
            assert FLAGS.fp32_precision == "ieee"
        assert FLAGS.fp32_precision == "tf32"
        say(wider, "all", "ieee")
        assert FLAGS.fp32_precision == "ieee"
        say(wider, "all", "none")
        assert FLAGS.fp32_precision == "none"
    finally:
        say(wider, "all", "none")


def test_a_torch_without_those_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_set_cublas_allow_fp16_accumulation")
    flag = _flag("allow_fp16_accumulation")
    monkeypatch.undo()
    assert flag.read() is True
    flag.write(False)
    assert FLAGS.allow_fp16_accumulation is False
    monkeypatch.delattr(torch._C, "_set_fp32_precision_setter")
    flag = _precision()
    monkeypatch.undo()
    assert flag.read() == "tf32" and flag.exact("tf32") == "ieee"
    flag.write("ieee")
    assert FLAGS.fp32_precision == "ieee"
