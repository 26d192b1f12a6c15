"""Targets: the words for them, and asking the machine through a fake NVML."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpdsl import target as module
from mlpdsl.errors import UnsupportedError
from mlpdsl.target import TARGETS, Target, detect, from_capability, parse_target

HOPPER, AMPERE, ADA = (9, 0), (8, 0), (8, 9)


class FakeNVML:
    """libnvidia-ml as ctypes shows it: functions that return a status and write through pointers."""

    def __init__(self, *capabilities: tuple[int, int], failing: str = "") -> None:
        self.capabilities = capabilities
        self.failing = failing
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.failing:
                return 999
            getattr(self, f"_{name}")(*arguments)
            return 0

        return function

    def _nvmlInit_v2(self) -> None: ...

    def _nvmlShutdown(self) -> None: ...

    def _nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self.capabilities)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> None:
        handle._obj.value = 0x7F00_0000_0000 + index.value  # above 32 bits: a handle is a pointer

    def _nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> None:
        assert length.value >= 80  # NVML_DEVICE_UUID_V2_BUFFER_SIZE is 96, the first version's was 80
        buffer.value = f"GPU-{handle.value - 0x7F00_0000_0000}b-dead-beef".encode()

    def _nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = self.capabilities[handle.value - 0x7F00_0000_0000]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLPDSL_TARGET", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    module._ask.cache_clear()
    yield
    module._ask.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], failing: str = "") -> FakeNVML:
    nvml = FakeNVML(*capabilities, failing=failing)
    monkeypatch.setattr(module, "_load_nvml", lambda: nvml)
    return nvml


class TestTargets:
    def test_hopper(self) -> None:
        assert TARGETS["sm_90"] == Target("sm_90", "cuda", 90, 32, 232448, True)

    def test_cdna3(self) -> None:
        assert TARGETS["gfx942"] == Target("gfx942", "hip", "gfx942", 64, 65536, False)

    def test_shared_memory_in_bytes(self) -> None:
        sizes = {name: target.shared_memory for name, target in TARGETS.items()}
        assert (sizes["sm_75"], sizes["sm_80"], sizes["sm_86"], sizes["sm_89"]) == (65536, 166912, 101376, 101376)
        assert (sizes["sm_100"], sizes["sm_103"], sizes["sm_120"], sizes["sm_121"]) == (232448, 232448, 101376, 101376)
        assert sizes["gfx950"] == 163840

    def test_tma_came_with_hopper(self) -> None:
        assert [name for name, target in TARGETS.items() if target.has_tma] == [*("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")]

    def test_frozen_and_hashable(self) -> None:
        assert len(set(TARGETS.values())) == len(TARGETS)
        with pytest.raises(dataclasses.FrozenInstanceError):
            TARGETS["sm_90"].arch = 100  # type: ignore[misc]


class TestParse:
    @pytest.mark.parametrize("text", ["sm_90", "sm90", "90", "sm_90a", "90a", " SM_90 ", TARGETS["sm_90"]])
    def test_spellings(self, text: str) -> None:
        assert parse_target(text) is TARGETS["sm_90"]

    def test_amd_with_features(self) -> None:
        assert parse_target("gfx942:sramecc+:xnack-") is TARGETS["gfx942"]

    def test_family_suffix(self) -> None:
        assert parse_target("sm_100f") is TARGETS["sm_100"]

    @pytest.mark.parametrize("name", TARGETS)
    def test_every_name_is_its_own_spelling(self, name: str) -> None:
        assert parse_target(name).name == name

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "sm_",
            "sm_80a",
            "sm_90f",
            "sm_91",
            "9",
            "9.0",
            "\uff19\uff10",
            "sm_90 # x",
            "gfx",
            "H100",
            "x" * 10**6,
            None,
            90,
            9.0,
        ],
        ids=lambda text: repr(text)[:10],
    )
    def test_everything_else_is_refused(self, text: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            parse_target(text)
        assert all(name in str(caught.value) for name in TARGETS)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        ("text", "target"), [("H100", "sm_90"), ("a100", "sm_80"), ("H200", "sm_90"), ("B200", "sm_100"), ("MI300X", "gfx942")]
    )
    def test_a_product_is_told_its_architecture(self, text: str, target: str) -> None:
        """Their names are like other architectures': an H100 is no sm_100."""
        with pytest.raises(UnsupportedError, match=f"Did you mean '{target}'"):
            parse_target(text)
        with pytest.raises(UnsupportedError) as caught:
            parse_target("V100")
        assert "Did you mean" not in str(caught.value)

    @settings(deadline=None)
    @given(st.text("smgfx_0123456789a:+ \n\0", max_size=9))
    def test_any_text(self, text: str) -> None:
        try:
            found = parse_target(text)
        except UnsupportedError:
            return
        assert found.name in TARGETS


def test_from_capability() -> None:
    assert from_capability(9, 0) is TARGETS["sm_90"]
    assert from_capability(12, 1) is TARGETS["sm_121"]
    for unknown in ((11, 0), (7, 0), (8, 10), (-1, 0), (0, 90), (9, -1)):
        assert from_capability(*unknown) is None


class TestVariable:
    def test_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = install(monkeypatch, HOPPER)
        monkeypatch.setenv("MLPDSL_TARGET", "sm_80")
        assert detect() is TARGETS["sm_80"]
        assert nvml.calls == []

    def test_a_bad_value_names_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, HOPPER)
        monkeypatch.setenv("MLPDSL_TARGET", "hopper")
        with pytest.raises(UnsupportedError, match="environment variable MLPDSL_TARGET: got 'hopper'"):
            detect()

    def test_an_empty_one_is_unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, HOPPER)
        monkeypatch.setenv("MLPDSL_TARGET", " ")
        assert detect() is TARGETS["sm_90"]


class TestDetect:
    @pytest.mark.parametrize(
        ("visible", "name"),
        [
            (None, "sm_90"),
            ("0", "sm_90"),
            ("1,0", "sm_90"),
            (" 1 , 0 ", "sm_90"),
            ("1abc", "sm_90"),  # CUDA reads the leading digits
            ("0,-1,1", "sm_90"),  # and stops at the first invalid entry
            ("0,7", "sm_90"),
            ("0,9999999999999999999999", "sm_90"),
            ("GPU-1b", "sm_90"),
            ("GPU-0b-dead-beef,GPU-1b", "sm_90"),
            ("GPU-0b,1", "sm_90"),
            ("", None),
            (" ", None),
            ("-1", None),
            ("7", None),
            ("-1,0", None),
            (",0", None),
            ("0,0", None),  # a repeated entry leaves nothing visible
            ("GPU-0b,GPU-0b-dead", None),
            ("GPU-", None),  # matches both
            ("GPU-ffff", None),
            ("MIG-0b-dead-beef", None),
            ("NoDevFiles", None),
            ("9" * 5000, None),
        ],
    )
    def test_cuda_visible_devices(self, monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str | None) -> None:
        install(monkeypatch, HOPPER, HOPPER)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = detect()
        assert (found and found.name) == name

    @pytest.mark.parametrize("visible", ["", "-1", "MIG-0b", "NoDevFiles"])
    def test_nothing_visible_does_not_load_the_driver(self, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
        nvml = install(monkeypatch, HOPPER)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert detect() is None
        assert nvml.calls == []

    @pytest.mark.parametrize(
        ("visible", "order", "name"),
        [
            (None, None, None),
            ("0", None, None),  # CUDA numbers the fastest first, NVML by bus
            ("0", "FASTEST_FIRST", None),
            ("0", "PCI_BUS_ID", "sm_80"),
            ("1", "PCI_BUS_ID", "sm_90"),
            ("0,1", "PCI_BUS_ID", None),
            ("GPU-1b", None, "sm_90"),
            ("GPU-1b,GPU-0b", None, None),
        ],
    )
    def test_different_gpus(
        self, monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, name: str | None
    ) -> None:
        install(monkeypatch, AMPERE, HOPPER)
        for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
            if value is not None:
                monkeypatch.setenv(variable, value)
        found = detect()
        assert (found and found.name) == name

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch)
        assert detect() is None

    def test_an_architecture_of_tomorrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, (11, 0))
        assert detect() is None

    @pytest.mark.parametrize(
        "failing",
        [
            "nvmlInit_v2",
            "nvmlDeviceGetCount_v2",
            "nvmlDeviceGetHandleByIndex_v2",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetCudaComputeCapability",
        ],
    )
    def test_an_nvml_error_is_not_ours(self, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
        nvml = install(monkeypatch, HOPPER, failing=failing)
        assert detect() is None
        # what was initialised is shut down, and nothing else is
        assert nvml.calls.count("nvmlShutdown") == (failing != "nvmlInit_v2")

    def test_an_old_or_absent_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent() -> Any:
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")

        monkeypatch.setattr(module, "_load_nvml", absent)
        assert detect() is None
        module._ask.cache_clear()
        monkeypatch.setattr(module, "_load_nvml", object)  # has none of the symbols
        assert detect() is None

    def test_asked_once_for_each_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = install(monkeypatch, ADA)
        assert detect() is detect() is TARGETS["sm_89"]
        assert nvml.calls.count("nvmlInit_v2") == nvml.calls.count("nvmlShutdown") == 1
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert detect() is None
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert detect() is TARGETS["sm_89"]
        assert nvml.calls.count("nvmlInit_v2") == 2

    def test_this_machine(self) -> None:
        assert detect() is None or detect() in TARGETS.values()

    def test_no_cuda_context(self) -> None:
        detect()
        torch = sys.modules.get("torch")
        assert torch is None or not torch.cuda.is_initialized()
