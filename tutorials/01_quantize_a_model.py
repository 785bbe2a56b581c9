# %% [markdown]
# # Quantize a model, step by step
#
# What `torchmix quantize` does in one command, taken apart: measure a model, plan the width of every row, look at the
# plan, quantize, compare with the original, save and load. It runs on the small model that comes with torchmix, on text
# that every Python has, in about a minute on two cores. Replace `directory` and `text` by your own.

# %%
"""Tutorial: from a model to a smaller one, step by step."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torchao.quantization import quantize_

import torchmix
from torchmix.demo import demo_model_directory, demo_texts
from torchmix.evaluation import evaluate_many
from torchmix.huggingface import load_model, load_tokenizer

directory = demo_model_directory()
text = demo_texts()  # two halves that share no paragraph
tokenizer = load_tokenizer(directory)
stored = load_model(directory)  # in bfloat16, as its file holds it: sizes are counted in this dtype
model = copy.deepcopy(stored).float()  # on a CPU, measuring is faster and more exact in float32
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## 1. Measure
#
# `calibrate` runs the model on text and scores every row of every linear layer at every width: how much would the
# model's predictions change if this row had 3, 4, 5, 6 or 8 bits? It also keeps the statistics of the layers' inputs
# (Hessians) that GPTQ rounds with. This is the slow part, and it is needed once: `calibration.save("file")` keeps it.

# %%
calibration = torchmix.calibrate(
    model, [text.calibration], tokenizer=tokenizer, num_samples=8, sequence_length=1024
)
print(f"{calibration.tokens:,} tokens of {calibration.source}")
print(f"{len(calibration.layers)} layers scored by {calibration.salience} at the widths {calibration.widths}")

# %% [markdown]
# ## 2. Plan
#
# A plan gives every row a width so that the whole stays within a budget. The budget counts everything that is stored:
# codes, scales, zero points, the widths themselves. Planning takes well under a second, so try several sizes. The
# predicted KL divergence says how far the predictions will be from the original's, in nats per token.

# %%
predicted = {}
for bits in (3.5, 4.0, 4.5, 5.0, 6.0):
    plan = calibration.plan(bits=bits)
    predicted[bits] = plan.predicted_kl
    size = torchmix.planned_checkpoint_bytes(stored, plan)
    print(
        f"{plan.bits_per_weight:.3f} bits: {size / 1e6:.2f} MB, predicted KL divergence {plan.predicted_kl:.4f}"
    )
assert list(predicted.values()) == sorted(predicted.values(), reverse=True), "more bits cost less"

# %% [markdown]
# Where do the bits go? Some layers need more than others, and inside a layer some rows do.

# %%
plan = calibration.plan(bits=4.5)
uniform = calibration.plan(widths=(4,))
for name in list(plan.layers)[:7]:
    print(f"{name:42} {plan.bits_per_weight_of(name):.2f} bits  {plan.rows_per_bits(name)}")
print(f"coverage {plan.coverage:.0%}; left as it is: {[(e.name, e.reason) for e in plan.excluded]}")
assert plan.bits_per_weight <= 4.5
assert len({plan.bits_per_weight_of(name) for name in plan.layers}) > 10, "layers differ"

# %% [markdown]
# ## 3. Quantize
#
# `quantize_` is torchao's, and works in place. Layers are rounded by GPTQ one after another, each on inputs from the
# layers quantized before it. Beside the plan of 4.5 bits we make the usual one, 4 bits for every row.

# %%
mixed, all_four = copy.deepcopy(model), copy.deepcopy(model)
quantize_(mixed, torchmix.mixllm_config(plan, calibration))
quantize_(all_four, torchmix.mixllm_config(uniform, calibration))
print(mixed.model.layers[0].mlp.down_proj)

# %% [markdown]
# ## 4. Compare
#
# On the other half of the text, in windows of 1024 tokens. KL divergence is the better judge: it sees every change of
# the predictions, also those which happen to help on this text.

# %%
token_ids = torch.tensor(tokenizer(text.evaluation, add_special_tokens=False, verbose=False)["input_ids"])
scores = evaluate_many(
    {"original": model, "4 bits": all_four, "mixed": mixed}, token_ids[: 12 * 1024 + 1], reference=model
)
for name, score in scores.items():
    same = score.top1_agreement
    print(f"{name:9} perplexity {score.perplexity:6.2f}  KL {score.kl_mean:.4f}  same top token {same:.1%}")

# %% [markdown]
# A third of a bit more, given to the right rows, halves the distance from the original. The prediction was made before
# anything was quantized, from the errors that GPTQ leaves on the calibration text; this is the other half of the text.

# %%
kl, uniform_kl = scores["mixed"].kl_mean, scores["4 bits"].kl_mean
assert kl < 0.65 * uniform_kl, f"measured 0.50 when this was written, now {kl / uniform_kl:.2f}"
assert scores["mixed"].perplexity < scores["4 bits"].perplexity
assert 0.4 < kl / predicted[4.5] < 1.6, f"measured / predicted = {kl / predicted[4.5]:.2f}"

# %% [markdown]
# ## 5. Save and load
#
# The directory holds plain tensors in safetensors files, the tokenizer, the plan and a model card. Its size is the one
# that was planned, to the byte. What is not quantized goes back to bfloat16 first, where it came from. transformers
# loads the directory too, after `import torchmix`.

# %%
ids = token_ids[None, :32]
with torch.inference_mode():
    expected = mixed(ids).logits
with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "small"
    info = torchmix.save_pretrained(mixed.to(torch.bfloat16), target, plan=plan, source=directory)
    assert info.checkpoint_bytes == torchmix.planned_checkpoint_bytes(stored, plan)
    print(f"{info.checkpoint_bytes:,} bytes: {sorted(path.name for path in target.iterdir())}")
    loaded = torchmix.load_pretrained(target, dtype=torch.float32)
with torch.inference_mode():
    assert torch.equal(loaded(ids).logits, expected), "saving and loading change nothing"
prompt = tokenizer("The castle was built in", return_tensors="pt")
output = loaded.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=20)
print(tokenizer.decode(output[0]))
