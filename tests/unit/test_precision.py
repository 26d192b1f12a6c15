"""The flags of torch that products depend on: right meanwhile, and the user's afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlpdsl import eager, precision
from mlpdsl.precision import _flag, _precision, exactly

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
    assert all(value in (False, "ieee") for value in exactly(read, dtype, dtype=dtype).values())
    assert read(dtype) == SAID[dtype]

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        exactly(fail, dtype=dtype)
    assert read(dtype) == SAID[dtype]


@pytest.mark.parametrize("said", ["none", "ieee", "tf32"])
def test_tf32_meanwhile_where_a_spec_says_so(said: str) -> None:
    FLAGS.fp32_precision = said
    assert exactly(lambda: FLAGS.fp32_precision, dtype=torch.float32, tf32=True) == "tf32"
    assert FLAGS.fp32_precision == said


@by_dtype
def test_another_thread_does_not_rely_on_what_is_taken_back(dtype: torch.dtype) -> None:
    """It comes while the flags are right for the first, and multiplies after the first has restored them."""
    inside, restored = threading.Event(), threading.Event()
    seen: list[dict[str, Any]] = []

    def product() -> None:
        inside.set()
        restored.wait(0.5)
        seen.append(read(dtype))

    thread = threading.Thread(target=lambda: exactly(product, dtype=dtype))

    def meanwhile() -> None:
        thread.start()
        inside.wait(0.2)  # it must not get in

    exactly(meanwhile, dtype=dtype)
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
        assert exactly(found, dtype=torch.bfloat16 if "bf16" in name else torch.float16) == (False, said[1])
        assert found() == said
    finally:
        setattr(FLAGS, name, True)


@pytest.mark.parametrize(("everywhere", "meanwhile"), [("none", "none"), ("tf32", "ieee"), ("ieee", "ieee")])
def test_what_is_said_of_all_products_counts(everywhere: str, meanwhile: str) -> None:
    """Where this flag says nothing, a wider one may; where none does, there is nothing to write."""
    try:
        torch.backends.fp32_precision = everywhere
        FLAGS.fp32_precision = "none"
        assert exactly(lambda: FLAGS.fp32_precision, dtype=torch.float32) == meanwhile
        assert FLAGS.fp32_precision == everywhere
    finally:
        torch.backends.fp32_precision = "none"


def eagerly(tf32: bool, function: Any) -> Any:
    with eager._matmul_precision(tf32):
        return function()


@pytest.mark.parametrize("wider", ["cuda", "generic"])
def test_a_wider_setting_may_change_after_a_product_in_tf32(wider: str) -> None:
    say = torch._C._set_fp32_precision_setter
    try:
        FLAGS.fp32_precision = "none"
        say(wider, "all", "ieee")
        assert exactly(lambda: FLAGS.fp32_precision, dtype=torch.float32, tf32=True) == "tf32"
        assert FLAGS.fp32_precision == "ieee"
        say(wider, "all", "tf32")
        assert FLAGS.fp32_precision == "tf32"
    finally:
        say(wider, "all", "none")


@pytest.mark.parametrize("change", [lambda f: exactly(f, dtype=torch.float32), lambda f: eagerly(False, f)], ids=["ours", "eager"])
@pytest.mark.parametrize("wider", ["cuda", "generic"])
def test_a_wider_setting_may_change_after_a_product(wider: str, change: Any) -> None:
    """What only a wider flag said is not said by this one from then on."""
    say = torch._C._set_fp32_precision_setter
    try:
        FLAGS.fp32_precision = "none"
        say(wider, "all", "tf32")
        assert change(lambda: FLAGS.fp32_precision) == "ieee"
        assert FLAGS.fp32_precision == "tf32"
        say(wider, "all", "ieee")
        assert FLAGS.fp32_precision == "ieee"
        say(wider, "all", "none")
        assert FLAGS.fp32_precision == "none"
    finally:
        say(wider, "all", "none")


@pytest.mark.parametrize("first", ["ours", "eager"])
def test_eager_products_and_ours_at_once(first: str) -> None:
    """Another thread's, whichever came first, waits: each has its own precision, and the flag is the user's afterwards."""
    FLAGS.fp32_precision = "none"
    inside, left = threading.Event(), threading.Event()
    seen: dict[str, str] = {}
    calls = {"ours": lambda f: exactly(f, dtype=torch.float32), "eager": lambda f: eagerly(True, f)}
    wanted = {"ours": ("ieee", "none"), "eager": ("tf32",)}

    def second(name: str) -> None:
        def product() -> None:
            inside.set()
            left.wait(0.5)
            seen[name] = FLAGS.fp32_precision

        calls[name](product)

    threads = [threading.Thread(target=second, args=(name,)) for name in calls if name != first]

    def product() -> None:
        for thread in threads:
            thread.start()
        inside.wait(0.2)  # it must not get in
        seen[first] = FLAGS.fp32_precision

    calls[first](product)
    left.set()
    for thread in threads:
        thread.join()
    assert all(seen[name] in wanted[name] for name in calls), seen
    assert FLAGS.fp32_precision == "none"


def test_a_signal_handler_that_multiplies_too() -> None:
    """It runs in the thread that holds the lock."""
    seen: list[str] = []

    def handle(*_: Any) -> None:
        exactly(lambda: seen.append(FLAGS.fp32_precision), dtype=torch.float32)

    def product() -> None:
        signal.raise_signal(signal.SIGUSR1)
        seen.append(FLAGS.fp32_precision)

    def hung(*_: Any) -> None:
        raise AssertionError("it waits for itself")

    before = [signal.signal(number, handler) for number, handler in ((signal.SIGUSR1, handle), (signal.SIGALRM, hung))]
    signal.alarm(5)
    try:
        exactly(product, dtype=torch.float32)
    finally:
        signal.alarm(0)
        for number, handler in zip((signal.SIGUSR1, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    assert seen == ["ieee", "ieee"]
    assert FLAGS.fp32_precision == "tf32"


def test_an_interrupt_while_a_flag_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever Ctrl-C comes between the lock and the product, neither the lock nor a flag stays as it was meanwhile."""
    (flag,) = precision._flags_of(torch.float32, False)

    def written(value: str) -> None:
        flag.write(value)
        if value == "ieee":
            raise KeyboardInterrupt

    interrupted = flag._replace(write=written)
    monkeypatch.setattr(precision, "_flags_of", lambda dtype, tf32: (interrupted,))
    with pytest.raises(KeyboardInterrupt):
        exactly(lambda: None, dtype=torch.float32)
    assert FLAGS.fp32_precision == "tf32"
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.append(precision.lock.acquire(timeout=1) and not precision.lock.release()))
    thread.start()
    thread.join()
    assert free == [True]


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
