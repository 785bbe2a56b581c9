"""A plan as text and JSON."""

from __future__ import annotations

import json

import torch

from torchmix.allocation import BitPlan, Exclusion, LayerPlan
from torchmix.cli.plan_report import (
    LayerLine,
    coverage_line,
    excluded_text,
    kl_text,
    layer_table,
    plan_lines,
    plan_report,
    size_text,
)


def small_plan() -> BitPlan:
    """Two layers of one kind and one of another, rows of 4 and 8 bits."""
    layers = {}
    for name, rows in (("h.0.up.weight", 4), ("h.1.up.weight", 4), ("h.0.down.weight", 2)):
        row_bits = torch.full((rows,), 4, dtype=torch.uint8)
        row_bits[0] = 8
        layers[name] = LayerPlan(name, (rows, 128), row_bits, False, "f")
    excluded = (Exclusion("lm_head.weight", "output head", 1000, False),)
    return BitPlan(layers, excluded, 128, (4, 8), "fisher_token", 0.25, 3.0)


def test_report_has_the_keys_of_the_contract_and_is_json() -> None:
    report = json.loads(json.dumps(plan_report(small_plan())))
    assert report["layers"][0]["name"] == "h.0.up.weight"
    assert report["layers"][0]["shape"] == [4, 128]
    assert report["layers"][0]["rows_per_bits"] == {"4": 3, "8": 1}
    assert report["excluded"] == [{"name": "lm_head.weight", "reason": "output head"}]
    assert report["predicted_kl"] == 0.25
    assert report["coverage"] == 1.0
    weighted = sum(layer["bits_per_weight"] * layer["shape"][0] for layer in report["layers"]) / 10
    assert abs(weighted - report["bits_per_weight"]) < 1e-12


def test_layers_of_one_kind_share_a_line_unless_each_is_asked_for() -> None:
    lines = plan_lines(small_plan())
    together = layer_table(lines).splitlines()
    assert together[0].split() == [
        "layers",
        "shape",
        "count",
        "bits/weight",
        *["rows", "at", "4", "rows", "at", "8"],
    ]
    assert together[2].split()[0::2] == ["h.*.up.weight", "2", "6"]
    assert len(together) == 4
    assert [line.split()[0] for line in layer_table(lines, each=True).splitlines()[2:]] == [
        "h.0.up.weight",
        "h.1.up.weight",
        "h.0.down.weight",
    ]


def test_layers_of_different_shapes_never_share_a_line() -> None:
    lines = [LayerLine(f"h.{i}.up.weight", (4 + i, 128), {4: 4 + i}, 4.2) for i in range(2)]
    assert len(layer_table(lines).splitlines()) == 4


def test_every_excluded_weight_is_named_or_counted() -> None:
    few = excluded_text([("lm_head.weight", "output head"), ("h.0.gate.weight", "router of experts")])
    assert few.splitlines() == [
        "left as it is:",
        "  lm_head.weight: output head",
        "  h.0.gate.weight: router of experts",
    ]
    many = excluded_text([(f"h.{i}.gate.weight", "router of experts") for i in range(40)])
    assert many.splitlines()[1:] == ["  h.*.gate.weight (40 layers): router of experts"]
    assert excluded_text([]) == "left as it is: nothing"


def test_sizes_and_predictions_in_words() -> None:
    assert size_text(5_981_718, 10_494_472) == "5,981,718 bytes (5.98 MB), 57.0% of the original's 10.5 MB"
    assert kl_text(0.0465) == "0.0465 nats per token from the original"
    assert "--data" in kl_text(None)
    assert coverage_line(plan_lines(small_plan()), 0.5) == "3 layers, 1,280 weights; coverage 50.0%"
