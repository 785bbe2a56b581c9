"""Model card of a checkpoint (L6): README.md made from the checkpoint's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRANSFORMERS = """```python
import torchmix  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Without `import torchmix` loading stops with an error."""
_MODULE = """```python
import torchmix

model = torchmix.load_pretrained("{name}", model=skeleton)  # skeleton: the module before quantization
```"""


def model_card(
    info: Mapping[str, Any],
    name: str,
    facts: Mapping[str, str] | None = None,
    *,
    transformers: bool = True,
) -> str:
    """Markdown text for README.md.

    Args:
        info: ``CheckpointInfo.to_dict()``, or a mapping with its keys but for the shards.
        name: title, usually the directory's name.
        facts: further lines such as "KL divergence" or "calibration data" -> value.
        transformers: whether transformers can load it; other modules need a skeleton.
    """
    rows: dict[str, int] = {}
    for layer in info["layers"]:
        for bits, count in layer["rows_per_bits"].items():
            rows[bits] = rows.get(bits, 0) + count
    total = sum(rows.values())
    widths = ", ".join(f"{bits} bits: {count / total:.1%}" for bits, count in sorted(rows.items()))
    activations = (
        "token" if info["activation_group"] == "token" else f"token and group of {info['group_size']}"
    )
    lines = [
        (
            "true bits per weight",
            f"{info['bits_per_weight']:.4f} (codes, scales, zero points and row widths)",
        ),
        ("rows (output features)", widths),
        *_row_rules(info),
        ("activations", f"int8, quantized on the fly per {activations}"),
        ("size of all weight files", f"{info['checkpoint_bytes']:,} bytes"),
        ("quantized layers", f"{len(info['layers'])}, {info['coverage']:.1%} of the linear weights"),
        *(facts or {}).items(),
        ("written by", f"{info['producer']}, format version {info['format_version']}"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in lines)
    excluded = "\n".join(f"- `{entry['name']}`: {entry['reason']}" for entry in info["excluded"]) or "- none"
    return f"""---
library_name: torchmix
tags: [torchmix, quantized, mixed-precision]
---
# {name}

Quantized with torchmix: every row (output feature) of a linear weight has its own bit width.

| | |
|---|---|
{table}

## Load

{(_TRANSFORMERS if transformers else _MODULE).format(name=name)}

## Weights that are not quantized

{excluded}
"""


def _row_rules(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked of the counts of rows per width, where something was."""
    rules = []
    if info["row_multiple"] > 1:
        rules.append(("rows of each width per layer", f"multiples of {info['row_multiple']}"))
    if info["tensor_parallel"] > 1:
        rules.append(
            ("tensor parallelism", f"{info['tensor_parallel']} equal blocks of rows with equal widths")
        )
    return rules
