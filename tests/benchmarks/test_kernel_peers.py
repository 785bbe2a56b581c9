"""Peers on a CPU: mixes of widths, operands and results against each other; torchmix runs on its reference."""

from __future__ import annotations

import pytest
import torch
from kernel_peers import (
    ACTIVATIONS,
    PEERS,
    activation_codes,
    missing_kernel,
    mix_name,
    our_layers,
    parse_mix,
    random_input,
    random_weight,
    relative_error,
    scattered_bits,
    wrong_codes,
)
from kernel_results import OURS, OURS_WITH_ACTIVATION


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("8:10,4:90", {8: 0.1, 4: 0.9}),
        ("4:90,8:10", {8: 0.1, 4: 0.9}),
        ("8", {8: 1.0}),
        ("6:25,5:25,3:50", {6: 0.25, 5: 0.25, 3: 0.5}),
    ],
)
def test_mixes(text: str, mix: dict[int, float]) -> None:
    assert parse_mix(text) == mix
    assert parse_mix(mix_name(mix)) == mix


@pytest.mark.parametrize("text", ["", "9", "1:100", "8:10,4:80", "4:50,4:50", "a:100", "8:0,4:100"])
def test_mixes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--row-bits"):
        parse_mix(text)


@pytest.mark.parametrize("num_rows", [1, 64, 1000])
def test_rows_follow_the_shares(num_rows: int) -> None:
    bits = scattered_bits(parse_mix("8:10,5:30,3:60"), num_rows)
    assert bits.dtype == torch.uint8
    assert bits.shape == (num_rows,)
    for width, share in ((8, 0.1), (5, 0.3), (3, 0.6)):
        assert abs(int((bits == width).sum()) - share * num_rows) <= 1
    assert num_rows < 1000 or not torch.equal(bits, bits.sort(descending=True).values)


@pytest.mark.parametrize("name", ["bf16", "fp8_tensor", "fp8_row", "int8_int_mm"])
def test_results_are_those_of_the_operands(name: str) -> None:
    """bf16 results are off by their rounding; integers are exact."""
    layer = PEERS[name].build(random_weight(64, 256, "cpu"))
    operands = layer.activate(random_input(32, 256, "cpu"))
    error = relative_error(layer, operands, layer.multiply(operands, layer.weights))
    assert error < (1e-6 if name == "int8_int_mm" else 3e-3)


@pytest.mark.parametrize("name", [OURS, OURS_WITH_ACTIVATION])
@pytest.mark.parametrize("mix", ["8:10,4:90", "8", "6:30,5:30,3:40"])
def test_torchmix_results_are_those_of_the_operands(name: str, mix: str) -> None:
    layer = our_layers(random_weight(200, 384, "cpu"), parse_mix(mix))[name]
    operands = layer.activate(random_input(5, 384, "cpu"))
    result = layer.multiply(operands, layer.weights)
    assert relative_error(layer, operands, result) < 3e-3
    assert relative_error(layer, operands, result * 1.1) > 0.05
    result[-1, -1] = float("nan")
    assert not relative_error(layer, operands, result) < 1


def test_weight_bytes_count_everything() -> None:
    layers = our_layers(random_weight(128, 256, "cpu"), parse_mix("4"))
    tiles = 2 * 2 * (64 * 128 // 2 + 256)  # 2 of them, of 2 groups
    assert layers[OURS].weight_bytes == tiles + 128 * 4 + 2 * 4 * 4
    assert PEERS["bf16"].build(random_weight(128, 256, "cpu")).weight_bytes == 128 * 256 * 2


def test_peers_are_measured_where_they_are_meant() -> None:
    assert PEERS["tinygemm_w4a16"].takes(16)
    assert not PEERS["tinygemm_w4a16"].takes(32)
    assert PEERS["int8_int_mm"].takes(32)
    assert not PEERS["int8_int_mm"].takes(16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_wrong_codes_are_counted(name: str) -> None:
    x = random_input(4, 256, "cpu")
    codes = activation_codes(name, ACTIVATIONS[name](x), x)
    assert wrong_codes(x, codes) == 0
    codes[3, :128] = -128
    assert wrong_codes(x, codes) == pytest.approx(0.125)


def test_a_cpu_needs_no_kernel() -> None:
    assert missing_kernel("cpu") is None
