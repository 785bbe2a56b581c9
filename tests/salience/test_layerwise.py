"""Scores of blocks by hand, and read from a real model's hidden states; larger is more important."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.generators import TinyLM, token_ids
from tests.models.tiny_models import logits, random_ids, tiny_model
from torchmix.salience import lim_score, lim_scores, zd_score


def test_lim_by_hand() -> None:
    """Same direction -1, opposite 1, right angle 0, 3-4-5 triangle -0.6; a bolder change scores higher."""
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    assert lim_score(x, 2 * x) == pytest.approx(-1.0)
    assert lim_score(x, -x) == pytest.approx(1.0)
    assert lim_score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])) == 0.0
    assert lim_score(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(-0.6)
    assert lim_score(x, x + 0.5) > lim_score(x, x + 0.1)


def test_lim_of_a_model() -> None:
    """The hidden states that transformers returns are inputs and outputs of the blocks."""
    model, ids = tiny_model("llama"), random_ids(3, 9)
    blocks = {f"model.layers.{i}": block for i, block in enumerate(model.model.layers)}
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        b.register_forward_hook(lambda m, args, out: seen.append((args[0], out))) for b in blocks.values()
    ]
    for sample in ids:
        logits(model, sample[None])
    for handle in handles:
        handle.remove()
    cosines = [nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in seen]
    expected = -torch.stack(cosines).view(3, 2).mean(0)
    found = lim_scores(model, blocks, ids)
    assert list(found) == list(blocks)
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert not any(block._forward_hooks for block in blocks.values())


def test_lim_of_blocks_that_do_not_run_once() -> None:
    model = TinyLM(blocks=2)
    blocks = {"blocks.0": model.blocks[0], "other": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match="other ran 0 times on 2 samples"):
        lim_scores(model, blocks, token_ids(2, 6))
    with pytest.raises(ValueError, match=r"blocks.0 ran 0 times on 0 samples"):
        lim_scores(model, {"blocks.0": model.blocks[0]}, token_ids(0, 6))


def test_lim_of_useless_states() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) of a block differ"):
        lim_score(torch.ones(2), torch.ones(3))
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="all zero or not finite"):
            lim_score(torch.full((2,), wrong), torch.ones(2))


def test_zd_by_hand() -> None:
    """Mean 0, std sqrt(26 / 8) = 1.80: 2 and 4 lie more than one above, -2 below does not count."""
    weights = torch.tensor([4.0, 2.0, -2.0, -1.0, -1.0, 0.0, -1.0, -1.0])
    assert weights.sum() == 0
    assert zd_score([weights]) == -2 / 8
    assert zd_score([-weights]) == -1 / 8
    assert zd_score([weights * 3 + 5]) == zd_score([weights])
    assert zd_score([weights[:3].view(3, 1), weights[3:]]) == zd_score([weights])


def test_zd_of_normal_weights() -> None:
    """P(z > 1) = 0.1587; 2e5 draws leave a standard deviation of 0.0008."""
    assert zd_score([torch.randn(200, 1000)]) == pytest.approx(-0.1587, abs=0.004)
    few_large = torch.zeros(100)
    few_large[0] = 1.0
    assert zd_score([few_large]) > zd_score([torch.randn(100)])


def test_zd_of_nothing() -> None:
    assert zd_score([torch.ones(4)]) == 0.0
    with pytest.raises(ValueError, match="without weights"):
        zd_score([])
