"""Int8 activations in a model that computes in floating point (L2).

Shapes: T tokens, K in_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchmix.capture.linear_calls import OPERANDS, with_operand
from torchmix.primitives import MIN_RANGE, SYMMETRIC_MAX, split_groups


def fake_quantize(x: Tensor, group_size: int, per_token: bool) -> Tensor:
    """What a quantized layer computes with instead of ``x`` (..., K): quantized to int8 and back, same dtype.

    The formula of :func:`torchmix.ops.quantize_activation`, without the codes and sums that only a kernel needs.
    """
    groups = split_groups(x.reshape(-1, x.shape[-1]).float(), group_size)
    absmax = torch.linalg.vector_norm(groups, torch.inf, dim=-1, keepdim=True)
    if per_token:
        absmax = absmax.amax(1, keepdim=True)
    largest = absmax.new_full((), float(SYMMETRIC_MAX))  # a tensor, so that the quotients are rounded once
    zero = absmax < MIN_RANGE
    factor, scale = torch.where(zero, 0.0, largest / absmax), torch.where(zero, 0.0, absmax / largest)
    rounded = (groups * factor).round_().clamp_(-SYMMETRIC_MAX, SYMMETRIC_MAX).mul_(scale)
    return rounded.flatten(1)[:, : x.shape[-1]].to(x.dtype).view(x.shape)


class QuantizedInputs(TorchFunctionMode):
    """While active, the inputs of linear calls with the given weights are quantized to int8 and back.

    Layers that are fed with the very same tensor one after another quantize it once.
    """

    def __init__(self, group_size: int, per_token: bool) -> None:
        super().__init__()
        self._group_size, self._per_token = group_size, per_token
        self._weights: dict[int, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, weight: Tensor) -> None:
        """Quantize the inputs of this weight from now on."""
        self._weights[id(weight)] = weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the input where the weight is one of ours."""
        kwargs = kwargs or {}
        operands = OPERANDS.get(func)
        if operands is not None:
            x_at, x_name, weight_at, weight_name = operands
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_name)
            if id(weight) in self._weights:
                x = args[x_at] if len(args) > x_at else kwargs[x_name]
                args, kwargs = with_operand(args, kwargs, x_at, x_name, self._quantized(x))
        return func(*args, **kwargs)

    def _quantized(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = (x, fake_quantize(x, self._group_size, self._per_token))
        return self._last[1]

    def __exit__(self, *exception: Any) -> None:
        self._last = None
        super().__exit__(*exception)
