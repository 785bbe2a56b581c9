"""Small models with quantized layers of mixed row widths, and a counter of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor

WIDTHS = (3, 4, 5, 6, 8)


def quantize_linears(
    module: nn.Module, seed: int = 0, widths: tuple[int, ...] = WIDTHS, group_size: int = 64
) -> nn.Module:
    """Replace the weights of all linear layers, except those named ``lora_*``; the mix depends on ``seed``."""
    for number, (name, layer) in enumerate(module.named_modules()):
        if isinstance(layer, nn.Linear) and "lora" not in name:
            layer.weight = quantized(layer.weight, seed + number, widths, group_size)
    return module


def quantized(
    weight: Tensor, seed: int = 0, widths: tuple[int, ...] = WIDTHS, group_size: int = 64
) -> nn.Parameter:
    """A frozen quantized parameter; each row draws its width, so another seed gives other row counts per width."""
    choices = torch.tensor(widths, dtype=torch.uint8)
    draws = torch.randint(len(widths), weight.shape[:-1], generator=torch.Generator().manual_seed(seed))
    packed = MixedPrecisionTensor.from_hp(weight.detach(), choices[draws], group_size)
    return nn.Parameter(packed, requires_grad=False)


def expert_weight(experts: int = 4, out_features: int = 24, in_features: int = 192) -> MixedPrecisionTensor:
    """Experts (E, N, K), every width in each expert."""
    bits = torch.stack([row_bits(out_features, WIDTHS, seed) for seed in range(experts)])
    return MixedPrecisionTensor.from_hp(torch.randn(experts, out_features, in_features), bits, 64)


class ReluBlock(nn.Module):
    """Layer with a residual. ReLU and additions are the same in a fused kernel, so compiled blocks are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 136)
        self.down = nn.Linear(136, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class AdapterModel(nn.Module):
    """Trainable embedding and adapters before and after a frozen quantized block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 128)
        self.lora_before = nn.Sequential(nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False))
        self.block = quantize_linears(ReluBlock())
        self.lora_after = nn.Sequential(nn.Linear(128, 4, bias=False), nn.Linear(4, 16, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lora_after(self.block(x + self.lora_before(x)))


class GraphCounter:
    """A backend of ``torch.compile`` that counts the graphs it has compiled.

    With ``dynamic=True`` PyTorch may interrupt a compilation and start again, to make floats inputs of the graph.
    """

    def __init__(self, backend: str = "aot_eager") -> None:
        self.compile = lookup_backend(backend)
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled = self.compile(graph, example_inputs)
        self.count += 1
        return compiled
