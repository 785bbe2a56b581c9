"""Token weights on numbers small enough to follow by hand; their mean is 1."""

from __future__ import annotations

import pytest
import torch

from torchmix.salience import gradient_weights, rsq_weights


def test_rsq_by_hand() -> None:
    """Two heads; column sums 3, 2, 1 become 1, 0.55, 0.1, over their mean 0.55."""
    first = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]
    second = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]
    weights = rsq_weights(torch.tensor([first, second]), minimum=0.1)
    assert torch.allclose(weights, torch.tensor([1.0, 0.55, 0.1]) / 0.55, rtol=1e-6)
    assert weights.dtype == torch.float32


def test_rsq_of_causal_attention() -> None:
    """The minimum is reached, its ratio to the largest kept, the mean is 1, bfloat16 will do."""
    scores = torch.randn(4, 32, 32).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf)
    weights = rsq_weights(scores.softmax(-1).bfloat16())
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights.min() / weights.max()) == pytest.approx(0.005, rel=1e-5)
    assert int(weights.argmin()) >= 29  # few queries come after the last tokens


def test_rsq_of_tokens_alike() -> None:
    assert rsq_weights(torch.full((2, 4, 4), 0.25)).tolist() == [1.0] * 4
    assert rsq_weights(torch.eye(5)[None], minimum=1.0).tolist() == [1.0] * 5


def test_gradient_weights_by_hand() -> None:
    """Roots 1, 2, 3 over their mean 2; with power 1 the values themselves over theirs; power 0 counts tokens."""
    squares = torch.tensor([1.0, 4.0, 9.0])
    assert gradient_weights(squares).tolist() == [0.5, 1.0, 1.5]
    assert torch.allclose(gradient_weights(squares, 1.0), squares * 3 / 14, rtol=1e-6)
    assert gradient_weights(squares, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_gradient_weights_have_a_floor() -> None:
    """Mean 1: zero counts as 1e-3 and 2 stays, whatever the unit of the gradients."""
    for unit in (1.0, 1e-30, 1e30):
        weights = gradient_weights(torch.tensor([0.0, 2.0]) * unit, 1.0)
        assert float(weights[0] / weights[1]) == pytest.approx(0.0005, rel=1e-5)
        assert float(weights.mean()) == pytest.approx(1.0)


def test_gradient_weights_without_gradients() -> None:
    assert gradient_weights(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert gradient_weights(torch.zeros(0)).shape == (0,)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(heads, tokens, tokens\), got \(4, 4\)"):
        rsq_weights(torch.ones(4, 4))
    with pytest.raises(ValueError, match="minimum=0"):
        rsq_weights(torch.ones(1, 4, 4), minimum=0.0)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            gradient_weights(torch.tensor([1.0, wrong]))
