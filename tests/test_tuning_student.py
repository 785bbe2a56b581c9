"""The differentiable model: it computes what the quantized model computes, and its gradients arrive."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from tests.models.tiny_models import apply_plan, logits, random_ids, random_plan, tiny_model
from torchmix.evaluation import kl_divergence, sqnr_db
from torchmix.tuning_student import Student, kl_with_gradient
from torchmix.workflow_whole_model import calibration_mode


def student_of(family, dtype=torch.float32, per_token=False, **options):
    """A quantized tiny model with rows of all widths, and the student made of it."""
    original = tiny_model(family, dtype)
    model = apply_plan(copy.deepcopy(original), random_plan(original), per_token)
    return model, original, Student(model, original, **({"learn_codes": True, "norms": True} | options))


def student_logits(student, ids):
    norms = {name: student.norm_value(name) for name in student.norms}
    return student.logits(ids, student.dense_weights(), norms).detach()


def test_the_gradient_of_the_divergence():
    reference, z = torch.randn(2, 3, 50), torch.randn(2, 3, 50, requires_grad=True)
    total, gradient = kl_with_gradient(reference, z)
    log_p, log_q = reference.log_softmax(-1), z.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, z.grad)
    assert total == pytest.approx(float(kl_divergence(reference, z.detach()).sum()), rel=1e-6)


# A sum in another order can tip the rounding of an activation to int8, which changes it by 1/127 of the largest of
# its group: one such flip among 128 inputs costs about 60 dB of one output. bfloat16 activations and products are
# rounded to 8 bits of mantissa throughout.
@pytest.mark.parametrize(
    ("family", "dtype", "per_token", "min_sqnr_db"),
    [
        ("llama", torch.float32, False, 50),
        ("llama", torch.float32, True, 50),
        ("gpt2", torch.float32, False, 50),
        ("mixtral", torch.float32, False, 50),
        ("qwen3_moe", torch.float32, True, 50),
        ("llama", torch.bfloat16, False, 30),
    ],
)
def test_it_computes_what_the_quantized_model_computes(family, dtype, per_token, min_sqnr_db):
    model, _, student = student_of(family, dtype, per_token)
    ids = random_ids(2, 24)
    for latent in student.latents.values():  # somewhere else than at the start
        latent.latent_codes += 0.5 * torch.randn(latent.latent_codes.shape)
        latent.log_multiplier += 0.05 * torch.randn(latent.log_multiplier.shape)
    for norm in student.norms.values():
        norm += 0.05 * torch.randn(norm.shape)
    with calibration_mode(model):
        trained = student_logits(student, ids)
        with torch.no_grad():
            stored = student.with_tensors(student.tensors())(ids)
    assert sqnr_db(stored.float(), trained.float()) > min_sqnr_db
    assert sqnr_db(logits(model, ids).float(), trained.float()) < 40, "the changes above are seen"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_everything_that_is_trained_gets_a_gradient(family, caplog):
    model, original, student = student_of(family)
    ids = random_ids(2, 24)
    with caplog.at_level(logging.WARNING), calibration_mode(model):
        loss = student.backward(ids, logits(original, ids))
    assert loss == pytest.approx(
        float(kl_divergence(logits(original, ids), logits(model, ids)).mean()), rel=1e-2
    )
    for latent in student.latents.values():
        assert latent.latent_codes.grad.any()
        assert latent.log_multiplier.grad.any()
    assert all(norm.grad.any() for norm in student.norms.values())
    assert not caplog.records
    assert all(parameter.grad is None for parameter in (*model.parameters(), *original.parameters()))


def test_norms_are_parameters_of_normalization_layers_only():
    _, _, student = student_of("gpt2")
    per_block = [f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    blocks = [f"transformer.h.{block}.{name}" for block in (0, 1) for name in per_block]
    assert set(student.norms) == {*blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert not student_of("llama", norms=False)[2].norms
    assert len(student_of("qwen3")[2].norms) == 2 * 4 + 1, "norms of queries and keys count"


def test_a_weight_without_any_product_is_named(caplog):
    model, original, student = student_of("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    ids = random_ids(1, 8)
    with caplog.at_level(logging.WARNING), calibration_mode(model):
        student.backward(ids, logits(original, ids))
    assert sum("no product with this weight" in record.message for record in caplog.records) == 3
    assert student.latents["model.layers.1.mlp.up_proj.weight"].log_multiplier.grad is None
