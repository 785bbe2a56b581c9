"""What reaches the class: registered operations, composites of them, and everything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor, registered_operations
from torchmix.tensor.dispatch import MODULES

F = torch.nn.functional


@pytest.fixture
def weight() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(24, 192), row_bits(24), 64)


def test_registered_operations() -> None:
    names = registered_operations()
    assert names == sorted(names)
    expected = {"aten::linear", "aten::mm", "aten::t", "aten::slice.Tensor", "aten::_to_copy", "aten::detach"}
    assert expected <= set(names)
    assert len(MODULES) == 4


@pytest.mark.parametrize(
    "operation",
    [lambda w: w * 2, lambda w: w + w, torch.sum, torch.isnan, lambda w: w.zero_(), torch.softmax],
)
def test_nothing_dequantizes_silently(weight: MixedPrecisionTensor, operation: Callable[..., Tensor]) -> None:
    arguments = (weight, 0) if operation is torch.softmax else (weight,)
    with pytest.raises(
        NotImplementedError, match=r"aten\..* is not defined for a MixedPrecisionTensor.*dequantize"
    ):
        operation(*arguments)


COMPOSITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.T,
    "matmul_batch": lambda x, w: x[None] @ w.mT,
    "chunk": lambda x, w: F.linear(x, w.chunk(2)[0]),
    "narrow": lambda x, w: F.linear(x, w.narrow(0, 2, 5)),
    "tensor_split": lambda x, w: F.linear(x, w.tensor_split(3)[2]),
    "reshape": lambda x, w: F.linear(x, w.reshape(2, 12, 192)[1]),
    "flatten": lambda x, w: F.linear(x, w.reshape(2, 12, 192).flatten(0, 1)),
    "vstack": lambda x, w: F.linear(x, torch.vstack([w, w])),
    "swapaxes": lambda x, w: x @ w.swapaxes(0, 1),
    "movedim": lambda x, w: x @ w.movedim(0, 1),
    "to": lambda x, w: F.linear(x, w.to(torch.bfloat16).to("cpu").float()),
    "contiguous": lambda x, w: x @ w.t().contiguous(),
    "t": lambda x, w: x @ w.t(),
    "slice": lambda x, w: F.linear(x, w[3:9]),
    "squeeze": lambda x, w: F.linear(x, w[None].squeeze(0)),
    "detach": lambda x, w: F.linear(x, w.detach().data.clone()),
    "type": lambda x, w: F.linear(x, w.type(torch.float16)),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_in_inference_mode(weight: MixedPrecisionTensor, name: str) -> None:
    """PyTorch does not take composite operations apart there, so the class does."""
    x = torch.randn(5, 192)
    expected = COMPOSITES[name](x, weight)
    with torch.inference_mode():
        assert torch.equal(COMPOSITES[name](x, weight), expected)


def test_results_do_not_require_gradients(weight: MixedPrecisionTensor) -> None:
    for result in (weight.t(), weight[:3], weight.clone(), weight.detach(), weight.bfloat16()):
        assert isinstance(result, MixedPrecisionTensor)
        assert not result.requires_grad
