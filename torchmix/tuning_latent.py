"""``LatentWeight`` (L8): the numbers of one quantized weight that training may choose, and their gradients.

Codes are trained as real numbers that are rounded to the nearest code wherever they are used, and whose gradient is
that of the code (straight-through estimator, arXiv 1308.3432). They start beside the codes that rounding chose, on
the side on which the original weight lies, so that a code flips first where that changes the weight least; learned
rounding in that sense is AdaRound's (arXiv 2004.10568) and SignRound's (arXiv 2309.05516). Scales are trained as
logarithms of multipliers. No computation graph is kept: both gradients follow from dL/dW by one line each.

Shapes: N rows, K in_features, E experts, G = ceil(K / group_size), R = N or E * N rows in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE, code_limits, dequantize, quantize, split_groups
from torchmix.tensor import MixedPrecisionTensor

MAX_OFFSET = 0.45
"""Largest distance of a latent code from its code at the start; below 0.5, so that rounding gives the code back."""


class LatentWeight:
    """One weight as trainable numbers; at first it is the quantized weight exactly.

    Attributes:
        latent_codes: float32 (R, K), or None where codes are not learned.
        log_multiplier: float32 (R, G), zero at first; the scale is ``scale * exp(log_multiplier)`` in bfloat16.
    """

    def __init__(self, weight: MixedPrecisionTensor, original: Tensor | None) -> None:
        """``original``: float weight, shape of ``weight``, towards which codes lean; None leaves the codes alone."""
        self._weight = weight
        self._row_bits = weight.row_bits.flatten()
        self._zero_point = weight.zero_points().view(len(self._row_bits), -1)
        self._first_scale = weight.scale.view(self._zero_point.shape).float()
        self.log_multiplier = torch.zeros_like(self._first_scale)
        self.latent_codes: Tensor | None = None
        self._fixed_codes: Tensor | None = self._first_codes()
        if original is not None:
            self.latent_codes = self._leaning(original)
            self._fixed_codes = None  # the weight has them; no second copy is kept
            self.constrain()

    def _first_codes(self) -> Tensor:
        """int8 (R, K), as the quantized weight has them."""
        return self._weight.codes().view(-1, self._weight.in_features)

    def _leaning(self, original: Tensor) -> Tensor:
        """Codes moved towards ``original`` in units of the scale, by less than half a code."""
        shift = self._rows(original.detach().to(self._weight.device)) - self._dequantized()
        shift = split_groups(shift, self._weight.group_size).div_(self._first_scale[..., None]).flatten(1)
        shift = shift[:, : self._weight.in_features].clamp(-MAX_OFFSET, MAX_OFFSET)
        return shift.add_(self.codes()).contiguous()

    def _rows(self, values: Tensor) -> Tensor:
        """Values in the shape of the weight as float32 (R, K)."""
        rows = values.transpose(-1, -2) if self._weight.transposed else values
        return rows.reshape(-1, self._weight.in_features).float()

    @property
    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """What an optimizer may change in place: scales (as logarithms), and codes (none where they are fixed)."""
        return [self.log_multiplier], [] if self.latent_codes is None else [self.latent_codes]

    def codes(self) -> Tensor:
        """int8 (R, K): nearest codes, inside the range of each row's width."""
        if self.latent_codes is None:
            assert self._fixed_codes is not None, "codes are latent or fixed"
            return self._fixed_codes
        one, zero = self._first_scale.new_ones(()), self._first_scale.new_zeros(())
        grid = (one.expand_as(self._first_scale), zero.expand_as(self._first_scale))
        return quantize(self.latent_codes, *grid, self._row_bits, self._weight.group_size)

    def scale(self) -> Tensor:
        """bfloat16 (R, G)."""
        return (self._first_scale * self.log_multiplier.exp()).to(SCALE_DTYPE)

    def _dequantized(self) -> Tensor:
        return dequantize(self.codes(), self.scale(), self._zero_point, self._weight.group_size)

    def dense(self) -> Tensor:
        """scale * (code - zero_point), in the shape and dtype that the model sees, contiguous."""
        rows = self._dequantized().view(*self._weight.row_bits.shape, -1)
        seen = rows.transpose(-1, -2) if self._weight.transposed else rows
        return seen.to(self._weight.dtype).contiguous()

    def set_gradients(self, gradient: Tensor | None, factor: float) -> None:
        """Turn dL/dW into gradients of what is trained, kept in ``.grad`` as optimizers expect them.

        With c the rounded code, s the rounded scale, z the zero point: W = s (c - z), so dL/dc = s dL/dW, which the
        latent code takes over, and dL/dlog s = s Σ (c - z) dL/dW over the inputs of a group.

        Args:
            gradient: dL/dW as the model sees it, any float dtype; None where the weight was not used.
            factor: multiplies the result.
        """
        if gradient is None:
            self.log_multiplier.grad = None
            if self.latent_codes is not None:
                self.latent_codes.grad = None
            return
        size, scale = self._weight.group_size, self.scale().float()
        groups = split_groups(self._rows(gradient).mul(factor), size)
        centered = split_groups(self.codes().float(), size) - self._zero_point.float()[..., None]
        if self._weight.in_features % size:  # places beyond the last input
            centered[:, -1, self._weight.in_features % size :] = 0
        self.log_multiplier.grad = centered.mul_(groups).sum(-1).mul_(scale)
        if self.latent_codes is not None:
            gradients = groups.mul_(scale[..., None]).flatten(1)
            self.latent_codes.grad = gradients[:, : self._weight.in_features].contiguous()

    def constrain(self) -> None:
        """Bring latent codes back into the range of their row, beyond which no gradient would ever move them."""
        if self.latent_codes is not None:
            smallest, largest = code_limits(self._row_bits)
            torch.clamp(self.latent_codes, smallest[:, None], largest[:, None], out=self.latent_codes)

    def codes_changed(self) -> int:
        """How many codes differ from those at the start."""
        return 0 if self.latent_codes is None else int((self.codes() != self._first_codes()).sum())

    def tensor(self) -> MixedPrecisionTensor:
        """The weight in its storage format: same widths, zero points and settings as at the start."""
        weight = self._weight
        return MixedPrecisionTensor.from_codes(
            self.codes().view(*weight.row_bits.shape, -1),
            self.scale().view(weight.scale.shape),
            self._zero_point.view(weight.scale.shape),
            weight.row_bits,
            weight.group_size,
            weight.dtype,
            per_token=weight.per_token,
            transposed=weight.transposed,
        )
