"""Interception of linear layers by their weight (L2).

Modules differ in how they apply a weight: ``nn.Linear`` calls ``F.linear``, GPT-2's ``Conv1D`` calls ``addmm``,
mixtures of experts index a 3-D parameter and call ``F.linear`` or ``matmul`` for each expert. All of them are
calls of a few functions with the parameter, or a view of it, as the right operand; that is what is recognised
here, so no table of architectures is needed.

Shapes: T tokens of one call, N out_features, K in_features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class LinearCall:
    """One application of one weight.

    Attributes:
        name: fully qualified name of the parameter.
        expert: number of the expert for 3-D parameters, else None.
        source: the input as the model passed it (identity tells layers that share an input).
        x: the input as (T, K), detached.
    """

    name: str
    expert: int | None
    source: Tensor
    x: Tensor


Observer = Callable[[LinearCall], "Callable[[Tensor], None] | None"]


class LinearCalls(TorchFunctionMode):
    """While active, reports every application of the given weights.

    ``observer`` gets a :class:`LinearCall` and may return a function; that one is called in the backward pass with
    dL/dy of the call as (T, N), in every backward pass through the graph. The model's parameters should not require
    gradients (nothing is accumulated into them); inputs that carry no gradient yet get one here.
    """

    def __init__(self, weights: Mapping[str, Tensor], observer: Observer) -> None:
        """``weights``: fully qualified name -> parameter (N, K), (K, N), (E, N, K) or (E, K, N)."""
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._weights = dict(weights)  # keeps the ids valid
        self._observer = observer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report the call when its weight is one of ours, then let it run."""
        kwargs = kwargs or {}
        operands = OPERANDS.get(func)
        weight = None if operands is None else _weight(operands, args, kwargs)
        found = None if weight is None else self._find(weight)
        if operands is None or weight is None or found is None:
            return func(*args, **kwargs)
        x_at, x_name, _, _ = operands
        x = args[x_at] if len(args) > x_at else kwargs[x_name]
        if weight.dim() == 3:
            return self._each_expert(x, weight)
        call = LinearCall(*found, source=x, x=x.detach().reshape(-1, x.shape[-1]))
        on_gradient = self._observer(call)
        if on_gradient is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
            args, kwargs = with_operand(args, kwargs, x_at, x_name, x)
        y = func(*args, **kwargs)
        y.register_hook(lambda grad: on_gradient(grad.detach().reshape(-1, grad.shape[-1])))
        return y

    def name_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Name of the watched 2-D weight that this call applies, if it is such a call."""
        operands = OPERANDS.get(func)
        weight = None if operands is None else _weight(operands, args, kwargs)
        return None if weight is None else self._names.get(id(weight))

    def _find(self, weight: Tensor) -> tuple[str, int | None] | None:
        """Name and expert of a parameter or of a view that selects one expert of it."""
        name = self._names.get(id(weight))
        if name is not None:
            return name, None
        base = weight._base
        name = self._names.get(id(base)) if base is not None else None
        if name is None or base is None:
            return None
        if base.dim() == 3 and weight.dim() == 2 and weight.numel() == base[0].numel():
            return name, (weight.storage_offset() - base.storage_offset()) // weight.numel()
        return (name, None) if weight.numel() == base.numel() else None

    def _each_expert(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., E, T, K) or (T, K) @ weight (E, K, N): one product per expert, so that each is reported."""
        inputs = [x] * len(weight) if x.dim() < 3 else x.expand(*x.shape[:-3], len(weight), -1, -1).unbind(-3)
        with self:  # inside __torch_function__ the mode is off
            return torch.stack([torch.matmul(x_e, weight[e]) for e, x_e in enumerate(inputs)], dim=-3)


def _weight(
    operands: tuple[int, str, int, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The right operand of a linear call."""
    _, _, at, name = operands
    weight = args[at] if len(args) > at else kwargs.get(name)
    return weight if isinstance(weight, Tensor) else None


def with_operand(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one of them replaced."""
    if len(args) > at:
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}


# function -> position and name of the input, position and name of the weight
OPERANDS: dict[Any, tuple[int, str, int, str]] = {
    torch.nn.functional.linear: (0, "input", 1, "weight"),
    torch.addmm: (1, "mat1", 2, "mat2"),
    torch.matmul: (0, "input", 1, "other"),
    torch.Tensor.matmul: (0, "self", 1, "other"),
    torch.Tensor.__matmul__: (0, "self", 1, "other"),
    torch.mm: (0, "input", 1, "mat2"),
    torch.Tensor.mm: (0, "self", 1, "mat2"),
    torch.bmm: (0, "input", 1, "mat2"),
    torch.Tensor.bmm: (0, "self", 1, "mat2"),
}
