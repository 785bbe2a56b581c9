"""``print(model)`` says which weights are quantized (L2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from torchmix.tensor.packed_tensor import PackedTensor


def show_quantized_weights(module: nn.Module) -> None:
    """Let ``print(module)`` list the quantized parameters of this module; calling it again changes nothing.

    ``copy.deepcopy`` and pickle of the module keep that.

    Args:
        module: the module that owns the parameters; parameters that become quantized later are listed too.
    """
    before = module.__dict__.get("extra_repr")
    if not isinstance(before, QuantizedExtraRepr):
        module.extra_repr = QuantizedExtraRepr(module, before)  # type: ignore[method-assign]


class QuantizedExtraRepr:
    """An ``extra_repr`` that stands in a module's ``__dict__``.

    An object instead of a bound method: pickle looks a bound method up on the class, where this one is not, and
    ``deepcopy`` of a bound method keeps what it closes over.
    """

    def __init__(self, module: nn.Module, before: Callable[[], str] | None) -> None:
        """``before``: what another program has put in the module's ``__dict__``, or None."""
        self.module, self.before = module, before

    def __call__(self) -> str:
        """The module's own text and its quantized parameters."""
        own = self.before() if self.before is not None else type(self.module).extra_repr(self.module)
        quantized = [
            f"{name}={weight}"
            for name, weight in self.module.named_parameters(recurse=False)
            if isinstance(weight, PackedTensor)
        ]
        return ", ".join(text for text in (own, *quantized) if text)
