"""``calibrate``: what it measures, what it leaves alone, and what it says when it cannot measure."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.generators import TinyLM, tiny_gpt2, tiny_mixtral, token_ids
from torchmix.calibration import Calibration
from torchmix.evaluation import kl_divergence
from torchmix.salience import METRICS
from torchmix.scoring import data_free_scores, draw_tokens, rounding_errors
from torchmix.selection import select_parameters
from torchmix.workflow import calibrate, calibration_mode, common_length, fill_dead_experts

LAYER = "blocks.0.gate.weight"


def run(model: nn.Module | None = None, **options: Any) -> Calibration:
    """Calibrate a tiny language model on 3 samples of 16 tokens."""
    defaults = {"data": token_ids(3, 16), "sequence_length": 16, "num_samples": 3}
    return calibrate(TinyLM() if model is None else model, **{**defaults, **options})


def same(a: Calibration, b: Calibration) -> bool:
    """Equal to the bit: scores, Hessians, counts."""
    scores = [
        torch.equal(layer.scores[metric], b.layers[name].scores[metric])
        for name, layer in a.layers.items()
        for metric in layer.scores
    ]
    hessians = [torch.equal(hessian, b.hessians[key]) for key, hessian in a.hessians.items()]
    counts = [layer.tokens == b.layers[name].tokens for name, layer in a.layers.items()]
    return all(scores) and all(hessians) and all(counts) and a.data_sha256 == b.data_sha256


def inputs_of(model: nn.Module, module: nn.Module, ids: Tensor) -> Tensor:
    """What reaches a module, all tokens one after another: float32 (T, K)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    handle.remove()
    return torch.cat(seen)


def test_what_is_measured() -> None:
    model = TinyLM().eval()
    ids = token_ids(3, 16)
    calibration = run(model, data=ids, salience=tuple(METRICS), widths=(8, 3, 3))
    assert calibration.widths == (3, 8)
    assert calibration.salience == tuple(METRICS)
    assert calibration.tokens == 48
    assert [layer.tokens for layer in calibration.layers.values()] == [(48,)] * 6
    assert list(calibration.layers) == [target.name for target in select_parameters(model).targets]
    assert calibration.model is not None
    assert calibration.model() is model
    x = inputs_of(model, model.blocks[1].down, ids)
    hessian = calibration.hessian("blocks.1.down.weight")
    assert hessian is not None
    expected = 2 / len(x) * x.double().T @ x.double()
    assert torch.allclose(hessian.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.diagonal().max()))
    error = x @ rounding_errors(model.blocks[1].down.weight.detach(), [3], 128)[0].T
    expected = error.double().square().sum(0)
    found = calibration.layers["blocks.1.down.weight"].scores["output_error"][:, 0]
    assert torch.allclose(found, expected, rtol=1e-5)


def test_gate_and_up_share_a_hessian() -> None:
    calibration = run()
    keys = [calibration.layers[f"blocks.1.{name}.weight"].hessian_keys for name in ("gate", "up", "down")]
    assert keys[0] == keys[1] != keys[2]
    assert len(calibration.hessians) == 4
    assert run(hessians=False).hessians == {}


@pytest.mark.parametrize("metric", ["mixllm", "fisher_token"])
def test_scores_are_those_of_real_gradients(metric: str) -> None:
    """A whole model, one layer, one sample: weight gradients by autograd, labels as the metric wants them.

    The mean loss of a sample has 15 next tokens of text, or 16 tokens drawn from the model's own predictions.
    """
    model, ids = TinyLM().eval(), token_ids(1, 16)
    found = (
        run(model, data=ids, num_samples=1, salience=metric, widths=(3,)).layers[LAYER].scores[metric][:, 0]
    )
    logits = model(ids)[0]
    drawn = draw_tokens(logits.detach(), torch.Generator().manual_seed(0))
    if metric == "mixllm":
        loss = nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    else:
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
    weight = model.blocks[0].gate.weight
    outputs: list[Tensor] = []
    hook = model.blocks[0].gate.register_forward_hook(lambda *args: outputs.append(args[2]))
    delta = rounding_errors(weight.detach(), [3], 128)[0]
    if metric == "mixllm":
        (gradient,) = torch.autograd.grad(loss, weight)
        a = (gradient.double() * delta).sum(1)
        expected = (a + a.square() / 2).abs()
    else:  # <dL_t/dW, dW> of token t is dL/dy_t times dW x_t
        logits = model(ids)[0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, outputs[0])
        x = inputs_of(model, model.blocks[0].gate, ids)
        expected = (gradient[0].double() * (x @ delta.T)).square().sum(0)
    hook.remove()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-9)  # float32 sums with cancellation


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("sharpness", [1.5, 20.0])  # nearly uniform predictions, and nearly certain ones
def test_predicted_kl_is_what_is_measured(bits: int, sharpness: float) -> None:
    """All weights rounded at once, on the calibration tokens: within a factor of 1.3.

    What is left out are correlations between rows and layers, higher orders (up to 1.25 at 3 bits) and the noise of
    2048 drawn labels.
    """
    model = TinyLM().eval().requires_grad_(False)
    model.lm_head.weight.mul_(sharpness)
    ids = token_ids(64, 32)
    plan = run(model, data=ids, num_samples=64, sequence_length=32, widths=(bits,)).plan()
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if name in plan.layers:
            parameter += rounding_errors(parameter, [bits], 128)[0]
    measured = kl_divergence(model(ids).flatten(0, 1), rounded(ids).flatten(0, 1)).mean()
    assert plan.predicted_kl is not None
    assert 1 / 1.3 < plan.predicted_kl / float(measured) < 1.3


def test_two_runs_are_equal_to_the_bit() -> None:
    first = run(salience=tuple(METRICS))
    torch.manual_seed(1)
    assert same(first, run(salience=tuple(METRICS)))
    other = run(seed=1)
    assert not torch.equal(
        other.layers[LAYER].scores["fisher_token"], first.layers[LAYER].scores["fisher_token"]
    )


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = TinyLM().train()
    model.blocks[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    calibration = run(model, salience=tuple(METRICS))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(after[0], states[0])
    assert after[1:] == states[1:]
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(calibration, run(TinyLM().eval(), salience=tuple(METRICS)))  # dropout was off


def test_an_error_leaves_the_model_alone_too() -> None:
    model = TinyLM().train()
    with calibration_mode(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), calibration_mode(model):
        raise ZeroDivisionError
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inside_no_grad() -> None:
    with torch.no_grad():
        calibration = run()
    assert same(calibration, run())


def test_the_model_is_moved_to_the_device(device: torch.device) -> None:
    model = TinyLM()
    calibration = run(model, device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    assert all(h.device.type == "cpu" for h in calibration.hessians.values())
    assert all(layer.scores["fisher_token"].device.type == "cpu" for layer in calibration.layers.values())


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    run(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype: torch.dtype) -> None:
    """Scores in 16 bits are those in 32 to a few per cent, in the sum over a layer."""
    model = TinyLM()
    short = run(copy.deepcopy(model).to(dtype), salience="mixllm", widths=(3,))
    full = run(model, salience="mixllm", widths=(3,))
    for name, layer in full.layers.items():
        found = short.layers[name].scores["mixllm"].sum() / layer.scores["mixllm"].sum()
        assert 0.9 < float(found) < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"salience": "fisher"}, r"salience=\['fisher'\] is not known.*'fisher_token'"),
        ({"salience": ()}, "is not known"),
        ({"widths": (1, 4)}, "bits=1"),
        ({"widths": ()}, "at least one width"),
        ({"group_size": 100}, "group_size=100"),
        ({"data": []}, "no text and no tokens"),
        ({"data": token_ids(1, 15)}, "15 tokens"),
        ({"data": token_ids(3, 16), "num_samples": 0}, "num_samples=0"),
        ({"include": ["blocks.7"]}, "'blocks.7' matches no linear layer"),
        ({"data": "no such file.txt"}, "no such file"),
    ],
    ids=str,
)
def test_wrong_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**options)


def test_bad_weights_are_named() -> None:
    model = TinyLM()
    with torch.no_grad():
        model.blocks[1].up.weight[5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.weight holds NaN"):
        run(model)


def test_bad_activations_name_the_first_layer() -> None:
    model = TinyLM()
    with torch.no_grad():
        model.blocks[0].down.bias[3] = float("inf")
    with pytest.raises(
        ValueError, match=r"blocks\.1\.gate\.weight: the input.*first layer.*weights before it"
    ):
        run(model)
    model = TinyLM()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")  # after the last measured layer
    with pytest.raises(ValueError, match="logits are NaN or infinite in calibration sample 0"):
        run(model)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = TinyLM()
    for data in (None, token_ids(3, 16)):
        with pytest.raises(ValueError, match=r"blocks\.0\.gate\.weight is on the meta device"):
            run(model, data=data)


def test_a_layer_that_is_never_called() -> None:
    model = TinyLM()
    model.unused = nn.Linear(128, 128)
    with pytest.raises(ValueError, match=r"unused\.weight: no calibration token reached this layer"):
        run(model)
    assert "unused.weight" not in run(model, exclude=["unused"]).layers


def test_without_data() -> None:
    model = TinyLM()
    calibration = calibrate(model, widths=(3, 4, 8))
    assert calibration.salience == ("weight_error",)
    assert (calibration.hessians, calibration.tokens, calibration.source) == ({}, 0, "no data")
    for target in select_parameters(model).targets:
        expected = data_free_scores(target, (3, 4, 8), 128)
        assert torch.equal(calibration.layers[target.name].scores["weight_error"], expected)
    assert calibration.experts_without_tokens() == {}
    plan = calibration.plan(4.5)
    assert plan.predicted_kl is None
    assert plan.bits_per_weight <= 4.5


def test_any_module_through_its_loss() -> None:
    model = nn.Sequential(nn.Linear(128, 40), nn.Tanh(), nn.Linear(40, 3))
    batches = [torch.randn(9, 128) for _ in range(4)]

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().sum()

    seen: list[tuple[int, int]] = []
    calibration = calibrate(
        model,
        iter(batches),
        loss_fn=loss_fn,
        num_samples=3,
        widths=(3,),
        include=["*"],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    x = torch.cat(batches[:3])
    y = model(x)
    error = model[1](model[0](x)).detach() @ rounding_errors(model[2].weight.detach(), [3], 128)[0].T
    expected = (2 * y.detach() * error).double().square().sum(0)  # dL/dy = 2 y
    assert torch.allclose(calibration.layers["2.weight"].scores["fisher_token"][:, 0], expected, rtol=1e-4)
    assert calibration.layers["0.weight"].tokens == (27,)
    assert calibration.tokens == 0
    assert calibration.plan(widths=(3,)).predicted_kl is None  # the loss is no log-likelihood that we know of
    hessian = calibration.hessian("0.weight")
    assert hessian is not None
    assert torch.allclose(hessian, 2 / 27 * x.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "loss_fn", "message"),
    [
        ([], lambda m, b: m(b).sum(), "data is empty"),
        ([torch.randn(2, 128)], lambda m, b: m(b), "one finite number per batch, but batch 0"),
        ([torch.randn(2, 128)], lambda m, b: m(b).sum() * float("nan"), "one finite number"),
        ([torch.randn(2, 128)], lambda m, b: 3.0, "one finite number"),
        ([torch.randn(2, 128)], lambda m, b: b.sum(), "cannot be differentiated.*no_grad or detach"),
        ([torch.randn(2, 128)], lambda m, b: m(b).detach().sum(), "cannot be differentiated"),
    ],
)
def test_wrong_losses(batches: list[Tensor], loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(nn.Sequential(nn.Linear(128, 4)), batches, loss_fn=loss_fn)


def test_conv1d_of_gpt2() -> None:
    model = tiny_gpt2().eval()
    calibration = run(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert calibration.layers[name].scores["fisher_token"].shape == (512, 5)
    module = model.transformer.h[0].mlp.c_fc
    x = inputs_of(model, module, token_ids(3, 16))
    hessian = calibration.hessian(name)
    assert torch.allclose(hessian, 2 / 48 * x.T @ x, rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
    whole = run(model, salience="output_error", widths=(3,), scored_samples=3)
    scores = whole.layers[name].scores["output_error"][:, 0]
    error = x @ rounding_errors(module.weight.detach().t(), [3], 128)[0].T
    assert torch.allclose(scores, error.double().square().sum(0), rtol=1e-4)


def test_experts_and_dead_ones() -> None:
    """2 tokens reach 4 of 8 experts at most; the others get scores of average experts and no Hessian."""
    model = tiny_mixtral(experts=8).train()
    before = model.get_experts_implementation()
    calibration = run(model, data=token_ids(1, 2), sequence_length=2, num_samples=1)
    assert model.get_experts_implementation() == before
    layer = calibration.layers["model.layers.0.mlp.experts.down_proj"]
    assert sum(layer.tokens) == 4
    dead = [e for e, count in enumerate(layer.tokens) if not count]
    assert len(dead) >= 4
    assert calibration.experts_without_tokens()[layer.name] == dead
    assert all((key == "") == (e in dead) for e, key in enumerate(layer.hessian_keys))
    assert all(calibration.hessian(layer.name, e) is None for e in dead)
    scores = layer.scores["fisher_token"]
    assert bool((scores[dead] > 0).all())
    assert calibration.plan(4.5).bits_per_weight <= 4.5


def test_dead_experts_are_filled_as_average_ones() -> None:
    """Twice the data-free score for every living expert means twice the data-free score for the dead one."""
    free = torch.rand(3, 4, 2, dtype=torch.float64)
    measured = 2 * free
    measured[1] = 0.0
    filled = fill_dead_experts(measured, free, [5, 0, 7])
    assert torch.allclose(filled, 2 * free, rtol=1e-12)
    assert torch.equal(filled[[0, 2]], measured[[0, 2]])


def test_the_context_of_the_model_limits_samples() -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="sequence_length=65 exceeds the model's context of 64"):
        run(model, sequence_length=65)
    assert run(model, data=token_ids(2, 64), sequence_length=None, scored_samples=2).tokens == 128
    with pytest.raises(ValueError, match="token id 48 is outside the vocabulary of 48"):
        run(model, data=torch.full((3, 16), 48))


def test_scores_without_data_go_beside_those_with_data() -> None:
    """A ranking at random, with the Hessians of real data."""
    calibration = run(salience=("random", "fisher_token"))
    assert calibration.salience == ("random", "fisher_token")
    assert calibration.hessians
    scores = calibration.layers[LAYER].scores["random"]
    assert torch.equal(scores, run(salience="random").layers[LAYER].scores["random"])
    assert calibration.plan(4.5).salience == "random"


def test_token_rows_keep_their_own_length() -> None:
    rows = torch.zeros(3, 7, dtype=torch.long)
    assert common_length(rows) == common_length(list(rows)) == 7
    samples = calibrate(TinyLM(), rows, num_samples=3).samples
    assert samples is not None
    assert samples.shape == (3, 7)
    others = (rows[0], [rows[0], rows[0, :6]], ["text"], "path", [[1, 2]], iter(()))
    assert [common_length(data) for data in others] == [None] * 6
