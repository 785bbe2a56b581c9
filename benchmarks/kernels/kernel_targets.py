"""What the kernels must reach on an H200, and whether the cells of a run do.

Speeds are over bf16 of the same run. The mix of the targets is 10 % of the rows at 8 bits, scattered, and the rest at
4 bits; "all 8 bits" has no others. With activation quantization, nine tenths of a figure are asked for from 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernel_results import ACTIVATION, MARLIN, OURS, OURS_WITH_ACTIVATION, Cell, stored_cells

MIXED, ALL_8 = "8:10,4:90", "8"
SMALL = ((4096, 4096), (6144, 4096))
MIDDLE = (
    (4096, 14336),
    (8192, 8192),
    (10240, 8192),
)  # 100 MB and more in bf16 too, but not named by the target
LARGE = ((28672, 4096), (8192, 28672), (57344, 8192))
SHAPES = (*SMALL, *MIDDLE, *LARGE)  # layers of Llama 3.1 8B and 70B
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
FEW, MANY = (1, 4, 16), (1024, 4096)
STORED_FEW = (1, 16)
WITH_ACTIVATION = 0.9

Value = Callable[[Cell], float | None]


@dataclass(frozen=True)
class Target:
    """A figure to reach at every one of some points.

    regime: in words. peer, row_bits: whose cells. points: (N, K, M). required: bound of the worst point.
    aim: what is hoped for, None where nothing is said. value: what is compared. smaller: less is better.
    """

    regime: str
    peer: str
    row_bits: str
    points: tuple[tuple[int, int, int], ...]
    required: float
    aim: float | None
    value: Value
    smaller: bool = False


@dataclass(frozen=True)
class Verdict:
    """The worst point of a target. met: "yes" only where all points were measured and hold the figure."""

    target: Target
    worst: float | None
    where: tuple[int, int, int] | None
    measured: int
    met: str


def speed(cell: Cell) -> float | None:
    """Over bf16."""
    return cell.ratio


def speed_over_marlin(cell: Cell) -> float | None:
    """Over Marlin's stored time."""
    stored = stored_cells([(cell.N, cell.K)], [cell.M])
    return stored[0].us / cell.us if stored and stored[0].us and cell.us else None


def time_us(cell: Cell) -> float | None:
    """Microseconds."""
    return cell.us


def share(cell: Cell) -> float | None:
    """Of the measured limit."""
    return cell.share_of_limit


def grid(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Every shape with every number of tokens."""
    return tuple((n, k, m) for n, k in shapes for m in tokens)


def speed_targets() -> list[Target]:
    """Speeds without activation quantization."""
    mixed = (
        ("M <= 16, large layers", grid(LARGE, FEW), 2.6, 3.1),
        ("M <= 16, other layers >= 100 MB", grid(MIDDLE, FEW), 2.6, 3.1),
        ("M <= 16, small layers", grid(SMALL, FEW), 1.9, 2.4),
        ("M = 64, large layers", grid(LARGE, (64,)), 1.9, 2.7),
        ("M = 128", grid(SHAPES, (128,)), 1.3, 1.6),
        ("M >= 1024", grid(SHAPES, MANY), 1.15, 1.4),
    )
    targets = [Target(regime, OURS, MIXED, points, *figures, speed) for regime, points, *figures in mixed]
    all_8 = Target("all 8 bits, M >= 1024", OURS, ALL_8, grid(SHAPES, MANY), 1.3, 1.6, speed)
    points = grid(SHAPES, STORED_FEW)
    marlin = Target(f"x {MARLIN}, M <= 16", OURS, MIXED, points, 1.0, None, speed_over_marlin)
    return [*targets, all_8, marlin]


def targets() -> list[Target]:
    """All figures: speeds, speeds with activation quantization, and activation quantization alone."""
    speeds = speed_targets()
    combined = [
        Target(
            f"with activation: {t.regime}",
            OURS_WITH_ACTIVATION,
            t.row_bits,
            t.points,
            round(WITH_ACTIVATION * t.required, 4),
            None,
            speed,
        )
        for t in speeds
        if t.value is speed and min(m for _, _, m in t.points) >= 64
    ]
    one_token = grid(SHAPES, (1,))
    one_token_inputs = tuple((0, k, 1) for k in sorted({k for _, k in SHAPES}))
    return [
        *speeds,
        *combined,
        Target("with activation: M = 1", OURS_WITH_ACTIVATION, MIXED, one_token, 1.5, None, speed),
        Target(f"{ACTIVATION} us, M = 1", ACTIVATION, "", one_token_inputs, 2.0, None, time_us, smaller=True),
        Target(f"{ACTIVATION} share of copy", ACTIVATION, "", ((0, 4096, 4096),), 0.6, None, share),
    ]


def judge(target: Target, cells: Sequence[Cell]) -> Verdict:
    """The worst point of ``target`` among ``cells``.

    A point counts as measured when its cell has the value. Points that failed or were not run keep "yes" away.
    """
    wanted = set(target.points)
    values = {
        (cell.N, cell.K, cell.M): value
        for cell in cells
        if (cell.peer, cell.row_bits) == (target.peer, target.row_bits)
        and (cell.N, cell.K, cell.M) in wanted
        and (value := target.value(cell)) is not None
    }
    if not values:
        return Verdict(target, None, None, 0, "not measured")
    pick = max if target.smaller else min
    where = pick(values, key=lambda point: values[point])
    worst = values[where]
    beaten = worst < target.required if target.smaller else worst >= target.required
    if not beaten:
        met = "NO"
    elif len(values) < len(wanted):
        met = "so far"
    else:
        met = "yes"
    return Verdict(target, worst, where, len(values), met)


def summary(cells: Sequence[Cell]) -> str:
    """The table of all targets."""
    lines = [f"{'target':<46} {'required':>8} {'aim':>5} {'worst':>7}  {'at N,K,M':<17} {'points':>7}  met"]
    for verdict in (judge(target, cells) for target in targets()):
        target = verdict.target
        sign = "<" if target.smaller else ">="
        aim = "" if target.aim is None else f"{target.aim:g}"
        worst = "-" if verdict.worst is None else f"{verdict.worst:.3f}"
        where = ",".join(map(str, verdict.where)) if verdict.where else ""
        points = f"{verdict.measured}/{len(target.points)}"
        required = f"{sign}{target.required:g}"
        lines.append(
            f"{target.regime:<46} {required:>8} {aim:>5} {worst:>7}  {where:<17} {points:>7}  {verdict.met}"
        )
    return "\n".join(lines)
