"""Projections that have the same input, as one product (L4): q, k and v of attention, gate and up of an MLP.

With few tokens a small product is mostly the time to start it, and its input is quantized once for each. Fused, the
first projection computes all of them, and the others hand out their parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchmix.repacking import save_plain
from torchmix.tensor import MixedPrecisionTensor, PackedTensor, TiledTensor

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse_projections` has done.

    fused: names of the modules that are one product now, the first of each computes it. left: (name of the parent and
    the projections, reason) of those that stay apart.
    """

    fused: tuple[tuple[str, ...], ...]
    left: tuple[tuple[str, str], ...]


class FusedLinear(nn.Module):
    """The first of some projections: one weight (N1 + N2 + .., K), one product, outputs in parts.

    Outputs for the other projections are kept until they ask for them, with the same, unchanged input; with another
    input, or once more, everything is computed again. One thread at a time may use it.
    """

    def __init__(self, weight: PackedTensor, bias: nn.Parameter | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self.sizes = list(sizes)
        self.in_features, self.out_features = weight.in_features, self.sizes[0]
        self._kept: tuple[Tensor, list[Tensor | None]] | None = (
            None  # the input, and outputs not yet asked for
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N1)."""
        return self.part(0, x)

    def part(self, index: int, x: Tensor) -> Tensor:
        """Output of projection ``index``: (..., K) to (..., N of it)."""
        kept = self._kept
        if kept is None or kept[0] is not x or kept[1][index] is None:
            kept = (x, list(F.linear(x, self.weight, self.bias).split(self.sizes, -1)))
        result = kept[1][index]
        assert result is not None, "it has just been computed, or was there"
        kept[1][index] = None
        self._kept = None if all(part is None for part in kept[1]) else kept
        return result

    def stored(self, index: int) -> tuple[MixedPrecisionTensor, Tensor | None]:
        """Weight, in the plain order, and bias of one projection, as they were before."""
        weight = _packed(self)
        assert weight is not None, "it was packed when this was made"
        piece: MixedPrecisionTensor = _plain(weight).split(self.sizes, 0)[index]
        return piece, None if self.bias is None else self.bias.detach().split(self.sizes)[index]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        _save_part(self, 0, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: object, prefix: str, *args: list[str]) -> None:
        _refuse_to_load(prefix, args[-1])

    def extra_repr(self) -> str:
        """Sizes of the projections."""
        return f"in_features={self.in_features}, out_features={' + '.join(map(str, self.sizes))}"


class FusedPart(nn.Module):
    """Another projection, whose rows are in a :class:`FusedLinear`."""

    def __init__(self, leader: FusedLinear, index: int) -> None:
        super().__init__()
        self._leader = (leader,)  # no submodule: the model knows it by another name
        self.index = index
        self.in_features, self.out_features = leader.in_features, leader.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return self._leader[0].part(self.index, x)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        _save_part(self._leader[0], self.index, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: object, prefix: str, *args: list[str]) -> None:
        _refuse_to_load(prefix, args[-1])

    def extra_repr(self) -> str:
        """Sizes, and where the rows are."""
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.index}"


def fuse_projections(model: nn.Module, projections: Sequence[Sequence[str]] = PROJECTIONS) -> FuseReport:
    """Make one product of quantized projections with the same input, in place.

    Outputs stay the same up to the rounding of float32 sums. The state dict and what is saved keep the original names,
    shapes and bytes. Works before and after :func:`torchmix.repack`; compile the model afterwards.

    Args:
        model: any module. A module that has children of these names must call them with the very same tensor;
            otherwise the result is right, but slower.
        projections: names of children that belong together, in the order in which they are called.

    Returns:
        Which projections were fused, and why others were not. Those that are not quantized are not mentioned.
    """
    uses = Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    fused: list[tuple[str, ...]] = []
    left: list[tuple[str, str]] = []
    for path, parent in list(model.named_modules()):
        for names in projections:
            children = [
                child for name in names if isinstance(child := getattr(parent, name, None), nn.Module)
            ]
            if len(children) < len(names) or any(_packed(child) is None for child in children):
                continue
            where = tuple(f"{path}.{name}" if path else name for name in names)
            reason = _cannot_fuse(children, uses)
            if reason is not None:
                left.append((", ".join(where), reason))
                continue
            fused.append(where)
            leader = _fused(children)
            for index, name in enumerate(names):
                setattr(parent, name, leader if index == 0 else FusedPart(leader, index))
    return FuseReport(tuple(fused), tuple(left))


def unfuse_projections(model: nn.Module) -> tuple[str, ...]:
    """Inverse of :func:`fuse_projections`, in place and bit for bit; weights in tiles are tiled again.

    Returns:
        Names of the modules that are linear layers again.
    """
    changed: list[str] = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedLinear | FusedPart):
                leader, index = (
                    (child, 0) if isinstance(child, FusedLinear) else (child._leader[0], child.index)
                )
                setattr(parent, name, _linear(leader, index))
                changed.append(f"{path}.{name}" if path else name)
    return tuple(changed)


def _packed(module: nn.Module) -> PackedTensor | None:
    """The quantized weight of a module, or None."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, PackedTensor) else None


def _plain(weight: PackedTensor) -> MixedPrecisionTensor:
    """The weight in the plain order, without its being a parameter."""
    plain = weight.to_plain() if isinstance(weight, TiledTensor) else weight.detach()
    assert isinstance(plain, MixedPrecisionTensor), "a quantized weight is plain or tiled"
    return plain


def _cannot_fuse(children: Sequence[nn.Module], uses: Counter[int]) -> str | None:
    """Why these quantized projections cannot be one product, or None."""
    linears = [child for child in children if type(child) is nn.Linear]
    if len(linears) < len(children):
        return f"they are {', '.join(type(child).__name__ for child in children)}; only nn.Linear is fused"
    weights = [weight for child in children if (weight := _packed(child)) is not None]
    kinds = {(type(w), w.in_features, w.group_size, w.dtype, w.per_token, w.device) for w in weights}
    if len(kinds) > 1 or any(weight.dim() != 2 or weight.transposed for weight in weights):
        return "their weights differ in inputs, group size, dtype, device, layout or scales of activations"
    biases = [linear.bias for linear in linears]
    if len({None if bias is None else (bias.dtype, bias.requires_grad) for bias in biases}) > 1:
        return "their biases differ, or only some have one"
    if any(uses[id(weight)] > 1 for weight in weights):
        return "a weight is shared with another module"
    if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return "forward hooks are registered on them"
    return None


def _fused(children: Sequence[nn.Module]) -> FusedLinear:
    weights = [weight for child in children if (weight := _packed(child)) is not None]
    biases = [child.bias for child in children if isinstance(child, nn.Linear) and child.bias is not None]
    together = torch.cat([_plain(weight) for weight in weights])
    assert isinstance(together, MixedPrecisionTensor), "rows that are put together stay packed"
    bias = None
    if biases:
        joined = torch.cat([bias.detach() for bias in biases])
        bias = nn.Parameter(joined, requires_grad=biases[0].requires_grad)
    tiled = isinstance(weights[0], TiledTensor)
    fused: PackedTensor = TiledTensor.from_plain(together) if tiled else together
    leader = FusedLinear(fused, bias, [weight.out_features for weight in weights])
    return leader.train(children[0].training)


def _linear(leader: FusedLinear, index: int) -> nn.Linear:
    weight, bias = leader.stored(index)
    linear = nn.Linear(leader.in_features, leader.sizes[index], bias is not None, device="meta")
    tiled = isinstance(leader.weight, TiledTensor)
    linear.weight = nn.Parameter(TiledTensor.from_plain(weight) if tiled else weight, requires_grad=False)
    if tiled:
        save_plain(linear)
    if bias is not None and leader.bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=leader.bias.requires_grad)
    return linear.train(leader.training)


def _save_part(
    leader: FusedLinear, index: int, destination: dict[str, Tensor], prefix: str, keep_vars: bool
) -> None:
    """Entries of one projection in a state dict; with keep_vars they are parameters, though not those of the model."""
    weight, bias = leader.stored(index)
    destination[f"{prefix}weight"] = nn.Parameter(weight, requires_grad=False) if keep_vars else weight
    if bias is not None:
        destination[f"{prefix}bias"] = nn.Parameter(bias, requires_grad=False) if keep_vars else bias


def _refuse_to_load(prefix: str, error_msgs: list[str]) -> None:
    error_msgs.append(
        f"{prefix.rstrip('.')} is fused with other projections; call torchmix.unfuse_projections(model) before loading"
    )
