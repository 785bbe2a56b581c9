"""Trainable numbers of one weight: they start at the weight, their gradients are those of the formula."""

from __future__ import annotations

import pytest
import torch

from torchmix.primitives import code_limits, split_groups
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tuning_latent import MAX_OFFSET, LatentWeight

GROUP_SIZE = 64
# shape as the model sees it, transposed; 136 inputs end in a short group
SHAPES = [
    ((14, 128), False),
    ((14, 136), False),
    ((136, 14), True),
    ((3, 14, 136), False),
    ((3, 136, 14), True),
]


def weights(shape, transposed, dtype=torch.float32):
    """A dense weight, and the same quantized with rows of all widths."""
    dense = torch.randn(shape).to(dtype)
    rows = dense.transpose(-1, -2) if transposed else dense
    bits = torch.tensor([2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8).repeat(2).expand(rows.shape[:-1]).clone()
    return dense, MixedPrecisionTensor.from_hp(dense, bits, GROUP_SIZE, transposed=transposed)


@pytest.mark.parametrize("learn_codes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "transposed"), SHAPES)
def test_it_starts_as_the_quantized_weight(shape, transposed, dtype, learn_codes):
    dense, quantized = weights(shape, transposed, dtype)
    latent = LatentWeight(quantized, dense if learn_codes else None)
    assert torch.equal(latent.dense(), quantized.dequantize())
    assert torch.equal(latent.tensor(), quantized)
    assert latent.codes_changed() == 0


def test_latent_codes_lean_towards_the_original():
    dense, quantized = weights((14, 128), False)
    codes, scale = quantized.codes().float(), quantized.scale.float().repeat_interleave(GROUP_SIZE, 1)
    smallest, largest = (limit[:, None] for limit in code_limits(quantized.row_bits))
    for original in (dense, dense + 3 * scale):
        shift = ((original - quantized.dequantize()) / scale).clamp(-MAX_OFFSET, MAX_OFFSET)
        expected = torch.minimum(torch.maximum(codes + shift, smallest), largest)
        latent = LatentWeight(quantized, original)
        torch.testing.assert_close(latent.latent_codes, expected, rtol=0, atol=1e-4)
        assert torch.equal(latent.codes(), quantized.codes())


@pytest.mark.parametrize(("shape", "transposed"), SHAPES)
def test_gradients_are_those_of_the_formula(shape, transposed):
    dense, quantized = weights(shape, transposed)
    latent = LatentWeight(quantized, dense)
    gradient = torch.randn(shape)
    latent.set_gradients(gradient, 0.5)

    codes = quantized.codes().view(14 if len(shape) == 2 else 42, -1).float().requires_grad_()
    log_multiplier = torch.zeros_like(latent.log_multiplier, requires_grad=True)
    scale = quantized.scale.view(log_multiplier.shape).float() * log_multiplier.exp()
    zero_point = quantized.zero_points().view(scale.shape).float()
    values = (split_groups(codes, GROUP_SIZE) - zero_point[..., None]) * scale[..., None]
    rows = gradient.transpose(-1, -2) if transposed else gradient
    (values.flatten(1)[:, : codes.shape[1]] * rows.reshape(codes.shape) * 0.5).sum().backward()
    torch.testing.assert_close(latent.latent_codes.grad, codes.grad)
    torch.testing.assert_close(latent.log_multiplier.grad, log_multiplier.grad, rtol=1e-4, atol=1e-5)
    latent.set_gradients(None, 1.0)
    assert latent.latent_codes.grad is None
    assert latent.log_multiplier.grad is None


@pytest.mark.parametrize(("shape", "transposed"), SHAPES)
def test_what_was_trained_is_what_is_stored(shape, transposed):
    """Also far outside the code range, and with scales that bfloat16 cannot hold."""
    dense, quantized = weights(shape, transposed)
    latent = LatentWeight(quantized, dense)
    latent.latent_codes += 40 * torch.randn(latent.latent_codes.shape)
    latent.log_multiplier += 0.1 * torch.randn(latent.log_multiplier.shape)
    trained = latent.dense()
    stored = latent.tensor()
    stored.check()
    assert torch.equal(stored.dequantize(), trained)
    assert torch.equal(stored.row_bits, quantized.row_bits)
    assert torch.equal(stored.zero_points(), quantized.zero_points())
    assert stored.qdata.numel() == quantized.qdata.numel()
    changed = (stored.codes() != quantized.codes()).sum()
    assert latent.codes_changed() == int(changed) > 0
    latent.constrain()
    assert torch.equal(latent.dense(), trained), "latent codes outside the range already counted as its ends"
    one = torch.zeros_like(latent.latent_codes)
    one[latent.codes() != stored.codes().view(one.shape)] = 1
    assert not one.any()


def test_constrained_codes_leave_the_border_again():
    dense, quantized = weights((14, 128), False)
    latent = LatentWeight(quantized, dense)
    latent.latent_codes.fill_(1000.0)
    latent.constrain()
    at_border = latent.codes().clone()
    latent.latent_codes -= 0.6
    assert (latent.codes() == at_border - 1).all()


def test_fixed_codes_are_no_parameters():
    dense, quantized = weights((14, 128), False)
    scales, codes = LatentWeight(quantized, None).parameters
    assert (len(scales), len(codes)) == (1, 0)
    assert len(LatentWeight(quantized, dense).parameters[1]) == 1
