"""``Calibration`` (L5): everything that was measured once, from which any budget is planned in seconds.

Shapes: N rows, K in_features, E experts, W widths.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchmix.accounting import budget_in_bits, width_costs
from torchmix.allocation import (
    AllocationProblem,
    BitPlan,
    Exclusion,
    LayerChoices,
    LayerPlan,
    allocate,
    top_rows,
)
from torchmix.calibration_statistics import FORMAT_VERSION, KIND, LayerStatistics, check_header
from torchmix.salience import METRICS
from torchmix.selection import matches

PAPER_WIDTHS = (4, 8)
Bounds = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores and input statistics of all layers of a model.

    Attributes:
        layers: by parameter name, in the model's order.
        excluded: weights that are not quantized, with the reasons.
        widths: the widths that have scores, rising.
        group_size: inputs per scale.
        hessians: key -> float32 (K, K), (2 / T) sum of x xᵀ; layers with the same input share a key.
        tokens: calibration tokens whose scores were added up; 0 without data.
        source: where the calibration tokens came from.
        data_sha256: hash of the calibration tokens, "" without data.
        samples: int64 (S, L), the calibration tokens themselves, which sequential rounding runs on; None for data
            that went through a loss function.
        token_weights: key of a Hessian -> float16 (S, L), how much an output error at each token matters to the loss,
            mean 1 (:func:`torchmix.salience.gradient_weights`); empty where no gradients were taken.
        scored_rounding: "gptq" where scores are of the error that GPTQ leaves, "rtn" for round to nearest.
        model: weak reference to the model that was measured; None for a calibration read from a file.
    """

    layers: dict[str, LayerStatistics]
    excluded: tuple[Exclusion, ...]
    widths: tuple[int, ...]
    group_size: int
    hessians: dict[str, Tensor] = field(default_factory=dict, repr=False)
    tokens: int = 0
    source: str = "no data"
    data_sha256: str = ""
    samples: Tensor | None = field(default=None, repr=False)
    token_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    scored_rounding: str = "rtn"
    model: Callable[[], nn.Module | None] | None = field(default=None, repr=False)

    @property
    def salience(self) -> tuple[str, ...]:
        """Names of the metrics that were measured."""
        return tuple(next(iter(self.layers.values())).scores)

    def hessian(self, name: str, expert: int = 0) -> Tensor | None:
        """Hessian of a layer (of one expert), float32 (K, K); None when there is none."""
        return self.hessians.get(self.layers[name].hessian_keys[expert])

    def weights_by_layer(self) -> dict[str, Tensor]:
        """Token weights by parameter name, float16 (S, L); of the layers that have them."""
        keys = {name: layer.hessian_keys[0] for name, layer in self.layers.items()}
        return {name: self.token_weights[key] for name, key in keys.items() if key in self.token_weights}

    def experts_without_tokens(self) -> dict[str, list[int]]:
        """Experts that no calibration token reached, by layer; their scores and Hessians are substitutes."""
        dead = {
            name: [e for e, count in enumerate(layer.tokens) if not count]
            for name, layer in self.layers.items()
        }
        return {name: dead[name] for name, layer in self.layers.items() if dead[name] and any(layer.tokens)}

    def plan(
        self,
        bits: float | None = None,
        *,
        rows_at_8_bits: float | None = None,
        per_layer: bool = False,
        widths: tuple[int, ...] | None = None,
        salience: str | None = None,
        row_multiple: int = 1,
        tensor_parallel: int = 1,
        min_bits: Bounds | None = None,
        max_bits: Bounds | None = None,
        fixed: Bounds | None = None,
    ) -> BitPlan:
        """Choose a width for every row.

        Args:
            bits: budget in true bits per weight of the quantized layers, all metadata counted. Not needed when
                only one width is allowed.
            rows_at_8_bits: instead of a budget, the paper's setting: this share (0..1) of all rows, those with the
                highest 4-bit scores, gets 8 bits and the rest 4 (MixLLM, arXiv 2412.14590, Algorithm 1).
            per_layer: with ``rows_at_8_bits``, take that share of every layer instead of ranking all layers together.
            widths: widths to choose from, by default all that were scored.
            salience: metric to rank by, by default the first that was measured.
            row_multiple: rows of each width per layer come in multiples of this.
            tensor_parallel: every one of this many row blocks of a layer gets the same count of rows per width.
            min_bits, max_bits: pattern -> bound for the layers it matches; patterns as in
                :func:`torchmix.selection.select_parameters`.
            fixed: pattern -> width of all rows of the layers it matches.

        Raises:
            ValueError: no or two budgets, an infeasible budget (the message gives the feasible range), a width or
                metric that was not measured, a pattern that matches nothing.
        """
        metric = self._metric(salience)
        bounds = (min_bits or {}, max_bits or {}, fixed or {})
        asked = None if widths is None else tuple(sorted(set(widths)))
        if rows_at_8_bits is not None or per_layer:
            rules = (row_multiple, tensor_parallel) != (1, 1) or any(bounds)
            _check_paper_setting(rows_at_8_bits, bits, asked, rules)
            return self._paper_plan(metric, rows_at_8_bits or 0.0, per_layer)
        widths = asked or self.widths
        if len(widths) == 1 and bits is None and not any(bounds):
            return self._bit_plan(metric, self._uniform(widths[0]), widths, row_multiple, tensor_parallel)
        if bits is None:
            raise ValueError(
                f"a budget is needed to choose among the widths {widths}; pass for example bits=4.5"
            )
        problem = AllocationProblem(
            self._choices(metric, widths, *bounds),
            widths,
            budget_in_bits(bits, self._num_weights()),
            row_multiple,
            tensor_parallel,
        )
        allocation = allocate(problem)
        return self._bit_plan(metric, allocation.row_bits, widths, row_multiple, tensor_parallel)

    def _metric(self, salience: str | None) -> str:
        metric = salience or self.salience[0]
        if metric not in self.salience:
            raise ValueError(
                f"salience={metric!r} was not measured, this calibration holds {self.salience}; calibrate again with "
                f"salience={metric!r}"
            )
        return metric

    def _num_weights(self) -> int:
        return sum(torch.Size(layer.shape).numel() for layer in self.layers.values())

    def _uniform(self, bits: int) -> dict[str, Tensor]:
        return {
            name: torch.full(layer.rows_shape, bits, dtype=torch.uint8) for name, layer in self.layers.items()
        }

    def _columns(self, widths: tuple[int, ...]) -> list[int]:
        """Positions of ``widths`` among the scored widths."""
        missing = [bits for bits in widths if bits not in self.widths]
        if missing:
            raise ValueError(
                f"widths {missing} were not scored, this calibration holds {self.widths}; calibrate again with "
                f"widths={tuple(sorted({*self.widths, *missing}))}"
            )
        return [self.widths.index(bits) for bits in widths]

    def _choices(
        self, metric: str, widths: tuple[int, ...], min_bits: Bounds, max_bits: Bounds, fixed: Bounds
    ) -> tuple[LayerChoices, ...]:
        columns = self._columns(widths)
        for pattern in (*min_bits, *max_bits, *fixed):
            if not any(matches(name, pattern) for name in self.layers):
                raise ValueError(
                    f"the pattern {pattern!r} matches no quantized layer; names look like {next(iter(self.layers))}"
                )
        choices = []
        for name, layer in self.layers.items():
            width = _bound(name, fixed)
            row_bits = None if width is None else torch.full(layer.rows_shape, width, dtype=torch.uint8)
            choices.append(
                LayerChoices(
                    name,
                    layer.in_features,
                    width_costs(layer.in_features, widths, self.group_size),
                    layer.scores[metric][..., columns],
                    min_bits=_bound(name, min_bits),
                    max_bits=_bound(name, max_bits),
                    row_bits=row_bits,
                )
            )
        return tuple(choices)

    def _paper_plan(self, metric: str, share: float, per_layer: bool) -> BitPlan:
        column = self._columns((4,))[0]
        scores = {name: layer.scores[metric][..., column] for name, layer in self.layers.items()}
        rankings = [{name: score} for name, score in scores.items()] if per_layer else [scores]
        row_bits = {name: bits for ranking in rankings for name, bits in top_rows(ranking, share).items()}
        return self._bit_plan(metric, row_bits, PAPER_WIDTHS)

    def _bit_plan(
        self,
        metric: str,
        row_bits: Mapping[str, Tensor],
        widths: tuple[int, ...],
        row_multiple: int = 1,
        tensor_parallel: int = 1,
    ) -> BitPlan:
        layers = {
            name: LayerPlan(name, layer.shape, row_bits[name], layer.transposed, layer.fingerprint)
            for name, layer in self.layers.items()
        }
        loss = self._predicted_loss(metric, row_bits)
        kl_scale = METRICS[metric].kl_scale if metric in METRICS else None
        kl = None if loss is None or kl_scale is None or not self.tokens else kl_scale * loss / self.tokens
        return BitPlan(
            layers, self.excluded, self.group_size, widths, metric, kl, loss, row_multiple, tensor_parallel
        )

    def _predicted_loss(self, metric: str, row_bits: Mapping[str, Tensor]) -> float | None:
        """Sum of the scores at the chosen widths; None where a width has no score."""
        column_of = torch.full((9,), -1)
        for column, bits in enumerate(self.widths):
            column_of[bits] = column
        total = 0.0
        for name, layer in self.layers.items():
            columns = column_of[row_bits[name].long()]
            if bool((columns < 0).any()):
                return None
            total += float(layer.scores[metric].gather(-1, columns[..., None]).sum())
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; scores and Hessians as tensors, the rest as JSON in its header.

        The file is written under a temporary name first and renamed when complete.

        Raises:
            OSError: no permission or no space.
        """
        tensors = {f"hessian/{key}": hessian.contiguous() for key, hessian in self.hessians.items()}
        for name, layer in self.layers.items():
            for metric, scores in layer.scores.items():
                tensors[f"score/{metric}/{name}"] = scores.contiguous()
        for key, weights in self.token_weights.items():
            tensors[f"token_weights/{key}"] = weights.contiguous()
        if self.samples is not None:
            tensors["samples"] = self.samples.contiguous()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask grants; safetensors itself leaves 0600
            save_file(tensors, temporary, {"torchmix": json.dumps(self._header())})
            temporary.chmod(mode)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "widths": self.widths,
            "group_size": self.group_size,
            "salience": self.salience,
            "tokens": self.tokens,
            "source": self.source,
            "data_sha256": self.data_sha256,
            "scored_rounding": self.scored_rounding,
            "excluded": [exclusion.to_dict() for exclusion in self.excluded],
            "layers": [layer.to_header() for layer in self.layers.values()],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a calibration, another format version, or a damaged file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no such calibration file; make one with calibrate(...).save(path)"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = check_header(path, (file.metadata() or {}).get("torchmix"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return _from_parts(header, tensors)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a complete calibration file ({error}); calibrate again") from error


def _from_parts(header: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    layers = {}
    for entry in header["layers"]:
        name = entry["name"]
        scores = {metric: tensors[f"score/{metric}/{name}"] for metric in header["salience"]}
        layers[name] = LayerStatistics.from_header(entry, scores, len(header["widths"]))

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Calibration(
        layers,
        tuple(Exclusion.from_dict("excluded", entry) for entry in header["excluded"]),
        tuple(header["widths"]),
        header["group_size"],
        under("hessian/"),
        header["tokens"],
        header["source"],
        header["data_sha256"],
        tensors.get("samples"),
        under("token_weights/"),
        header.get("scored_rounding", "rtn"),
    )


def _bound(name: str, bounds: Bounds) -> int | None:
    """Value of the first pattern that matches, or None."""
    return next((value for pattern, value in bounds.items() if matches(name, pattern)), None)


def _check_paper_setting(
    share: float | None, bits: float | None, widths: tuple[int, ...] | None, rules: bool
) -> None:
    """Refuse what does not go with the paper's setting."""
    if share is None:
        raise ValueError("per_layer=True goes with rows_at_8_bits; give rows_at_8_bits=0.10, or leave it out")
    if bits is not None or widths not in (None, PAPER_WIDTHS) or rules:
        raise ValueError(
            f"rows_at_8_bits={share} fixes the widths {PAPER_WIDTHS}, the size and the rows; leave out bits ({bits}), "
            f"widths ({widths}), row_multiple, tensor_parallel, min_bits, max_bits, fixed"
        )
