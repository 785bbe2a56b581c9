"""One way to quantize for all commands: the library's, with the flags' rounding."""

from __future__ import annotations

import io

import torch
from torchao.quantization import quantize_

from tests.generators import TinyLM, token_ids
from torchmix import MixedPrecisionTensor, calibrate, mixllm_config
from torchmix.cli.progress import ProgressReporter
from torchmix.cli.quantization import quantize_model


def test_it_does_what_the_library_does() -> None:
    model, same = TinyLM(), TinyLM()
    calibration = calibrate(model, token_ids(2, 16), sequence_length=16)
    plan = calibration.plan(bits=4.5)
    stream = io.StringIO()
    records = quantize_model(model, plan, calibration, "gptq", ProgressReporter("r", "layers", stream=stream))
    assert [record.name for record in records] == list(plan.layers)
    quantize_(same, mixllm_config(plan, calibration, model=same, rounding="gptq"))
    for name, parameter in model.named_parameters():
        other = same.get_parameter(name)
        assert isinstance(parameter, MixedPrecisionTensor) == (name in plan.layers)
        if isinstance(parameter, MixedPrecisionTensor):
            assert torch.equal(parameter.dequantize(), other.dequantize())  # type: ignore[attr-defined]


def test_without_hessians_it_rounds_without_them() -> None:
    model = TinyLM()
    calibration = calibrate(model, None)
    reporter = ProgressReporter("r", "layers", quiet=True)
    for measured in (calibration, None):
        records = quantize_model(TinyLM(), calibration.plan(bits=4.5), measured, None, reporter)
        assert {record.method for record in records} == {"clip"}
