"""What a run will need, found out before it starts (L8): a provisional plan, and the peak of memory.

The plan shows that a budget is feasible and how large the files will be; the real one, made after calibration, has
the same size within a few rows. The peak is an estimate: what the process holds now, plus what calibration and
rounding add, from the model's own shapes and from the activations that a few tokens leave behind.

Shapes: L tokens of a sample, N rows, K in_features, V vocabulary entries.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.allocation import BitPlan
from torchmix.calibration import Calibration, LayerStatistics
from torchmix.capture import (
    LinearCall,
    LinearCalls,
    NotReplayableError,
    chunk_samples,
    find_blocks,
    hidden_states_device,
)
from torchmix.evaluation import model_logits
from torchmix.selection import Selection, Target, select_parameters, weight_fingerprint
from torchmix.workflow_whole_model import calibration_mode

PROVISIONAL = "provisional"
PROBE_LENGTHS = (8, 16, 32)
_LOGIT_COPIES = 5  # logits, float32 copy, probabilities, log-probabilities, gradient
_ERROR_COPIES = 6  # float32 (L, N) values alive while one layer is scored
_ROUNDING_COPIES = 10  # float32 (N, K) values alive while one layer is rounded
_FACTOR_COPIES = 6  # float64 (K, K) values alive while a Hessian is factored
_LIBRARIES = 60 * 10**6  # linear algebra and autograd, loaded at first use
_MAX_SLACK = 512 * 10**6  # freed memory that malloc keeps; large blocks it gives back at once


def provisional_calibration(
    model: nn.Module,
    *,
    widths: Sequence[int],
    group_size: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Calibration:
    """A calibration that measured nothing: every row has the same score, which falls fourfold per bit.

    ``plan(...)`` of it fails where that of a real one would fail, and needs the same number of bytes. Its scores mean
    nothing.

    Raises:
        ValueError, TypeError: as :func:`torchmix.selection.select_parameters`.
    """
    selection = select_parameters(model, include, exclude)
    per_width = torch.tensor([4.0**-bits for bits in sorted(widths)], dtype=torch.float64)
    layers = {}
    for target in selection.targets:
        rows = target.rows
        scores = {PROVISIONAL: (per_width * rows.shape[-1]).expand(*rows.shape[:-1], len(per_width))}
        experts = target.num_experts or 1
        layers[target.name] = LayerStatistics(
            target.name,
            tuple(target.weight.shape),
            target.transposed,
            weight_fingerprint(target.weight),
            scores,
            ("",) * experts,
            (0,) * experts,
        )
    return Calibration(layers, selection.excluded, tuple(sorted(widths)), group_size)


def without_predictions(plan: BitPlan) -> BitPlan:
    """The plan with nothing predicted, for plans whose scores mean nothing."""
    return replace(plan, salience="none", predicted_kl=None, predicted_loss=None)


@dataclass(frozen=True)
class MemoryForecast:
    """Largest memory of a run in bytes: of the process, and of the accelerator (0 where there is none)."""

    peak_host_bytes: int
    peak_device_bytes: int


def forecast_memory(
    model: nn.Module,
    *,
    sequence_length: int | None,
    num_samples: int = 0,
    num_metrics: int = 1,
    num_widths: int = 5,
    hessians: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> MemoryForecast:
    """Estimate the peak of ``calibrate`` and ``quantize_`` for a loaded causal language model.

    Args:
        model: with its values, on the device and in the dtype that it will be calibrated in.
        sequence_length: tokens per sample; None without data.
        num_samples: of the data; the hidden states between all blocks are kept for all of them.
        num_metrics, num_widths: of the calibration.
        hessians: whether it keeps Hessians.
        include, exclude: as for :func:`torchmix.calibrate`.

    Raises:
        ValueError, TypeError: as :func:`torchmix.selection.select_parameters`, and where the model cannot run.
    """
    selection = select_parameters(model, include, exclude)
    num_rows = sum(target.rows.numel() // target.rows.shape[-1] for target in selection.targets)
    scores = 8 * num_metrics * num_widths * num_rows
    rounding = max(map(_rounding_bytes, selection.targets))
    kept, transient, hidden = scores, 0, 0
    if sequence_length is not None:
        probe = probe_model(model, selection)
        kept += probe.hessian_bytes if hessians else 0
        blocks = _num_blocks(model, selection)
        hidden = _hidden_bytes(model, selection, blocks, num_samples * sequence_length)
        chunk = chunk_samples(selection.targets[0].weight.device, sequence_length) if blocks else 1
        saved = chunk * probe.saved_bytes(sequence_length) // max(blocks, 1)
        scoring = max(_scoring_bytes(target, chunk * sequence_length) for target in selection.targets)
        transient = max(saved + scoring, probe.logit_bytes(sequence_length))
    device = selection.targets[0].weight.device
    busy = max(transient, rounding)
    if device.type == "cpu":
        return MemoryForecast(resident_bytes() + _LIBRARIES + kept + hidden + busy + min(busy, _MAX_SLACK), 0)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    host = resident_bytes() + _LIBRARIES + 2 * kept
    if hidden_states_device(device, hidden) == device:
        return MemoryForecast(host, weights + kept + busy + hidden)
    return MemoryForecast(host + hidden, weights + kept + busy)


def _num_blocks(model: nn.Module, selection: Selection) -> int:
    """Blocks that calibration goes through one by one; 0 where the model has none."""
    try:
        return len(find_blocks(model, [target.name for target in selection.targets]))
    except NotReplayableError:
        return 0


def _hidden_bytes(model: nn.Module, selection: Selection, blocks: int, tokens: int) -> int:
    """What calibration block by block keeps of so many tokens: hidden states before and after every block."""
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    return (blocks + 1) * tokens * width * selection.targets[0].weight.element_size() if blocks else 0


def _scoring_bytes(target: Target, sequence_length: int) -> int:
    """Memory to score one layer on one sample; an expert may see all tokens."""
    rows, columns = target.rows.shape[-2:]
    return 4 * (sequence_length * (_ERROR_COPIES * rows + columns) + 6 * rows * columns)


def _rounding_bytes(target: Target) -> int:
    """Memory to round one layer, or one expert after the other with all their codes kept."""
    rows, columns = target.rows.shape[-2:]
    codes = target.rows.numel()
    return 4 * _ROUNDING_COPIES * rows * columns + 8 * _FACTOR_COPIES * columns * columns + 2 * codes


@dataclass(frozen=True)
class Probe:
    """What a few tokens through the model show.

    lengths: tokens that were tried.
    saved: bytes that autograd kept for each of them, weights not counted.
    vocabulary: V.
    hessian_bytes: of one float32 (K, K) for every distinct input of a layer.
    """

    lengths: tuple[int, ...]
    saved: tuple[int, ...]
    vocabulary: int
    hessian_bytes: int

    def saved_bytes(self, length: int) -> int:
        """Bytes kept for a sample of ``length`` tokens: the parabola through the three lengths tried."""
        total = 0.0
        for i, (x, y) in enumerate(zip(self.lengths, self.saved, strict=True)):
            others = [other for j, other in enumerate(self.lengths) if j != i]
            total += y * (length - others[0]) * (length - others[1]) / ((x - others[0]) * (x - others[1]))
        return max(int(total), 0)

    def logit_bytes(self, length: int) -> int:
        """Bytes of the logits and what the loss makes of them."""
        return 4 * _LOGIT_COPIES * length * self.vocabulary


def probe_model(model: nn.Module, selection: Selection) -> Probe:
    """Run three short samples forward and count what they leave behind.

    Raises:
        TypeError, ValueError: the model does not return logits for token ids.
    """
    weights = {target.name: target.weight for target in selection.targets}
    counts, vocabulary = [], 0
    distinct = _DistinctInputs()
    with calibration_mode(model):
        for length in PROBE_LENGTHS:
            ids = torch.arange(length)[None] % 2
            saved = _SavedTensors(model)
            with saved.hooks(), LinearCalls(weights, distinct):
                vocabulary = model_logits("the model", model, ids).shape[-1]
            counts.append(saved.num_bytes)
            distinct.forget_sources()
    experts = sum(4 * target.rows.shape[-1] ** 2 * (target.num_experts or 0) for target in selection.targets)
    return Probe(PROBE_LENGTHS, tuple(counts), vocabulary, distinct.num_bytes + experts)


class _SavedTensors:
    """Counts what autograd saves, every storage once, parameters and buffers left out."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self._alive: list[Tensor] = []  # a freed address may come back
        self.num_bytes = 0

    def hooks(self) -> Any:
        """Context manager inside which saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


class _DistinctInputs:
    """Observer of linear calls: the inputs that need a Hessian of their own; experts are counted elsewhere."""

    def __init__(self) -> None:
        self._hessian_of: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._last: tuple[Tensor, str] | None = None

    def __call__(self, call: LinearCall) -> Any:
        """Note the call; ask for gradients, as calibration does."""
        if call.expert is None and call.name not in self._hessian_of:
            shared = self._last is not None and self._last[0] is call.source
            key = self._last[1] if self._last is not None and shared else call.name
            self._hessian_of[call.name] = key
            self._sizes.setdefault(key, call.x.shape[-1])
            self._last = (call.source, key)
        return lambda gradient: None

    def forget_sources(self) -> None:
        """Release the last input."""
        self._last = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all Hessians in float32."""
        return sum(4 * size * size for size in self._sizes.values())


def resident_bytes() -> int:
    """Memory that this process holds now, in bytes; its peak so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_resident_bytes()
    return pages * resource.getpagesize()


def available_bytes() -> int | None:
    """Memory that the system can still give, in bytes; None where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def peak_resident_bytes() -> int:
    """Largest memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device | str) -> int:
    """Largest memory that torch has held on an accelerator, in bytes; 0 for a CPU."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
