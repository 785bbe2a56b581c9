"""Readers of a normalization are found by identity, and nobody else's look at its output goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.generators import token_ids
from tests.models.tiny_models import random_ids, tiny_model
from torchmix.transforms.norm_readers import ELSEWHERE, find_readers

SIZE = 8


class Toy(nn.Module):
    """``read`` says what happens to the norm's output; tokens are (1, 6)."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(48, SIZE), nn.LayerNorm(SIZE)
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2 * SIZE, bias=False)
        self.read = read

    def forward(self, ids: Tensor) -> Any:
        return self.read(self, self.norm(self.embed(ids)))


def uses(
    read: Callable[[Any, Tensor], Any], samples: int = 2
) -> tuple[set[str], set[str], set[str], set[str]]:
    """Readers and others of the norm, sources and others of the first linear."""
    norms, weights = find_readers(Toy(read), token_ids(samples, 6))
    use = weights["first.weight"]
    return norms["norm"].readers, norms["norm"].others, use.sources, use.others


PLAIN: dict[str, Callable[[Any, Tensor], Any]] = {
    "two linears": lambda m, x: (m.first(x), m.second(x))[1],
    "views": lambda m, x: m.first(x.view(-1, SIZE)) + m.second(x.reshape(6, 1, SIZE).squeeze(1))[:, :SIZE],
    "keywords": lambda m, x: (
        m.second(F.linear(input=x, weight=m.first.weight) * 0 + 1) + F.linear(x, weight=m.second.weight)
    ),
    "shape and dtype": lambda m, x: (
        m.first(x[:, :]) * x.shape[0] * x.size(-1) + m.second(x.contiguous().to(x.dtype))[..., : len(x[0, 0])]
    ),
    "weights by matmul": lambda m, x: x @ m.first.weight.T + (x @ m.second.weight.t())[..., :SIZE],
}


@pytest.mark.parametrize("read", PLAIN.values(), ids=PLAIN.keys())
def test_linear_readers_alone(read: Callable[[Any, Tensor], Any]) -> None:
    readers, others, sources, weight_others = uses(read)
    assert readers == {"first.weight", "second.weight"}
    assert (others, sources, weight_others) == (set(), {"norm"}, set())


def in_place(module: Any, x: Tensor) -> Tensor:
    return module.first(x.mul_(2.0))


def alias_without_base(module: Any, x: Tensor) -> Tensor:
    return module.first(x) + x.data.sum()


OTHERS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "residual sum": (lambda m, x: x + m.first(x), "add"),
    "function of a view": (lambda m, x: m.first(x) + x.view(-1).exp().sum(), "exp"),
    "gathered tokens": (lambda m, x: m.first(x[:, torch.tensor([2, 3])]), "__getitem__"),
    "list": (lambda m, x: m.first(torch.stack([x, x])), "stack"),
    "in place": (in_place, "mul_"),
    "data": (alias_without_base, "__get__"),
    "number": (lambda m, x: m.first(x) * x[0, 0, 0].item(), "item"),
    "unknown weight": (lambda m, x: m.first(x) + F.linear(x, torch.ones(SIZE, SIZE)), "linear"),
    "part of it": (
        lambda m, x: m.first(x) + F.linear(x[..., :4], m.second.weight.view(-1, 4))[..., :SIZE],
        "second.weight, which reads a part of it",
    ),
    "other order": (
        lambda m, x: (
            F.linear(x.new_ones(1, SIZE, SIZE), m.second.weight)
            + m.first(x.view(-1, SIZE)[:1].expand(SIZE, SIZE).T).sum()
        ),
        "first.weight, which reads a part of it",
    ),
    "as bias": (
        lambda m, x: torch.addmm(x[0, :1], torch.ones(1, SIZE), m.first.weight.T),
        "a linear layer, otherwise than as its input",
    ),
    "returned": (lambda m, x: {"logits": m.first(x), "states": (x[:, -1],)}, "the model's output"),
}


@pytest.mark.parametrize(("read", "reader"), OTHERS.values(), ids=OTHERS.keys())
def test_other_readers(read: Callable[[Any, Tensor], Any], reader: str) -> None:
    assert reader in uses(read)[1]


def test_a_weight_that_is_applied_elsewhere_too() -> None:
    """To another input, and by another function."""
    readers, others, sources, _ = uses(lambda m, x: m.first(m.first(x)))
    assert (readers, others, sources) == ({"first.weight"}, set(), {"norm", ELSEWHERE})
    assert uses(lambda m, x: m.first(x) + m.first.weight.square().sum())[3] == {"square"}


def test_magnitudes_and_examples() -> None:
    """The largest magnitude runs over all samples; the example is what the norm really did."""
    ids = token_ids(3, 6)
    model = Toy(lambda m, x: m.first(x))
    use = find_readers(model, ids)[0]["norm"]
    outputs = model.norm(model.embed(ids)).detach()
    assert use.largest is not None
    assert use.example is not None
    assert torch.allclose(use.largest, outputs.abs().amax((0, 1)), rtol=1e-6)
    assert torch.equal(use.example[0], model.embed(ids[:1]))
    assert torch.allclose(use.example[1], outputs[:1], rtol=1e-6)


def test_odd_norms() -> None:
    """One that does not run, one whose output is a view, one with a third parameter."""

    class Viewed(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:]

    model = Toy(lambda m, x: m.first(m.viewed(x)))
    model.viewed, model.idle, model.scaled = Viewed(SIZE), nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
    model.scaled.extra = nn.Parameter(torch.ones(1))
    norms, _ = find_readers(model, token_ids(1, 6))
    assert norms.keys() == {"norm", "viewed", "idle"}
    assert norms["viewed"].others == {"code that gets a form of output which is not known"}
    assert norms["idle"].largest is None


def test_the_model_is_left_alone() -> None:
    """Training flags, gradients and hooks are as before; dropout is off while watching."""
    model = Toy(lambda m, x: F.dropout(m.first(x), training=m.training)).train()
    model.second.eval()
    find_readers(model, token_ids(1, 6))
    assert (model.training, model.norm.training, model.second.training) == (True, True, False)
    assert not model.norm._forward_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("samples", [torch.zeros(3), torch.zeros(3, dtype=torch.int64), token_ids(0, 4)])
def test_wrong_samples(samples: Tensor) -> None:
    with pytest.raises(ValueError, match=r"int64 \(samples, tokens\)"):
        find_readers(Toy(lambda m, x: x), samples)


def test_gpt2_and_tied_heads() -> None:
    """Conv1D weights are read through a view of the norm's output; the head is the embedding too."""
    norms, weights = find_readers(tiny_model("gpt2"), random_ids(1, 5))
    assert norms["transformer.h.1.ln_2"].readers == {"transformer.h.1.mlp.c_fc.weight"}
    assert weights["transformer.h.1.mlp.c_fc.weight"].rows.shape == (512, 128)
    assert weights["lm_head.weight"].others == {"embedding"}
