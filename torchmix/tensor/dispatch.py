"""Which PyTorch operations a :class:`MixedPrecisionTensor` takes part in (L2).

Importing this module registers them on the class:

``products``
    linear layers and matrix products, which go to the registered ops
``shapes``
    the same bytes in another shape: ``t``, ``transpose``, ``view``
``slices``
    rows, experts and groups of inputs: ``slice``, ``split``, ``select``, indexing, ``cat``
``copies``
    ``to``, ``copy_``, ``empty_like``, ``pin_memory``, ``equal``

``detach``, ``clone`` and ``contiguous`` come from torchao's base class. Anything else raises, because a silent
``dequantize`` would hide a cost. Linear layers, copies and transposition are registered on ``TiledTensor`` too, which
goes through the plain weight for the rest.
"""

from __future__ import annotations

from typing import Any

from torchmix.tensor import copies, products, shapes, slices
from torchmix.tensor.mixed_precision_tensor import OPS_BY_NAME, MixedPrecisionTensor

MODULES = (products, shapes, slices, copies)


def registered_operations() -> list[str]:
    """Names of the operations that have an implementation, sorted; composites of them work too."""
    table: dict[Any, Any] = MixedPrecisionTensor._ATEN_OP_TABLE[MixedPrecisionTensor]
    return sorted({operation.name() for operation in table} | set(OPS_BY_NAME))
