"""Each metric on numbers small enough to follow by hand, and against the weight gradient it never forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchmix.salience import DATA_FREE, METRICS, RowSignals, weight_error
from torchmix.salience.metrics import fisher_token, mixllm, output_error

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


def test_registry() -> None:
    """Names users pass; only a score on labels from the model predicts a KL divergence."""
    properties = {name: (metric.labels, metric.kl_scale, metric.rounding) for name, metric in METRICS.items()}
    expected = {
        "fisher_token": ("model", 0.5, "gptq"),
        "fisher_token_rtn": ("model", 0.5, "rtn"),
        "mixllm": ("data", None, "rtn"),
        "output_error": (None, None, "rtn"),
    }
    assert properties.items() >= expected.items()
    assert all((metric.kl_scale is None) == (metric.labels != "model") for metric in METRICS.values())
    assert DATA_FREE not in METRICS


def test_gradient_metrics_need_gradients() -> None:
    with pytest.raises(AssertionError, match="asks for gradients"):
        fisher_token(RowSignals(ERROR, None, 2))


@pytest.mark.parametrize("name", METRICS)
def test_no_tokens_score_zero(name: str) -> None:
    empty = torch.empty(0, 3)
    assert METRICS[name].score(RowSignals(empty, empty, 1)).tolist() == [0.0] * 3


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_float64_and_never_negative(name: str) -> None:
    score = METRICS[name].score(RowSignals(torch.randn(9, 5), torch.randn(9, 5), 9))
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
