"""The plan of a quantized model (L3): which row of which layer gets how many bits.

A :class:`BitPlan` is made by :meth:`Calibration.plan` or read from JSON; it holds no weights and no module.
Everything in it is checked when it is made, so a plan that exists is valid. The JSON file is meant to be read
and edited by people.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchmix.accounting import check_bits, check_group_size, stored_bits
from torchmix.allocation.json_values import Types, typed, typed_values, unique_keys, write_whole
from torchmix.allocation.layer_plan import Exclusion, LayerPlan
from torchmix.allocation.rules import check_counts_options, check_row_counts, check_widths

FORMAT_VERSION = 1
KIND = "torchmix.BitPlan"
NO_SALIENCE = "none"  # the salience of a plan whose widths do not come from scores


@dataclass(frozen=True, repr=False)
class BitPlan:
    """Row widths of all quantized layers of a model, and what they are predicted to cost.

    layers: by name, in the model's order.
    excluded: linear weights that are not quantized, with the reason.
    group_size: inputs that share a scale.
    widths: the widths that rows could choose from, rising; every row has one of them.
    salience: the score behind the choice, ``"none"`` where there was none.
    predicted_kl: KL divergence from the original model per token in nats; None where it cannot be predicted.
    predicted_loss: sum of the scores at the chosen widths; None without scores.
    row_multiple, tensor_parallel: what the counts of rows keep to, see
        :func:`torchmix.allocation.rules.check_row_counts`.

    Raises ``ValueError`` or ``TypeError`` naming layer, rule and value where something does not fit.
    """

    layers: dict[str, LayerPlan]
    excluded: tuple[Exclusion, ...]
    group_size: int
    widths: tuple[int, ...]
    salience: str
    predicted_kl: float | None
    predicted_loss: float | None
    row_multiple: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_widths(self.widths)
        check_counts_options(self.row_multiple, self.tensor_parallel)
        self._check_predictions()
        self._check_names()
        for layer in self.layers.values():
            self._check_layer(layer)

    def _check_predictions(self) -> None:
        for name in ("predicted_kl", "predicted_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{name}={value!r} must be a finite number from 0 up; use None if it is not known"
                )

    def _check_names(self) -> None:
        if not self.layers:
            raise ValueError(
                f"a plan needs at least one layer, got none ({len(self.excluded)} excluded); widen include"
            )
        for key, layer in self.layers.items():
            if key != layer.name:
                raise ValueError(f"{key}: the layer under this key calls itself {layer.name!r}; use one name")
        seen = set(self.layers)
        for exclusion in self.excluded:
            if exclusion.name in seen:
                raise ValueError(f"{exclusion.name}: listed twice among layers and excluded; keep one entry")
            seen.add(exclusion.name)

    def _check_layer(self, layer: LayerPlan) -> None:
        for bits in layer.rows_per_bits():
            if bits not in self.widths:
                raise ValueError(
                    f"{layer.name}: has rows of {bits} bits, but widths={tuple(self.widths)}; add {bits} to "
                    "widths or change these rows"
                )
        check_row_counts(layer.name, layer.row_bits, self.row_multiple, self.tensor_parallel)

    def __repr__(self) -> str:
        return (
            f"BitPlan({len(self.layers)} layers, {self.bits_per_weight:.4f} bits per weight, "
            f"widths={self.widths}, salience={self.salience!r}, {len(self.excluded)} excluded)"
        )

    @property
    def quantized_weights(self) -> int:
        """Number of weights of all quantized layers."""
        return sum(layer.num_weights for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """All stored bits (codes, scales, zero points, row widths, padding) per quantized weight."""
        return sum(map(self.stored_bits_of, self.layers)) / self.quantized_weights

    @property
    def coverage(self) -> float:
        """Quantized weights / (linear weights minus what a listed default or the user excluded), 0 to 1."""
        missed = sum(exclusion.weights for exclusion in self.excluded if exclusion.counts_against_coverage)
        return self.quantized_weights / (self.quantized_weights + missed)

    def layer(self, name: str) -> LayerPlan:
        """The plan of one layer.

        Raises:
            ValueError: the plan has no layer of this name.
        """
        if name not in self.layers:
            reason = next((e.reason for e in self.excluded if e.name == name), "unknown name")
            raise ValueError(
                f"{name}: not a quantized layer of this plan ({reason}); its names are in plan.layers"
            )
        return self.layers[name]

    def stored_bits_of(self, name: str) -> int:
        """All stored bits of one layer."""
        layer = self.layer(name)
        return stored_bits(layer.row_bits, layer.in_features, self.group_size)

    def bits_per_weight_of(self, name: str) -> float:
        """All stored bits of one layer per weight of it."""
        return self.stored_bits_of(name) / self.layer(name).num_weights

    def rows_per_bits(self, name: str) -> dict[int, int]:
        """Number of rows of one layer at each width that occurs in it, widths rising."""
        return self.layer(name).rows_per_bits()

    def with_uniform_bits(self, bits: int) -> BitPlan:
        """The same layers with every row at ``bits``; nothing is predicted for it.

        Raises:
            ValueError: ``bits`` outside 2 to 8.
        """
        check_bits(bits)
        layers = {
            name: replace(layer, row_bits=torch.full_like(layer.row_bits, bits))
            for name, layer in self.layers.items()
        }
        return replace(
            self, layers=layers, widths=(bits,), salience=NO_SALIENCE, predicted_kl=None, predicted_loss=None
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; :meth:`from_dict` reads it back."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "group_size": self.group_size,
            "widths": list(self.widths),
            "salience": self.salience,
            "predicted_kl": self.predicted_kl,
            "predicted_loss": self.predicted_loss,
            "row_multiple": self.row_multiple,
            "tensor_parallel": self.tensor_parallel,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "excluded": [exclusion.to_dict() for exclusion in self.excluded],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BitPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: another kind or format version, a missing or unknown key, a value of the wrong type or
                outside its range; the message names layer, rule and value.
        """
        _check_header(data)
        values = typed_values("plan", data, _PLAN_KEYS)
        del values["format_version"], values["kind"]
        for i, bits in enumerate(values["widths"]):
            typed("plan", f"widths[{i}]", bits, (int,))
        values["widths"] = tuple(values["widths"])
        values["layers"] = {
            name: LayerPlan.from_dict(name, layer) for name, layer in values["layers"].items()
        }
        values["excluded"] = tuple(
            Exclusion.from_dict(f"excluded[{i}]", entry) for i, entry in enumerate(values["excluded"])
        )
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears under its name only when it is complete.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitPlan:
        """Read a plan that :meth:`save` wrote, or that was edited by hand.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a valid plan; the message names file, layer, rule and value.
        """
        text = Path(path).read_bytes()
        try:
            return cls.from_dict(json.loads(text, object_pairs_hook=unique_keys))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_PLAN_KEYS: dict[str, Types] = {
    "format_version": (int,),
    "kind": (str,),
    "group_size": (int,),
    "widths": (list,),
    "salience": (str,),
    "predicted_kl": (float, int, type(None)),
    "predicted_loss": (float, int, type(None)),
    "row_multiple": (int,),
    "tensor_parallel": (int,),
    "layers": (dict,),
    "excluded": (list,),
}


def _check_header(data: object) -> None:
    """Refuse another kind of file or another version before looking at anything else."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(data, dict) or kind != KIND:
        raise ValueError(
            f"kind={kind!r}, not {KIND!r}; this is not a plan (BitPlan.save or `torchmix plan` writes one)"
        )
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"format_version={version!r} is unknown, this torchmix reads {FORMAT_VERSION}; install the "
            "torchmix that wrote the plan, or make the plan again"
        )
