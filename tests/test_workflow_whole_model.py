"""Models that bring a loss, or are no chain of blocks, are run as a whole; what cannot be used is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchmix
from torchmix.workflow_whole_model import calibration_mode


class Pair(nn.Module):
    """Two linear layers and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


def batches(count: int) -> list[torch.Tensor]:
    return [torch.randn(3, 128) for _ in range(count)]


def test_a_loss_calibrates_any_module() -> None:
    steps: list[tuple[int, int]] = []
    calibration = torchmix.calibrate(
        Pair(), batches(3), num_samples=2, loss_fn=loss, progress=lambda *step: steps.append(step)
    )
    assert set(calibration.layers) == {"first.weight", "second.weight"}
    assert calibration.scored_rounding == "rtn"
    assert calibration.samples is None
    assert calibration.token_weights == {}
    assert calibration.layers["first.weight"].tokens == (6,)  # two batches of three
    assert steps == [(1, 2), (2, 2)]
    plan = calibration.plan(4.5)
    assert plan.predicted_kl is None  # it is not known over how many tokens the loss sums


@pytest.mark.parametrize(
    ("loss_fn", "data", "message"),
    [
        (loss, [], "data is empty"),
        (lambda model, batch: model(batch), batches(1), "one finite number per batch, but batch 0"),
        (lambda model, batch: model(batch).sum() * torch.nan, batches(1), "one finite number"),
        (lambda model, batch: model(batch).detach().sum(), batches(1), "cannot be differentiated"),
    ],
)
def test_what_is_no_loss_is_refused_and_the_model_left_alone(loss_fn, data, message) -> None:
    model = Pair().train()
    with pytest.raises(ValueError, match=message):
        torchmix.calibrate(model, data, loss_fn=loss_fn)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_calibration_mode_restores_flags() -> None:
    model = Pair().train()
    model.first.weight.requires_grad_(False)
    with calibration_mode(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]


def test_token_weights_need_tokens() -> None:
    with pytest.raises(ValueError, match="token_weights=True needs token samples"):
        torchmix.calibrate(Pair(), batches(1), loss_fn=loss, token_weights=True)
