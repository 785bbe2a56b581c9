"""How long quantizing will take on this machine, found out in a fraction of a second (L8): about, not exactly.

The work is counted from the shapes of the layers, the tokens and the widths; the machine is timed on two small pieces
of it, a matrix product and GPTQ of one group of inputs. What the count leaves out (attention, loading, writing,
other programs on the machine) is not in the result.

Shapes: T tokens, N rows, K in_features, E experts, W widths, g = inputs of one group.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.allocation import BitPlan, LayerPlan
from torchmix.rounding import DEFAULT_REFINE, gptq_round

PRODUCT_SIZE = 512  # of the square matrices that are timed
FEW_ROWS, MANY_ROWS = 64, 2048  # of the groups that are timed
_REPEATS = 3  # of each measurement; the best counts, as other programs only ever make it slower
_SEQUENTIAL_PASSES = (
    8.0  # forward passes through the blocks: parts of them for each input, original and quantized
)
_SHARED_INPUTS = 0.6  # distinct inputs per layer: query, key and value share one, gate and up another
_FACTOR_FLOPS = 8.0  # times K³: Cholesky factor, inverse and its factor, in float64 at half speed
_SCORING_SHARE = 0.1  # of a GPTQ sweep's time per weight: for each output, token and width that is scored
_SWEEP_SHARE = {"clip": 0.5, "hqq": 1.0, "rtn": 0.2}  # of a GPTQ sweep's time
_BACKWARD_LOGITS = (
    3.0  # products with the output head: forward, and backward to its input, some work on the logits
)


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second.

    flops: operations of a float32 matrix product per second (a multiplication and an addition are two).
    column_seconds: GPTQ of one input of a layer, whatever the number of rows. weight_seconds: more for each row.
    """

    flops: float
    column_seconds: float
    weight_seconds: float


@dataclass(frozen=True)
class TimeForecast:
    """Seconds of the two steps of quantizing; the first is 0 where calibration is done already."""

    calibration: float
    rounding: float

    @property
    def total(self) -> float:
        """Seconds of both."""
        return self.calibration + self.rounding


def measure_speed(device: torch.device | str = "cpu", group_size: int = 128) -> Speed:
    """Time a matrix product and GPTQ of one group; takes a fraction of a second and changes no random state."""
    x = torch.linspace(-1, 1, PRODUCT_SIZE**2, device=device).view(PRODUCT_SIZE, PRODUCT_SIZE)
    seconds = _best_time(lambda: x @ x, x)
    few, many = (_group_seconds(rows, group_size, x.device) for rows in (FEW_ROWS, MANY_ROWS))
    per_weight = max(many - few, 0.0) / (group_size * (MANY_ROWS - FEW_ROWS))
    per_column = max(few / group_size - FEW_ROWS * per_weight, 0.0)
    return Speed(2 * PRODUCT_SIZE**3 / seconds, per_column, per_weight)


def _group_seconds(rows: int, group_size: int, device: torch.device) -> float:
    """Seconds of GPTQ of a weight (rows, g)."""
    weight = torch.linspace(-1, 1, rows * group_size, device=device).view(rows, group_size)
    row_bits = torch.full((rows,), 4, dtype=torch.uint8, device=device)
    hessian = torch.eye(group_size, device=device)
    return _best_time(lambda: gptq_round(weight, row_bits, group_size, hessian), weight)


def _best_time(run: Callable[[], object], where: Tensor) -> float:
    """Shortest of several calls in seconds, each finished on its device, after one that does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        if where.device.type == "cuda":
            torch.cuda.synchronize(where.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def forecast_time(
    model: nn.Module,
    plan: BitPlan,
    speed: Speed,
    *,
    tokens: int,
    scored_tokens: int,
    num_widths: int,
    rounding: str | None = None,
    calibrated: bool = False,
) -> TimeForecast:
    """Estimate the seconds of ``calibrate`` and of ``quantize_`` for a causal language model.

    Args:
        model: for the sizes of its head and how many experts see a token.
        plan: names the layers.
        speed: of the machine.
        tokens: T of the calibration, 0 without data.
        scored_tokens: those that are scored.
        num_widths: W that are scored.
        rounding: as for :func:`torchmix.mixllm_config`; None stands for "sequential" with tokens, else "clip".
        calibrated: calibration is done already.
    """
    rounding = rounding or ("sequential" if tokens else "clip")
    work = [_Layer.of(layer, model) for layer in plan.layers.values()]
    calibration = 0.0
    if tokens and not calibrated:
        calibration = scored_tokens * _head_flops(model) / speed.flops
    for layer in work:
        if not tokens and not calibrated:
            calibration += num_widths * _SWEEP_SHARE["rtn"] * layer.sweep_seconds(speed)
        if tokens and not calibrated:
            passes = tokens * (2 * layer.active + 2 * _SHARED_INPUTS * layer.columns**2)
            # once more forward, backward, and the output error at each width
            scores = scored_tokens * layer.active * (4 + 2 * num_widths)
            outputs = scored_tokens * num_widths * layer.active / layer.columns
            calibration += (passes + scores) / speed.flops + layer.gptq_seconds(speed, num_widths)
            calibration += _SCORING_SHARE * outputs * speed.weight_seconds
    return TimeForecast(calibration, sum(_rounding_seconds(layer, speed, tokens, rounding) for layer in work))


def _rounding_seconds(layer: _Layer, speed: Speed, tokens: int, rounding: str) -> float:
    """Seconds to round one layer."""
    if rounding in _SWEEP_SHARE:
        return _SWEEP_SHARE[rounding] * layer.sweep_seconds(speed)
    seconds = layer.gptq_seconds(speed, 1, DEFAULT_REFINE)
    if rounding == "sequential" and layer.experts == 1:
        moments = 4 * _SHARED_INPUTS * tokens * layer.columns**2
        seconds += (2 * _SEQUENTIAL_PASSES * tokens * layer.active + moments) / speed.flops
    return seconds


@dataclass(frozen=True)
class _Layer:
    """Sizes of one layer: N, K, E (1 without experts), and the weights that one token meets."""

    rows: int
    columns: int
    experts: int
    active: float

    @classmethod
    def of(cls, layer: LayerPlan, model: nn.Module) -> _Layer:
        """Sizes of a planned layer."""
        experts = layer.num_experts or 1
        chosen = _config_value(model, "num_experts_per_tok") or experts
        rows = layer.row_bits.numel() // experts
        return cls(rows, layer.in_features, experts, rows * layer.in_features * min(chosen, experts))

    def sweep_seconds(self, speed: Speed) -> float:
        """One pass over the inputs of all experts."""
        return self.experts * self.columns * (speed.column_seconds + self.rows * speed.weight_seconds)

    def gptq_seconds(self, speed: Speed, widths: int, refine: int = 0) -> float:
        """GPTQ of all experts, ``widths`` times as many rows at once, and rounds of refinement."""
        rows = self.rows * widths
        sweeps = (1 + refine) * replace(self, rows=rows).sweep_seconds(speed)
        updates = (1 + 3 * refine) * 2 * rows * self.columns**2
        return sweeps + self.experts * (updates + _FACTOR_FLOPS * self.columns**3) / speed.flops


def _head_flops(model: Any) -> float:
    """Operations per token of the output head, forward and backward; 0 where it is not known."""
    vocabulary, width = (_config_value(model, name) or 0 for name in ("vocab_size", "hidden_size"))
    return 2 * _BACKWARD_LOGITS * vocabulary * width


def _config_value(model: Any, name: str) -> int | None:
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None
