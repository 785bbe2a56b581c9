"""KL divergence against float64, its chunks, and the exact quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmix.evaluation import divergence
from torchmix.evaluation.divergence import kl_divergence, kl_from_log_probs, log_probs, quantile, token_chunks


def kl_float64(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The definition, sum p (log p - log q), in float64."""
    log_p = reference_logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - logits.double().log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1e-1, 1.0])
def test_small_divergences_keep_their_digits(noise):
    generator = torch.Generator().manual_seed(0)
    reference = 5 * torch.randn(64, 1000, generator=generator) + 30
    logits = reference + noise * torch.randn(64, 1000, generator=generator)
    expected = kl_float64(reference, logits)
    # the rounding of a log-probability (1e-6 at a magnitude of 30) enters multiplied by the log ratio;
    # the rounding of p and q themselves, which sum to one, is at most about 2**-23 = 1e-7
    error = (kl_divergence(reference, logits) - expected).abs()
    assert (error <= 1e-7 + 1e-4 * expected).all()


def test_more_exact_than_the_definition_in_float32():
    generator = torch.Generator().manual_seed(0)
    reference = 5 * torch.randn(256, 1000, generator=generator) + 30
    logits = reference + 1e-3 * torch.randn(256, 1000, generator=generator)
    log_p, log_q = log_probs(reference), log_probs(logits)
    expected = kl_float64(reference, logits)
    definition = (log_p.exp() * (log_p - log_q)).sum(-1)
    ours = kl_from_log_probs(log_p, log_q)
    assert (ours - expected).abs().mean() < (definition - expected).abs().mean()


def test_equal_models_have_zero_divergence():
    logits = torch.randn(3, 5, 40)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(3, 5))


def test_never_negative():
    reference = 20 * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    assert (kl_divergence(reference, reference + 1e-6) >= 0).all()


def test_masked_entries_count_nothing_and_missing_support_is_infinite():
    reference = torch.tensor([[0.0, 1.0, -math.inf]])
    logits = torch.tensor([[1.0, 0.0, -math.inf]])
    assert kl_divergence(reference, logits)[0] == pytest.approx(
        kl_float64(reference[:, :2], logits[:, :2])[0]
    )
    assert kl_divergence(reference, torch.tensor([[1.0, -math.inf, 0.0]])) == math.inf
    wider = torch.tensor([[1.0, 0.0, 5.0]])  # the model also believes in what the reference excludes
    log_q = wider.double().log_softmax(-1)
    log_p = reference.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q))[0, :2].sum()
    assert kl_divergence(reference, wider)[0] == pytest.approx(float(expected), rel=1e-5)


def test_far_apart_distributions_do_not_overflow():
    reference = torch.tensor([[200.0, 0.0, 0.0]])
    logits = torch.tensor([[0.0, 200.0, 0.0]])
    assert kl_divergence(reference, logits)[0] == pytest.approx(200.0)


def test_chunks_change_nothing(monkeypatch):
    reference, logits = torch.randn(2, 7, 30), torch.randn(2, 7, 30)
    whole = kl_divergence(reference, logits)
    monkeypatch.setattr(divergence, "chunk_elements", lambda device: 100)  # three tokens at a time
    assert torch.equal(kl_divergence(reference, logits), whole)


def test_token_chunks_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(divergence, "chunk_elements", lambda device: 100)
    assert list(token_chunks(torch.empty(7, 30))) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(token_chunks(torch.empty(2, 1000))) == [slice(0, 1), slice(1, 2)]  # a row is never split
    assert list(token_chunks(torch.empty(0, 30))) == []


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\).*same vocabulary"):
        kl_divergence(torch.randn(2, 5), torch.randn(2, 6))


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=200),
    fraction=st.sampled_from([0, 0.5, 0.99, 1]),
)
def test_quantile_is_numpys(values, fraction):
    tensor = torch.tensor(values)
    expected = np.quantile(tensor.double().numpy(), fraction)
    assert quantile(tensor, fraction) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_quantile_edges():
    assert quantile(torch.tensor([1.0, math.inf, math.inf]), 0.99) == math.inf
    with pytest.raises(ValueError, match="0 values"):
        quantile(torch.empty(0), 0.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        quantile(torch.ones(3), 1.5)
