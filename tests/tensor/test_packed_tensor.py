"""What both classes of quantized weights answer alike."""

from __future__ import annotations

import pytest
import torch

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor, PackedTensor, TiledTensor


def weights() -> tuple[MixedPrecisionTensor, TiledTensor]:
    plain = MixedPrecisionTensor.from_hp(torch.randn(70, 200), row_bits(70))
    return plain, TiledTensor.from_plain(plain)


def test_sizes_and_settings() -> None:
    for weight in weights():
        assert isinstance(weight, PackedTensor)
        assert (weight.in_features, weight.out_features, weight.group_size) == (200, 70, 128)
        assert (weight.t().in_features, weight.t().out_features) == (200, 70)
        assert (weight.per_token, weight.transposed, weight.t().transposed) == (False, False, True)
        assert torch.equal(weight.row_bits, row_bits(70))
        assert set(weight.length_names) <= set(weight.tensor_data_names)


def test_bits_per_weight_are_those_of_the_memory() -> None:
    for weight in weights():
        inner = [getattr(weight, name) for name in weight.tensor_data_names]
        assert weight.bits_per_weight == 8 * sum(t.numel() * t.element_size() for t in inner) / (70 * 200)
        assert f"{weight.bits_per_weight:.3f} bits per weight" in repr(weight)


def test_with_parts_shares_what_is_not_replaced() -> None:
    for weight in weights():
        other = weight.with_parts(per_token=True)
        assert type(other) is type(weight)
        assert other.per_token
        for name in weight.tensor_data_names:
            assert getattr(other, name) is getattr(weight, name)


@pytest.mark.parametrize("number", [0, 1])
def test_compile_cache_key(number: int) -> None:
    """Equal for weights that differ in values only; different for anything that a graph depends on."""
    weight = weights()[number]
    key = weight._stable_hash_for_caching()
    assert weight.clone()._stable_hash_for_caching() == key
    others = [weight.t(), weight.bfloat16(), weight.with_parts(per_token=True)]
    assert len({key, *(other._stable_hash_for_caching() for other in others)}) == 4


def test_the_base_class_has_no_order_of_its_own() -> None:
    with pytest.raises(NotImplementedError, match="does not say what its plain order is"):
        PackedTensor.to_plain(weights()[0])
