"""Copies and comparisons of whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor


def mixed(seed: int = 0) -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(24, 192), row_bits(24, seed=seed), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_dtype_is_honoured(dtype: torch.dtype) -> None:
    weight = mixed()
    for found in (
        weight.to(dtype),
        weight.type(dtype),
        weight.to("cpu", dtype),
        weight.to(torch.empty(1, dtype=dtype)),
    ):
        assert found.dtype == found.dequantize().dtype == dtype
        assert torch.equal(found.dequantize(), weight.dequantize(dtype))
    assert weight.dtype == torch.float32
    assert torch.equal(weight.to(dtype).float(), weight)  # nothing was rounded


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, torch.bool])
def test_other_dtypes_are_errors(dtype: torch.dtype) -> None:
    weight = mixed()
    with pytest.raises(TypeError, match=rf"cannot become {dtype}.*call dequantize\(\)"):
        weight.to(dtype)
    with pytest.raises(TypeError, match="cannot become"):
        torch.empty_like(weight, dtype=dtype)
    with pytest.raises(TypeError, match="cannot become"), torch.inference_mode():
        weight.to(dtype)


def test_to_copies_only_when_something_changes() -> None:
    weight = mixed()
    assert weight.to(torch.float32) is weight
    copied = weight.to(torch.float32, copy=True)
    assert copied.qdata.data_ptr() != weight.qdata.data_ptr()
    assert torch.equal(copied, weight)


def test_clone_detach_and_data() -> None:
    weight = mixed()
    assert weight.clone().qdata.data_ptr() != weight.qdata.data_ptr()
    assert weight.detach().qdata.data_ptr() == weight.qdata.data_ptr()
    assert nn.Parameter(weight, requires_grad=False).data.qdata.data_ptr() == weight.qdata.data_ptr()


def test_meta_keeps_sizes() -> None:
    weight = mixed()
    meta = weight.to("meta")
    assert meta.qdata.shape == weight.qdata.shape
    assert meta.bits_per_weight == weight.bits_per_weight
    back = torch.empty_like(meta, device="cpu")
    back.copy_(weight)
    assert torch.equal(back, weight)


def test_copy_keeps_the_dtype_of_the_target() -> None:
    target, source = mixed().bfloat16(), mixed()
    assert target.copy_(source) is target
    assert target.dtype == torch.bfloat16
    assert torch.equal(target.float(), source)


def test_copies_that_are_refused() -> None:
    weight, other = mixed(), MixedPrecisionTensor.from_hp(torch.randn(24, 192), 4, 64)
    with pytest.raises(ValueError, match=r"differ in size of qdata \(\(.*\) and \(.*\)\)"):
        weight.copy_(other)
    with pytest.raises(ValueError, match=r"group_size \(64 and 32\)"):
        weight.copy_(MixedPrecisionTensor.from_hp(torch.randn(24, 192), 4, 32))
    with pytest.raises(TypeError, match="equally quantized one"):
        weight.copy_(torch.randn(24, 192))
    with pytest.raises(TypeError, match="equally quantized one"):
        torch.randn(24, 192).copy_(weight)


def test_equal() -> None:
    weight = mixed()
    changed = weight.clone()
    changed.qdata[0] ^= 1
    assert torch.equal(weight, weight.clone())
    others = (changed, weight.t(), weight.bfloat16(), weight[:3], weight.with_parts(per_token=True))
    assert not any(torch.equal(weight, other) for other in others)
    assert not torch.equal(weight, weight.dequantize())


def test_pinned_memory() -> None:
    weight = mixed()
    assert not weight.is_pinned()
    if torch.cuda.is_available():
        pinned = weight.pin_memory()
        assert pinned.is_pinned()
        assert torch.equal(pinned, weight)


def test_shared_memory_keeps_the_weight() -> None:
    weight = mixed()
    expected = weight.dequantize()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    assert torch.equal(weight.dequantize(), expected)
