"""``calibrate`` (L7): run a model on data once and keep what every later budget needs.

Shapes: S samples of L tokens, N rows, K in_features, E experts, V vocabulary, W widths.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.accounting import check_bits, check_group_size
from torchmix.calibration import Calibration, LayerStatistics
from torchmix.capture import HessianAccumulator, LinearCalls, NotReplayableError
from torchmix.data import TokenSample, token_batches
from torchmix.evaluation import evaluation_mode, model_logits
from torchmix.salience import DATA_FREE, DATA_FREE_METRICS, METRICS, gradient_weights
from torchmix.scoring import (
    SalienceRecorder,
    check_differentiable,
    check_logits,
    data_free_scores,
    token_losses,
)
from torchmix.scoring_blocks import calibrate_by_blocks
from torchmix.selection import Selection, Target, select_parameters, weight_fingerprint

logger = logging.getLogger(__name__)
DEFAULT_WIDTHS = (3, 4, 5, 6, 8)
DEFAULT_SALIENCE = "fisher_token"
DEFAULT_SAMPLES = 64
DEFAULT_SEQUENCE_LENGTH = 2048
Progress = Callable[[int, int], None]
LossFn = Callable[[nn.Module, Any], Tensor]


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
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Measure what quantizing each row at each width costs, and the layers' input statistics.

    Language models are measured block by block with the errors that GPTQ leaves (:mod:`torchmix.scoring_blocks`),
    others as a whole with those of round to nearest. The model's mode and flags, and random state, stay as they are.

    Args:
        model: any module. Causal language models are called as ``model(input_ids)``; others need ``loss_fn``.
        data: token batches, texts, chats, a path or a data set (:func:`torchmix.data.token_batches`); with
            ``loss_fn`` an iterable of whatever that takes. None: no data, scores are squared rounding errors.
        num_samples, sequence_length, tokenizer: of the data. The length is by default that of token rows where they
            all have the same, else 2048, at most the model's context; text needs the tokenizer.
        salience: names of :data:`torchmix.salience.METRICS`; the first is the default of ``Calibration.plan``.
        widths, group_size: widths to score; inputs per scale, a multiple of 8 up to 512.
        hessians: keep the Hessians that GPTQ needs, 4 K² bytes for each distinct layer input.
        include, exclude: patterns, see :func:`torchmix.selection.select_parameters`.
        loss_fn: (model, batch) -> scalar loss, summed over what the batch holds.
        scored_samples: samples that are scored, by default a quarter, up to 16: scores need fewer tokens than Hessians.
        device: where to run; the model is moved there. By default where it is.
        seed: chooses the samples and draws the labels of metrics on the model's own predictions.
        progress: called as ``progress(steps_done, steps_in_all)``; a step is a block in one direction, or a sample.

    Raises:
        ValueError, TypeError: unusable options, data, patterns or weights; NaN or Inf names the first layer.
    """
    metrics, widths = _check_options(salience, widths, group_size)
    selection = _select(model, include, exclude, device)
    if data is None:
        return _calibrate_without_data(model, selection, widths, group_size)
    new_recorder = partial(_recorder, selection, metrics, widths, group_size, hessians)
    if loss_fn is not None:
        recorder = new_recorder()
        tokens = _run_with_loss(model, selection, recorder, data, num_samples, loss_fn, progress)
        origin: dict[str, Any] = {"source": f"{type(data).__name__} through loss_fn"}
    else:
        sample = _token_sample(model, data, tokenizer, num_samples, sequence_length, seed)
        recorder, tokens = _run_language_model(
            model, selection, new_recorder, sample, scored_samples, seed, progress
        )
        origin = _origin(recorder, sample)
    calibration = _collect(selection, recorder, metrics, group_size)
    return replace(calibration, tokens=tokens, model=weakref.ref(model), **origin)


def _recorder(
    selection: Selection, metrics: Sequence[str], widths: tuple[int, ...], group_size: int, hessians: bool
) -> SalienceRecorder:
    """A recorder of all metrics that need data."""
    measured = [metric for metric in metrics if metric in METRICS]
    accumulator = HessianAccumulator() if hessians else None
    return SalienceRecorder(selection.targets, measured, widths, group_size, accumulator)


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


def _token_sample(
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


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, experts applied one by one; all restored afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        with _experts_one_by_one(model), evaluation_mode([model]), torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad in flags.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Use transformers' plain loop over experts, whose linear calls can be observed one by one."""
    before = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    if not any(before.values()):
        yield
        return
    try:
        model.set_experts_implementation("eager")
        yield
    finally:
        model.set_experts_implementation(before)


def _run_language_model(
    model: nn.Module,
    selection: Selection,
    new_recorder: Callable[[], SalienceRecorder],
    sample: TokenSample,
    scored_samples: int | None,
    seed: int,
    progress: Progress | None,
) -> tuple[SalienceRecorder, int]:
    """Block by block, or else the whole model sample by sample; the recorder, and the number of tokens scored."""
    with calibration_mode(model):
        recorder = new_recorder()
        try:
            tokens = calibrate_by_blocks(
                model, selection.targets, recorder, sample.input_ids, scored_samples, seed, progress
            )
        except NotReplayableError as error:
            logger.warning(
                "%s cannot be calibrated block by block (%s): the whole model runs on each sample, and salience is "
                "that of round to nearest",
                type(model).__name__,
                error,
            )
            recorder = new_recorder()
            _run_whole_model(model, selection, recorder, sample, seed, progress)
            tokens = sample.input_ids.numel()
    return recorder, tokens


def _run_whole_model(
    model: nn.Module,
    selection: Selection,
    recorder: SalienceRecorder,
    sample: TokenSample,
    seed: int,
    progress: Progress | None,
) -> None:
    """One forward pass per sample and one backward pass per kind of labels."""
    generator = torch.Generator(selection.targets[0].weight.device).manual_seed(seed)
    weights = {target.name: target.weight for target in selection.targets}
    recorder.sample_order = list(range(len(sample.input_ids)))
    for index, ids in enumerate(sample.input_ids):
        recorder.samples = [index]
        with LinearCalls(weights, recorder), torch.set_grad_enabled(bool(recorder.needs_labels)):
            logits = model_logits("the model", model, ids[None])[0].float()
        check_logits(logits, index)
        check_differentiable(logits, recorder, "the model's logits")
        for labels in recorder.needs_labels:
            losses = token_losses(logits, ids.to(logits.device), labels, generator)
            recorder.labels, recorder.loss_tokens = labels, len(losses)
            losses.sum().backward(retain_graph=labels != recorder.needs_labels[-1])
        if recorder.hessians is not None:
            recorder.hessians.forget_last()
        if progress is not None:
            progress(index + 1, len(sample.input_ids))


def _run_with_loss(
    model: nn.Module,
    selection: Selection,
    recorder: SalienceRecorder,
    data: Any,
    num_samples: int,
    loss_fn: LossFn,
    progress: Progress | None,
) -> int:
    """Calibrate any module through its own loss; returns 0, as it is not known over how many tokens that sums."""
    weights = {target.name: target.weight for target in selection.targets}
    index = -1
    with calibration_mode(model):
        for index, batch in enumerate(data):
            if index == num_samples:
                break
            recorder.samples = [index]
            with LinearCalls(weights, recorder):
                loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.isfinite(loss).all():
                raise ValueError(
                    f"loss_fn must return one finite number per batch, but batch {index} gave {loss}"
                )
            check_differentiable(loss, recorder, "the result of loss_fn")
            recorder.loss_tokens = 1
            for labels in recorder.needs_labels:
                recorder.labels = labels
                loss.backward(retain_graph=labels != recorder.needs_labels[-1])
            if recorder.hessians is not None:
                recorder.hessians.forget_last()
            if progress is not None:
                progress(index + 1, num_samples)
    if index < 0:
        raise ValueError(f"data is empty ({type(data).__name__} gave no batch); pass at least one batch")
    return 0


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
    """Key of a Hessian -> float16 (S, L); layers that share an input share the mean of their weights."""
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
