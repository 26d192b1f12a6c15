"""What descriptors say of memory, where torch leaves it open."""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import torch

from mlpdsl import launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 8, 9, 12, 13, 16])
def test_no_stride_reaches_further_than_the_next(dtype: torch.dtype, columns: int) -> None:
    """CUDA wants strides of whole 16 bytes, none smaller than the one inside it: of one row, too, whose stride is nobody's."""
    x = torch.empty(4, dtype=dtype)
    for shape in ((1, columns), (3, columns), (2, 1, columns), (1, 1, columns), (2, 3, columns), (1, 3, columns)):
        made = launch.empty_padded(x, shape)
        described = (launch.describe if len(shape) == 2 else launch.describe_planes)(made, 1, 16)
        strides = described.strides
        assert strides[-1] == 1 and all(stride * x.element_size() % 16 == 0 for stride in strides[:-1])
        assert all(outer >= inner * extent for outer, inner, extent in zip(strides, strides[1:], described.shape[1:], strict=False))
        assert strides == list(made.stride()) or 1 in shape
