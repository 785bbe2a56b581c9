"""Tuning: it lowers the divergence on samples it has not seen, or changes nothing at all."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn

import torchmix
from tests.models.tiny_models import apply_plan, random_ids, random_plan, tiny_model
from torchmix.data import token_batches
from torchmix.demo import demo_texts
from torchmix.demo.text import demo_model_directory
from torchmix.evaluation import evaluation_mode, kl_divergence
from torchmix.huggingface import load_model, load_tokenizer
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tuning import rate_factor, tune, tuning_bytes

# Far above the defaults: what takes hundreds of steps otherwise shows in a few.
FAST = {"steps": 8, "batch_size": 4, "scale_lr": 3e-3, "code_lr": 1e-2}


def pair(family="llama", dtype=torch.float32, bits=3, per_token=False, **changes):
    """A tiny random model, and a copy with all rows rounded to nearest at ``bits``."""
    original = tiny_model(family, dtype, **changes)
    return apply_plan(copy.deepcopy(original), random_plan(original, (bits,)), per_token), original


def state(model):
    """Everything a model holds, quantized weights as their parts."""
    found = {}
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        quantized = isinstance(tensor, MixedPrecisionTensor)
        parts = (
            {n: getattr(tensor, n) for n in tensor.tensor_data_names} if quantized else {"": tensor.detach()}
        )
        found |= {f"{name}.{part}": value.clone() for part, value in parts.items()}
    return found


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


def mean_kl(original, model, ids):
    with evaluation_mode([original, model]), torch.no_grad():
        return float(kl_divergence(original(ids).logits, model(ids).logits).mean())


@pytest.fixture(scope="module")
def trained():
    """The bundled model, a copy rounded to nearest at 3 bits, and samples of a text."""
    original = load_model(demo_model_directory()).float()
    tokenizer = load_tokenizer(demo_model_directory())
    text = demo_texts().calibration[:60_000]
    ids = token_batches([text], tokenizer, num_samples=20, sequence_length=64).input_ids
    return apply_plan(copy.deepcopy(original), random_plan(original, (3,))), original, ids


def test_the_divergence_falls_on_samples_held_back(trained):
    """Rounding to nearest at 3 bits leaves scales so far from their best that 8 steps on 2048 tokens gain a fifth."""
    quantized, original, ids = trained
    model, seen = copy.deepcopy(quantized), []
    fast = FAST | {"code_lr": 2e-3}
    record = tune(model, original, ids, **fast, progress=lambda *step: seen.append(step))
    assert record.kept
    assert record.kl_after < 0.9 * record.kl_before
    assert (record.steps, record.samples, record.held_back) == (8, 18, 2)
    assert seen == [(step, 8) for step in range(1, 9)]
    assert record.losses[-1] < record.losses[0]
    held_back = ids[[5, 15]]
    assert record.kl_before == pytest.approx(mean_kl(original, quantized, held_back), rel=1e-4)
    assert record.kl_after == pytest.approx(mean_kl(original, model, held_back), rel=1e-4)
    assert json.loads(json.dumps(record.to_dict()))["kept"] is True
    before, after = state(quantized), state(model)
    changed = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"scale", ""}, "with steps this small no code gets far enough to flip"
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in quantized.named_parameters()
    }


def test_learned_codes_change_codes_and_nothing_of_the_format():
    model, original = pair()
    before = state(model)
    record = tune(model, original, random_ids(12, 32), **FAST | {"code_lr": 3e-2})
    assert 0 < record.codes_changed < 0.5
    after = state(model)
    assert record.kept
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"qdata", "scale", ""}
    assert all(before[key].shape == after[key].shape for key in before)
    assert not torch.equal(before["model.norm.weight."], after["model.norm.weight."])
    assert torch.equal(before["lm_head.weight."], after["lm_head.weight."])


@pytest.mark.parametrize(
    ("family", "dtype", "per_token"),
    [
        ("gpt2", torch.float32, False),
        ("mixtral", torch.float32, False),
        ("qwen3_moe", torch.float32, True),
        ("llama", torch.bfloat16, False),
    ],
)
def test_kinds_of_models(family, dtype, per_token):
    model, original = pair(family, dtype, per_token=per_token)
    ids = random_ids(20, 48)
    record = tune(model, original, ids, **FAST | {"steps": 12}, learn_codes=False)
    assert record.kept
    assert record.codes_changed == 0
    # experts are computed one by one while tuning, elsewhere all at once: equal but for rounding
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.01
    assert record.kl_after == pytest.approx(mean_kl(original, model, ids[[5, 15]]), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == original.get_parameter(name).dtype
        if isinstance(parameter, MixedPrecisionTensor):
            assert parameter.per_token == per_token
            parameter.check(name)


def test_the_model_never_gets_worse(trained, caplog):
    quantized, original, ids = trained
    model = copy.deepcopy(quantized)
    with caplog.at_level(logging.WARNING):
        record = tune(model, original, ids, **FAST | {"steps": 2, "code_lr": 1.0})
    assert not record.kept
    assert record.kl_after > record.kl_before
    assert same(state(model), state(quantized))
    assert "stays as it was" in caplog.text


class Stopped(Exception):
    """Raised in the middle of the training."""


def test_nothing_is_changed_when_it_is_interrupted():
    model, original = pair()
    before, first = state(model), dict(model.named_parameters())

    def stop(done, total):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        tune(model, original, random_ids(8, 16), **FAST, progress=stop)
    assert same(state(model), before)
    assert all(parameter is first[name] for name, parameter in model.named_parameters())


def test_nothing_is_changed_when_it_diverges():
    model, original = pair()
    before = state(model)
    with pytest.raises(ValueError, match=r"the KL divergence is nan in step \d; the model was not changed"):
        tune(model, original, random_ids(8, 16), **FAST | {"scale_lr": 1e4})
    assert same(state(model), before)


def test_modes_flags_and_random_state_are_left_alone():
    model, original = pair("mixtral")
    ids = random_ids(8, 16)
    model.train()
    original.train()
    original.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [[module.training for module in m.modules()] for m in (model, original)]
    flags = [[parameter.requires_grad for parameter in m.parameters()] for m in (model, original)]
    frozen, random_state = state(original), torch.get_rng_state()
    implementations = model.get_experts_implementation()
    assert tune(model, original, ids, **FAST | {"code_lr": 0.0}).kept
    assert modes == [[module.training for module in m.modules()] for m in (model, original)]
    assert flags == [[parameter.requires_grad for parameter in m.parameters()] for m in (model, original)]
    assert same(state(original), frozen)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.get_experts_implementation() == implementations
    assert all(parameter.grad is None for m in (model, original) for parameter in m.parameters())


def test_a_seed_gives_one_result():
    model, original = pair()
    ids, results = random_ids(12, 16), []
    for seed in (0, 0, 1):
        copied = copy.deepcopy(model)
        record = tune(copied, original, ids, **FAST | {"code_lr": 0.0}, seed=seed)
        assert record.kept
        results.append(state(copied))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_shared_weights_stay_shared():
    model, original = pair()
    for m in (model, original):
        m.model.layers[1].mlp.up_proj.weight = m.model.layers[0].mlp.up_proj.weight
    before = model.model.layers[0].mlp.up_proj.weight
    assert tune(model, original, random_ids(8, 16), **FAST | {"code_lr": 0.0}).kept
    assert model.model.layers[0].mlp.up_proj.weight is not before
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


def test_norms_can_be_left_alone():
    model, original = pair()
    before = state(model)
    tune(model, original, random_ids(8, 16), **FAST | {"code_lr": 0.0}, norms=False)
    after = state(model)
    assert {key.rpartition(".")[2] for key in after if not torch.equal(before[key], after[key])} == {"scale"}


def test_texts_are_read_like_those_of_calibrate():
    model, original = pair(vocab_size=8192)
    tokenizer = load_tokenizer(demo_model_directory())
    text = [demo_texts().calibration[:4000]]
    record = tune(
        model, original, text, tokenizer=tokenizer, sequence_length=32, num_samples=6, steps=1, batch_size=2
    )
    assert record.samples + record.held_back == 6
    assert tune(model, original, text, tokenizer=tokenizer, steps=1).held_back == 1, (
        "the model's context: 128"
    )


def test_a_tuned_checkpoint_loads_like_any_other(tmp_path):
    model, original = pair()
    plan = random_plan(original, (3,))
    assert tune(model, original, random_ids(8, 16), **FAST | {"code_lr": 0.0}).kept
    torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    assert same(state(torchmix.load_pretrained(tmp_path / "out")), state(model))
    assert "bits per weight" in str(model), "print(model) still names the quantized weights"


def test_unusable_models_are_refused():
    model, original = pair()
    ids = random_ids(4, 16)
    with pytest.raises(ValueError, match="share modules"):
        tune(model, model, ids)
    with pytest.raises(ValueError, match="no quantized weights to tune"):
        tune(tiny_model("llama"), original, ids)
    with pytest.raises(TypeError, match=r"q_proj\.weight of the original is quantized itself"):
        tune(model, copy.deepcopy(model), ids)
    with pytest.raises(ValueError, match="does not exist in the original"):
        tune(model, tiny_model("gpt2"), ids)
    with pytest.raises(ValueError, match=r"has shape \(256, 128\) in the original"):
        tune(model, tiny_model("llama", intermediate_size=256), ids)
    compiled = copy.deepcopy(model)
    torchmix.compile_blocks(compiled.model.layers)
    with pytest.raises(ValueError, match="tune first, then compile"):
        tune(compiled, original, ids)
    with pytest.raises(ValueError, match="tune first, then compile"):
        tune(torch.compile(model), original, ids)


def test_unusable_data_and_options_are_refused():
    model, original = pair()
    with pytest.raises(ValueError, match="data is None"):
        tune(model, original, None)
    with pytest.raises(ValueError, match="at least 2 samples"):
        tune(model, original, random_ids(1, 16))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tune(model, original, random_ids(2, 16) + 256)
    with pytest.raises(TypeError, match="must be integers"):
        tune(model, original, torch.rand(2, 16))
    with pytest.raises(ValueError, match="no tokenizer"):
        tune(model, original, ["a text"])
    with pytest.raises(ValueError, match="steps=0"):
        tune(model, original, random_ids(2, 16), steps=0)
    with pytest.raises(ValueError, match="code_lr=-1"):
        tune(model, original, random_ids(2, 16), code_lr=-1.0)


def test_nan_in_the_original_is_named():
    model, original = pair()
    with torch.no_grad():
        original.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="look for NaN"):
        tune(model, original, random_ids(4, 16), steps=1)


def test_memory_per_weight():
    assert [tuning_bytes(10, dtype) for dtype in (torch.bfloat16, torch.float32)] == [160, 200]
    assert [tuning_bytes(10, dtype, False) for dtype in (torch.bfloat16, torch.float32)] == [50, 90]


def test_learning_rates_rise_and_fall():
    rates = [rate_factor(step, 300) for step in range(300)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[19] > 0.98
    assert rates[150] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-4
    assert rate_factor(0, 1) == 1.0
    assert rate_factor(1, 10) > 0.9, "a short run warms up in a fifth of its steps"


def test_any_module_with_logits_will_do(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 128)
            self.inner = nn.Linear(128, 128)
            self.norm = nn.LayerNorm(128)
            self.head = nn.Linear(128, 50)

        def forward(self, ids):
            return self.head(self.norm(self.inner(self.embedding(ids))))

    original = Model().to(device)
    model = apply_plan(copy.deepcopy(original), random_plan(original, (2,), exclude=["head"]))
    bias = model.inner.bias.clone()
    record = tune(model, original, torch.randint(50, (8, 16)), **FAST | {"code_lr": 0.0})
    assert record.kept
    assert torch.equal(model.inner.bias, bias)
    assert all(parameter.device.type == device.type for parameter in model.parameters())
