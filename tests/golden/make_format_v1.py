"""Writes tests/golden/format_v1: two checkpoints of format version 1 and what they must give.

    PYTHONPATH=. python tests/golden/make_format_v1.py

The files stay as they are for as long as format version 1 is read; they were written once, and running this again
is only needed if they never were released. ``expected.safetensors`` holds, for each checkpoint, the dequantized
weights (decoded below from the documented bytes, without torchmix), an input and the output.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchmix.checkpoint import save_pretrained
from torchmix.tensor import MixedPrecisionTensor

GOLDEN = Path(__file__).parent / "format_v1"
GROUP_SIZE = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Module(nn.Module):
    """All kinds of weights: (N, K) with bias, (K, N), experts (E, N, K) and (E, K, N); a tied weight; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 14)
        self.again = nn.Linear(40, 14, bias=False)
        self.again.weight = self.linear.weight
        self.conv = nn.Parameter(torch.randn(40, 14))
        self.experts = nn.Parameter(torch.randn(3, 10, 24))
        self.experts_transposed = nn.Parameter(torch.randn(2, 24, 10))
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        """(M, 40) -> (M, 92)."""
        y = [self.linear(x), self.again(x), x @ self.conv]
        y += [nn.functional.linear(x[:, :24], self.experts[e]) for e in range(3)]
        y += [x[:, :24] @ self.experts_transposed[e] for e in range(2)]
        return torch.cat(y, dim=1) + self.steps


def language_model() -> Any:
    """A Llama with one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def quantize(model: nn.Module, names: dict[str, bool], per_token: bool) -> None:
    """Round the named parameters to rows of all widths; the value says whether a parameter is transposed."""
    for name, transposed in names.items():
        weight = model.get_parameter(name).detach()
        rows = weight.transpose(-1, -2).shape[:-1] if transposed else weight.shape[:-1]
        bits = torch.tensor(WIDTHS, dtype=torch.uint8)[torch.randint(len(WIDTHS), rows)]
        quantized = MixedPrecisionTensor.from_hp(
            weight, bits, GROUP_SIZE, per_token=per_token, transposed=transposed
        )
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(quantized, requires_grad=False)
        for other in model.modules() if owner else ():  # tied ones too
            if getattr(other, leaf, None) is model.get_parameter(name) and other is not model.get_submodule(
                owner
            ):
                setattr(other, leaf, parameter)
        setattr(model.get_submodule(owner), leaf, parameter)


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    """The first ``count`` numbers of ``bits`` bits, least significant bit first."""
    number = int.from_bytes(data, "little")
    return [number >> (bits * i) & (2**bits - 1) for i in range(count)]


def decode(tensors: dict[str, Tensor], name: str, in_features: int, group_size: int) -> Tensor:
    """Dequantized rows float32 (rows, K) of one parameter, from the description of the format alone."""
    data, zero_data = tensors[name].numpy().tobytes(), tensors[name + "_zero_point"].numpy().tobytes()
    row_bits = tensors[name + "_row_bits"].flatten().tolist()
    scale = tensors[name + "_scale"].double()
    scale = scale.reshape(len(row_bits), -1)
    groups = -(-in_features // group_size)
    at = zero_at = 0
    rows = []
    for n, bits in enumerate(row_bits):
        row_bytes = -(-in_features // 8) * bits
        zero_bytes = -(-groups * bits // 8) if bits < 8 else 0
        codes = unpack(data[at : at + row_bytes], bits, in_features)
        zeros = unpack(zero_data[zero_at : zero_at + zero_bytes], bits, groups) if bits < 8 else [0] * groups
        if bits == 8:
            codes = [code - 256 if code > 127 else code for code in codes]
        values = [
            float(scale[n, k // group_size]) * (code - zeros[k // group_size]) for k, code in enumerate(codes)
        ]
        rows.append(values)
        at, zero_at = at + row_bytes, zero_at + zero_bytes
    assert (at, zero_at) == (len(data), len(zero_data)), "the rows do not fill the bytes"
    return torch.tensor(rows, dtype=torch.float64).float()


def decoded_layers(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Dequantized weights of a checkpoint in the model's shapes, by ``decode``."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    layers = {}
    for name, layer in config["layers"].items():
        shape, transposed = layer["shape"], layer.get("transposed", False)
        in_features = shape[-2] if transposed else shape[-1]
        stored = [*shape[:-2], shape[-1], shape[-2]] if transposed else shape
        rows = decode(tensors, name, in_features, config["group_size"]).reshape(stored)
        layers[name] = rows.transpose(-1, -2).contiguous() if transposed else rows
    return layers


def main() -> None:
    """Write everything anew."""
    import json

    shutil.rmtree(GOLDEN, ignore_errors=True)
    torch.manual_seed(0)
    module, llama = Module(), language_model()
    quantize(
        module,
        {"linear.weight": False, "conv": True, "experts": False, "experts_transposed": True},
        per_token=True,
    )
    linears = {f"{name}.weight": False for name, m in llama.named_modules() if isinstance(m, nn.Linear)}
    del linears["lm_head.weight"]
    quantize(llama, linears, per_token=False)
    ids = torch.randint(32, (2, 12))
    inputs = {"module": torch.randn(5, 40), "llama": ids}
    expected = {}
    with torch.no_grad():
        outputs = {"module": module(inputs["module"]), "llama": llama(ids).logits}
    for name, model in {"module": module, "llama": llama}.items():
        save_pretrained(model, GOLDEN / name, max_shard_size="8KB" if name == "llama" else "5GB")
        config = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
        layers = decoded_layers(GOLDEN / name, config)
        expected |= {f"{name}/weights/{key}": value for key, value in layers.items()}
        expected |= {f"{name}/input": inputs[name], f"{name}/output": outputs[name]}
    save_file(expected, GOLDEN / "expected.safetensors")


if __name__ == "__main__":
    main()
