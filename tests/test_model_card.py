"""The model card: numbers, excluded weights, and how to load."""

from __future__ import annotations

from typing import Any

import pytest

from torchmix.model_card import model_card

INFO: dict[str, Any] = {
    "bits_per_weight": 4.51234,
    "checkpoint_bytes": 1234567,
    "coverage": 0.975,
    "format_version": 1,
    "producer": "torchmix 0.1.0",
    "group_size": 64,
    "row_multiple": 1,
    "tensor_parallel": 1,
    "activation_group": "group",
    "layers": [
        {"name": "a.weight", "rows_per_bits": {"4": 60, "8": 10}},
        {"name": "b.weight", "rows_per_bits": {"4": 30}},
    ],
    "excluded": [{"name": "lm_head.weight", "reason": "output head"}],
}


def test_every_number_is_there():
    text = model_card(INFO, "tiny-4.5", {"KL divergence": "0.01 nats per token"})
    assert text.startswith("---\nlibrary_name: torchmix\n")
    for line in (
        "# tiny-4.5",
        "| true bits per weight | 4.5123 (codes, scales, zero points and row widths) |",
        "| rows (output features) | 4 bits: 90.0%, 8 bits: 10.0% |",
        "| activations | int8, quantized on the fly per token and group of 64 |",
        "| size of all weight files | 1,234,567 bytes |",
        "| quantized layers | 2, 97.5% of the linear weights |",
        "| KL divergence | 0.01 nats per token |",
        "| written by | torchmix 0.1.0, format version 1 |",
        "- `lm_head.weight`: output head",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("transformers", "line"),
    [
        (True, 'model = AutoModelForCausalLM.from_pretrained("x{y}")'),
        (
            False,
            'model = torchmix.load_pretrained("x{y}", model=skeleton)  # skeleton: the module before quantization',
        ),
    ],
)
def test_how_to_load(transformers, line):
    lines = model_card(INFO, "x{y}", transformers=transformers).splitlines()
    assert line in lines
    start = lines.index("```python")
    compile("\n".join(lines[start + 1 : lines.index("```", start)]), "card", "exec")


def test_rules_for_rows_are_named_where_there_are_any():
    assert "multiples of" not in model_card(INFO, "x")
    assert "parallelism" not in model_card(INFO, "x")
    text = model_card(INFO | {"row_multiple": 16, "tensor_parallel": 2}, "x")
    assert "| rows of each width per layer | multiples of 16 |" in text
    assert "| tensor parallelism | 2 equal blocks of rows with equal widths |" in text


def test_one_scale_per_token_and_nothing_excluded():
    text = model_card(INFO | {"activation_group": "token", "excluded": []}, "x")
    assert "int8, quantized on the fly per token |" in text
    assert text.endswith("## Weights that are not quantized\n\n- none\n")
