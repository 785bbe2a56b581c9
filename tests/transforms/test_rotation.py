"""A rotated model computes the same logits from a rotated residual stream."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny_models import logits, random_ids, tiny_model
from torchmix.transforms import hadamard_matrix, rotate_residual_stream

IDS = random_ids(2, 16)
# float32: each weight is rounded once more (2^-24) and sums of up to 192 products have another order.
BOUND = 1e-5


def random_norms_and_biases(family: str, **changes: Any) -> Any:
    """Norm weights that are not 1 and biases that are not 0, which a wrong rotation would not survive."""
    model = tiny_model(family, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.5
    return model


def hidden_states(model: Any) -> tuple[Tensor, ...]:
    """What enters each block, and what enters the final norm."""
    found: list[Tensor] = []
    modules = [*model.model.layers, model.model.norm]
    handles = [m.register_forward_pre_hook(lambda m, args: found.append(args[0])) for m in modules]
    logits(model, IDS)
    for handle in handles:
        handle.remove()
    return tuple(found)


@pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 128, 320])
def test_matrices_are_orthogonal(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert (matrix.shape, matrix.dtype) == ((size, size), torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


def test_powers_of_two_are_hadamard_matrices() -> None:
    """All entries ±1/8; signs per row only: undoing them leaves Sylvester's matrix, whose first column is +."""
    matrix = hadamard_matrix(64) * 8
    assert torch.equal(matrix.abs(), torch.ones(64, 64, dtype=torch.float64))
    sylvester = matrix * matrix[:, :1]
    ones = torch.tensor([[bin(i & j).count("1") % 2 for j in range(64)] for i in range(64)])
    assert torch.equal(sylvester, 1.0 - 2.0 * ones)
    assert 16 < int((matrix[:, 0] < 0).sum()) < 48


@pytest.mark.parametrize("size", [12, 16])
def test_the_seed_decides(size: int) -> None:
    assert torch.equal(hadamard_matrix(size, 3), hadamard_matrix(size, 3))
    assert not torch.equal(hadamard_matrix(size, 3), hadamard_matrix(size, 4))
    with pytest.raises(ValueError, match="size=0"):
        hadamard_matrix(0)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "reader biases": ("qwen2", {}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "norms of heads": ("qwen3", {}),
    "no power of two": ("llama", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}),
}


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS.keys())
def test_logits_stay_and_the_stream_is_rotated(family: str, changes: dict[str, Any]) -> None:
    model = random_norms_and_biases(family, **changes)
    rotated = copy.deepcopy(model)
    rotation = rotate_residual_stream(rotated, seed=5)
    expected = logits(model, IDS)
    assert float((logits(rotated, IDS) - expected).abs().max() / expected.abs().max()) < BOUND
    for before, after in zip(hidden_states(model), hidden_states(rotated), strict=True):
        turned = before.double() @ rotation
        assert float((after - turned).abs().max() / turned.abs().max()) < BOUND
        assert float((after - before).abs().max()) > 0.1 * float(before.abs().max())
    norms = [p for name, p in rotated.named_parameters() if "norm" in name and "self_attn" not in name]
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in norms)


def test_tied_embeddings_are_untied_for_good(tmp_path: Path) -> None:
    """The head has its own weight, also after saving and loading."""
    model = tiny_model("llama", tie_word_embeddings=True)
    rotate_residual_stream(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_outliers_are_spread() -> None:
    """One feature of the embedding that is 50 times larger becomes no feature larger than 6 times the mean."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[:, 7] *= 50.0
    rotate_residual_stream(model)
    sizes = model.model.embed_tokens.weight.detach().abs()[1:].mean(0)  # token 0 pads: all zero
    assert float(sizes.max() / sizes.mean()) < 6.0


def test_dtype_and_gradient_flags_stay() -> None:
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True).requires_grad_(False)
    rotated = copy.deepcopy(model)
    rotate_residual_stream(rotated)
    assert {(p.dtype, p.requires_grad) for p in rotated.parameters()} == {(torch.bfloat16, False)}
    expected = logits(model, IDS).float()
    change = (logits(rotated, IDS).float() - expected).abs().max() / expected.abs().max()
    assert float(change) < 0.05  # weights are rounded again, to 2^-8


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel lacks model.embed_tokens"):
        rotate_residual_stream(tiny_model("gpt2"))
