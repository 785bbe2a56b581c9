"""Calibration block by block measures what one pass through the whole model measures, and scores GPTQ's errors."""

from __future__ import annotations

import pytest
import torch

import torchmix
from tests.models.tiny_models import random_ids, tiny_model
from torchmix.capture import HessianAccumulator, LinearCalls, NotReplayableError
from torchmix.rounding import gptq_round
from torchmix.scoring import SalienceRecorder, rounding_errors, token_losses
from torchmix.scoring_blocks import calibrate_by_blocks, choose_scored
from torchmix.selection import select_parameters
from torchmix.workflow_whole_model import calibration_mode

METRICS = ("fisher_token_rtn", "mixllm", "output_error")
S, L = 4, 32


def by_blocks(model, samples, metrics=METRICS, scored=S, hessians=True, include=()):
    targets = select_parameters(model, include=include).targets
    recorder = SalienceRecorder(targets, metrics, (3, 4), 128, HessianAccumulator() if hessians else None)
    with calibration_mode(model):
        tokens = calibrate_by_blocks(model, targets, recorder, samples, scored, seed=0)
    return recorder, tokens


def as_a_whole(model, samples, metrics=METRICS, include=()):
    """The same with the whole model at once, and the same draws of labels."""
    targets = select_parameters(model, include=include).targets
    recorder = SalienceRecorder(targets, metrics, (3, 4), 128, HessianAccumulator())
    generator = torch.Generator().manual_seed(0)
    weights = {target.name: target.weight for target in targets}
    with calibration_mode(model):
        for ids in samples:
            with LinearCalls(weights, recorder):
                logits = model(ids[None], use_cache=False).logits[0].float()
            for labels in recorder.needs_labels:
                losses = token_losses(logits, ids, labels, generator)
                recorder.labels, recorder.loss_tokens = labels, len(losses)
                losses.sum().backward(retain_graph=True)
            recorder.hessians.forget_last()
    return recorder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3", "mixtral", "qwen2_moe"])
def test_scores_and_hessians_are_those_of_the_whole_model(family):
    model, samples = tiny_model(family), random_ids(S, L)
    found, tokens = by_blocks(model, samples)
    expected = as_a_whole(model, samples)
    assert tokens == S * L
    assert found.tokens == expected.tokens
    for metric in METRICS:
        for name, scores in expected.scores[metric].items():
            # float32 sums in another order; mixllm's have cancellation
            torch.testing.assert_close(found.scores[metric][name], scores, rtol=2e-3, atol=1e-9)
    hessians = found.hessians.hessians()
    for key, hessian in expected.hessians.hessians().items():
        torch.testing.assert_close(hessians[key], hessian, rtol=1e-4, atol=1e-5)


def test_scores_are_of_what_gptq_leaves():
    """By hand for the last layer: error of GPTQ with the finished Hessian, gradient of a drawn label's loss."""
    model, samples = tiny_model("llama"), random_ids(2, L)
    recorder, _ = by_blocks(model, samples, ("fisher_token",))
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach()
    hessian = recorder.hessians.hessian(name)
    delta = (
        gptq_round(weight, torch.full((len(weight),), 3, dtype=torch.uint8), 128, hessian).dequantize()
        - weight
    )
    torch.testing.assert_close(rounding_errors(weight, (3, 4), 128, hessian)[0], delta)
    total, generator = 0.0, torch.Generator().manual_seed(0)
    kept = {}
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, output: kept.update(x=args[0][0], y=output)
    )
    model.requires_grad_(True)
    for ids in samples:
        logits = model(ids[None]).logits[0]
        (gradient,) = torch.autograd.grad(token_losses(logits, ids, "model", generator).sum(), kept["y"])
        total = total + (gradient[0] * (kept["x"].detach() @ delta.T)).square().sum(0)
    torch.testing.assert_close(
        recorder.scores["fisher_token"][name][:, 0].float(), total, rtol=1e-3, atol=1e-10
    )


def test_without_hessians_round_to_nearest_is_scored():
    model, samples = tiny_model("llama"), random_ids(2, L)
    recorder, _ = by_blocks(model, samples, ("fisher_token", "fisher_token_rtn"), hessians=False)
    for name, scores in recorder.scores["fisher_token"].items():
        assert torch.equal(scores, recorder.scores["fisher_token_rtn"][name])


def test_only_some_samples_are_scored_but_all_count_in_hessians():
    model, samples = tiny_model("llama"), random_ids(6, L)
    recorder, tokens = by_blocks(model, samples, ("fisher_token_rtn",), scored=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert tokens == 2 * L
    assert recorder.tokens[name] == [6 * L]
    assert recorder.scored_tokens[name] == [2 * L]
    assert recorder.sample_order == [0, 3, 1, 2, 4, 5]
    assert recorder.gradients == {}  # nobody asked for them
    alone, _ = by_blocks(model, samples[[0, 3]], ("fisher_token_rtn",))
    torch.testing.assert_close(
        recorder.scores["fisher_token_rtn"][name],
        alone.scores["fisher_token_rtn"][name],
        rtol=1e-4,
        atol=1e-12,
    )


def test_layers_behind_the_blocks_are_measured_too():
    model, samples = tiny_model("llama", tie_word_embeddings=False), random_ids(S, L)
    include = ("lm_head.weight", "model.layers.*")
    found, _ = by_blocks(model, samples, include=include)
    expected = as_a_whole(model, samples, include=include)
    assert found.tokens["lm_head.weight"] == [S * L]
    for metric in METRICS:
        torch.testing.assert_close(
            found.scores[metric]["lm_head.weight"],
            expected.scores[metric]["lm_head.weight"],
            rtol=2e-3,
            atol=1e-9,
        )


def test_a_layer_before_the_blocks_is_refused_by_name():
    model = tiny_model("llama")
    model.model.register_module("first", torch.nn.Linear(128, 128))
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda module, args, output: model.model.first(output))
    with pytest.raises(NotReplayableError, match=r"model\.first\.weight lies before the first block"):
        by_blocks(model, random_ids(2, L))


def test_progress_counts_blocks_in_both_directions():
    steps = []
    torchmix.calibrate(
        tiny_model("llama"),
        random_ids(2, L),
        num_samples=2,
        sequence_length=L,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(64, 4, [0, 16, 32, 48]), (8, None, [0, 4]), (3, None, [0]), (3, 9, [0, 1, 2]), (1, None, [0])],
)
def test_choose_scored(count, wanted, expected):
    assert choose_scored(count, wanted) == expected


def test_token_weights_are_of_all_samples_in_their_order():
    model, samples = tiny_model("llama"), random_ids(6, L)
    options = {"num_samples": 6, "sequence_length": L, "scored_samples": 2}
    without = torchmix.calibrate(model, samples, **options)
    weighted = torchmix.calibrate(model, samples, **options, token_weights=True)
    assert without.token_weights == {}
    weights = weighted.weights_by_layer()
    assert set(weights) == set(weighted.layers)
    assert all(w.shape == (6, L) and abs(float(w.float().mean()) - 1) < 0.01 for w in weights.values())
    q, k = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qk")
    assert q is k  # layers with one input share the weights
    for name, scores in weighted.layers.items():
        assert torch.equal(scores.scores["fisher_token"], without.layers[name].scores["fisher_token"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scored_samples": 0}, "scored_samples=0 must be at least 1"),
        ({"token_weights": True, "hessians": False}, "hessians=False"),
        ({"token_weights": True, "salience": "output_error"}, r"salience=\('output_error',\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        torchmix.calibrate(tiny_model("llama"), random_ids(2, L), **options)
