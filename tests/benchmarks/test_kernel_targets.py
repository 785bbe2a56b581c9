"""Targets cover the regimes, and verdicts follow the worst point."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kernel_results import ACTIVATION, COPY_BYTES_PER_SECOND, OURS, OURS_WITH_ACTIVATION, Cell
from kernel_targets import ALL_8, LARGE, MIXED, SHAPES, Target, judge, summary, targets


def find(regime: str) -> Target:
    return next(target for target in targets() if target.regime == regime)


def cells(target: Target, ratio: float) -> list[Cell]:
    """A cell of this speed over bf16 for every point of a target."""
    return [Cell(target.peer, target.row_bits, n, k, m, us=1.0, ratio=ratio) for n, k, m in target.points]


def test_required_figures() -> None:
    figures = {target.regime: (target.required, target.aim) for target in targets()}
    assert figures["M <= 16, large layers"] == (2.6, 3.1)
    assert figures["M <= 16, small layers"] == (1.9, 2.4)
    assert figures["M = 64, large layers"] == (1.9, 2.7)
    assert figures["M = 128"] == (1.3, 1.6)
    assert figures["M >= 1024"] == (1.15, 1.4)
    assert figures["all 8 bits, M >= 1024"] == (1.3, 1.6)
    assert figures["with activation: M = 1"] == (1.5, None)
    assert figures["with activation: M = 128"] == (1.17, None)
    assert figures["quantize_activation us, M = 1"] == (2.0, None)
    assert figures["quantize_activation share of copy"] == (0.6, None)


def test_regimes_lie_on_their_shapes() -> None:
    assert {(n, k) for n, k, _ in find("M <= 16, large layers").points} == set(LARGE)
    assert {(n, k) for n, k, _ in find("M >= 1024").points} == set(SHAPES)
    assert find("all 8 bits, M >= 1024").row_bits == ALL_8
    assert all(target.row_bits in (MIXED, ALL_8, "") for target in targets())


@pytest.mark.parametrize(("ratio", "met"), [(1.31, "yes"), (1.3, "yes"), (1.29, "NO")])
def test_all_points_at_one_speed(ratio: float, met: str) -> None:
    verdict = judge(find("M = 128"), cells(find("M = 128"), ratio))
    assert (verdict.met, verdict.measured, verdict.worst) == (met, len(SHAPES), ratio)


def test_one_slow_point_decides() -> None:
    measured = cells(find("M = 128"), 2.0)
    measured[3] = replace(measured[3], ratio=1.0)
    verdict = judge(find("M = 128"), measured)
    assert (verdict.met, verdict.worst) == ("NO", 1.0)
    assert verdict.where == find("M = 128").points[3]


def test_a_failed_point_keeps_the_target_open() -> None:
    measured = cells(find("M = 128"), 2.0)
    measured[0] = replace(measured[0], us=None, ratio=None, note="RuntimeError")
    assert judge(find("M = 128"), measured).met == "so far"
    assert judge(find("M = 128"), []).met == "not measured"


def test_other_peers_and_mixes_do_not_count() -> None:
    target = find("M = 128")
    others = [replace(cell, peer=OURS_WITH_ACTIVATION) for cell in cells(target, 0.1)]
    others += [replace(cell, row_bits="4") for cell in cells(target, 0.1)]
    assert judge(target, others).met == "not measured"


def test_activation_times_must_be_small() -> None:
    target = find("quantize_activation us, M = 1")
    measured = [
        replace(cell, us=us) for cell, us in zip(cells(target, 0.0), (1.0, 1.2, 1.4, 1.9), strict=True)
    ]
    assert (judge(target, measured).met, judge(target, measured).worst) == ("yes", 1.9)
    measured[1] = replace(measured[1], us=2.0)
    assert judge(target, measured).met == "NO"


def test_activation_bandwidth() -> None:
    target = find("quantize_activation share of copy")
    cell = Cell(ACTIVATION, "", 0, 4096, 4096, us=10.0, weight_bytes=int(COPY_BYTES_PER_SECOND * 6.5e-6))
    assert judge(target, [cell]).met == "yes"
    assert judge(target, [replace(cell, us=20.0)]).met == "NO"


def test_marlin_is_beaten_in_time_not_in_ratio() -> None:
    target = find("x marlin_w4a16, M <= 16")
    fast = [replace(cell, us=5.0) for cell in cells(target, 1.0)]
    assert judge(target, fast).met == "yes"
    assert judge(target, [replace(cell, us=50.0) for cell in fast]).met == "NO"


def test_summary_has_a_line_per_target() -> None:
    lines = summary(cells(find("M = 128"), 1.0)).splitlines()
    assert len(lines) == len(targets()) + 1
    line = next(line for line in lines if line.startswith("M = 128 "))
    assert line.split()[-1] == "NO"
    assert "8/8" in line
    assert sum("not measured" in line for line in lines) == len(targets()) - 1
    assert targets()[0].peer == OURS
