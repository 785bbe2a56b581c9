"""``calibrate`` (L7): run a model on data once and keep what every later budget needs.

Shapes: S samples of L tokens, N rows, K in_features, E experts, V vocabulary, W widths.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.accounting import check_bits, check_group_size
from torchmix.calibration import Calibration, LayerStatistics
from torchmix.capture import HessianAccumulator, NotReplayableError
from torchmix.data import TokenSample, token_batches
from torchmix.salience import DATA_FREE, DATA_FREE_METRICS, METRICS, gradient_weights
from torchmix.scoring import SalienceRecorder, data_free_scores
from torchmix.scoring_blocks import calibrate_by_blocks
from torchmix.selection import Selection, Target, select_parameters, weight_fingerprint
from torchmix.workflow_whole_model import (
    LossFn,
    Progress,
    calibration_mode,
    run_whole_model,
    run_with_loss,
)

logger = logging.getLogger(__name__)
DEFAULT_WIDTHS = (3, 4, 5, 6, 8)
DEFAULT_SALIENCE = "fisher_token"
DEFAULT_SAMPLES = 64
DEFAULT_SEQUENCE_LENGTH = 2048


def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    num_samples: int = DEFAULT_SAMPLES,
    sequence_length: int | None = None,
    tokenizer: Any = None,
    salience: str | Sequence[str] = DEFAULT_SALIENCE,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    group_size: int = 128,
    hessians: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    loss_fn: LossFn | None = None,
    scored_samples: int | None = None,
    token_weights: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Measure what quantizing each row at each width costs, and the layers' input statistics.

    Language models are measured block by block with the errors that GPTQ leaves (:mod:`torchmix.scoring_blocks`),
    others as a whole with those of round to nearest. The model's mode and flags, and random state, are left alone.

    Args:
        model: causal language model; any other with ``loss_fn``: (model, batch) -> scalar loss, summed over the batch.
        data: whatever :func:`torchmix.data.token_batches` takes; with ``loss_fn`` an iterable of what that takes.
            None: no data, scores are squared rounding errors.
        num_samples, sequence_length, tokenizer: of the data. The length is by default that of token rows where they
            all have the same, else 2048, at most the model's context; text needs the tokenizer.
        salience: names of :data:`torchmix.salience.METRICS`; the first is the default of ``Calibration.plan``.
        widths, group_size: to score; inputs per scale, a multiple of 8 up to 512.
        hessians: keep the Hessians that GPTQ needs, 4 K² bytes for each distinct layer input.
        include, exclude: see :func:`torchmix.selection.select_parameters`.
        scored_samples: samples that are scored, by default a quarter, up to 16: scores need fewer tokens than Hessians.
        token_weights: weigh tokens by their gradients in sequential rounding, for a backward pass over all samples.
        device, seed: where to run, the model is moved there; what chooses samples and draws labels from the model.
        progress: called as ``progress(steps_done, steps_in_all)``; a step is a block in one direction, or a sample.

    Raises:
        ValueError, TypeError: unusable options, data, patterns or weights; NaN or Inf names the first layer.
    """
    metrics, widths = _check_options(salience, widths, group_size)
    selection = _select(model, include, exclude, device)
    if data is None:
        return _calibrate_without_data(model, selection, widths, group_size)
    recorder = _recorder(selection, metrics, widths, group_size, hessians, token_weights)
    if loss_fn is not None:
        tokens = run_with_loss(model, selection, recorder, data, num_samples, loss_fn, progress)
        origin: dict[str, Any] = {"source": f"{type(data).__name__} through loss_fn"}
    else:
        sample = token_sample(model, data, tokenizer, num_samples, sequence_length, seed)
        tokens = _run_language_model(model, selection, recorder, sample, scored_samples, seed, progress)
        origin = _origin(recorder, sample)
    calibration = _collect(selection, recorder, metrics, group_size)
    return replace(calibration, tokens=tokens, model=weakref.ref(model), **origin)


def _recorder(
    selection: Selection,
    metrics: Sequence[str],
    widths: tuple[int, ...],
    group_size: int,
    hessians: bool,
    token_weights: bool,
) -> SalienceRecorder:
    """A recorder of all metrics that need data."""
    measured = [metric for metric in metrics if metric in METRICS]
    accumulator = HessianAccumulator() if hessians else None
    recorder = SalienceRecorder(selection.targets, measured, widths, group_size, accumulator)
    if token_weights and not (hessians and recorder.needs_labels):
        raise ValueError(
            f"token_weights=True weighs Hessians by gradients, but hessians={hessians} and salience={tuple(metrics)} "
            "takes gradients only if 'fisher_token' or another metric with labels is in it; add them, or leave it out"
        )
    recorder.keeps_gradients = token_weights
    return recorder


def _origin(recorder: SalienceRecorder, sample: TokenSample) -> dict[str, Any]:
    """What a calibration keeps of its tokens."""
    return {
        "source": sample.source,
        "data_sha256": sample.sha256,
        "samples": sample.input_ids,
        "token_weights": _token_weights(recorder, sample),
    }


def _calibrate_without_data(
    model: nn.Module, selection: Selection, widths: tuple[int, ...], group_size: int
) -> Calibration:
    """Scores from the weights alone."""
    layers = {}
    for target in selection.targets:
        scores = {DATA_FREE: data_free_scores(target, widths, group_size)}
        layers[target.name] = _statistics(target, scores, None, [0] * (target.num_experts or 1))
    return Calibration(layers, selection.excluded, widths, group_size, model=weakref.ref(model))


def _check_options(
    salience: str | Sequence[str], widths: Sequence[int], group_size: int
) -> tuple[list[str], tuple[int, ...]]:
    """Validated metric names, and the widths rising."""
    metrics = [salience] if isinstance(salience, str) else list(dict.fromkeys(salience))
    known = {*METRICS, *DATA_FREE_METRICS}
    unknown = [metric for metric in metrics if metric not in known]
    if unknown or not metrics:
        raise ValueError(f"salience={unknown or metrics} is not known; choose among {sorted(known)}")
    for bits in widths:
        check_bits(bits)
    if not widths:
        raise ValueError(f"widths={tuple(widths)} must name at least one width from 2 to 8")
    check_group_size(group_size)
    return metrics, tuple(sorted(set(widths)))


def _select(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], device: torch.device | str | None
) -> Selection:
    """Move the model, choose its weights, and check that they have values."""
    if device is not None:
        model.to(device)
    selection = select_parameters(model, include, exclude)
    for target in selection.targets:
        if target.weight.device.type == "meta":
            raise ValueError(
                f"{target.name} is on the meta device and has no values to quantize; load the model's weights first"
            )
    return selection


def token_sample(
    model: nn.Module, data: Any, tokenizer: Any, num_samples: int, sequence_length: int | None, seed: int
) -> TokenSample:
    """Draw the calibration tokens; by default in the length of token rows, or the model's context up to 2048."""
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQUENCE_LENGTH
    if sequence_length is None:
        common = common_length(data)
        sequence_length = min(common or DEFAULT_SEQUENCE_LENGTH, context)
    elif config is not None and sequence_length > context:
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's context of {context} tokens")
    return token_batches(
        data,
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
        vocab_size=getattr(config, "vocab_size", None),
    )


def common_length(data: Any) -> int | None:
    """L of token rows that all have the same length: a tensor (S, L) or a list of 1-D tensors; else None."""
    if isinstance(data, Tensor):
        return data.shape[1] if data.dim() == 2 else None
    if not isinstance(data, list | tuple) or not all(
        isinstance(row, Tensor) and row.dim() == 1 for row in data
    ):
        return None
    lengths = {len(row) for row in data}
    return lengths.pop() if len(lengths) == 1 else None


def _run_language_model(
    model: nn.Module,
    selection: Selection,
    recorder: SalienceRecorder,
    sample: TokenSample,
    scored_samples: int | None,
    seed: int,
    progress: Progress | None,
) -> int:
    """Block by block, or else the whole model sample by sample; returns the number of tokens scored."""
    with calibration_mode(model):
        try:
            return calibrate_by_blocks(
                model,
                selection.targets,
                recorder,
                sample.input_ids,
                scored_samples,
                seed,
                progress,
            )
        except NotReplayableError as error:
            logger.warning(
                "%s cannot be calibrated block by block (%s): the whole model runs on each sample, and salience is "
                "that of round to nearest",
                type(model).__name__,
                error,
            )
            run_whole_model(model, selection, recorder, sample, seed, progress)
            return sample.input_ids.numel()


def _collect(
    selection: Selection, recorder: SalienceRecorder, metrics: Sequence[str], group_size: int
) -> Calibration:
    """Move what was recorded to the CPU, fill in experts without tokens, and check that every layer was used."""
    layers, widths = {}, recorder.widths
    for target in selection.targets:
        counts, scored = recorder.tokens[target.name], recorder.scored_tokens[target.name]
        if not any(counts):
            raise ValueError(
                f"{target.name}: no calibration token reached this layer; use more or other data, or exclude it"
            )
        scores = {metric: recorder.scores[metric][target.name].cpu() for metric in recorder.scores}
        if not all(scored):
            free = data_free_scores(target, widths, group_size)
            scores = {metric: fill_dead_experts(score, free, scored) for metric, score in scores.items()}
        for metric in metrics:
            if metric in DATA_FREE_METRICS:
                scores[metric] = data_free_scores(target, widths, group_size, metric)
        scores = {metric: scores[metric] for metric in metrics}  # the first is the default of plans
        layers[target.name] = _statistics(target, scores, recorder.hessians, counts)
    sums = {} if recorder.hessians is None else recorder.hessians.hessians()
    on_cpu = {key: hessian.cpu() for key, hessian in sums.items()}
    rounding = "gptq" if recorder.gptq else "rtn"
    return Calibration(layers, selection.excluded, widths, group_size, on_cpu, scored_rounding=rounding)


def _token_weights(recorder: SalienceRecorder, sample: TokenSample) -> dict[str, Tensor]:
    """Key of a Hessian -> float16 (S, L); layers that share an input share the mean of their weights.

    Empty where no gradients were kept; a layer that runs more than once per sample has none.
    """
    keys = {} if recorder.hessians is None else recorder.hessians.keys
    by_key: dict[str, list[Tensor]] = {}
    for (name, expert), key in keys.items():
        squares = torch.cat(recorder.gradients.get(name, [torch.empty(0)]))
        if expert is None and squares.numel() == sample.input_ids.numel():
            by_key.setdefault(key, []).append(gradient_weights(squares))
    order = torch.tensor(recorder.sample_order)
    weights = {}
    for key, parts in by_key.items():
        mean = torch.stack(parts).mean(0).view(len(order), -1)
        weights[key] = torch.empty_like(mean, dtype=torch.float16)
        weights[key][order] = mean.half()
    return weights


def _statistics(
    target: Target, scores: dict[str, Tensor], hessians: HessianAccumulator | None, tokens: list[int]
) -> LayerStatistics:
    experts: list[int | None] = [None] if target.num_experts is None else list(range(target.num_experts))
    keys = {} if hessians is None else hessians.keys
    return LayerStatistics(
        target.name,
        tuple(target.weight.shape),
        target.transposed,
        weight_fingerprint(target.weight),
        scores,
        tuple(keys.get((target.name, expert), "") for expert in experts),
        tuple(tokens),
    )


def fill_dead_experts(scores: Tensor, data_free: Tensor, tokens: Sequence[int]) -> Tensor:
    """Scores for experts that no token reached: as if they were average experts.

    A dead expert gets its data-free scores times the ratio that measured and data-free scores have, summed over the
    experts that saw tokens; a score of zero would hand the fewest bits to what was never looked at.

    Args:
        scores: float64 (E, N, W), zero for dead experts.
        data_free: float64 (E, N, W).
        tokens: tokens that each expert saw.
    """
    alive = torch.tensor([count > 0 for count in tokens])
    ratio = scores[alive].sum() / data_free[alive].sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(alive[:, None, None], scores, data_free * ratio)
