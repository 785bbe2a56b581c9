"""When the default rounds layer after layer, and what it says when it cannot."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torchao.quantization import quantize_

import torchmix
from tests.models.tiny_models import random_ids, tiny_model
from torchmix.config_sequential import original_model


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("llama")
    calibration = torchmix.calibrate(model, random_ids(4, 32), num_samples=4, token_weights=True)
    return model, calibration, calibration.plan(4.5)


def methods(model, config):
    quantize_(model, config)
    return {record.method for record in config.records}


def test_the_default_is_sequential_where_the_model_is_known(measured):
    model, calibration, plan = measured
    assert methods(copy.deepcopy(model), torchmix.mixllm_config(plan, calibration)) == {"sequential"}


def test_a_calibration_from_a_file_needs_the_model(measured, tmp_path, caplog):
    model, calibration, plan = measured
    calibration.save(tmp_path / "calibration")
    read = torchmix.Calibration.load(tmp_path / "calibration")
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "torchmix"):
        assert methods(first, torchmix.mixllm_config(plan, read)) == {"gptq"}
    assert "one-shot GPTQ instead of layer after layer: the model is not known" in caplog.text
    config = torchmix.mixllm_config(plan, read, model=second)
    assert methods(second, config) == {"sequential"}
    third = copy.deepcopy(model)
    quantize_(third, torchmix.mixllm_config(plan, calibration))
    for name, parameter in third.named_parameters():  # token weights are in the file too
        assert torch.equal(parameter, second.get_parameter(name)) or "proj" in name
        if "proj" in name:
            assert torch.equal(parameter.dequantize(), second.get_parameter(name).dequantize())


def test_a_model_that_cannot_be_run_is_named(measured):
    model, calibration, plan = measured
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.add_(1.0)
    for other, reason in (
        (None, "the model is not known"),
        (changed, r"layers\.1\.mlp\.up_proj\.weight of the model has other weights"),
        (torch.nn.Linear(2, 2), "of the model is missing"),
    ):
        found, why = original_model(calibration, plan, other)
        assert found is None
        assert re.search(reason, why)
    quantized = copy.deepcopy(model)
    quantize_(quantized, torchmix.mixllm_config(plan, calibration))
    assert "quantized already" in original_model(calibration, plan, quantized)[1]


def test_sequential_by_name_is_refused_where_it_cannot_be(measured, tmp_path):
    _, calibration, plan = measured
    calibration.save(tmp_path / "calibration")
    read = torchmix.Calibration.load(tmp_path / "calibration")
    with pytest.raises(ValueError, match="the model is not known; pass mixllm_config"):
        torchmix.mixllm_config(plan, read, rounding="sequential")


def test_the_original_must_live_until_it_is_run(measured):
    model, calibration, plan = measured
    copied = copy.deepcopy(model)
    config = torchmix.mixllm_config(plan, calibration, model=copied)
    other = copy.deepcopy(model)
    del copied
    with pytest.raises(ValueError, match="no longer exists"):
        quantize_(other, config)
