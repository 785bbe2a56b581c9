"""Running statistics of layer inputs (L2).

Shapes: T tokens, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchmix.capture.linear_calls import LinearCall
from torchmix.matmul_precision import token_sums

_Layer = tuple[str, "int | None"]  # parameter name, expert


@dataclass
class _Input:
    """An input whose layers are not all known yet: the next call may be of the very same tensor."""

    source: Tensor  # kept because its identity must not be reused meanwhile
    x: Tensor  # (T, K)
    key: str
    layers: list[_Layer]


class HessianAccumulator:
    """Hessians H = (2 / T) sum of x xᵀ over all tokens that a layer saw, in float32.

    Layers that get the very same input tensor one after another (query, key and value; gate and up) share one
    Hessian. Sharing is found at the first call of a layer; layers that part later continue with copies. An input
    is added when the next one comes, because only then it is known who shared it.

    Attributes:
        keys: (name, expert) -> key of its Hessian.
        tokens: key -> tokens seen.
    """

    def __init__(self) -> None:
        self.keys: dict[_Layer, str] = {}
        self.tokens: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._layers: dict[str, list[_Layer]] = {}  # key -> layers that share it
        self._last: _Input | None = None

    def add(self, call: LinearCall) -> None:
        """Add the inputs of one call."""
        layer = (call.name, call.expert)
        if self._last is not None and self._last.source is call.source and self._may_join(layer, self._last):
            self._last.layers.append(layer)
            self._give_key(layer, self._last.key)
            return
        self.forget_last()
        if layer not in self.keys:
            self._give_key(layer, _own_key(layer))
        self._last = _Input(call.source, call.x, self.keys[layer], [layer])

    def _may_join(self, layer: _Layer, last: _Input) -> bool:
        """Whether all that this layer has seen, with ``last``, is what the Hessian of ``last`` holds."""
        if layer in self.keys:
            return self.keys[layer] == last.key and layer not in last.layers
        return last.key not in self._sums

    def _give_key(self, layer: _Layer, key: str) -> None:
        if self.keys.get(layer) == key:
            return
        self.keys[layer] = key
        self._layers.setdefault(key, []).append(layer)

    def forget_last(self) -> None:
        """Add and release the last input; called between samples."""
        last, self._last = self._last, None
        if last is None:
            return
        self._part(last)
        x = last.x.float()
        with token_sums(last.x.dtype):
            if last.key in self._sums:
                self._sums[last.key].addmm_(x.T, x)
            else:
                self._sums[last.key] = x.T @ x
        self.tokens[last.key] = self.tokens.get(last.key, 0) + len(x)

    def _part(self, last: _Input) -> None:
        """Give layers that did not get this input a Hessian without it."""
        sharers = self._layers[last.key]
        others = [layer for layer in sharers if layer not in last.layers]
        if not others:
            return
        owner_stays = any(_own_key(layer) == last.key for layer in last.layers)
        moved = others if owner_stays else last.layers
        old, new = last.key, _own_key(moved[0])
        self._sums[new], self.tokens[new] = self._sums[old].clone(), self.tokens[old]
        self._layers[old] = [layer for layer in sharers if layer not in moved]
        for layer in moved:
            self._give_key(layer, new)
        last.key = last.key if owner_stays else new

    def hessian(self, name: str, expert: int | None = None) -> Tensor | None:
        """Hessian of one layer, float32 (K, K), without an input that is still open; None where no token came by."""
        key = self.keys.get((name, expert))
        if key is None or key not in self._sums:
            return None
        return self._sums[key] * (2.0 / max(self.tokens[key], 1))

    def hessians(self) -> dict[str, Tensor]:
        """All Hessians by key: float32 (K, K) each."""
        self.forget_last()
        return {key: total * (2.0 / max(self.tokens[key], 1)) for key, total in self._sums.items()}


def _own_key(layer: _Layer) -> str:
    """Key of the Hessian that this layer was the first to see."""
    name, expert = layer
    return name if expert is None else f"{name}[{expert}]"
