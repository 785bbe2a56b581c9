"""Salience metrics (L3): one function each, from the signals of one layer and sample to a score per row.

All metrics are sums over samples, and larger means that quantizing the row costs more. To add one, write a
function of :class:`RowSignals` and enter it in :data:`METRICS`; one that needs no data is a function of
:class:`WeightSignals` and belongs into :data:`DATA_FREE_METRICS`.

Symbols: w a row, dw = quantized w - w its error at some width, x_t the inputs of token t, y_t = w x_t the row's
output, L the loss of one sample (sum over its tokens). Shapes: T tokens, N rows, K in_features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSignals:
    """What a metric may look at, for one layer, sample and width.

    Attributes:
        output_error: float32 (T, N), dw x_t of every token and row.
        output_gradient: float32 (T, N), dL/dy; None for metrics that need no gradient.
        loss_tokens: number of tokens that L sums over.
        inputs: float32 (T, K), x.
        weight_error: float32 (N, K), dw.
    """

    output_error: Tensor
    output_gradient: Tensor | None
    loss_tokens: int
    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weight_error: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def gradient(self) -> Tensor:
        """dL/dy, which gradient metrics may rely on."""
        assert self.output_gradient is not None, (
            "this metric was registered without labels but asks for gradients"
        )
        return self.output_gradient


@dataclass(frozen=True)
class WeightSignals:
    """What a data-free metric may look at, for one layer and width.

    Attributes:
        name: fully qualified name of the parameter.
        bits: the width.
        weight_error: float32 (N, K), dw; experts one below the other.
    """

    name: str
    bits: int
    weight_error: Tensor


@dataclass(frozen=True)
class Metric:
    """A metric, the labels whose loss it differentiates, and the rounding whose error it scores.

    Attributes:
        score: RowSignals -> float64 (N,), the sample's contribution to the score.
        labels: "data" for the next tokens of the text, "model" for labels drawn from the model's own prediction
            (the true Fisher information), None when no gradient is needed.
        kl_scale: factor from the summed score of a token to nats of KL divergence per token, None for a bare score.
        rounding: "gptq" scores the error that is left after GPTQ, which is nearer to the final one; "rtn" that of
            round to nearest. Where there are no Hessians, all metrics score round to nearest.
        per_sample: the score is not a sum over tokens, so each sample must be scored by itself.
    """

    score: Callable[[RowSignals], Tensor]
    labels: Literal["data", "model"] | None
    kl_scale: float | None = None
    rounding: Literal["gptq", "rtn"] = "rtn"
    per_sample: bool = False


def mixllm(signals: RowSignals) -> Tensor:
    """|a + a²/2| with a = <dL/dw, dw>, L the mean loss of the sample (MixLLM, arXiv 2412.14590, Eq. 4).

    The dot product is taken as sum_t dL/dy_t (dw x_t), which equals it without forming dL/dw.
    """
    a = (signals.gradient() * signals.output_error).sum(0, dtype=torch.float64) / signals.loss_tokens
    return (a + 0.5 * a * a).abs()


def fisher_token(signals: RowSignals) -> Tensor:
    """sum_t (dL/dy_t (dw x_t))²: the per-token Fisher information of the row's error, in nats².

    With labels from the model, half of its mean per token predicts the KL divergence that the row's error causes
    (second-order expansion; errors of different rows and tokens count as independent).
    """
    return (signals.gradient() * signals.output_error).square_().sum(0).double()


def output_error(signals: RowSignals) -> Tensor:
    """sum_t (dw x_t)²: squared error of the layer's output, without gradients."""
    return signals.output_error.square().sum(0).double()


def fisher_diagonal(signals: RowSignals) -> Tensor:
    """sum_k (dL/dw_k)² dw_k²: diagonal of the empirical Fisher information over the weights, L as a sum over tokens.

    The impact of a weight in CherryQ (arXiv 2404.02837), H_kk = E[(dL/dw_k)²] over samples. Departure: CherryQ ranks
    single weights by H_kk alone; here it is multiplied by the squared error, the second-order term of the loss, and
    summed over a row. Forms dL/dw of the layer, (N, K), once for each width.
    """
    weight_gradient = signals.gradient().T @ signals.inputs
    return weight_gradient.mul_(signals.weight_error).square_().sum(1, dtype=torch.float64)


def weight_error(delta: Tensor) -> Tensor:
    """|dw|², the data-free score: float64 (N,) from the error (N, K)."""
    return delta.square().sum(1, dtype=torch.float64)


def random_score(signals: WeightSignals, seed: int = 0) -> Tensor:
    """u K 4^-bits with u drawn evenly from (0, 1] for each row: what a ranking is worth that knows nothing.

    The draw depends on the layer's name, the row and the seed alone. 4^-bits is how a squared rounding error falls
    with the width, and K is what a bit of width costs, so an allocation under a budget treats long and short rows
    alike. A ranking that counts rows over all layers ("rows at 8 bits") prefers long ones; within a layer it is even.

    Returns:
        float64 (N,).
    """
    rows, in_features = signals.weight_error.shape
    digest = hashlib.sha256(f"{seed} {signals.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    u = 1.0 - torch.rand(rows, generator=generator, dtype=torch.float64)
    return (u * in_features * 4.0**-signals.bits).to(signals.weight_error.device)


METRICS: dict[str, Metric] = {
    "fisher_token": Metric(fisher_token, labels="model", kl_scale=0.5, rounding="gptq"),
    "fisher_token_rtn": Metric(fisher_token, labels="model", kl_scale=0.5),
    "mixllm": Metric(mixllm, labels="data", per_sample=True),
    "output_error": Metric(output_error, labels=None),
    "fisher_diagonal": Metric(fisher_diagonal, labels="data", per_sample=True),
}
DATA_FREE = "weight_error"
DATA_FREE_METRICS: dict[str, Callable[[WeightSignals], Tensor]] = {
    DATA_FREE: lambda signals: weight_error(signals.weight_error),
    "random": random_score,
}
