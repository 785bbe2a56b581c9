"""Statistics of a layer as header and back."""

from __future__ import annotations

import json

import pytest
import torch

from torchmix.calibration_statistics import KIND, LayerStatistics, check_header


def layer(**changes):
    values = {
        "name": "w",
        "shape": (4, 16, 3),
        "transposed": True,
        "fingerprint": "f",
        "scores": {"m": torch.ones(4, 3, 2)},
        "hessian_keys": ("w[0]", "", "w[2]", "w[3]"),
        "tokens": (1, 0, 2, 3),
    }
    return LayerStatistics(**(values | changes))


def test_sizes_follow_the_orientation():
    assert (layer().in_features, layer().rows_shape) == (16, (4, 3))
    plain = layer(shape=(3, 16), transposed=False)
    assert (plain.in_features, plain.rows_shape) == (16, (3,))


def test_header_round_trip_through_json():
    before = layer()
    after = LayerStatistics.from_header(json.loads(json.dumps(before.to_header())), before.scores, 2)
    assert after.to_header() == before.to_header()
    assert after.scores is before.scores


def test_scores_of_another_shape_are_refused_by_name():
    with pytest.raises(TypeError, match=r"w: the m scores have shape \(4, 3, 2\) instead of \(4, 3, 5\)"):
        LayerStatistics.from_header(layer().to_header(), layer().scores, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a torchmix calibration"),
        ("{", "not JSON"),
        ('{"kind": "other"}', "not a torchmix calibration"),
        (json.dumps({"kind": KIND, "format_version": 99}), "version 99 is unknown"),
    ],
)
def test_other_headers_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_header("file", text)
