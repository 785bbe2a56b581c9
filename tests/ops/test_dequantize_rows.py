"""Packed rows back to dense weights: exact in float32, shapes of experts, experts' bytes one after another."""

from __future__ import annotations

import pytest
import torch

from tests.generators import ORDINARY_IN_FEATURES, packed_weight, random_codes, row_bits
from torchmix.ops import dequantize_rows
from torchmix.ops.dequantize_rows import centered_codes
from torchmix.packing import pack_rows, pack_zero_points


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("out_features", [1, 17])
def test_float32_is_exact(out_features: int, in_features: int, device: torch.device) -> None:
    """scale has 8 significant bits and code - zero_point at most 8: their product fits float32."""
    weight = packed_weight(out_features, in_features)
    dense = dequantize_rows(*weight.inner_on(device), in_features, 128, torch.float32)
    assert dense.dtype == torch.float32
    assert torch.equal(dense.cpu().double(), weight.dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_rounded_float32(dtype: torch.dtype) -> None:
    weight = packed_weight(9, 40, 16)
    assert torch.equal(dequantize_rows(*weight.inner, 40, 16, dtype), weight.dense.float().to(dtype))


def test_experts_have_their_rows_one_after_another() -> None:
    experts = [packed_weight(5, 40, 16, seed=seed) for seed in range(3)]
    parts = zip(*(expert.inner for expert in experts), strict=True)
    qdata, scale, zero_point, bits = parts
    dense = dequantize_rows(
        torch.cat(qdata), torch.stack(scale), torch.cat(zero_point), torch.stack(bits), 40, 16, torch.float32
    )
    assert torch.equal(dense.double(), torch.stack([expert.dense for expert in experts]))


def test_no_rows() -> None:
    empty, bits = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    scale = torch.empty((0, 3), dtype=torch.bfloat16)
    assert dequantize_rows(empty, scale, empty, bits, 40, 16, torch.float32).shape == (0, 40)


def test_centered_codes_are_zero_in_the_padding() -> None:
    """Zero points must not leak into the padded inputs of the last group."""
    weight = packed_weight(9, 20, 8)
    qdata, _, zero_point, bits = weight.inner
    centered = centered_codes(qdata, zero_point, bits, 20, 8)
    assert centered.shape == (9, 3, 8)
    assert torch.equal(centered.flatten(1)[:, :20].long(), weight.centered)
    assert not centered[:, 2, 4:].any()


def test_a_wrong_number_of_inputs_is_an_error() -> None:
    weight = packed_weight(9, 172)
    with pytest.raises(ValueError, match="in_features=130"):
        dequantize_rows(*weight.inner, 130, 128, torch.float32)


@pytest.mark.parametrize("shape", [(9,), (2, 3)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    bits = row_bits(9 if len(shape) == 1 else 6)
    codes, zeros = random_codes(bits, 20), random_codes(bits.clamp(max=7), 3).view(torch.uint8)
    inner = (
        pack_rows(codes, bits),
        torch.rand(*shape, 3).bfloat16(),
        pack_zero_points(zeros, bits),
        bits.view(shape),
    )
    torch.library.opcheck(torch.ops.torchmix.dequantize_rows.default, (*inner, 20, 8, torch.bfloat16))
