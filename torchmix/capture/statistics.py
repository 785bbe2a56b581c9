"""Running statistics of layer inputs (L2).

Shapes: T tokens, K in_features.
"""

from __future__ import annotations

from torch import Tensor

from torchmix.capture.linear_calls import LinearCall


class HessianAccumulator:
    """Hessians H = (2 / T) sum of x xᵀ over all tokens that a layer saw, in float32.

    Layers that get the very same input tensor (query, key and value; gate and up) share one Hessian. Sharing is
    found at the first call of a layer; a layer that leaves its partners later continues with a copy of its own.

    Attributes:
        keys: (name, expert) -> key of its Hessian.
        tokens: key -> tokens seen.
    """

    def __init__(self) -> None:
        self.keys: dict[tuple[str, int | None], str] = {}
        self.tokens: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None  # the tensor is kept: its identity must not be reused

    def add(self, call: LinearCall) -> None:
        """Add the inputs of one call."""
        layer = (call.name, call.expert)
        own_key = call.name if call.expert is None else f"{call.name}[{call.expert}]"
        last_key = self._last[1] if self._last is not None and self._last[0] is call.source else None
        key = self.keys.setdefault(layer, last_key or own_key)
        if key == last_key:
            return
        if key != own_key:
            self.keys[layer] = own_key
            self._sums[own_key], self.tokens[own_key] = self._sums[key].clone(), self.tokens[key]
            key = own_key
        x = call.x.float()
        if key in self._sums:
            self._sums[key].addmm_(x.T, x)
        else:
            self._sums[key] = x.T @ x
        self.tokens[key] = self.tokens.get(key, 0) + len(x)
        self._last = (call.source, key)

    def forget_last(self) -> None:
        """Release the last input; called between samples."""
        self._last = None

    def hessians(self) -> dict[str, Tensor]:
        """All Hessians by key: float32 (K, K) each."""
        return {key: total * (2.0 / max(self.tokens[key], 1)) for key, total in self._sums.items()}
