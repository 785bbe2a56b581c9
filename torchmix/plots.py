"""Figures from tables of numbers (L10): the only module that imports matplotlib, inside functions.

A function takes rows (mappings from names to numbers) and returns a ``matplotlib.figure.Figure`` with an Agg canvas
of its own; pyplot and its global state are not used. Colours are those of Okabe and Ito (2008), which people with
any kind of colour vision can tell apart; lines differ in marker and dash as well.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_BLUE, _VERMILION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": _VERMILION, "linestyle": "-", "marker": "s"},
    {"color": _BLUE, "linestyle": "--", "marker": "o"},
    {"color": _GREEN, "linestyle": "-.", "marker": "^"},
    {"color": _GREY, "linestyle": ":", "marker": "v"},
)
_SERIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "predicted_kl",
        "predicted",
        {"color": _BLUE, "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    ),
    ("measured_kl", "measured", {"color": _VERMILION, "linestyle": "-", "marker": "s"}),
)


def check_matplotlib() -> None:
    """Raise ``ImportError`` with the way out where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('drawing needs matplotlib; install it with: pip install "torchmix[plots]"')


def quality_curve(rows: Sequence[Mapping[str, float | None]], title: str = "") -> Figure:
    """KL divergence from the original over true bits per weight, on a logarithmic axis.

    Args:
        rows: one size each, with the keys ``bits_per_weight`` (bits, all metadata counted), ``predicted_kl`` and
            ``measured_kl`` (nats per token). Values that are None, missing or not positive are left out.
        title: above the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a divergence.
    """
    check_matplotlib()
    series = {key: _points(rows, key) for key, _, _ in _SERIES}
    if not any(series.values()):
        raise ValueError(
            f"{len(rows)} rows and no KL divergence in them, so there is nothing to draw; predict it from data with "
            "salience fisher_token, or measure it"
        )
    return _draw([(label, series[key], style) for key, label, style in _SERIES if series[key]], title)


def method_curves(methods: Mapping[str, Sequence[tuple[float, float]]], title: str = "") -> Figure:
    """KL divergence over true bits of up to four methods, on a logarithmic axis.

    Args:
        methods: name -> (bits per weight, KL divergence in nats per token) of each size.
        title: above the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no method, or more than four.
    """
    check_matplotlib()
    if not 1 <= len(methods) <= len(_STYLES):
        raise ValueError(f"{len(methods)} methods; a figure stays readable with 1 to {len(_STYLES)}")
    return _draw(
        [
            (name, sorted(points), style)
            for (name, points), style in zip(methods.items(), _STYLES, strict=False)
        ],
        title,
    )


def _draw(curves: Sequence[tuple[str, Sequence[tuple[float, float]], dict[str, Any]]], title: str) -> Figure:
    """A figure of label, points and line style of each curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, points, style in curves:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, markersize=5, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("true bits per weight (codes, scales and all other metadata)")
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.set_title(title)
    axes.grid(visible=True, color="0.88")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _points(rows: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(bits, divergence) of the rows that can be drawn, by rising bits."""
    pairs = ((row.get("bits_per_weight"), row.get(key)) for row in rows)
    return sorted((bits, kl) for bits, kl in pairs if bits is not None and kl is not None and kl > 0)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as .png, .svg or .pdf. The file appears under its name only when it is complete.

    Raises:
        ValueError: another ending.
        OSError: no folder, no permission or no space; a file that was there before stays as it was.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"{target}: the name of a figure must end in one of {', '.join(FORMATS)}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        figure.savefig(temporary, format=target.suffix.lower().removeprefix("."))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
