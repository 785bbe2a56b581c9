"""Each metric on numbers small enough to follow by hand, and against the weight gradient it never forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchmix.salience import DATA_FREE, DATA_FREE_METRICS, METRICS, RowSignals, WeightSignals, weight_error
from torchmix.salience.metrics import fisher_diagonal, fisher_token, mixllm, output_error, random_score

# Two tokens, two rows.
ERROR = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
GRADIENT = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])


def test_fisher_token_by_hand() -> None:
    """Row 0: 0.5² + (-3)²; row 1: 2² + (-2)²: opposite signs of tokens do not cancel."""
    assert fisher_token(RowSignals(ERROR, GRADIENT, 2)).tolist() == [9.25, 8.0]


def test_mixllm_by_hand() -> None:
    """Row 0: a = (0.5 - 3) / 2 = -1.25, |a + a²/2| = 0.46875; row 1: a = (2 - 2) / 2 = 0."""
    assert mixllm(RowSignals(ERROR, GRADIENT, 2)).tolist() == [0.46875, 0.0]


def test_output_error_by_hand() -> None:
    assert output_error(RowSignals(ERROR, None, 2)).tolist() == [10.0, 5.0]


def test_weight_error_by_hand() -> None:
    assert weight_error(ERROR).tolist() == [5.0, 10.0]
    assert DATA_FREE_METRICS[DATA_FREE](WeightSignals("layer", 4, ERROR)).tolist() == [5.0, 10.0]


def test_fisher_diagonal_by_hand() -> None:
    """dL/dw = [[0.5 - 1, 1], [1 + 2, 2]], times dw = [[2, 1], [1, -3]]: 1 + 1 and 9 + 36."""
    x, delta = torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    assert fisher_diagonal(RowSignals(x @ delta.T, GRADIENT, 2, x, delta)).tolist() == [2.0, 45.0]


def test_fisher_diagonal_uses_real_weight_gradients() -> None:
    """(dL/dW)² dW² with L the summed loss and the gradient that autograd accumulates."""
    layer, x, delta, gradient, tokens = layer_and_gradients()
    assert layer.weight.grad is not None
    expected = (layer.weight.grad.double() * delta.double()).square().sum(1)
    score = fisher_diagonal(RowSignals(x @ delta.T, gradient, tokens, x, delta))
    assert torch.allclose(score, expected, rtol=1e-5)


def random_scores(name: str, bits: int, rows: int = 400, in_features: int = 8, seed: int = 0) -> Tensor:
    return random_score(WeightSignals(name, bits, torch.zeros(rows, in_features)), seed)


def test_random_score_is_reproducible_and_knows_nothing() -> None:
    """The name and the seed decide, not the weights; 400 draws from (0, 1] leave 0.015 of noise in their mean."""
    score = random_scores("a", 4)
    assert torch.equal(score, DATA_FREE_METRICS["random"](WeightSignals("a", 4, torch.randn(400, 8))))
    assert not torch.equal(score, random_scores("b", 4))
    assert not torch.equal(score, random_scores("a", 4, seed=1))
    u = score / 8 * 4**4
    assert bool(((u > 0) & (u <= 1)).all())
    assert float(u.mean()) == pytest.approx(0.5, abs=0.06)
    assert len(u.unique()) == 400


def test_random_score_treats_rows_alike() -> None:
    """From width to width it falls by 4 per bit in every row, and a bit gains the same share of what it costs."""
    assert torch.equal(random_scores("a", 3), 16 * random_scores("a", 5))
    assert torch.equal(random_scores("a", 4, in_features=8) / 8, random_scores("a", 4, in_features=32) / 32)


def test_registry() -> None:
    """Names users pass; only a score on labels from the model predicts a KL divergence."""
    properties = {name: (metric.labels, metric.kl_scale, metric.rounding) for name, metric in METRICS.items()}
    expected = {
        "fisher_token": ("model", 0.5, "gptq"),
        "fisher_token_rtn": ("model", 0.5, "rtn"),
        "mixllm": ("data", None, "rtn"),
        "output_error": (None, None, "rtn"),
        "fisher_diagonal": ("data", None, "rtn"),
    }
    assert properties.items() >= expected.items()
    assert all((metric.kl_scale is None) == (metric.labels != "model") for metric in METRICS.values())
    assert list(DATA_FREE_METRICS) == [DATA_FREE, "random"]
    assert not DATA_FREE_METRICS.keys() & METRICS.keys()


def test_gradient_metrics_need_gradients() -> None:
    with pytest.raises(AssertionError, match="asks for gradients"):
        fisher_token(RowSignals(ERROR, None, 2))


@pytest.mark.parametrize("name", METRICS)
def test_no_tokens_score_zero(name: str) -> None:
    empty = torch.empty(0, 3)
    signals = RowSignals(empty, empty, 1, torch.empty(0, 4), torch.ones(3, 4))
    assert METRICS[name].score(signals).tolist() == [0.0] * 3


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_float64_and_never_negative(name: str) -> None:
    x, delta = torch.randn(9, 4), torch.randn(5, 4)
    score = METRICS[name].score(RowSignals(x @ delta.T, torch.randn(9, 5), 9, x, delta))
    assert score.dtype == torch.float64
    assert bool((score >= 0).all())


def layer_and_gradients() -> tuple[nn.Linear, Tensor, Tensor, Tensor, int]:
    """A layer inside a classifier: inputs, rounding error (N, K), dL/dy of the summed loss, tokens."""
    layer, head = nn.Linear(6, 4), nn.Linear(4, 5)
    x, labels = torch.randn(9, 6), torch.randint(5, (9,))
    y = layer(x)
    y.retain_grad()
    nn.functional.cross_entropy(head(y), labels, reduction="sum").backward()
    assert y.grad is not None
    return layer, x, 0.1 * torch.randn(4, 6), y.grad, len(x)


def test_mixllm_is_the_papers_formula_with_real_weight_gradients() -> None:
    """a = <dL/dW_row, dW_row>, with L the mean loss: Eq. 4 of arXiv 2412.14590."""
    layer, x, delta, gradient, tokens = layer_and_gradients()
    assert layer.weight.grad is not None
    a = (layer.weight.grad.double() / tokens * delta.double()).sum(1)
    score = mixllm(RowSignals(x @ delta.T, gradient, tokens))
    assert torch.allclose(score, (a + a * a / 2).abs(), rtol=1e-5, atol=1e-9)  # float32 products


def test_fisher_token_is_the_sum_of_squared_per_token_gradients() -> None:
    """sum over tokens of <dL_t/dW_row, dW_row>², each token differentiated on its own."""
    _, x, delta, gradient, _ = layer_and_gradients()
    per_token = torch.einsum("tn,tk->tnk", gradient.double(), x.double())
    expected = (per_token * delta.double()).sum(2).square().sum(0)
    assert torch.allclose(fisher_token(RowSignals(x @ delta.T, gradient, 9)), expected, rtol=1e-5)


def test_half_the_fisher_score_predicts_the_kl_divergence_of_a_softmax() -> None:
    """logits y = W x, labels drawn from softmax(y): E[S] / 2 = 1/2 sum p (1 - p) e², the diagonal of the Fisher.

    The exact second-order divergence is 1/2 (sum p e² - (sum p e)²); its cross terms vanish on average over the
    independent errors of 40 rows. 4000 tokens leave about 2 % of noise.
    """
    tokens, rows = 4000, 40
    logits = 2 * torch.randn(tokens, rows, dtype=torch.float64)
    error = 0.02 * torch.randn(tokens, rows, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    gradient = logits.softmax(1) - nn.functional.one_hot(labels, rows)
    predicted = fisher_token(RowSignals(error, gradient, tokens)).sum() / 2
    log_p, log_q = logits.log_softmax(1), (logits + error).log_softmax(1)
    measured = (log_p.exp() * (log_p - log_q)).sum()
    assert 0.93 < float(predicted / measured) < 1.07
