"""The time grows with the work and falls with the machine's speed; how near it is, no test can say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.generators import TinyLM, tiny_mixtral
from torchmix.allocation import BitPlan
from torchmix.forecast_time import Speed, TimeForecast, forecast_time, measure_speed
from torchmix.workflow import calibrate

SPEED = Speed(1e9, 1e-4, 1e-8)
FULL: dict[str, Any] = {"tokens": 4096, "scored_tokens": 1024, "num_widths": 5}


@pytest.fixture(scope="module")
def plan() -> BitPlan:
    return calibrate(TinyLM(), None).plan(bits=4.5)


def seconds(plan: BitPlan, speed: Speed = SPEED, **changes: Any) -> TimeForecast:
    return forecast_time(TinyLM(), plan, speed, **{**FULL, **changes})


def test_more_work_takes_longer(plan: BitPlan) -> None:
    base = seconds(plan)
    for changes in ({"tokens": 8192}, {"scored_tokens": 2048}, {"num_widths": 6}):
        assert seconds(plan, **changes).calibration > base.calibration
    assert seconds(plan, tokens=8192).rounding > base.rounding
    assert base.total == base.calibration + base.rounding


def test_roundings_in_the_order_of_their_work(plan: BitPlan) -> None:
    times = [seconds(plan, rounding=name).rounding for name in ("rtn", "clip", "hqq", "gptq", "sequential")]
    assert times == sorted(times)
    assert seconds(plan).rounding == times[-1], "with tokens the default is sequential"
    assert seconds(plan, tokens=0, scored_tokens=0).rounding == times[1], "without it is clip search"


def test_each_part_of_a_speed_counts(plan: BitPlan) -> None:
    slow = Speed(SPEED.flops / 2, 2 * SPEED.column_seconds, 2 * SPEED.weight_seconds)
    assert seconds(plan, slow).total == pytest.approx(2 * seconds(plan).total)
    for part in ({"flops": 5e8}, {"column_seconds": 2e-4}, {"weight_seconds": 2e-8}):
        assert seconds(plan).total < seconds(plan, replace(SPEED, **part)).total < seconds(plan, slow).total


def test_what_is_done_already_takes_no_time(plan: BitPlan) -> None:
    assert seconds(plan, calibrated=True) == TimeForecast(0.0, seconds(plan).rounding)
    bare = seconds(plan, tokens=0, scored_tokens=0)
    assert 0 < bare.calibration < seconds(plan).calibration


def test_a_token_meets_the_experts_that_are_chosen() -> None:
    model = tiny_mixtral()
    plan = calibrate(model, None).plan(bits=4.5)
    times = []
    for chosen in (1, 2):
        model.config.num_experts_per_tok = chosen  # type: ignore[union-attr]
        times.append(forecast_time(model, plan, SPEED, **FULL).calibration)
    assert times[0] < times[1]


def test_the_machine_is_timed_without_a_trace() -> None:
    state = torch.random.get_rng_state()
    speed = measure_speed("cpu", 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert speed.flops > 1e6
    assert speed.column_seconds >= 0
    assert speed.weight_seconds >= 0
    assert speed.column_seconds + speed.weight_seconds > 0
