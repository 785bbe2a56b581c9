"""Make the class known to file formats that keep lists of classes (L2).

``torch.load(weights_only=True)`` asks PyTorch's list of safe classes. torchao's safetensors support asks two
containers of a prototype module and offers no function to add to them; where a torchao has neither, its
``flatten_tensor_state_dict`` refuses the class by name, and everything else works.
"""

from __future__ import annotations

import torch

from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor


def register_with_torchao_safetensors() -> bool:
    """Add the class to torchao's safetensors lists; calling it again changes nothing. Returns whether it could."""
    try:
        from torchao.prototype.safetensors import safetensors_utils
    except ImportError:
        return False
    classes = getattr(safetensors_utils, "ALLOWED_CLASSES", None)
    names = getattr(safetensors_utils, "ALLOWED_TENSORS_SUBCLASSES", None)
    if not isinstance(classes, dict) or not isinstance(names, list):
        return False
    name = MixedPrecisionTensor.__name__
    classes.setdefault(name, MixedPrecisionTensor)
    if name not in names:  # in place: other modules of torchao hold the same list
        names.append(name)
    return True


torch.serialization.add_safe_globals([MixedPrecisionTensor])
register_with_torchao_safetensors()
