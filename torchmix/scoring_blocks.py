"""Calibration block by block (L5): every sample passes a block before any passes the next.

First all samples go forward, block after block, and leave the Hessians of the layers; what enters each block is
kept, on a GPU that has room and else in main memory. Then the gradient of the loss goes backward through the blocks
in reverse, each recomputed from what entered it. By then the Hessians are known, so each block's layers are rounded
at every width once, and the scores are those of the rounding that is really used. A sample that is scored joins the
Hessians only then: GPTQ fits the tokens it has seen better than others. Memory for errors and gradients is bounded
by one block.

Shapes: S samples of L tokens, B samples of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchmix.capture import (
    Block,
    LinearCall,
    LinearCalls,
    NotReplayableError,
    chunk_samples,
    find_blocks,
    hidden_states_device,
    record_blocks,
    short_circuit,
)
from torchmix.evaluation import model_logits
from torchmix.scoring import SalienceRecorder, check_differentiable, check_logits, token_losses
from torchmix.selection import Target

MOST_SCORED = 16  # samples; more of them did not change held-out results
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Chunk:
    """Samples that go together: their numbers, and whether they are scored."""

    numbers: list[int]
    scored: bool


def choose_scored(count: int, wanted: int | None) -> list[int]:
    """Numbers of the samples to score, evenly spaced; by default a quarter of all, from 1 up to 16.

    Raises:
        ValueError: fewer than one is wanted.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(
            f"scored_samples={wanted} must be at least 1; leave it out for a quarter of the samples"
        )
    chosen = max(1, min(MOST_SCORED, count // 4)) if wanted is None else min(wanted, count)
    return [i * count // chosen for i in range(chosen)]


def calibrate_by_blocks(
    model: nn.Module,
    targets: Sequence[Target],
    recorder: SalienceRecorder,
    samples: Tensor,
    scored_samples: int | None,
    seed: int,
    progress: Progress | None = None,
) -> int:
    """Feed a recorder with all samples, forward and backward, block by block.

    Args:
        model: causal language model in calibration mode.
        targets: weights to measure.
        recorder: takes in what is measured.
        samples: int64 (S, L).
        scored_samples: samples whose tokens are scored, see :func:`choose_scored`; the others give Hessians, and
            gradients where the recorder keeps them.
        seed: draws the labels of metrics on the model's own predictions.
        progress: called as ``progress(steps_done, steps_in_all)``, once per block and direction.

    Returns:
        number of tokens that were scored.

    Raises:
        NotReplayableError: the model is not a chain of blocks, or a target lies before them; nothing was recorded.
    """
    run = _BlockRun(model, targets, recorder, samples, scored_samples, seed, progress)
    with torch.no_grad():
        run.forward()
    recorder.gptq = recorder.hessians is not None
    run.head()
    run.backward()
    return len(choose_scored(len(samples), scored_samples)) * samples.shape[1]


class _BlockRun:
    """The two passes over the blocks, and what is kept between them."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        recorder: SalienceRecorder,
        samples: Tensor,
        scored_samples: int | None,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._recorder, self._samples = model, recorder, samples
        self._weights = {target.name: target.weight for target in targets}
        device = targets[0].weight.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device, self._progress, self._steps = device, progress, 0
        scored = choose_scored(len(samples), scored_samples)
        others = sorted(set(range(len(samples))) - set(scored))
        size = 1 if recorder.one_by_one else chunk_samples(device, samples.shape[1])
        blocks, entering = self._record(scored + others, size)  # refuses what cannot be replayed
        recorder.sample_order, recorder.late_hessians = scored + others, bool(others)
        recorder.keeps_errors = True
        if len(entering) == len(samples):
            size = 1
        # scored and other samples must not share a chunk; cut again where the first cut mixed them
        self._chunks = [
            _Chunk(numbers[i : i + size], numbers is scored)
            for numbers in (scored, others)
            for i in range(0, len(numbers), size)
        ]
        kept = sum(states.numel() * states.element_size() for states in entering) * (len(blocks) + 1)
        self._keep_on = hidden_states_device(device, kept)
        states = torch.cat(entering).to(self._keep_on).split([len(chunk.numbers) for chunk in self._chunks])
        self._blocks = blocks
        self._entering: list[list[Tensor]] = [list(states)]  # for each block, the hidden states of each chunk

    def _record(self, order: list[int], size: int) -> tuple[list[Block], list[Tensor]]:
        blocks = find_blocks(self._model, list(self._weights))
        outside = {
            name: weight
            for name, weight in self._weights.items()
            if not any(name.startswith(f"{block}.") for block in blocks)
        }
        self._outside = outside
        entered = False

        def enter(*_: object) -> None:
            nonlocal entered
            entered = True

        def observe(call: LinearCall) -> None:
            if not entered:
                raise NotReplayableError(f"{call.name} lies before the first block")

        handle = next(iter(blocks.values())).register_forward_pre_hook(enter)
        try:
            with LinearCalls(outside, observe):
                model_logits("the model", self._model, self._samples[:1])
        finally:
            handle.remove()
        return record_blocks(
            blocks, lambda ids: model_logits("the model", self._model, ids), self._samples[order], size
        )

    def _tick(self) -> None:
        self._steps += 1
        if self._progress is not None:
            self._progress(self._steps, 2 * len(self._blocks) + 1)

    def _weights_in(self, block: Block) -> dict[str, Tensor]:
        return {name: w for name, w in self._weights.items() if name.startswith(f"{block.name}.")}

    def forward(self) -> None:
        """Hessians and token counts of all layers; keeps what enters each block."""
        for block in self._blocks:
            weights, following = self._weights_in(block), []
            for chunk, hidden in zip(self._chunks, self._entering[-1], strict=True):
                self._recorder.samples, self._recorder.scoring = chunk.numbers, chunk.scored
                with LinearCalls(weights, self._recorder.observe):
                    following.append(block.run(block.module, hidden.to(self._device)).to(self._keep_on))
                if self._recorder.hessians is not None:
                    self._recorder.hessians.forget_last()
            self._entering.append(following)
            self._tick()
        for chunk, hidden in zip(self._chunks, self._entering[-1], strict=True):
            self._recorder.scoring = chunk.scored
            if self._outside:
                for number, state in zip(chunk.numbers, hidden.split(1), strict=True):
                    self._recorder.samples = [number]
                    self._logits(number, state.to(self._device), self._recorder.observe)
        if self._recorder.hessians is not None:
            self._recorder.hessians.forget_last()

    def _logits(
        self,
        number: int,
        hidden: Tensor,
        observer: Callable[[LinearCall], Callable[[Tensor], None] | None],
    ) -> Tensor:
        """Logits (L, V) of one sample from what leaves its last block (1, L, D)."""
        with short_circuit(self._blocks, hidden), LinearCalls(self._outside, observer):
            logits = model_logits("the model", self._model, self._samples[number][None])[0].float()
        check_logits(logits, number)
        return logits

    def head(self) -> None:
        """The gradient of each kind of loss at the last block's output, and the scores of layers behind it."""
        recorder, kinds = self._recorder, self._recorder.needs_labels
        self._gradients: dict[str, list[Tensor]] = {labels: [] for labels in kinds}
        last = self._entering.pop()
        self._chunks = [chunk for chunk in self._chunks if chunk.scored or self._recorder.keeps_gradients]
        for chunk, hidden in zip(self._chunks, last, strict=False):  # scored chunks come first
            parts: dict[str, list[Tensor]] = {labels: [] for labels in kinds}
            recorder.scoring = chunk.scored
            for number, state in zip(chunk.numbers, hidden.split(1), strict=True):
                leaf = state.to(self._device).requires_grad_(bool(kinds))
                recorder.samples = [number]
                with torch.set_grad_enabled(bool(kinds)):
                    logits = self._logits(number, leaf, recorder.score)
                check_differentiable(logits, recorder, "the model's logits")
                for labels in kinds:
                    losses = token_losses(
                        logits, self._samples[number].to(self._device), labels, self._generator
                    )
                    recorder.labels, recorder.loss_tokens = labels, len(losses)
                    retain = labels != kinds[-1]
                    (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=retain)
                    parts[labels].append(gradient.to(self._keep_on))
            for labels in kinds:
                self._gradients[labels].append(torch.cat(parts[labels]))
        recorder.forget_errors()
        self._tick()

    def backward(self) -> None:
        """Scores and gradients of all layers, from the last block to the first."""
        for block in reversed(self._blocks):
            entering, weights = self._entering.pop(), self._weights_in(block)
            for index, chunk in enumerate(self._chunks):
                if chunk.scored or self._recorder.needs_labels:
                    self._score_chunk(block, weights, chunk, index, entering[index])
            self._recorder.forget_errors()
            self._tick()

    def _score_chunk(
        self, block: Block, weights: dict[str, Tensor], chunk: _Chunk, index: int, hidden: Tensor
    ) -> None:
        """Recompute one block on one chunk, and take the gradients back through it."""
        recorder, kinds = self._recorder, self._recorder.needs_labels
        recorder.samples, recorder.scoring = chunk.numbers, chunk.scored
        leaf = hidden.to(self._device).requires_grad_(bool(kinds))
        with torch.set_grad_enabled(bool(kinds)), LinearCalls(weights, recorder.score):
            output = block.run(block.module, leaf)
        for labels in kinds:
            recorder.labels = labels
            recorder.loss_tokens = self._samples.shape[1] - (labels == "data")
            arriving = self._gradients[labels][index].to(self._device, output.dtype)
            retain = labels != kinds[-1]
            (gradient,) = torch.autograd.grad(output, leaf, arriving, retain_graph=retain)
            self._gradients[labels][index] = gradient.to(self._keep_on)
        if recorder.hessians is not None:
            recorder.hessians.forget_last()
