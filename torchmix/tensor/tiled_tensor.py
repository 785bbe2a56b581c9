"""``TiledTensor`` (L2): a quantized weight in the order that GPU kernels read; :mod:`torchmix.tiles` draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from torchmix.ops import dequantize_tiles
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor
from torchmix.tensor.packed_tensor import PackedTensor
from torchmix.tiles import GROUP_SIZE, pack_tiles, tile_row_bits, unpack_tiles


class TiledTensor(PackedTensor):
    """Weight (N, K) in the tile layout, made from a :class:`MixedPrecisionTensor` and turned back into it bit for bit.

    Linear layers call ``torchmix::mixed_linear_tiled``. Copies, devices, dtypes and transposition work on the tiles;
    every other operation unpacks the weight and works on that. Files never hold tiles: pickle, checkpoints and the
    state dict of a repacked model have the plain bytes.

    Tensor Data Attributes:
        tiles: uint8 1-D, codes, scales, zero points and sums of codes.
        row_index: int32 (T * 64,), original row of each place.
        tile_table: int32 (T, 4), where the tiles begin, their widths, and what kernels choose by.

    Non-Tensor Attributes:
        shape: shape as the model sees it; (N, K), or with ``transposed`` (K, N).
        dtype: dtype as the model sees it and of :meth:`dequantize`; outputs follow the activations' dtype.
        per_token: activations get one scale per token instead of one per token and group.
        transposed: the model sees the two dimensions swapped; the stored rows stay output features.
    """

    tensor_data_names = ["tiles", "row_index", "tile_table"]
    tensor_attribute_names = ["shape", "dtype", "per_token", "transposed"]
    length_names = ("tiles", "row_index", "tile_table")

    tiles: Tensor
    row_index: Tensor
    tile_table: Tensor
    group_size = GROUP_SIZE

    def __new__(
        cls,
        tiles: Tensor,
        row_index: Tensor,
        tile_table: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        per_token: bool = False,
        transposed: bool = False,
    ) -> TiledTensor:
        """Wrap inner tensors; :meth:`from_plain` makes them."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=tiles.device, requires_grad=False
        )
        self.tiles, self.row_index, self.tile_table = tiles, row_index, tile_table
        self.per_token, self.transposed = per_token, transposed
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: tuple[Any, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the registered implementation of ``func``, or what it is composed of, or ``func`` on plain weights."""
        kwargs = kwargs or {}
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs)
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        weight = next(arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, TiledTensor))
        with weight.own_mode():
            args, kwargs = pytree.tree_map_only(TiledTensor, TiledTensor.to_plain, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def from_plain(cls, weight: MixedPrecisionTensor) -> TiledTensor:
        """Repack a weight on the device where it is.

        Raises:
            ValueError: for experts, and for a group size other than 128.
        """
        if weight.dim() != 2:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} cannot be tiled, only one with 2 dimensions; repack the "
                "experts one by one, or leave them plain"
            )
        inner = (weight.qdata, weight.scale, weight.zero_point, weight.row_bits)
        tiles = pack_tiles(*inner, weight.in_features, weight.group_size)
        return cls(*tiles, weight.shape, weight.dtype, weight.per_token, weight.transposed)

    def to_plain(self) -> MixedPrecisionTensor:
        """The same weight in the plain order, with exactly the tensors it was made from.

        Raises:
            NotImplementedError: while a graph is traced, where the row widths have no values.
        """
        if is_fake(self.tiles):
            raise NotImplementedError(
                f"this operation on a {self._quantization_type()} needs its plain bytes, whose sizes a graph does not "
                "know; call torchmix.to_plain(model) before compiling or exporting"
            )
        inner = unpack_tiles(self.tiles, self.row_index, self.tile_table, self.out_features, self.in_features)
        return MixedPrecisionTensor(
            *inner,
            self.shape,
            GROUP_SIZE,
            self.dtype,
            per_token=self.per_token,
            transposed=self.transposed,
        )

    @property
    def row_bits(self) -> Tensor:  # type: ignore[override]
        """Width of each row: uint8 (N,)."""
        return tile_row_bits(self.row_index, self.tile_table, self.out_features)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight ``scale * (code - zero_point)`` in ``output_dtype`` (default: ``dtype``), shape as seen."""
        dense = dequantize_tiles(
            self.tiles,
            self.row_index,
            self.tile_table,
            self.out_features,
            self.in_features,
            output_dtype or self.dtype,
        )
        return dense.t() if self.transposed else dense

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle holds the plain weight."""
        return rebuild_tiled, (self.to_plain(), isinstance(self, nn.Parameter))


def rebuild_tiled(plain: MixedPrecisionTensor, is_parameter: bool) -> Tensor:
    """What pickle calls; a weight without values (``map_location="meta"``) stays plain."""
    weight = plain if plain.device.type == "meta" else TiledTensor.from_plain(plain)
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def implements(operations: list[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register one implementation of operations for both classes."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        MixedPrecisionTensor.implements(operations)(handler)
        return TiledTensor.implements(operations)(handler)

    return register


def implements_torch_function(functions: list[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register one implementation of functions for both classes."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        MixedPrecisionTensor.implements_torch_function(functions)(handler)
        return TiledTensor.implements_torch_function(functions)(handler)

    return register
