"""``mixllm_config`` where ``quantize_`` would find no module to show."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torchao.quantization import quantize_

from tests.generators import TinyLM, tiny_gpt2
from torchmix.config import mixllm_config
from torchmix.tensor import MixedPrecisionTensor
from torchmix.workflow import calibrate


def test_a_model_without_linear_modules_is_a_warning_whose_advice_works() -> None:
    """The body of GPT-2 has Conv1D layers only, so quantize_ by itself never asks the handler."""
    model: Any = tiny_gpt2().transformer  # type: ignore[attr-defined]
    calibration = calibrate(model, None)
    plan = calibration.plan(4.5)
    with pytest.warns(
        UserWarning, match=r"GPT2Model has no nn\.Linear.*filter_fn=lambda module, name: True\)$"
    ):
        config = mixllm_config(plan, model=model)
    with pytest.warns(UserWarning, match=r"calibrate\(model, data\)\.plan\(bits=4\.5\)"):
        mixllm_config(model=model)
    quantize_(model, config, filter_fn=lambda module, name: True)
    assert len(config.records) == len(plan.layers) == 4
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, MixedPrecisionTensor) == (name in plan.layers)


def test_models_with_linear_modules_are_no_warning() -> None:
    for model in (tiny_gpt2(), TinyLM()):
        plan = calibrate(model, None).plan(4.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mixllm_config(plan, model=model)
