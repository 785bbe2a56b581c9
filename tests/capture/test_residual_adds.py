"""Layers that write to a residual stream are told from those that do not, and the stream is handed over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.tiny_models import random_ids, tiny_model
from torchmix.capture import ResidualAdds, find_blocks


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.up, self.down, self.form = nn.Linear(8, 16), nn.Linear(16, 8), form

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        return {
            "x + y": lambda: x + y,
            "y + x": lambda: y + x,
            "torch.add": lambda: torch.add(x, y),
            "in place": lambda: y.add_(x),
            "scaled": lambda: x + 0.5 * y,
            "bias": lambda: y + torch.ones(8),
        }[self.form]()


@pytest.mark.parametrize("form", ["x + y", "y + x", "torch.add", "in place"])
def test_additions_are_found_with_their_stream(form):
    layer, x, seen = Layer(form), torch.randn(3, 8), []
    weights = {"up": layer.up.weight, "down": layer.down.weight}
    with torch.no_grad(), ResidualAdds(weights, lambda call: None, lambda *found: seen.append(found)) as adds:
        layer(x)
    assert adds.residuals == {"down"}
    ((name, stream),) = seen
    assert name == "down"
    assert stream is x


@pytest.mark.parametrize("form", ["scaled", "bias"])
def test_other_sums_are_none(form):
    layer = Layer(form)
    with torch.no_grad(), ResidualAdds({"down": layer.down.weight}, lambda call: None) as adds:
        layer(torch.randn(3, 8))
    assert adds.residuals == set()


def test_a_llama_writes_with_its_output_and_down_projections():
    model = tiny_model("llama")
    weights = {name: p for name, p in model.named_parameters() if "proj" in name}
    assert find_blocks(model, list(weights))
    with torch.no_grad(), ResidualAdds(weights, lambda call: None) as adds:
        model(random_ids(1, 8))
    assert {name.split(".")[-2] for name in adds.residuals} == {"o_proj", "down_proj"}
    assert len(adds.residuals) == 4
