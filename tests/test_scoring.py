"""Scores of rows, taken while a model runs: equal to what real weight gradients give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchmix.capture import HessianAccumulator, LinearCall, LinearCalls
from torchmix.primitives import choose_qparams, dequantize, quantize
from torchmix.salience import METRICS
from torchmix.scoring import SalienceRecorder, data_free_scores, draw_tokens, rounding_errors
from torchmix.selection import Target

WIDTHS = (3, 8)


class Experts(nn.Module):
    """Three experts stored as (E, K, N), each applied to its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:4] @ self.w[0], x[4:] @ self.w[2]])


def row_target(module: nn.Linear, name: str) -> Target:
    return Target(name, module, "weight", transposed=False)


def error_by_hand(weight: Tensor, bits: int) -> Tensor:
    width = torch.full((len(weight),), bits, dtype=torch.uint8)
    scale, zero = choose_qparams(weight, width, 8)
    return dequantize(quantize(weight, scale, zero, width, 8), scale, zero, 8) - weight


def same(found: Tensor, expected: Tensor) -> bool:
    """Sums of at most 20 squares in float32: a relative 20 * 2**-24, as no term is negative, and rounded outputs."""
    return torch.allclose(found, expected, rtol=2.0**-19, atol=0.0)


def classifier() -> tuple[nn.Sequential, list[Target]]:
    model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 4))
    return model, [row_target(model[0], "0.weight"), row_target(model[2], "2.weight")]


def record(model: nn.Module, recorder: SalienceRecorder, targets: list[Target], x: Tensor) -> Tensor:
    model.requires_grad_(False)
    with LinearCalls({target.name: target.weight for target in targets}, recorder):
        return model(x)


def test_rounding_error_is_that_of_round_to_nearest() -> None:
    weight = torch.randn(5, 20)
    assert torch.equal(rounding_errors(weight, [3], 8)[0], error_by_hand(weight, 3))
    assert rounding_errors(weight.bfloat16(), [3], 8)[0].dtype == torch.float32


def test_data_free_scores() -> None:
    layer = nn.Linear(20, 5)
    scores = data_free_scores(row_target(layer, "w"), WIDTHS, 8)
    weight = layer.weight.detach()
    expected = [error_by_hand(weight, bits).double().square().sum(1) for bits in WIDTHS]
    assert same(scores, torch.stack(expected, 1))
    assert bool((scores[:, 0] > scores[:, 1]).all())


def test_data_free_scores_of_transposed_experts() -> None:
    experts = Experts()
    scores = data_free_scores(Target("w", experts, "w", transposed=True), WIDTHS, 8)
    assert scores.shape == (3, 5, 2)
    for e in range(3):
        rows = experts.w[e].detach().t()
        assert same(scores[e, :, 1], error_by_hand(rows, 8).double().square().sum(1))


@pytest.mark.parametrize("metric", ["mixllm", "fisher_token"])
def test_scores_equal_real_gradients(metric: str) -> None:
    """Two samples; gradients of every token's loss with respect to every weight, by autograd, in a second model."""
    model, targets = classifier()
    samples = [(torch.randn(7, 20), torch.randint(4, (7,))) for _ in range(2)]
    expected = {target.name: torch.zeros(len(target.rows), 2, dtype=torch.float64) for target in targets}
    for x, labels in samples:
        for target in targets:
            per_token = []  # <dL_t/dW_row, dW_row> for each token: (T, N, W)
            for t in range(len(x)):
                loss = nn.functional.cross_entropy(model(x[t : t + 1]), labels[t : t + 1])
                (gradient,) = torch.autograd.grad(loss, target.weight)
                weight = target.weight.detach()
                deltas = torch.stack([error_by_hand(weight, bits) for bits in WIDTHS])
                per_token.append((gradient * deltas).sum(2).T.double())
            a = torch.stack(per_token)
            if metric == "fisher_token":
                expected[target.name] += a.square().sum(0)
            else:
                mean = a.sum(0) / len(x)
                expected[target.name] += (mean + mean.square() / 2).abs()
    recorder = SalienceRecorder(targets, [metric], WIDTHS, 8, None)
    for x, labels in samples:
        loss = nn.functional.cross_entropy(record(model, recorder, targets, x), labels, reduction="sum")
        recorder.labels, recorder.loss_tokens = METRICS[metric].labels, len(x)
        loss.backward()
    for target in targets:
        found = recorder.scores[metric][target.name]
        assert torch.allclose(
            found, expected[target.name], rtol=1e-3, atol=1e-9
        )  # float32 sums with cancellation
        assert recorder.tokens[target.name] == [14]


def test_each_backward_pass_feeds_the_metrics_of_its_labels() -> None:
    model, targets = classifier()
    recorder = SalienceRecorder(targets, list(METRICS), WIDTHS, 8, None)
    assert recorder.needs_labels == ["model", "data"]
    y = record(model, recorder, targets, torch.randn(7, 20))
    assert recorder.scores["output_error"]["0.weight"].any()
    recorder.loss_tokens = 7
    for labels, filled, empty in (("model", "fisher_token", "mixllm"), ("data", "mixllm", "")):
        recorder.labels = labels
        before = recorder.scores["fisher_token"]["0.weight"].clone()
        y.square().sum().backward(retain_graph=True)
        assert recorder.scores[filled]["0.weight"].any()
        assert not empty or not recorder.scores[empty]["0.weight"].any()
    assert torch.equal(recorder.scores["fisher_token"]["0.weight"], before)


def test_output_error_needs_no_gradient() -> None:
    model, targets = classifier()
    recorder = SalienceRecorder(targets, ["output_error"], WIDTHS, 8, None)
    assert recorder.needs_labels == []
    x = torch.randn(7, 20)
    y = record(model, recorder, targets, x)
    assert not y.requires_grad
    for column, bits in enumerate(WIDTHS):
        expected = (x @ error_by_hand(model[0].weight, bits).T).double().square().sum(0)
        assert same(recorder.scores["output_error"]["0.weight"][:, column], expected)


def test_experts_are_scored_apart() -> None:
    model, x = Experts(), torch.randn(9, 20)
    targets = [Target("w", model, "w", transposed=True)]
    recorder = SalienceRecorder(targets, ["output_error"], WIDTHS, 8, HessianAccumulator())
    record(model, recorder, targets, x)
    assert recorder.tokens["w"] == [4, 0, 5]
    scores = recorder.scores["output_error"]["w"]
    assert scores.shape == (3, 5, 2)
    assert not scores[1].any()
    expected = (x[4:] @ error_by_hand(model.w[2].detach().t(), 3).T).double().square().sum(0)
    assert same(scores[2, :, 0], expected)
    assert recorder.hessians is not None
    assert set(recorder.hessians.hessians()) == {"w[0]", "w[2]"}


def test_the_first_layer_with_a_bad_input_is_named() -> None:
    model, targets = classifier()
    recorder = SalienceRecorder(targets, ["output_error"], WIDTHS, 8, None)
    recorder.samples = [3]
    x = torch.randn(7, 20)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight: the input of this layer is NaN.*sample 3"):
        record(model, recorder, targets, x)


def test_a_call_without_tokens_adds_nothing() -> None:
    _model, targets = classifier()
    recorder = SalienceRecorder(targets, list(METRICS), WIDTHS, 8, None)
    source = torch.empty(0, 20)
    assert recorder(LinearCall("0.weight", None, source, source)) is None
    assert recorder.tokens["0.weight"] == [0]
    assert not any(scores["0.weight"].any() for scores in recorder.scores.values())


def test_tokens_are_drawn_from_the_predicted_distribution() -> None:
    logits = torch.randn(1, 7).mul(2).expand(20000, 7)
    drawn = draw_tokens(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=7) / 20000
    # six standard deviations of a share
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=6 * (0.25 / 20000) ** 0.5, rtol=0)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1000, 5), -torch.inf)
    logits[:, 1] = logits[:, 3] = 0.0
    assert set(draw_tokens(logits, torch.Generator().manual_seed(0)).tolist()) == {1, 3}
