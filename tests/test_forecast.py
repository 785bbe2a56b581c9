"""What a run will need: sizes exact, memory within a stated bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.generators import TinyLM, token_ids
from tests.models.tiny_models import tiny_model
from torchmix import calibrate
from torchmix.demo import demo_model_directory
from torchmix.forecast import (
    Probe,
    available_bytes,
    forecast_memory,
    peak_device_bytes,
    peak_resident_bytes,
    probe_model,
    provisional_calibration,
    resident_bytes,
    without_predictions,
)
from torchmix.selection import select_parameters

ROOT = Path(__file__).parents[1]


def test_provisional_plan_has_the_layers_and_the_size_of_the_real_one() -> None:
    model = TinyLM()
    provisional = provisional_calibration(model, widths=(3, 4, 8), group_size=128).plan(bits=4.6)
    real = calibrate(model, token_ids(2, 16), sequence_length=16, widths=(3, 4, 8)).plan(bits=4.6)
    assert list(provisional.layers) == list(real.layers)
    assert provisional.excluded == real.excluded
    assert abs(provisional.bits_per_weight - real.bits_per_weight) < 0.02  # less than a row's step
    for name, layer in real.layers.items():
        assert provisional.layers[name].fingerprint == layer.fingerprint
    bare = without_predictions(provisional)
    assert (bare.salience, bare.predicted_kl, bare.predicted_loss) == ("none", None, None)


def test_provisional_plan_fails_where_the_real_one_would() -> None:
    provisional = provisional_calibration(TinyLM(), widths=(3, 4), group_size=128)
    with pytest.raises(ValueError, match="feasible range"):
        provisional.plan(bits=5.0)
    with pytest.raises(ValueError, match="matches no linear layer"):
        provisional_calibration(TinyLM(), widths=(4,), group_size=128, include=["nothing"])


def test_probe_finds_the_hessians_that_calibration_keeps() -> None:
    model = TinyLM()
    probe = probe_model(model, select_parameters(model))
    hessians = calibrate(model, token_ids(2, 16), sequence_length=16).hessians
    assert probe.hessian_bytes == sum(4 * hessian.numel() for hessian in hessians.values())
    assert probe.vocabulary == model.lm_head.out_features


def test_probe_leaves_the_model_as_it_was() -> None:
    model = TinyLM().train()
    probe_model(model, select_parameters(model))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_saved_activations_of_long_samples_follow_from_short_ones() -> None:
    model = TinyLM()
    probe = probe_model(model, select_parameters(model))
    doubled = Probe((8, 16, 64), probe_lengths(model, (8, 16, 64)), 1, 0)
    assert probe.saved_bytes(64) == doubled.saved[2], "linear here, so exact"
    assert Probe((1, 2, 3), (2, 6, 12), 1, 0).saved_bytes(10) == 110, "x² + x through its three points"


def probe_lengths(model: nn.Module, lengths: tuple[int, ...]) -> tuple[int, ...]:
    from unittest.mock import patch

    with patch("torchmix.forecast.PROBE_LENGTHS", lengths):
        return probe_model(model, select_parameters(model)).saved


def test_forecast_grows_with_the_work() -> None:
    model = TinyLM()
    sizes = [
        forecast_memory(model, sequence_length=None).peak_host_bytes,
        forecast_memory(model, sequence_length=64, hessians=False).peak_host_bytes,
        forecast_memory(model, sequence_length=4096).peak_host_bytes,
    ]
    assert sizes == sorted(sizes)
    assert forecast_memory(model, sequence_length=64).peak_device_bytes == 0


def test_memory_of_this_process() -> None:
    assert 0 < resident_bytes() <= peak_resident_bytes() + 10**7
    available = available_bytes()
    assert available is None or available > 0
    assert peak_device_bytes("cpu") == 0
    assert torch.device("cpu").type == "cpu"


@pytest.mark.slow
def test_forecast_is_near_the_measured_peak(tmp_path: Path) -> None:
    model = demo_model_directory()
    command = [
        "quantize",
        model,
        "--data",
        "python-docs",
        "--samples",
        3,
        "--bits",
        4.5,
        "--output",
        tmp_path / "o",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "torchmix", *map(str, command), "--json", str(tmp_path / "r.json"), "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    ratio = report["predicted_peak_host_bytes"] / report["peak_host_bytes"]
    # 0.9 to 1.2 on two machines and two models; what malloc keeps of freed memory is a matter of luck
    assert 0.7 < ratio < 1.5, f"forecast / measured = {ratio:.2f}"


def test_hidden_states_of_all_samples_are_counted() -> None:
    model = tiny_model("llama")
    one, three = (
        forecast_memory(model, sequence_length=64, num_samples=n).peak_host_bytes for n in (1000, 3000)
    )
    kept = (
        3 * 2000 * 64 * 128 * 4
    )  # two blocks: three places between and around them, 128 features in float32
    assert abs(three - one - kept) < 0.1 * kept  # the process itself may grow or shrink a little meanwhile
