"""The quality tables, one command each; all through one pipeline and one evaluator (``harness.py``).

    python benchmarks/quality/tables.py MODEL accuracy --data calibration.txt --text test.txt --csv accuracy.csv

Tables: accuracy (budgets and the standard methods), rows (row_multiple 16 and 64), ablation (what each part of the
default is worth), neighbours (other ways to rank rows, to round, to prepare the model), curve (KL over bits),
size (calibration samples), seeds (three calibrations), other_text (calibration text unlike the evaluation text).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import Bench, Case, Measurement, arguments, report, with_samples
from torch import nn

from torchmix import BitPlan
from torchmix.accounting import budget_in_bits, width_costs
from torchmix.allocation import promote_blocks
from torchmix.calibration import Calibration
from torchmix.capture import find_blocks
from torchmix.demo import demo_texts
from torchmix.salience import lim_scores, rsq_weights, zd_score
from torchmix.transforms import fold_smoothquant, rotate_residual_stream

BUDGETS = (4.17, 4.41, 4.845, 5.215)
BITS = 4.41  # of the ablation, calibration size, seeds and texts
PLAIN = {"rounding": "gptq", "refine": 0}  # GPTQ as published
PAPER = Measurement(salience=("mixllm",))
TUNING = {"steps": 300, "num_samples": 480}  # more text than a calibration needs
RTN_SCORES = Measurement(salience=("fisher_token_rtn",))


def accuracy() -> Iterator[Case]:
    """The standard methods and torchmix at four budgets."""
    for name, config in (
        ("RTN", {"rounding": "rtn"}),
        ("HQQ-like", {"rounding": "hqq"}),
        ("RTN with clip search", {"rounding": "clip"}),
        ("GPTQ", PLAIN),
    ):
        yield Case(f"{name}, 4 bits", {"widths": (4,)}, config)
    yield Case("MixLLM paper, 10 % of rows at 8 bits", {"rows_at_8_bits": 0.10}, PLAIN, PAPER)
    yield Case("8 bits", {"widths": (8,)}, PLAIN)
    for bits in BUDGETS:
        yield Case(f"torchmix, {bits:g} bits", {"bits": bits})
    for bits in BUDGETS:
        yield Case(f"torchmix, {bits:g} bits, tuned", {"bits": bits}, tune=TUNING)


def rows() -> Iterator[Case]:
    """What it costs that the rows of one width come in multiples."""
    for multiple in (16, 64):
        for bits in BUDGETS:
            yield Case(f"{bits:g} bits, row_multiple {multiple}", {"bits": bits, "row_multiple": multiple})


def ablation() -> Iterator[Case]:
    """The default with one part changed at a time, then what can be put on top."""
    budget = {"bits": BITS}
    yield Case("torchmix", budget)
    yield Case("without refinement", budget, {"refine": 0})
    yield Case("without refit", budget, {"refit": 0.0})
    yield Case("whole refit", budget, {"refit": 1.0})
    weighted = Measurement(token_weights=True)
    yield Case("token weights by gradients", budget, measurement=weighted)
    yield Case("token weights by attention (RSQ)", budget, measurement=weighted, adapt=attention_weights)
    yield Case("scores of round to nearest", budget, measurement=RTN_SCORES)
    yield Case("one-shot GPTQ, refined", budget, {"rounding": "gptq"})
    yield Case("one-shot GPTQ", budget, PLAIN)
    yield Case("one-shot GPTQ, scores of round to nearest", budget, PLAIN, RTN_SCORES)
    yield Case("widths 4, 8", {"bits": BITS, "widths": (4, 8)})
    yield Case("widths 4, 5, 6, 8", {"bits": BITS, "widths": (4, 5, 6, 8)})
    yield Case("one activation scale per token", budget, {"activation_group": "token"})
    yield Case("SmoothQuant first", budget, measurement=Measurement(transform="smoothquant"))
    yield Case("Hadamard rotation first", budget, measurement=Measurement(transform="rotation"))
    yield Case("tuned: scales and norms", budget, tune={**TUNING, "learn_codes": False})


def neighbours() -> Iterator[Case]:
    """Rankings of rows and of blocks at the true bits of the paper's setting; 4 and 8 bits, plain GPTQ."""
    share, bits = {"rows_at_8_bits": 0.10}, 4.84
    budget = {"bits": bits, "widths": (4, 8)}

    def ranked(name: str, metric: str, plan: dict[str, object]) -> Case:
        return Case(name, plan, PLAIN, Measurement(salience=(metric,)))

    yield ranked("paper: top 10 % of all rows", "mixllm", share)
    yield ranked("paper's score, 10 % of every layer", "mixllm", {**share, "per_layer": True})
    yield ranked("paper's score per bit", "mixllm", budget)
    yield ranked("random rows", "random", budget)
    yield ranked("output error", "output_error", budget)
    yield ranked("diagonal Fisher (CherryQ-style)", "fisher_diagonal", budget)
    yield ranked("per-token Fisher of RTN errors", "fisher_token_rtn", budget)
    yield ranked("per-token Fisher of GPTQ errors", "fisher_token", budget)
    yield Case("whole blocks by LIM", partial(whole_blocks, bits, lim), PLAIN)
    yield Case("whole blocks by ZD", partial(whole_blocks, bits, zd), PLAIN)
    for transform in ("smoothquant", "rotation"):
        measurement = Measurement(salience=("mixllm",), transform=transform)
        yield Case(f"paper after {transform}", share, PLAIN, measurement)
    yield Case("paper with HQQ-like rounding", share, {"rounding": "hqq"}, PAPER)


def curve() -> Iterator[Case]:
    """KL over true bits."""
    for bits in (3.3, 3.6, 3.9, 4.17, 4.41, 4.845, 5.215, 5.7, 6.3):
        yield Case(f"torchmix, {bits:g} bits", {"bits": bits})
    for share in (0.0, 0.05, 0.1, 0.2, 0.3, 0.45):
        yield Case(f"MixLLM paper, {share:.0%} of rows", {"rows_at_8_bits": share}, PLAIN, PAPER)
    for bits in (3, 4, 5, 6):
        yield Case(f"GPTQ, {bits} bits", {"widths": (bits,)}, PLAIN)
        yield Case(f"RTN, {bits} bits", {"widths": (bits,)}, {"rounding": "rtn"})


def size() -> Iterator[Case]:
    """How much calibration text is enough."""
    for samples in (4, 8, 16, 32, 64, 128):
        yield with_samples(Case(f"torchmix, {samples} samples", {"bits": BITS}), samples)
    yield with_samples(Case("torchmix, 128 samples, tuned", {"bits": BITS}, tune=TUNING), 128)


def seeds() -> Iterator[Case]:
    """How far three calibrations are apart, for torchmix and for the paper's algorithm."""
    for seed in range(3):
        yield Case(f"torchmix, {BITS} bits, seed {seed}", {"bits": BITS}, measurement=Measurement(seed=seed))
        paper = replace(PAPER, seed=seed)
        yield Case(f"MixLLM paper, seed {seed}", {"rows_at_8_bits": 0.10}, PLAIN, paper)


def other_text() -> Iterator[Case]:
    """Calibration on Python's documentation instead of text like the evaluation's."""
    path = Path(tempfile.gettempdir()) / "python-docs.txt"
    path.write_text(demo_texts().calibration + demo_texts().evaluation, encoding="utf-8")
    for name, data in (("text like the evaluation's", ""), ("Python's documentation", str(path))):
        own, paper = Measurement(data=data), replace(PAPER, data=data)
        yield Case(f"torchmix, {BITS} bits, on {name}", {"bits": BITS}, measurement=own)
        yield Case(f"GPTQ, 4 bits, on {name}", {"widths": (4,)}, PLAIN, own)
        yield Case(f"MixLLM paper, on {name}", {"rows_at_8_bits": 0.10}, PLAIN, paper)


TABLES: dict[str, Callable[[], Iterator[Case]]] = {
    table.__name__: table for table in (accuracy, rows, ablation, neighbours, curve, size, seeds, other_text)
}


def attention_weights(calibration: Calibration, model: nn.Module) -> Calibration:
    """Token weights by attention concentration instead of gradients (RSQ, arXiv 2503.01820)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused attention does not give its probabilities away
    weights: dict[str, list[torch.Tensor]] = {}
    assert calibration.samples is not None, "the benchmark calibrates on tokens"
    with torch.no_grad():
        for ids in calibration.samples:
            output = model(ids[None].to(model.device), output_attentions=True, use_cache=False)
            for index, attention in enumerate(output.attentions):
                weights.setdefault(f".{index}.", []).append(rsq_weights(attention[0].float()).half().cpu())
    model.set_attn_implementation(before)
    by_key = {
        key: torch.stack(rows) for key in calibration.token_weights for n, rows in weights.items() if n in key
    }
    return replace(calibration, token_weights=by_key)


def lim(calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """LIM score of each block."""
    assert calibration.samples is not None, "the benchmark calibrates on tokens"
    return lim_scores(model, find_blocks(model, list(calibration.layers)), calibration.samples[:16])


def zd(calibration: Calibration, model: nn.Module) -> dict[str, float]:
    """ZD score of each block."""
    blocks = find_blocks(model, list(calibration.layers))
    parameters = dict(model.named_parameters())
    return {
        block: zd_score([parameters[name] for name in calibration.layers if name.startswith(f"{block}.")])
        for block in blocks
    }


def whole_blocks(
    bits: float,
    score: Callable[[Calibration, nn.Module], dict[str, float]],
    calibration: Calibration,
    model: nn.Module,
) -> BitPlan:
    """Blocks at 8 bits in the order of a score, the others at 4, within a budget of true bits."""
    scores = score(calibration, model)
    weights, stored = 0, {block: {4: 0, 8: 0} for block in scores}
    for name, layer in calibration.layers.items():
        block = next(block for block in scores if name.startswith(f"{block}."))
        num_rows = torch.Size(layer.rows_shape).numel()
        weights += num_rows * layer.in_features
        for width, cost in zip(
            (4, 8), width_costs(layer.in_features, (4, 8), calibration.group_size), strict=True
        ):
            stored[block][width] += num_rows * cost
    widths = promote_blocks(scores, stored, budget_in_bits(bits, weights))
    plan = calibration.plan(widths=(4,))
    layers = {
        name: replace(layer, row_bits=torch.full_like(layer.row_bits, widths[block]))
        for name, layer in plan.layers.items()
        for block in widths
        if name.startswith(f"{block}.")
    }
    return replace(plan, layers=layers, widths=(4, 8), predicted_kl=None, predicted_loss=None)


def smoothquant(model: nn.Module, calibration: Calibration) -> None:
    """SmoothQuant with alpha 0.5, in place."""
    assert calibration.samples is not None, "the benchmark calibrates on tokens"
    fold_smoothquant(model, calibration.samples[:16])


def rotation(model: nn.Module, calibration: Calibration) -> None:
    """A random Hadamard rotation of the residual stream, in place."""
    rotate_residual_stream(model)


def main() -> None:
    """Run one table."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES, help="which table")
    options = parser.parse_args()
    bench = Bench(options, {"smoothquant": smoothquant, "rotation": rotation})
    cases = TABLES[options.table]()
    if options.table != "size":
        cases = (with_samples(case, options.samples) for case in cases)
    report(bench.run(cases), options.csv)


if __name__ == "__main__":
    main()
