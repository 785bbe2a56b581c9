"""Calibration of a model as a whole (L7): sample by sample, for models that are no chain of blocks or bring a loss.

Scores are those of round to nearest: GPTQ would need the Hessians before the only pass there is.

Shapes: S samples of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.capture import LinearCalls
from torchmix.data import TokenSample
from torchmix.evaluation import evaluation_mode, model_logits
from torchmix.scoring import SalienceRecorder, check_differentiable, check_logits, token_losses
from torchmix.selection import Selection

Progress = Callable[[int, int], None]
LossFn = Callable[[nn.Module, Any], Tensor]


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


def run_whole_model(
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


def run_with_loss(
    model: nn.Module,
    selection: Selection,
    recorder: SalienceRecorder,
    data: Any,
    num_samples: int,
    loss_fn: LossFn,
    progress: Progress | None,
) -> int:
    """Calibrate any module through its own loss; returns 0, as it is not known over how many tokens that sums.

    Raises:
        ValueError: no batch, a loss that is not one finite number with a gradient, or token weights are asked for.
    """
    if recorder.keeps_gradients:
        raise ValueError(
            "token_weights=True needs token samples; leave it out where a loss_fn reads the data"
        )
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
