"""What all figures share: their style, a mean line with its band, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.comparison import Cell
from analysis.statistics import summarise
from runfolder.errors import UserError

SUFFIXES = (".png", ".pdf")
SVG = ".svg"  # for pages: only where a file is asked for by this name
# Okabe and Ito's colours, told apart by colour-blind readers; the baseline is black.
COLOURS = {
    "black": "#000000",
    "vermillion": "#D55E00",
    "blue": "#0072B2",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
}
_DASHES = ("-", "--", ":", "-.")  # a second round of colours gets the next kind of line
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "tract",  # the same bytes each time
    "text.parse_math": False,  # a name with two dollars is no formula
}
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2
EARLY = 0.2  # share of the epochs that may lie below the panel, so that the ends can be told apart


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each epoch that all n runs have; the spread is 0 for one run."""

    n: int
    epochs: tuple[int, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]


@dataclass(frozen=True)
class LineStyle:
    """How a line looks."""

    colour: str
    dashes: str = "-"
    marker: str = "o"
    width: float = 1.3


def nth_style(index: int) -> LineStyle:
    """One style after the other, different for the first 28."""
    colours = list(COLOURS.values())
    return LineStyle(colours[index % len(colours)], _DASHES[index // len(colours) % len(_DASHES)])


def in_style() -> AbstractContextManager:
    """A context in which figures are made and written."""
    return mpl.rc_context(_STYLE)


def curve_of(cell: Cell, metric: str) -> Curve:
    """A cell's runs as one curve, over the epochs that all of them have."""
    curves = [run.curve(metric) for run in cell.runs.values()]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = {epoch: [curve[epoch] for curve in curves] for epoch in shared}
    summaries = {epoch: summarise(values) for epoch, values in points.items() if all(map(math.isfinite, values))}
    means = tuple(summary.mean for summary in summaries.values())
    stds = tuple(summary.std or 0.0 for summary in summaries.values())
    return Curve(len(curves), tuple(summaries), means, stds)


def mean_line(
    axes: Axes, xs: Sequence[float], means: Sequence[float], stds: Sequence[float], style: LineStyle, **options
) -> None:
    """Means as a line, with a band of one std to either side; both are interrupted where one is nan.

    Args:
        axes: where.
        xs: ascending.
        means: one per x.
        stds: one per x.
        style: how.
        options: further ones of ``Axes.plot``, such as ``label`` and ``marker``.
    """
    means, stds = np.array(means, dtype=float), np.array(stds, dtype=float)
    axes.plot(xs, means, style.dashes, color=style.colour, lw=style.width, markersize=3, **options)
    axes.fill_between(xs, means - stds, means + stds, color=style.colour, alpha=0.2, linewidth=0)


def bottom(axes: Axes, curves: Sequence[Curve], early: float = EARLY) -> float | None:
    """The lowest point of the bands after the early share of the epochs, with a margin; None leaves the axis."""
    late = [
        mean - std
        for curve in curves
        for epoch, mean, std in zip(curve.epochs, curve.means, curve.stds, strict=True)
        if epoch > early * max(curve.epochs)
    ]
    top = axes.get_ylim()[1]
    return min(late) - 0.25 * (top - min(late)) if late and top > min(late) else None


def make_drawable(figure: Figure) -> None:
    """Replace what no font and no SVG can hold (control characters, halves of pairs) in all texts of a figure."""
    for text in figure.findobj(Text):
        drawable = _NOT_IN_XML.sub("\ufffd", text.get_text())
        if drawable != text.get_text():
            text.set_text(drawable)


def target_of(out: Path, name: str, figures: int) -> Path:
    """A figure's path without its suffix, if that is not .svg.

    Args:
        out: a folder, or the file of a single figure.
        name: the figure's in a folder.
        figures: how many there are.

    Raises:
        UserError: one file for several figures.
    """
    if out.suffix not in (*SUFFIXES, SVG):
        return out / name
    if figures > 1:
        raise UserError(f"expected --out to be a folder for {figures} figures, got {out}; choose one of them.")
    return out if out.suffix == SVG else out.with_suffix("")


def write(figure: Figure, target: Path) -> list[Path]:
    """Write a figure as PNG and PDF, or as the SVG that is asked for; returns the paths.

    Raises:
        UserError: the place cannot be written to.
    """
    paths = [target] if target.suffix == SVG else [target.with_name(target.name + suffix) for suffix in SUFFIXES]
    make_drawable(figure)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with in_style():
            for path in paths:
                figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == SVG else None)
    except OSError as error:
        raise UserError(f"expected --out to be a place to write to, got {target.parent} ({error.strerror}).") from None
    return paths
