"""Scores of all rows at all widths, taken while a model runs on calibration data (L5).

Gradients of weights are never formed: a row's score follows from the gradient of its output and from the output
error dw x of its rounding error, so memory is bounded by the activations of one sample and the errors of one layer.

Shapes: T tokens, N rows, K in_features, E experts, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchmix.capture import HessianAccumulator, LinearCall
from torchmix.matmul_precision import token_sums
from torchmix.rounding import gptq_round, rtn_round
from torchmix.salience import DATA_FREE, DATA_FREE_METRICS, METRICS, RowSignals, WeightSignals
from torchmix.selection import Target


def rounding_errors(
    weight: Tensor, widths: Sequence[int], group_size: int, hessian: Tensor | None = None
) -> Tensor:
    """Errors of rounding a weight at each width, dequantized w - w.

    Args:
        weight: float (N, K).
        widths: W widths.
        group_size: inputs per scale.
        hessian: float32 (K, K) for GPTQ, all widths in one sweep; None for round to nearest.

    Returns:
        float32 (W, N, K).
    """
    tall = weight.float().repeat(len(widths), 1)
    row_bits = torch.tensor(widths, dtype=torch.uint8, device=weight.device).repeat_interleave(len(weight))
    if hessian is None:
        rounded = rtn_round(tall, row_bits, group_size)
    else:
        rounded = gptq_round(tall, row_bits, group_size, hessian)
    return (rounded.dequantize() - tall).unflatten(0, (len(widths), len(weight)))


def data_free_scores(
    target: Target, widths: Sequence[int], group_size: int, metric: str = DATA_FREE
) -> Tensor:
    """A score from the weights alone, by default the squared rounding error of every row.

    Args:
        target: the weight.
        widths: W widths.
        group_size: inputs per scale.
        metric: name in :data:`torchmix.salience.DATA_FREE_METRICS`.

    Returns:
        float64 (N, W) or (E, N, W).
    """
    rows = target.rows.detach()
    flat = rows.reshape(-1, rows.shape[-1])
    score = DATA_FREE_METRICS[metric]
    columns = [
        score(WeightSignals(target.name, bits, rounding_errors(flat, [bits], group_size)[0]))
        for bits in widths
    ]
    return torch.stack(columns, -1).view(*rows.shape[:-1], len(widths)).cpu()


def token_losses(logits: Tensor, ids: Tensor, labels: str, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood per token in nats: of the text's next tokens, or of tokens drawn from the model.

    Args:
        logits: float32 (L, V).
        ids: int64 (L,).
        labels: "data" or "model".
        generator: source of the draws.
    """
    if labels == "data":
        return nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    drawn = draw_tokens(logits.detach(), generator)
    return nn.functional.cross_entropy(logits, drawn, reduction="none")


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token from each predicted distribution: int64 (L,) from float32 (L, V).

    By inversion of the cumulative distribution, with one random number per token: ``torch.multinomial`` draws one for
    every entry of the vocabulary, which is slow on a CPU.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    point = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def check_logits(logits: Tensor, sample: int) -> None:
    """Refuse logits with NaN or infinite values.

    Raises:
        ValueError: names the sample.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"the logits are NaN or infinite in calibration sample {sample}, though every linear layer had finite "
            "inputs; calibrate in float32 or bfloat16"
        )


class SalienceRecorder:
    """Observer for :class:`torchmix.capture.LinearCalls` that adds up scores and input statistics.

    ``observe`` takes in inputs, ``score`` also scores; called as a function it does both. Before each backward pass
    the driver says whose labels the loss has (``labels``) and over how many tokens it sums (``loss_tokens``); every
    backward pass then feeds the metrics that are defined on those labels.

    Attributes:
        samples: numbers of the calibration samples that run now, for messages.
        scoring: whether this sample's tokens are scored; without it only gradients are recorded.
        gptq: score the error that GPTQ leaves (for metrics that ask for it); needs finished Hessians.
        late_hessians: scored tokens join the Hessians only when they are scored, so that GPTQ has not seen them before.
        scores: metric -> parameter name -> float64 (N, W) or (E, N, W).
        tokens: parameter name -> tokens seen by each expert (one entry without experts).
        scored_tokens: the same for tokens that were scored.
        keeps_errors: rounding errors of a layer are kept until :meth:`forget_errors`; for drivers that come by a layer
            often and then leave it.
        keeps_gradients: fill ``gradients``, for token weights.
        gradients: parameter name -> mean square of dL/dy over the rows of each token, float32 (T,) per call; of
            layers without experts, with the labels of the first metric.
        sample_order: numbers of the samples in the order of ``gradients``.
        hessians: accumulator of input statistics, or None.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        metrics: Sequence[str],
        widths: Sequence[int],
        group_size: int,
        hessians: HessianAccumulator | None,
    ) -> None:
        """``metrics``: names from :data:`torchmix.salience.METRICS`."""
        self.labels: str | None = None
        self.loss_tokens = 0
        self.samples: Sequence[int] = (0,)
        self.scoring = True
        self.gptq = False
        self.late_hessians = False
        self.keeps_errors = False
        self.keeps_gradients = False
        self.hessians = hessians
        self._targets = {target.name: target for target in targets}
        self._widths, self._group_size = tuple(widths), group_size
        self._by_labels: dict[str | None, list[str]] = {}
        for metric in metrics:
            self._by_labels.setdefault(METRICS[metric].labels, []).append(metric)
        self.scores: dict[str, dict[str, Tensor]] = {metric: {} for metric in metrics}
        self.tokens: dict[str, list[int]] = {}
        self.scored_tokens: dict[str, list[int]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self.sample_order: list[int] = []
        self._errors: dict[tuple[str, int | None, bool], Tensor] = {}
        for target in targets:
            shape = (*target.rows.shape[:-1], len(self._widths))
            self.tokens[target.name] = [0] * (target.num_experts or 1)
            self.scored_tokens[target.name] = [0] * (target.num_experts or 1)
            for metric in metrics:
                self.scores[metric][target.name] = torch.zeros(
                    shape, dtype=torch.float64, device=target.weight.device
                )

    @property
    def needs_labels(self) -> list[str]:
        """Kinds of labels whose loss must be differentiated, in a fixed order."""
        return [labels for labels in ("model", "data") if labels in self._by_labels]

    @property
    def one_by_one(self) -> bool:
        """Whether samples must be scored one at a time."""
        return any(METRICS[metric].per_sample for metric in self.scores)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that are scored."""
        return self._widths

    def __call__(self, call: LinearCall) -> Callable[[Tensor], None] | None:
        """Take in one application of a layer, and score it."""
        self.observe(call)
        return self.score(call)

    def observe(self, call: LinearCall) -> None:
        """Count the tokens of one application of a layer, and add its inputs to the Hessian.

        Raises:
            ValueError: an input is NaN or infinite; names the layer and the sample.
        """
        finite = torch.isfinite(call.x)
        if not finite.all():
            raise ValueError(
                f"{call.name}: the input of this layer is NaN or infinite in calibration sample "
                f"{self._sample_of(finite)}, and it is the first layer for which that is so; look for NaN in the "
                "weights before it, or calibrate in float32 or bfloat16 instead of float16"
            )
        self.tokens[call.name][call.expert or 0] += len(call.x)
        if self.hessians is not None and not (self.late_hessians and self.scoring):
            self.hessians.add(call)

    def _sample_of(self, finite: Tensor) -> int:
        """Number of the sample with the first bad input; of several samples, tokens lie in their order."""
        row = int((~finite).any(-1).nonzero()[0])
        return self.samples[row * len(self.samples) // len(finite)]

    def score(self, call: LinearCall) -> Callable[[Tensor], None] | None:
        """Score one application of a layer, where needed once its gradient is known."""
        if self.scoring:
            self.scored_tokens[call.name][call.expert or 0] += len(call.x)
            self._prepare(call)
            if None in self._by_labels:
                self._add(call, None, None)
        if not self.needs_labels or not len(call.x):
            return None

        def on_gradient(gradient: Tensor) -> None:
            gradient = gradient.float()
            if self.keeps_gradients and call.expert is None and self.labels == self.needs_labels[0]:
                self.gradients.setdefault(call.name, []).append(gradient.square().mean(1).cpu())
            if self.scoring and self.labels in self._by_labels:
                self._add(call, gradient, self.labels)

        return on_gradient

    def _prepare(self, call: LinearCall) -> None:
        """Round with GPTQ before the Hessian learns of these tokens, which are scored unseen."""
        if self.gptq and any(self._takes_gptq(metric) for metric in self.scores):
            self._errors_of(call, True)
        if self.late_hessians and self.hessians is not None:
            self.hessians.add(call)

    def _add(self, call: LinearCall, gradient: Tensor | None, labels: str | None) -> None:
        """Add one sample of one layer to the metrics of these labels."""
        x = call.x.float()
        for kind in (True, False):
            metrics = [name for name in self._by_labels[labels] if self._takes_gptq(name) == kind]
            if not metrics:
                continue
            errors = self._errors_of(call, kind)
            with token_sums(call.x.dtype):
                output_errors = (x @ errors.flatten(0, 1).T).unflatten(1, errors.shape[:2])
            for column in range(len(errors)):
                signals = RowSignals(output_errors[:, column], gradient, self.loss_tokens, x, errors[column])
                for metric in metrics:
                    total = self.scores[metric][call.name]
                    total = total if call.expert is None else total[call.expert]
                    total[:, column] += METRICS[metric].score(signals)

    def _takes_gptq(self, metric: str) -> bool:
        return self.gptq and METRICS[metric].rounding == "gptq"

    def _errors_of(self, call: LinearCall, gptq: bool) -> Tensor:
        """Rounding errors of a layer: float32 (W, N, K)."""
        key = (call.name, call.expert, gptq)
        if key in self._errors:
            return self._errors[key]
        rows = self._targets[call.name].rows.detach()
        weight = rows if call.expert is None else rows[call.expert]
        hessian = None
        if gptq and self.hessians is not None:
            hessian = self.hessians.hessian(call.name, call.expert)
        errors = rounding_errors(weight, self._widths, self._group_size, hessian)
        if self.keeps_errors:
            self._errors[key] = errors
        return errors

    def forget_errors(self) -> None:
        """Release the rounding errors of the layers that are done."""
        self._errors.clear()


def check_differentiable(output: Tensor, recorder: SalienceRecorder, what: str) -> None:
    """Refuse an output without gradient where gradients are needed.

    Raises:
        ValueError: names the sample and the likely cause.
    """
    if recorder.needs_labels and not output.requires_grad:
        raise ValueError(
            f"{what} in calibration sample {recorder.samples[0]} cannot be differentiated with respect to any layer "
            f"(requires_grad={output.requires_grad}): look for no_grad or detach there, or use salience='output_error'"
        )
