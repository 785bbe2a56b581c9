"""``MixedPrecisionTensor`` (L2): a weight whose rows (output features) have different bit widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmix.accounting import check_bits, check_group_size
from torchmix.ops import dequantize_rows
from torchmix.packing import (
    MAX_BITS,
    MIN_BITS,
    SIGNED_BITS,
    pack_codes,
    pack_rows,
    pack_zero_points,
    packed_sizes,
    unpack_rows,
    unpack_zero_points,
)
from torchmix.primitives import SCALE_DTYPE, choose_qparams, quantize
from torchmix.tensor.packed_tensor import PackedTensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = "plain"
Handler = Callable[[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], dict[str, Any]], Any]
# Operations of other libraries, by name so that these need not be installed; torchmix.tensor.products fills it.
OPS_BY_NAME: dict[str, Handler] = {}


class MixedPrecisionTensor(PackedTensor):
    """Weight (N, K), or E experts (E, N, K), with a bit width for every row.

    Tensor Data Attributes:
        qdata: uint8 1-D, packed codes, rows in their original order (:mod:`torchmix.packing` draws the bytes).
        scale: bfloat16 (N, G) or (E, N, G), G = ceil(K / group_size).
        zero_point: uint8 1-D, packed zero points of the rows below 8 bits.
        row_bits: uint8 (N,) or (E, N), width of each row, 2 to 8.

    Non-Tensor Attributes:
        shape: shape as the model sees it; (N, K) or (E, N, K), or with ``transposed`` (K, N) or (E, K, N).
        group_size: inputs that share a scale and a zero point.
        dtype: dtype as the model sees it and of :meth:`dequantize`; outputs follow the activations' dtype.
        packing: order of the codes in ``qdata``; "plain" is the order of the file format.
        per_token: activations get one scale per token instead of one per token and group.
        transposed: the model sees the last two dimensions swapped; the stored rows stay output features.

    The number of rows of each width is deliberately not an attribute: it would be a guard of every compiled
    graph. Slices of rows and of inputs at group borders are again quantized tensors, without new rounding.

    The weight is frozen: gradients flow to inputs and biases, never to it.
    """

    tensor_data_names = ["qdata", "scale", "zero_point", "row_bits"]
    tensor_attribute_names = ["shape", "group_size", "dtype", "packing", "per_token", "transposed"]

    length_names = ("qdata", "zero_point")

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    row_bits: Tensor
    packing: str

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        row_bits: Tensor,
        shape: Sequence[int],
        group_size: int,
        dtype: torch.dtype,
        packing: str = PLAIN,
        per_token: bool = False,
        transposed: bool = False,
    ) -> MixedPrecisionTensor:
        """Wrap inner tensors; see :meth:`from_hp` and :meth:`from_codes` for the usual ways to make one."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=qdata.device, requires_grad=False
        )
        self.qdata, self.scale, self.zero_point, self.row_bits = qdata, scale, zero_point, row_bits
        self.group_size, self.packing = group_size, packing
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
        """Run the registered implementation of ``func``, or the operations that PyTorch composes it from.

        PyTorch itself decomposes composite operations before they get here, but not in inference mode.
        """
        handler = cls._ATEN_OP_TABLE[cls].get(func) or OPS_BY_NAME.get(func.name())
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            raise NotImplementedError(
                f"{func} is not defined for a MixedPrecisionTensor; use dequantize() where a dense weight is meant"
            )
        return result

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        row_bits: Tensor,
        group_size: int,
        dtype: torch.dtype,
        *,
        per_token: bool = False,
        transposed: bool = False,
    ) -> MixedPrecisionTensor:
        """Pack codes that a rounding algorithm has chosen.

        Args:
            codes: int8 (N, K) or (E, N, K), unsigned values below 8 bits.
            scale: bfloat16 (N, G) or (E, N, G).
            zero_point: uint8, shape of ``scale``.
            row_bits: uint8 (N,) or (E, N).
            group_size: inputs per scale.
            dtype: dtype the model sees.
            per_token, transposed: as in the class description.

        Raises:
            ValueError: for widths outside 2..8, or shapes that do not fit each other.
        """
        _check_weight(codes.shape, row_bits, group_size, dtype)
        flat_bits = row_bits.flatten().contiguous()
        qdata = pack_rows(codes.reshape(-1, codes.shape[-1]), flat_bits)
        packed_zero_point = pack_zero_points(zero_point.reshape(-1, zero_point.shape[-1]), flat_bits)
        inner = (qdata, scale.to(SCALE_DTYPE).contiguous(), packed_zero_point, row_bits.contiguous())
        shape = (*codes.shape[:-2], codes.shape[-1], codes.shape[-2]) if transposed else codes.shape
        return cls(*inner, shape, group_size, dtype, PLAIN, per_token, transposed)

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        row_bits: Tensor | int,
        group_size: int = 128,
        *,
        per_token: bool = False,
        transposed: bool = False,
    ) -> MixedPrecisionTensor:
        """Quantize a high-precision weight with round-to-nearest.

        Args:
            weight: float32, bfloat16 or float16 (N, K) or (E, N, K); with ``transposed`` (K, N) or (E, K, N).
            row_bits: one width for all rows, or uint8 (N,) or (E, N).
            group_size: inputs per scale, a multiple of 8 up to 512.
            per_token, transposed: as in the class description.

        Raises:
            ValueError: for widths outside 2..8, a group size that is not allowed, or shapes that do not fit.
            TypeError: for a dtype that is not a supported float.
        """
        rows = weight.transpose(-1, -2) if transposed else weight
        if isinstance(row_bits, int):
            check_bits(row_bits)
            bits = torch.full(rows.shape[:-1], row_bits, dtype=torch.uint8, device=weight.device)
        else:
            bits = row_bits.to(weight.device)
        _check_weight(rows.shape, bits, group_size, weight.dtype)
        flat, flat_bits = rows.reshape(-1, rows.shape[-1]), bits.flatten()
        scale, zero_point = choose_qparams(flat, flat_bits, group_size)
        codes = quantize(flat, scale, zero_point, flat_bits, group_size)
        if isinstance(row_bits, int):
            qdata, packed_zero_point = _pack_equal_rows(codes, zero_point, row_bits)
        else:
            qdata, packed_zero_point = pack_rows(codes, flat_bits), pack_zero_points(zero_point, flat_bits)
        inner = (qdata, scale.view(*rows.shape[:-1], -1), packed_zero_point, bits.contiguous())
        return cls(*inner, weight.shape, group_size, weight.dtype, PLAIN, per_token, transposed)

    def to_plain(self) -> MixedPrecisionTensor:
        """The weight itself."""
        return self

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight ``scale * (code - zero_point)`` in ``output_dtype`` (default: ``dtype``), shape as seen."""
        dense = dequantize_rows(
            self.qdata,
            self.scale,
            self.zero_point,
            self.row_bits,
            self.in_features,
            self.group_size,
            output_dtype or self.dtype,
        )
        return dense.transpose(-1, -2) if self.transposed else dense

    def codes(self) -> Tensor:
        """Codes of all rows: int8 (N, K) or (E, N, K), never transposed."""
        codes = unpack_rows(self.qdata, self.row_bits.flatten(), self.in_features)
        return codes.view(*self.row_bits.shape, self.in_features)

    def zero_points(self) -> Tensor:
        """Zero points of all rows: uint8, shape of ``scale``; 0 for 8-bit rows."""
        groups = self.scale.shape[-1]
        return unpack_zero_points(self.zero_point, self.row_bits.flatten(), groups).view(self.scale.shape)

    def check(self, name: str = "weight") -> None:
        """Raise ``ValueError`` naming the tensor when the inner tensors do not fit each other.

        Used on tensors that come from a file. Reads ``row_bits``.
        """
        bits = self.row_bits
        if bits.numel() and not (int(bits.min()) >= MIN_BITS and int(bits.max()) <= MAX_BITS):
            raise ValueError(f"{name}: row widths {torch.unique(bits).tolist()} must lie in 2..8")
        qdata, zero_point = packed_sizes(bits, self.in_features, self.group_size)
        groups = -(-self.in_features // self.group_size)
        rows = (*self.shape[:-2], self.out_features)
        found = (self.qdata.numel(), self.zero_point.numel(), tuple(self.scale.shape), tuple(bits.shape))
        wanted = (qdata, zero_point, (*rows, groups), rows)
        if found != wanted:
            raise ValueError(
                f"{name}: bytes of codes, bytes of zero points, shape of scales and of row widths are {found}, "
                f"but shape {tuple(self.shape)} with group_size={self.group_size} needs {wanted}; "
                "the tensor is damaged or belongs to another layer"
            )


def _pack_equal_rows(codes: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What ``pack_rows`` and ``pack_zero_points`` give for rows of one width, in operations that can be traced."""
    qdata = pack_codes(codes.view(torch.uint8), bits).flatten()
    if bits == SIGNED_BITS:
        return qdata, qdata.new_empty(0)
    length = (zero_point.shape[1] * bits + 7) // 8
    return qdata, pack_codes(zero_point, bits)[:, :length].flatten()


def _check_weight(shape: Sequence[int], row_bits: Tensor, group_size: int, dtype: torch.dtype) -> None:
    """Raise for arguments from which no tensor can be made."""
    check_group_size(group_size)
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight dtype {dtype} is not supported; convert to one of {WEIGHT_DTYPES} first")
    if len(shape) not in (2, 3):
        raise ValueError(f"a weight has 2 dimensions, or 3 with experts, but got shape {tuple(shape)}")
    if row_bits.dtype != torch.uint8 or tuple(row_bits.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"row_bits must be uint8 of shape {tuple(shape[:-1])} for a weight with rows of shape {tuple(shape)}, "
            f"but is {row_bits.dtype} of shape {tuple(row_bits.shape)}"
        )
    if row_bits.device.type == "meta" or not row_bits.numel() or torch.compiler.is_compiling():
        return
    low, high = int(row_bits.min()), int(row_bits.max())
    if low < MIN_BITS or high > MAX_BITS:
        raise ValueError(f"row widths must lie in {MIN_BITS}..{MAX_BITS}, but row_bits holds {low}..{high}")


MixedPrecisionTensor.__module__ = "torchmix"
