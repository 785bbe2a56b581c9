"""Sequential rounding (L5): GPTQ layer after layer, on inputs from the layers that are quantized already.

A layer's Hessian is taken from what really reaches it in the quantized model, int8 activations included, and its
rounding target is refitted to give the original outputs from there (:mod:`torchmix.rounding.refit`). Two streams of
hidden states, of the original and of the quantized model, move forward block by block, so memory is bounded by one
block and the hidden states of the calibration samples.

Shapes: S samples of L tokens, D hidden size, T = L tokens of a sample, N rows, K in_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchmix.capture import Block, LinearCall, LinearCalls, find_blocks, record_blocks
from torchmix.evaluation import evaluation_mode, model_logits
from torchmix.ops import quantize_activation
from torchmix.primitives import split_groups
from torchmix.rounding import PERCDAMP, RoundedWeight, gptq_round, refit_target
from torchmix.selection import Target
from torchmix.tensor import MixedPrecisionTensor

Progress = Callable[[Collection[str], str], None]


@dataclass(frozen=True)
class SequentialRounding:
    """Settings of :func:`round_sequentially`.

    Attributes:
        group_size: inputs per scale.
        per_token: granularity of the activation scales.
        refit: shrinkage of the refit, 0 for none; 0.5 was best on held-out calibration text.
        percdamp: damping of GPTQ and of the refit.
    """

    group_size: int
    per_token: bool
    refit: float
    percdamp: float = PERCDAMP


def round_sequentially(
    model: nn.Module,
    targets: Sequence[Target],
    row_bits: Mapping[str, Tensor],
    samples: Tensor,
    settings: SequentialRounding,
    progress: Progress | None = None,
) -> dict[str, RoundedWeight]:
    """Round all 2-D weights that lie in the model's blocks; the model itself is not changed.

    Args:
        model: causal language model with its original weights.
        targets: weights to round; experts, and weights outside the blocks, are left to the caller.
        row_bits: name -> uint8 (N,).
        samples: int64 (S, L), the calibration tokens.
        settings: see :class:`SequentialRounding`.
        progress: called as ``progress(names_of_all_finished_layers, name)`` after each layer.

    Returns:
        name -> rounded weight, for the layers that were rounded.

    Raises:
        NotReplayableError: the model is not a chain of blocks.
    """
    plain = {target.name: target for target in targets if target.num_experts is None}
    with evaluation_mode([model]), torch.no_grad():
        blocks, hidden = record_blocks(
            find_blocks(model, list(plain)),
            lambda i: model_logits("the model", model, samples[i : i + 1]),
            len(samples),
        )
        rounded: dict[str, RoundedWeight] = {}
        streams = _Streams(hidden, list(hidden))
        for block in blocks:
            inside = {name: t for name, t in plain.items() if name.startswith(f"{block.name}.")}
            _round_block(block, inside, row_bits, streams, settings, rounded, progress)
    return rounded


@dataclass
class _Streams:
    """Hidden states (1, L, D) of every sample at the next block, in the original and in the quantized model."""

    original: list[Tensor]
    quantized: list[Tensor]


def _round_block(
    block: Block,
    targets: Mapping[str, Target],
    row_bits: Mapping[str, Tensor],
    streams: _Streams,
    settings: SequentialRounding,
    rounded: dict[str, RoundedWeight],
    progress: Progress | None,
) -> None:
    """Round the layers of one block in the order in which they run, then move both streams past it."""
    twin = copy.deepcopy(block.module)
    weights = {name: target.weight for name, target in targets.items()}
    for names in _layers_in_order(block, weights, streams.original[0]):
        hessian, cross = _input_moments(block, twin, targets, names[0], streams, settings)
        for name in names:
            target, bits = targets[name], row_bits[name].to(hessian.device)
            wanted, note = refit_target(
                target.rows.float(), hessian, cross, settings.refit, settings.percdamp
            )
            result = gptq_round(wanted, bits, settings.group_size, hessian, percdamp=settings.percdamp)
            method = "sequential" if result.method == "gptq" else result.method
            rounded[name] = replace(result, method=method, note="; ".join(filter(None, (note, result.note))))
            _place(twin, name.removeprefix(f"{block.name}."), target, rounded[name], bits, settings)
            if progress is not None:
                progress(rounded, name)
    streams.original = [block.run(block.module, hidden) for hidden in streams.original]
    streams.quantized = [block.run(twin, hidden) for hidden in streams.quantized]


def _layers_in_order(block: Block, weights: Mapping[str, Tensor], hidden: Tensor) -> list[list[str]]:
    """Names of the block's layers in the order of their calls; layers with one input together."""
    calls: list[LinearCall] = []
    with LinearCalls(weights, calls.append):
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
    return order


def _input_moments(
    block: Block,
    twin: nn.Module,
    targets: Mapping[str, Target],
    name: str,
    streams: _Streams,
    settings: SequentialRounding,
) -> tuple[Tensor, Tensor]:
    """H = sum of x~ x~ᵀ and G = sum of x x~ᵀ of one input: float32 (K, K) each."""
    weight = targets[name].weight
    in_twin = twin.get_parameter(name.removeprefix(f"{block.name}."))
    in_features = targets[name].rows.shape[-1]
    hessian = torch.zeros(in_features, in_features, device=weight.device)
    cross = torch.zeros_like(hessian)
    for original, quantized in zip(streams.original, streams.quantized, strict=True):
        x = _input_of(block, block.module, name, weight, original)
        x_q = _as_quantized(_input_of(block, twin, name, in_twin, quantized), settings)
        hessian.addmm_(x_q.T, x_q)
        cross.addmm_(x.T, x_q)
    return hessian, cross


class _Reached(Exception):
    """Stops a block at the layer that is asked about."""


def _input_of(block: Block, module: nn.Module, name: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """Input (T, K) of one layer in float32; the block is not run further than to there."""
    found: list[Tensor] = []

    def observe(call: LinearCall) -> None:
        found.append(call.x.float())
        raise _Reached

    try:
        with LinearCalls({name: weight}, observe):
            block.run(module, hidden)
    except _Reached:
        pass
    return found[0]


def _as_quantized(x: Tensor, settings: SequentialRounding) -> Tensor:
    """What the quantized layer computes with: float32 (T, K) after int8 quantization."""
    codes, scale, _ = quantize_activation(x, settings.group_size, settings.per_token)
    groups = split_groups(codes.float(), settings.group_size) * scale[..., None]
    return groups.flatten(1)[:, : x.shape[1]]


def _place(
    twin: nn.Module,
    name: str,
    target: Target,
    rounded: RoundedWeight,
    row_bits: Tensor,
    settings: SequentialRounding,
) -> None:
    """Put a rounded weight into the copy of the block."""
    module_name, _, parameter_name = name.rpartition(".")
    weight = MixedPrecisionTensor.from_codes(
        rounded.codes,
        rounded.scale,
        rounded.zero_point,
        row_bits,
        settings.group_size,
        target.weight.dtype,
        per_token=settings.per_token,
        transposed=target.transposed,
    )
    setattr(twin.get_submodule(module_name), parameter_name, nn.Parameter(weight, requires_grad=False))
