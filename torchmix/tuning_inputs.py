"""Float weights that behave like quantized ones in the layers that use them (L8).

While a model is tuned, each quantized weight is replaced by its dense values. What is left to imitate is the int8
quantization of the layer's inputs; it happens here, where a product with such a weight is called, and counts as the
identity in the backward pass (straight-through estimator, arXiv 1308.3432), as in the quantized layer itself.

Shapes: N out_features, K in_features, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchmix.capture import fake_quantize
from torchmix.capture.linear_calls import OPERANDS, with_operand


class DenseWeight:
    """Values of one weight during one step, and where their gradient arrives.

    Attributes:
        value: the weight as the model sees it; a leaf that requires a gradient.
        experts: for (E, ...) weights one leaf per expert, with the memory of ``value``: the gradient of indexing would
            fill a tensor of all experts for every expert.
        in_features, group_size, per_token: how the inputs are quantized.
    """

    def __init__(self, value: Tensor, in_features: int, group_size: int, per_token: bool) -> None:
        self.value = value.detach().requires_grad_()  # detached: a tensor that is no view itself
        self.in_features, self.group_size, self.per_token = in_features, group_size, per_token
        parts = value.detach().unbind() if value.dim() == 3 else ()
        self.experts = [part.detach().requires_grad_() for part in parts]

    def operand(self, view: Tensor) -> Tensor:
        """What to use in place of ``view``, which is the weight or a view of it: a leaf where there is one."""
        for expert in self.experts:
            if view.storage_offset() != expert.storage_offset():
                continue
            for candidate in (expert, expert.transpose(0, 1)):
                if view.shape == candidate.shape and view.stride() == candidate.stride():
                    return candidate
        return view

    def take_gradient(self) -> Tensor | None:
        """dL/dW, shape and dtype of ``value``, forgotten here; None where the weight was not used."""
        total, self.value.grad = self.value.grad, None
        gradients = [(e, leaf.grad) for e, leaf in enumerate(self.experts) if leaf.grad is not None]
        if gradients and total is None:
            total = torch.zeros_like(self.value, requires_grad=False)
        for e, gradient in gradients:
            assert total is not None, "made above where there is a gradient"
            total[e] += gradient
            self.experts[e].grad = None
        return total


class TunedProducts(TorchFunctionMode):
    """While active, the inputs of linear calls with the given weights are quantized to int8 and back.

    Attributes:
        seen: names of the weights that were used so far.
    """

    def __init__(self, weights: Mapping[str, DenseWeight]) -> None:
        """``weights``: by name."""
        super().__init__()
        self._weights = dict(weights)
        self._names = {id(weight.value): name for name, weight in weights.items()}
        self._last: tuple[Any, Tensor, Tensor] | None = None
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace input and weight of a call with one of the weights; let everything else run as it is."""
        kwargs = kwargs or {}
        operands = OPERANDS.get(func)
        if operands is None:
            return func(*args, **kwargs)
        x_at, x_name, weight_at, weight_name = operands
        view = args[weight_at] if len(args) > weight_at else kwargs.get(weight_name)
        name = self._name_of(view)
        if name is not None and view is not None:
            weight, x = self._weights[name], args[x_at] if len(args) > x_at else kwargs[x_name]
            args, kwargs = with_operand(args, kwargs, x_at, x_name, self._quantized(x, weight))
            args, kwargs = with_operand(args, kwargs, weight_at, weight_name, weight.operand(view))
            self.seen.add(name)
        return func(*args, **kwargs)

    def _name_of(self, operand: Any) -> str | None:
        """Name of the weight that ``operand`` is, or is a view of."""
        if not isinstance(operand, Tensor):
            return None
        return self._names.get(id(operand)) or self._names.get(id(operand._base))

    def _quantized(self, x: Tensor, weight: DenseWeight) -> Tensor:
        """Inputs after quantization; layers that are fed with the very same tensor in turn share the result."""
        key = (x._version, weight.group_size, weight.per_token)
        if self._last is None or self._last[0] != key or self._last[1] is not x:
            self._last = (key, x, _StraightThrough.apply(x, weight.group_size, weight.per_token))
        return self._last[2]


class _StraightThrough(torch.autograd.Function):
    """int8 quantization of activations and back; the identity for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int, per_token: bool) -> Tensor:
        """x (..., K) -> the same shape and dtype."""
        return fake_quantize(x, group_size, per_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Straight through."""
        return gradient, None, None
