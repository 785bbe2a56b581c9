"""Flags that several commands share, with their explanations, units and defaults."""

from __future__ import annotations

import argparse

from torchmix.cli.formatting import HelpFormatter

SALIENCE_NAMES = ("fisher_token", "fisher_token_rtn", "mixllm", "output_error", "fisher_diagonal")
ROUNDING_NAMES = ("gptq", "sequential", "clip", "hqq", "rtn")
WITH_HESSIANS = (None, "gptq", "sequential")  # None: sequential where there is data
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DEFAULT_WIDTHS = (3, 4, 5, 6, 8)
PAPER_WIDTHS = (4, 8)
DEFAULT_GROUP_SIZE = 128
DEFAULT_SAMPLES = 64
DEFAULT_POINTS = 20
MODEL_HELP = "directory of a transformers causal language model, or its id on the hub"


def command_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """The parser of one command: a line for the list of commands, a description, and examples at the end."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
    )


def widths(text: str) -> tuple[int, ...]:
    """ "3,4,8" -> (3, 4, 8), rising and without repetition."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers; write for example 3,4,8"
        ) from None
    if not all(2 <= value <= 8 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: widths go from 2 to 8 bits")
    return values


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text, float)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1; 0.10 means ten percent")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = _number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return int(value)


def bits(text: str) -> float:
    """A budget in bits per weight."""
    value = _number(text, float)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number of bits; 4.5 is a good start")
    return value


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def add_budget(parser: argparse.ArgumentParser) -> None:
    """How small the model becomes."""
    group = parser.add_argument_group("size (give one)")
    group.add_argument(
        "--bits",
        type=bits,
        metavar="B",
        help="budget in bits per weight of the quantized layers, with everything that is stored for them (scales, "
        "zero points, row widths) counted; not needed where --widths names a single width",
    )
    group.add_argument(
        "--rows-at-8-bits",
        type=share,
        metavar="SHARE",
        help="the setting of the MixLLM paper instead of a budget: this share (0.10 = ten percent) of all rows gets "
        "8 bits, the others 4; ranks by --salience mixllm unless told otherwise",
    )
    group.add_argument(
        "--widths",
        type=widths,
        metavar="LIST",
        help="widths in bits that a row may have, from 2 to 8 (default: "
        f"{','.join(map(str, DEFAULT_WIDTHS))}); one width alone makes all rows alike",
    )
    group.add_argument(
        "--row-multiple",
        type=positive,
        metavar="R",
        default=1,
        help="rows of each width per layer come in multiples of R, as some kernels like (default: 1)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        default=1,
        help="each of N equal blocks of a layer's rows gets the same count of rows per width, so that the layer can be "
        "cut over N devices (default: 1)",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which layers are quantized."""
    group = parser.add_argument_group("layers")
    pattern = "an exact name, a glob such as '*.mlp.*', or re: and a regular expression; repeatable"
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"quantize only layers that match: {pattern}",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers that match as they are (output head, embeddings, routers of experts and rows of fewer "
        "than 128 inputs are left by default)",
    )
    group.add_argument(
        "--group-size",
        type=positive,
        metavar="G",
        help=f"inputs that share one scale, a multiple of 8 up to 512 (default: {DEFAULT_GROUP_SIZE})",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The text that shows which rows matter."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--data",
        metavar="TEXT",
        help="text like that which the model will see: a text file, a .jsonl file (records with text or messages), "
        "a data set's name on the hub, or python-docs for Python's own documentation (for trying things out)",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="result of an earlier --save-calibration, instead of --data; any size is then planned in seconds",
    )
    group.add_argument(
        "--save-calibration",
        metavar="FILE",
        help="keep what is measured, for further sizes of the same model",
    )
    group.add_argument(
        "--samples",
        type=positive,
        default=DEFAULT_SAMPLES,
        metavar="S",
        help=f"samples to take from the text (default: {DEFAULT_SAMPLES}, or all there are)",
    )
    group.add_argument(
        "--sequence-length",
        type=positive,
        metavar="L",
        help="tokens per sample (default: 2048, or the model's context where that is less)",
    )
    group.add_argument(
        "--salience",
        choices=SALIENCE_NAMES,
        help="how rows are ranked: fisher_token, the expected rise of the loss by the row's error after GPTQ "
        "(default); fisher_token_rtn, the same after rounding to nearest; mixllm, the paper's score; output_error, the "
        "error of the layer's output; fisher_diagonal, the squared gradients of single weights as in CherryQ",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="chooses the samples; same seed, same result (default: 0)",
    )


def add_rounding(group: argparse._ArgumentGroup) -> None:
    """How weights are rounded once their widths are known."""
    group.add_argument(
        "--rounding",
        choices=ROUNDING_NAMES,
        help="sequential rounds layer after layer on inputs from the layers quantized before (default with a text); "
        "gptq lets later inputs make up for the error of earlier ones, without further passes over the text; clip "
        "searches the best scale (default without a text); hqq fits the scale so that a few large errors count little, "
        "without data; rtn rounds to the nearest code",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where and in which arithmetic."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1 ... (default: cpu)")
    group.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="arithmetic of the unquantized model (default: float32 on a CPU, elsewhere as stored)",
    )


def add_output(parser: argparse.ArgumentParser, progress: bool = True) -> None:
    """What is printed and written besides the result."""
    group = parser.add_argument_group("reports")
    group.add_argument(
        "--json",
        metavar="FILE",
        help="also write the result as JSON; - prints it instead of the text",
    )
    if progress:
        group.add_argument(
            "--quiet", action="store_true", help="show no progress and no warnings, only the result"
        )
