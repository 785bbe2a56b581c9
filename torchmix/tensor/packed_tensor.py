"""``PackedTensor`` (L2): what quantized weights have in common, whatever the order of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torchao.utils import TorchAOBaseTensor

if TYPE_CHECKING:
    from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor


class PackedTensor(TorchAOBaseTensor):
    """A quantized weight; its classes differ in which inner tensors hold it.

    Attributes:
        shape: shape as the model sees it; with ``transposed`` the stored rows are its last dimension.
        group_size: inputs that share a scale and a zero point.
        per_token: activations get one scale per token instead of one per token and group.
        transposed: the model sees the last two dimensions swapped; the stored rows stay output features.
        row_bits: uint8 (N,) or (E, N), width of each row.
        length_names: the inner tensors whose lengths depend on the row widths.
    """

    tensor_data_names: list[str]
    tensor_attribute_names: list[str]
    length_names: tuple[str, ...] = ()
    group_size: int
    per_token: bool
    transposed: bool
    row_bits: Tensor

    @property
    def in_features(self) -> int:
        """K, the number of inputs of a row."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        """N, the number of rows (of one expert)."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all inner tensors."""
        inner = [getattr(self, name) for name in self.tensor_data_names]
        return 8 * sum(t.numel() * t.element_size() for t in inner) / max(self.numel(), 1)

    def to_plain(self) -> MixedPrecisionTensor:
        """The same weight in the plain order; itself where it has that."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its plain order is")

    def _quantization_type(self) -> str:
        """Short description for a module's ``extra_repr``, as torchao's tensors have it."""
        description = f"shape={tuple(self.shape)}, group_size={self.group_size}"
        if is_fake(self):  # lengths may be symbols, and printing must not fix their values
            return description
        return f"{description}, {self.bits_per_weight:.3f} bits per weight"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._quantization_type()}, dtype={self.dtype}, device={self.device})"

    def _stable_hash_for_caching(self) -> str:
        """Key of compile caches: everything a graph depends on, nothing of the values."""
        inner = [getattr(self, name) for name in self.tensor_data_names]
        data = [(tuple(t.shape), tuple(t.stride()), str(t.dtype)) for t in inner]
        attributes = [str(getattr(self, name)) for name in self.tensor_attribute_names]
        key = (data, attributes, str(self.device), self.requires_grad)
        return hashlib.sha256(repr(key).encode()).hexdigest()

    def with_parts(self, **changes: Any) -> Self:
        """Copy of the wrapper with some inner tensors or attributes replaced; shares the others."""
        names = self.tensor_data_names + self.tensor_attribute_names
        with self.own_mode():
            return type(self)(**{name: changes.get(name, getattr(self, name)) for name in names})

    def own_mode(self) -> AbstractContextManager[object]:
        """Where views of this weight must be made.

        A view of an ordinary tensor must be an ordinary tensor in inference mode too, or PyTorch refuses it.
        """
        leave = torch.is_inference_mode_enabled() and not self.is_inference()
        return torch.inference_mode(False) if leave else nullcontext()

    def _apply_fn_to_data(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return self.with_parts(**{name: fn(getattr(self, name)) for name in self.tensor_data_names})
