"""Scores of all rows at all widths, taken while a model runs on calibration data (L5).

Gradients of weights are never formed: a row's score follows from the gradient of its output and from the output
error dw x of its rounding error, so memory is bounded by the activations of one sample.

Shapes: T tokens, N rows, K in_features, E experts, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchmix.capture import HessianAccumulator, LinearCall
from torchmix.rounding import rtn_round
from torchmix.salience import METRICS, RowSignals, weight_error
from torchmix.selection import Target


def rounding_error(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Error of round-to-nearest at one width, dequantized w - w: float32 (N, K) from float (N, K)."""
    row_bits = torch.full((len(weight),), bits, dtype=torch.uint8, device=weight.device)
    return rtn_round(weight, row_bits, group_size).dequantize() - weight.float()


def data_free_scores(target: Target, widths: Sequence[int], group_size: int) -> Tensor:
    """Squared rounding error of every row: float64 (N, W) or (E, N, W)."""
    rows = target.rows.detach()
    flat = rows.reshape(-1, rows.shape[-1])
    columns = [weight_error(rounding_error(flat, bits, group_size)) for bits in widths]
    return torch.stack(columns, -1).view(*rows.shape[:-1], len(widths)).cpu()


class SalienceRecorder:
    """Observer for :class:`torchmix.capture.LinearCalls` that adds up scores and Hessians.

    Before each backward pass the driver says whose labels the loss has (``labels``) and over how many tokens it
    sums (``loss_tokens``); every backward pass then feeds the metrics that are defined on those labels.

    Attributes:
        scores: metric -> parameter name -> float64 (N, W) or (E, N, W).
        tokens: parameter name -> tokens seen by each expert (one entry without experts).
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
        self.sample = 0
        self.hessians = hessians
        self._targets = {target.name: target for target in targets}
        self._widths, self._group_size = tuple(widths), group_size
        self._by_labels: dict[str | None, list[str]] = {}
        for metric in metrics:
            self._by_labels.setdefault(METRICS[metric].labels, []).append(metric)
        self.scores: dict[str, dict[str, Tensor]] = {metric: {} for metric in metrics}
        self.tokens: dict[str, list[int]] = {}
        for target in targets:
            shape = (*target.rows.shape[:-1], len(self._widths))
            self.tokens[target.name] = [0] * (target.num_experts or 1)
            for metric in metrics:
                self.scores[metric][target.name] = torch.zeros(
                    shape, dtype=torch.float64, device=target.weight.device
                )

    @property
    def needs_labels(self) -> list[str]:
        """Kinds of labels whose loss must be differentiated, in a fixed order."""
        return [labels for labels in ("model", "data") if labels in self._by_labels]

    def __call__(self, call: LinearCall) -> Callable[[Tensor], None] | None:
        """Take in one application of a layer; see :class:`torchmix.capture.LinearCalls`."""
        if not torch.isfinite(call.x).all():
            raise ValueError(
                f"{call.name}: the input of this layer is NaN or infinite in calibration sample {self.sample}, and it "
                "is the first layer for which that is so; look for NaN in the weights before it, or calibrate in "
                "float32 or bfloat16 instead of float16"
            )
        self.tokens[call.name][call.expert or 0] += len(call.x)
        if self.hessians is not None:
            self.hessians.add(call)
        if None in self._by_labels:
            self._add(call, None, None)
        if not self.needs_labels or not len(call.x):
            return None

        def on_gradient(gradient: Tensor) -> None:
            if self.labels in self._by_labels:
                self._add(call, gradient.float(), self.labels)

        return on_gradient

    def _add(self, call: LinearCall, gradient: Tensor | None, labels: str | None) -> None:
        """Add one sample of one layer to the metrics of these labels."""
        rows = self._targets[call.name].rows.detach()
        weight = rows if call.expert is None else rows[call.expert]
        x = call.x.float()
        for column, bits in enumerate(self._widths):
            error = x @ rounding_error(weight, bits, self._group_size).T
            signals = RowSignals(error, gradient, self.loss_tokens)
            for metric in self._by_labels[labels]:
                total = self.scores[metric][call.name]
                total = total if call.expert is None else total[call.expert]
                total[:, column] += METRICS[metric].score(signals)
