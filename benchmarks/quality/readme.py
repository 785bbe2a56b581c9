"""The README's quality table and plot, from the results that are kept: ``python benchmarks/quality/readme.py``.

Replaces what stands between the markers in README.md and draws the plot; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality_wiki_llama_22m"
PLOT = RESULTS / "curve.png"
METHODS = {
    "torchmix": "torchmix",
    "MixLLM paper": "MixLLM (4 and 8 bits)",
    "GPTQ": "GPTQ, one width",
    "RTN": "RTN, one width",
}


def read(table: str) -> list[dict[str, str]]:
    """Rows of one result file, the original's first."""
    with (RESULTS / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(*values: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(values)} |"


def accuracy() -> str:
    """The standard methods and torchmix, predicted and measured."""
    original, *rows = read("accuracy")
    lines = [
        cells(
            "method",
            "bits per weight",
            "perplexity loss",
            "KL divergence",
            "predicted",
            "measured / predicted",
        ),
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["method"].startswith("torchmix")
        ratio = f"{float(row['kl_mean']) / float(row['predicted_kl']):.2f}" if ours else "-"
        predicted = row["predicted_kl"] if ours else "-"
        lines.append(
            cells(
                row["method"],
                row["bits_per_weight"],
                row["perplexity_loss"],
                row["kl_mean"],
                predicted,
                ratio,
            )
        )
    lines += [
        "",
        f"Perplexity of the original {original['perplexity']}; {rows[0]['samples']} samples of 1024 tokens;",
        f"measured on {original['machine']}, at commit {original['commit']}.",
    ]
    return "\n".join(lines)


def ablation() -> str:
    """What each part of the default is worth at 4.41 bits."""
    _, *rows = read("ablation")
    base = float(rows[0]["kl_mean"])
    lines = [cells("at 4.41 bits", "KL divergence", "change", "perplexity loss"), "|---|---|---|---|"]
    for row in rows:
        change = "-" if row is rows[0] else f"{float(row['kl_mean']) / base - 1:+.1%}"
        lines.append(cells(row["method"], row["kl_mean"], change, row["perplexity_loss"]))
    return "\n".join(lines)


BLOCKS = {"accuracy": accuracy, "ablation": ablation}


def filled(text: str) -> str:
    """The README with all blocks as the results have them."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(
            pattern, lambda found, block=block: f"{found[1]}\n{block()}\n\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have the marks of {name} once, found {count}")
    return text


def draw() -> None:
    """KL over bits of the methods."""
    from torchmix.plots import method_curves, write_figure

    points: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS.values()}
    for row in read("curve")[1:]:
        name = next(name for start, name in METHODS.items() if row["method"].startswith(start))
        points[name].append((float(row["bits_per_weight"]), float(row["kl_mean"])))
    write_figure(method_curves(points, "22M-parameter Llama, WikiText-2 test"), PLOT)


def main() -> int:
    """Write README.md and the plot, or say whether README.md is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if README.md is out of date"
    )
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        return int(after != before)
    temporary = path.with_name(".README.md.tmp")
    temporary.write_text(after, encoding="utf-8")
    temporary.replace(path)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
