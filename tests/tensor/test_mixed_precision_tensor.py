"""The tensor class: what it stores, what it dequantizes to, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.generators import ORDINARY_IN_FEATURES, WIDTHS, packed_weight, row_bits
from torchmix.accounting import row_stored_bits
from torchmix.primitives import choose_qparams, dequantize, quantize
from torchmix.tensor import MixedPrecisionTensor


def mixed(*shape: int, group_size: int = 64, transposed: bool = False) -> MixedPrecisionTensor:
    """Normal values, rows of all widths; ``shape`` is (N, K) or (E, N, K)."""
    bits = row_bits(torch.Size(shape[:-1]).numel()).view(shape[:-1])
    weight = torch.randn(shape)
    if transposed:
        weight = weight.transpose(-1, -2).contiguous()
    return MixedPrecisionTensor.from_hp(weight, bits, group_size, transposed=transposed)


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
def test_from_codes_dequantizes_exactly(in_features: int) -> None:
    stored = packed_weight(16, in_features)
    weight = MixedPrecisionTensor.from_codes(
        stored.codes, stored.scale, stored.zero_points, stored.row_bits, 128, torch.float32
    )
    assert torch.equal(weight.dequantize().double(), stored.dense)
    assert weight.dequantize().is_contiguous()
    assert torch.equal(weight.codes(), stored.codes)
    assert torch.equal(weight.zero_points(), stored.zero_points)
    weight.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_hp_rounds_to_nearest(dtype: torch.dtype) -> None:
    dense, bits = torch.randn(16, 172, dtype=dtype), row_bits(16)
    weight = MixedPrecisionTensor.from_hp(dense, bits, 64)
    scale, zero_point = choose_qparams(dense, bits, 64)
    expected = dequantize(quantize(dense, scale, zero_point, bits, 64), scale, zero_point, 64)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert weight.dtype == weight.dequantize().dtype == dtype
    assert weight.shape == dense.shape


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("in_features", [64, 172])
def test_one_width_for_all_rows_stores_the_same_bytes(bits: int, in_features: int) -> None:
    """It is packed by other code, which can be traced."""
    dense = torch.randn(2, 12, in_features)
    one = MixedPrecisionTensor.from_hp(dense, bits, 64)
    many = MixedPrecisionTensor.from_hp(dense, torch.full((2, 12), bits, dtype=torch.uint8), 64)
    assert torch.equal(one, many)
    one.check()


def test_experts_are_matrices_one_after_another() -> None:
    dense, bits = torch.randn(3, 16, 172), row_bits(48).view(3, 16)
    experts = MixedPrecisionTensor.from_hp(dense, bits, 64)
    for e in range(3):
        alone = MixedPrecisionTensor.from_hp(dense[e], bits[e], 64)
        assert torch.equal(experts.dequantize()[e], alone.dequantize())
    assert experts.in_features == 172
    assert experts.out_features == 16


@pytest.mark.parametrize("shape", [(16, 172), (3, 16, 172)])
def test_transposed_weights_store_output_features_as_rows(shape: tuple[int, ...]) -> None:
    """GPT-2's Conv1D and some experts are (in_features, out_features)."""
    dense, bits = torch.randn(shape), row_bits(torch.Size(shape[:-1]).numel()).view(shape[:-1])
    plain = MixedPrecisionTensor.from_hp(dense, bits, 64)
    swapped = MixedPrecisionTensor.from_hp(dense.transpose(-1, -2), bits, 64, transposed=True)
    assert swapped.shape == dense.transpose(-1, -2).shape
    assert torch.equal(swapped.dequantize(), plain.dequantize().transpose(-1, -2))
    assert (swapped.in_features, swapped.out_features) == (172, 16)
    assert torch.equal(swapped.qdata, plain.qdata)
    swapped.check()


def test_bits_per_weight_counts_everything() -> None:
    weight = mixed(14, 172)
    expected = sum(row_stored_bits(172, bits, 64) for bits in weight.row_bits.tolist())
    assert weight.bits_per_weight * weight.numel() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_bits": 9}, "bits=9"),
        ({"row_bits": 1}, "bits=1"),
        ({"row_bits": torch.full((4,), 9, dtype=torch.uint8)}, r"2\.\.8"),
        ({"row_bits": torch.full((3,), 4, dtype=torch.uint8)}, r"shape \(4,\)"),
        ({"row_bits": torch.full((4,), 4)}, "must be uint8"),
        ({"row_bits": 4, "group_size": 100}, "group_size=100"),
        ({"row_bits": 4, "group_size": 1024}, "group_size=1024"),
    ],
)
def test_settings_that_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPrecisionTensor.from_hp(torch.randn(4, 128), **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_weights_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="is not supported; convert to one of"):
        MixedPrecisionTensor.from_hp(torch.ones(4, 128, dtype=dtype), 4)


@pytest.mark.parametrize("shape", [(128,), (2, 2, 4, 128)])
def test_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a weight has 2 dimensions, or 3 with experts"):
        MixedPrecisionTensor.from_hp(torch.ones(shape), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"qdata": w.qdata[:-1]}, "layer.weight: bytes of codes.*damaged"),
        (lambda w: {"zero_point": w.zero_point[1:]}, "damaged"),
        (lambda w: {"scale": w.scale[:, :1]}, "damaged"),
        (lambda w: {"row_bits": w.row_bits * 0}, r"row widths \[0\] must lie in 2\.\.8"),
        (lambda w: {"row_bits": w.row_bits.flip(0)[1:]}, "damaged"),
    ],
)
def test_check_finds_damage(change: object, message: str) -> None:
    weight = mixed(14, 172)
    assert callable(change)
    with pytest.raises(ValueError, match=message):
        weight.with_parts(**change(weight)).check("layer.weight")


def test_flatten_and_unflatten() -> None:
    weight = mixed(14, 172)
    names, attributes = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    again = MixedPrecisionTensor.__tensor_unflatten__(inner, attributes, weight.shape, weight.stride())
    assert torch.equal(again, weight)
    assert not any(isinstance(value, torch.Tensor) for value in attributes.values())
    hash(tuple(attributes.values()))  # guards of compiled graphs compare them


def test_repr_reads_no_values() -> None:
    weight = mixed(14, 172)
    assert f"{weight.bits_per_weight:.3f} bits per weight" in repr(weight)
    assert "device=meta" in repr(weight.to("meta"))
    assert "shape=(14, 172)" in repr(torch.empty_like(weight))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = weight.with_parts(
            **{n: mode.from_tensor(getattr(weight, n)) for n in weight.tensor_data_names}
        )
        assert "shape=(14, 172)" in repr(fake)
    assert isinstance(weight._quantization_type(), str)


def test_compile_cache_key() -> None:
    """Equal for weights that differ in values only; different for anything that a graph depends on."""
    weight = mixed(14, 172)
    key = weight._stable_hash_for_caching()
    assert weight.clone()._stable_hash_for_caching() == key
    others = [mixed(14, 172, group_size=32), mixed(14, 180), weight.t(), weight.bfloat16(), weight[:13]]
    keys = {key, *(other._stable_hash_for_caching() for other in others)}
    assert len(keys) == 1 + len(others)


def test_public_name() -> None:
    assert MixedPrecisionTensor.__module__ == "torchmix"
