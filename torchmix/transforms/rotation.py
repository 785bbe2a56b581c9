"""Rotation of the residual stream (L3): spread outliers over all features without changing what the model computes.

QuaRot, arXiv 2404.00456, section 4, stage 1a (rotation R1 of SpinQuant, arXiv 2405.16406): RMSNorm without weight
commutes with any rotation R, rms(x R) = rms(x), so the residual stream h may be replaced by h R when all who write it
append R and all who read it undo R first. Nothing is left to do at run time.

Expected to help where one scale serves a whole row; with groups of 128 inputs reports are that it does not, and the
output rows of o_proj and down_proj, being mixed, all become equally important.

Shapes: V vocabulary, D hidden size, N out_features of a reader, M in_features of a writer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmix.transforms.model_map import ModelMap, map_model

_ROWS_AT_ONCE = 8192  # bounds the float64 copies of a large vocabulary


def hadamard_matrix(size: int, seed: int = 0) -> Tensor:
    """A random rotation with entries as equal as possible: float64 (size, size), orthogonal.

    For powers of two diag(±1) H / sqrt(size), with H the Hadamard matrix of Sylvester's construction
    H_2n = [[H_n, H_n], [H_n, -H_n]] and random signs: all entries are ±1 / sqrt(size). For other sizes a random
    orthogonal matrix instead (Q of the QR decomposition of a normal matrix, signs so that it is uniformly
    distributed), whose entries are only of equal variance.

    Args:
        size: D.
        seed: of the signs or of the normal matrix; same seed, same matrix.

    Raises:
        ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size={size} of a rotation must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1):
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        orthogonal, triangle = torch.linalg.qr(normal)
        return orthogonal * triangle.diagonal().sign()
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size, 1), generator=generator).double() * 2 - 1
    return signs * matrix / size**0.5


@torch.no_grad()
def rotate_residual_stream(model: nn.Module, seed: int = 0) -> Tensor:
    """Fold every norm's weight into its readers and rotate the residual stream; changes ``model``.

    The model must have Llama's modules (see :func:`torchmix.transforms.map_model`). A head tied to the embedding
    gets its own weight, because the final norm goes into the head alone; ``config.tie_word_embeddings`` is then
    set to False. All norm weights become 1.

    The rewrite is exact but for one rounding of each weight from float64 to its own dtype (relative 2⁻²⁴ in float32,
    2⁻⁸ in bfloat16) and for the other order of the sums at run time.

    Args:
        model: a causal language model with plain float weights; pass a copy to keep the original.
        seed: of the rotation.

    Returns:
        R, float64 (D, D): hidden states of the new model are those of the old one times R.

    Raises:
        ValueError: the model is not built like Llama; the message says what is missing.
    """
    parts = map_model(model)
    _untie(model, parts)
    rotation = hadamard_matrix(parts.hidden_size, seed)
    _multiply(parts.embedding.weight, rotation)
    for branch in parts.branches:
        _fuse_norm(branch.norm, branch.readers)
        for reader in branch.readers:
            _multiply(reader.weight, rotation)  # W R: undoes R
        _multiply(branch.writer.weight.T, rotation)  # Rᵀ W: appends R
        if branch.writer.bias is not None:
            _multiply(branch.writer.bias[None], rotation)
    _fuse_norm(parts.final_norm, (parts.head,))
    _multiply(parts.head.weight, rotation)
    return rotation


def _untie(model: nn.Module, parts: ModelMap) -> None:
    """Give the head its own weight."""
    if parts.head.weight is not parts.embedding.weight:
        return
    parts.head.weight = nn.Parameter(
        parts.head.weight.detach().clone(), requires_grad=parts.head.weight.requires_grad
    )
    config: Any = getattr(model, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False


def _fuse_norm(norm: nn.Module, readers: tuple[nn.Linear, ...]) -> None:
    """W <- W diag(weight of the norm), which becomes 1."""
    factors = norm.get_parameter("weight")
    for reader in readers:
        for rows in reader.weight.split(_ROWS_AT_ONCE):
            rows.copy_(rows.double() * factors.double().to(rows.device))
    factors.fill_(1.0)


def _multiply(rows: Tensor, rotation: Tensor) -> None:
    """rows <- rows R in place, in float64."""
    rotation = rotation.to(rows.device)
    for part in rows.split(_ROWS_AT_ONCE):
        part.copy_(part.double() @ rotation)
