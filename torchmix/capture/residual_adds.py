"""Which linear layers write to a residual stream, and what is in it (L2).

``hidden = residual + layer(x)`` is recognised when it happens: an addition one of whose operands is the very tensor
that a watched layer has just returned.

Shapes: T tokens, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchmix.capture.linear_calls import LinearCalls, Observer

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}


class ResidualAdds(LinearCalls):
    """:class:`LinearCalls` that also notices where an output is added to another tensor of its shape.

    Attributes:
        residuals: names of the layers whose output was added to a stream.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        observer: Observer,
        on_add: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """``on_add`` is called with a layer's name and the stream, before the addition."""
        super().__init__(weights, observer)
        self.residuals: set[str] = set()
        self._on_add = on_add
        self._last: tuple[str, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notice additions; leave the rest to the base class."""
        if func in _ADDITIONS and self._last is not None and len(args) == 2 and not kwargs:
            name, output = self._last
            others = [arg for arg in args if isinstance(arg, Tensor) and arg is not output]
            if len(others) == 1 and others[0].shape == output.shape and any(arg is output for arg in args):
                self.residuals.add(name)
                if self._on_add is not None:
                    self._on_add(name, others[0])
        result = super().__torch_function__(func, types, args, kwargs)
        watched = self.name_of(func, args, kwargs or {})
        if watched is not None and isinstance(result, Tensor):
            self._last = (watched, result)
        return result
