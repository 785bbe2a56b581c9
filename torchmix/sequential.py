"""Sequential rounding (L5): GPTQ layer after layer, on inputs from the layers that are quantized already.

A layer's Hessian is taken from what really reaches it in the quantized model, int8 activations included, and its
rounding target is refitted to give the original outputs from there (:mod:`torchmix.rounding.refit`); a layer that
writes to the residual stream also makes up for part of that stream's error. Two streams of hidden states, of the
original and of the quantized model, move forward block by block, so memory is bounded by one block and the hidden
states of the calibration samples.

Shapes: S samples of L tokens, B samples of a chunk, D hidden size, T = B L tokens, N rows, K in_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchmix.capture import (
    Block,
    LinearCall,
    QuantizedInputs,
    ResidualAdds,
    chunk_samples,
    fake_quantize,
    find_blocks,
    record_blocks,
)
from torchmix.evaluation import evaluation_mode, model_logits
from torchmix.matmul_precision import token_sums
from torchmix.rounding import (
    DEFAULT_REFINE,
    PERCDAMP,
    RoundedWeight,
    gptq_round,
    refine_rounding,
    refit_target,
)
from torchmix.selection import Target

Progress = Callable[[Collection[str], str], None]


@dataclass(frozen=True)
class SequentialRounding:
    """Settings of :func:`round_sequentially`.

    Attributes:
        group_size: inputs per scale.
        per_token: granularity of the activation scales.
        refit: shrinkage of the refit, 0 for none; 0.5 was best on held-out calibration text.
        refine: rounds of refinement after GPTQ, 0 for none.
        percdamp: damping of GPTQ and of the refit.
    """

    group_size: int
    per_token: bool
    refit: float
    refine: int = DEFAULT_REFINE
    percdamp: float = PERCDAMP


def round_sequentially(
    model: nn.Module,
    targets: Sequence[Target],
    row_bits: Mapping[str, Tensor],
    samples: Tensor,
    settings: SequentialRounding,
    token_weights: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> dict[str, RoundedWeight]:
    """Round all 2-D weights that lie in the model's blocks; the model itself is not changed.

    Args:
        model: causal language model with its original weights.
        targets: weights to round; experts, and weights outside the blocks, are left to the caller.
        row_bits: name -> uint8 (N,).
        samples: int64 (S, L), the calibration tokens.
        settings: see :class:`SequentialRounding`.
        token_weights: name -> float (S, L), weight of each token in the sums of this layer's input
            (:func:`torchmix.salience.gradient_weights`); layers without an entry count all tokens alike.
        progress: called as ``progress(names_of_all_finished_layers, name)`` after each layer.

    Returns:
        name -> rounded weight, for the layers that were rounded.

    Raises:
        NotReplayableError: the model is not a chain of blocks.
    """
    plain = {target.name: target for target in targets if target.num_experts is None}
    run = _Run(plain, row_bits, settings, token_weights or {}, progress)
    with evaluation_mode([model]), torch.no_grad():
        chunk = chunk_samples(targets[0].weight.device, samples.shape[1])
        blocks, hidden = record_blocks(
            find_blocks(model, list(plain)), lambda ids: model_logits("the model", model, ids), samples, chunk
        )
        streams = _Streams(hidden, list(hidden))
        for block in blocks:
            run.round_block(block, streams, last=block is blocks[-1])
    return run.rounded


@dataclass
class _Streams:
    """Hidden states (B, L, D) of every chunk at the next block, in the original and in the quantized model."""

    original: list[Tensor]
    quantized: list[Tensor]


@dataclass(frozen=True)
class _Inputs:
    """Layers of a block that read the same input, in the order of their first calls.

    Attributes:
        names: the layers.
        residual: whether the (only) layer's output is added to a residual stream.
    """

    names: list[str]
    residual: bool


@dataclass
class _Moments:
    """Sums over tokens, weighted: x~ x~ᵀ and x x~ᵀ (K, K), (r - r~) x~ᵀ (N, K) or None; all float32."""

    hessian: Tensor
    cross: Tensor
    residual: Tensor | None


@dataclass
class _Run:
    """What stays the same from block to block, and the layers rounded so far."""

    targets: Mapping[str, Target]
    row_bits: Mapping[str, Tensor]
    settings: SequentialRounding
    token_weights: Mapping[str, Tensor]
    progress: Progress | None
    rounded: dict[str, RoundedWeight] = field(default_factory=dict)

    def round_block(self, block: Block, streams: _Streams, last: bool) -> None:
        """Round the layers of one block in the order in which they run, then move both streams past it."""
        twin = copy.deepcopy(block.module)
        weights = {n: t.weight for n, t in self.targets.items() if n.startswith(f"{block.name}.")}
        int8 = QuantizedInputs(self.settings.group_size, self.settings.per_token)
        order = _inputs_in_order(block, weights, streams.original[0][:1])
        following: list[Tensor] = []  # what the original block gives, from the run that meets its last input
        for inputs in order:
            outputs = following if inputs is order[-1] and not last else None
            moments = self._moments(block, twin, int8, inputs, streams, outputs)
            for name in inputs.names:
                self.rounded[name] = self._round(name, moments)
                weight = _twin_weight(block, twin, name)
                rows = self.rounded[name].dequantize().to(weight.dtype)
                weight.data.copy_(rows.T if self.targets[name].transposed else rows)
                int8.add(weight)
                if self.progress is not None:
                    self.progress(self.rounded, name)
        if last:
            return  # nobody reads what leaves the last block
        streams.original = following or [block.run(block.module, hidden) for hidden in streams.original]
        with int8:
            streams.quantized = [block.run(twin, hidden) for hidden in streams.quantized]

    def _round(self, name: str, moments: _Moments) -> RoundedWeight:
        """Refit, GPTQ and refinement of one layer."""
        target, settings = self.targets[name], self.settings
        bits = self.row_bits[name].to(moments.hessian.device)
        wanted, note = refit_target(
            target.rows.float(),
            moments.hessian,
            moments.cross,
            settings.refit,
            settings.percdamp,
            moments.residual,
        )
        result = gptq_round(wanted, bits, settings.group_size, moments.hessian, percdamp=settings.percdamp)
        if result.method == "gptq":
            result = refine_rounding(
                wanted, result, bits, moments.hessian, settings.refine, settings.percdamp
            )
            result = replace(result, method="sequential")
        return replace(result, note="; ".join(filter(None, (note, result.note))))

    def _moments(
        self,
        block: Block,
        twin: nn.Module,
        int8: QuantizedInputs,
        inputs: _Inputs,
        streams: _Streams,
        outputs: list[Tensor] | None,
    ) -> _Moments:
        """Sums over all tokens of one input, in the original and in the quantized model.

        ``outputs`` is filled with what the original block gives, where it is asked for.
        """
        name, settings = inputs.names[0], self.settings
        rows, device = self.targets[name].rows, self.targets[name].weight.device
        out_features, in_features = rows.shape
        moments = _Moments(
            torch.zeros(in_features, in_features, device=device),
            torch.zeros(in_features, in_features, device=device),
            torch.zeros(out_features, in_features, device=device) if inputs.residual else None,
        )
        first = 0
        for original, quantized in zip(streams.original, streams.quantized, strict=True):
            weight, rounded = self.targets[name].weight, _twin_weight(block, twin, name)
            x, r = _observe(block, block.module, {name: weight}, original, inputs.residual, outputs)
            with int8:
                x_q, r_q = _observe(block, twin, {name: rounded}, quantized, inputs.residual)
            x_q = fake_quantize(x_q, settings.group_size, settings.per_token)
            weighted = self._weighted(name, x_q, first, len(original))
            first += len(original)
            with token_sums(weight.dtype):
                moments.hessian.addmm_(weighted.T, x_q)
                moments.cross.addmm_(x.T, weighted)
                if moments.residual is not None and r is not None and r_q is not None:
                    moments.residual.addmm_((r - r_q).T, weighted)
        return moments

    def _weighted(self, name: str, x: Tensor, first: int, samples: int) -> Tensor:
        """Inputs (T, K) times the weights of their tokens."""
        weights = self.token_weights.get(name)
        if weights is None:
            return x
        return x * weights[first : first + samples].to(x).reshape(-1, 1)


def _twin_weight(block: Block, twin: nn.Module, name: str) -> Tensor:
    return twin.get_parameter(name.removeprefix(f"{block.name}."))


def _inputs_in_order(block: Block, weights: Mapping[str, Tensor], hidden: Tensor) -> list[_Inputs]:
    """The block's layers in the order of their calls; layers with one input together."""
    calls: list[LinearCall] = []
    with ResidualAdds(weights, calls.append) as adds:
        block.run(block.module, hidden)
    order: list[list[str]] = []
    last: Tensor | None = None
    seen: set[str] = set()
    for call in calls:
        if call.name not in seen:
            seen.add(call.name)
            if call.source is last:
                order[-1].append(call.name)
            else:
                order.append([call.name])
        last = call.source
    return [_Inputs(names, residual=len(names) == 1 and names[0] in adds.residuals) for names in order]


class _Reached(Exception):
    """Stops a block at the layer that is asked about."""


def _observe(
    block: Block,
    module: nn.Module,
    weight: dict[str, Tensor],
    hidden: Tensor,
    residual: bool,
    outputs: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Input (T, K) of one layer, and the residual stream (T, N) its output is added to; both float32.

    The block is not run further than to there, unless its output is wanted in ``outputs``.
    """
    inputs: list[Tensor] = []
    streams: list[Tensor] = []

    def stop() -> None:
        if outputs is None:
            raise _Reached

    def observe(call: LinearCall) -> None:
        if not inputs:
            inputs.append(call.x.float())
            if not residual:
                stop()

    def added(_: str, stream: Tensor) -> None:
        if not streams:
            streams.append(stream.reshape(-1, stream.shape[-1]).float())
            stop()

    try:
        with ResidualAdds(weight, observe, added if residual else None):
            output = block.run(module, hidden)
        if outputs is not None:
            outputs.append(output)
    except _Reached:
        pass
    return inputs[0], streams[0] if streams else None
