"""The refit of the rounding target: normal equations, shrinkage, and what it is for."""

from __future__ import annotations

import pytest
import torch

from torchmix.rounding import refit_target

N, K, T = 12, 16, 400


def moments(x, x_q):
    return x_q.T @ x_q, x.T @ x_q


@pytest.fixture
def drifted():
    """Inputs, the same inputs after a linear drift with noise, and a weight."""
    x = torch.randn(T, K)
    x_q = x @ (torch.eye(K) + 0.05 * torch.randn(K, K)) + 0.01 * torch.randn(T, K)
    return x, x_q, torch.randn(N, K)


def test_full_step_without_damping_is_least_squares(drifted):
    x, x_q, weight = drifted
    refitted, note = refit_target(weight, *moments(x, x_q), shrinkage=1.0, percdamp=0.0)
    expected = torch.linalg.lstsq(x_q.double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-3, atol=1e-4)  # H is summed in float32
    assert note == ""


def test_equal_inputs_keep_the_weight(drifted):
    x, _, weight = drifted
    refitted, _ = refit_target(weight, *moments(x, x), shrinkage=1.0, percdamp=0.01)
    torch.testing.assert_close(refitted, weight, rtol=1e-4, atol=1e-5)


def test_shrinkage_goes_part_of_the_way(drifted):
    x, x_q, weight = drifted
    whole, _ = refit_target(weight, *moments(x, x_q), shrinkage=1.0, percdamp=0.01)
    half, _ = refit_target(weight, *moments(x, x_q), shrinkage=0.5, percdamp=0.01)
    torch.testing.assert_close(half, (weight + whole) / 2)
    same, _ = refit_target(weight, *moments(x, x_q), shrinkage=0.0, percdamp=0.01)
    assert torch.equal(same, weight)


def test_refit_lowers_the_output_error_on_other_tokens(drifted):
    x, x_q, weight = drifted
    fit, held_out = slice(0, T // 2), slice(T // 2, T)
    refitted, _ = refit_target(weight, *moments(x[fit], x_q[fit]), shrinkage=1.0, percdamp=0.01)
    wanted = x[held_out] @ weight.T
    before = (wanted - x_q[held_out] @ weight.T).norm()
    after = (wanted - x_q[held_out] @ refitted.T).norm()
    assert after < 0.5 * before  # the drift is linear, so only the noise (a fifth of it) must remain


def test_inputs_without_cholesky_factor_keep_the_weight_and_say_so(drifted):
    _, _, weight = drifted
    refitted, note = refit_target(weight, -torch.eye(K), torch.eye(K), shrinkage=0.5, percdamp=0.0)
    assert torch.equal(refitted, weight)
    assert "without refit" in note


def test_residual_errors_are_made_up_for(drifted):
    """With the stream's error in the target, the full step is least squares on the whole sum."""
    x, x_q, weight = drifted
    drift = torch.randn(T, N) * 0.1 + x_q @ torch.randn(K, N) * 0.1  # r - r~
    moments_q = moments(x, x_q)
    refitted, _ = refit_target(weight, *moments_q, shrinkage=1.0, percdamp=0.0, residual=drift.T @ x_q)
    wanted = x @ weight.T + drift
    expected = torch.linalg.lstsq(x_q.double(), wanted.double()).solution.T
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-3, atol=1e-4)
    plain, _ = refit_target(weight, *moments_q, shrinkage=1.0, percdamp=0.0)
    assert (wanted - x_q @ refitted.T).norm() < 0.8 * (wanted - x_q @ plain.T).norm()
