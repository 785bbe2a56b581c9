"""Dense weights from tiles are those from the plain order, to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.generators import ORDINARY_IN_FEATURES, packed_weight
from torchmix.ops import dequantize_rows, dequantize_tiles
from torchmix.tiles import pack_tiles


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_the_plain_order(in_features: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = packed_weight(150, in_features)
    inner = weight.inner_on(device)
    found = dequantize_tiles(*pack_tiles(*inner, in_features), 150, in_features, dtype)
    assert torch.equal(found, dequantize_rows(*inner, in_features, 128, dtype))
    if dtype == torch.float32:
        assert torch.equal(found.double().cpu(), weight.dense)


def test_opcheck(device: torch.device) -> None:
    tiles = pack_tiles(*packed_weight(70, 130).inner_on(device), 130)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        op = torch.ops.torchmix.dequantize_tiles.default
        torch.library.opcheck(op, (*tiles, 70, 130, torch.bfloat16))
