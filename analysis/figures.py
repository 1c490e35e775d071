"""Accuracy curves from run folders.

    python analysis/figures.py --runs runs --experiment cifar_resnet --out figures

One figure per experiment, as PNG and PDF: a panel per row of its table, a line per method (mean
over seeds) and a band of one sample standard deviation to either side.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.command import Parser, add_cache_flags, chosen_cache, exit_code
from analysis.comparison import Cell, Row, Table
from analysis.grouping import plain
from analysis.load import InputError
from analysis.statistics import summarise
from analysis.tables import tables_of

_SUFFIXES = (".png", ".pdf")
# Okabe and Ito's colours, told apart by colour-blind readers; the baseline is black.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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
}
_PANEL = (3.6, 2.8)  # inches
_MOST_COLUMNS = 3
_MOST_INSIDE = 5  # methods in a legend within the panel; more stand beside it
_EARLY = 0.2  # share of the epochs that may lie below the panel, so that the ends can be told apart
_NOTE = "the first fifth of the epochs may lie below a panel"


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each epoch that all n runs have; the spread is 0 for one run."""

    n: int
    epochs: tuple[int, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures; returns the exit code."""
    return exit_code(lambda: _run(_parser().parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    tables = tables_of(options.runs, options.experiment, cache=chosen_cache(options))
    paths = [path for table in tables for path in _write(table, _target(options.out, table, len(tables)))]
    print("\n".join(map(str, paths)))
    for sentence in (sentence for table in tables for sentence in table.named):
        print(sentence, file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = Parser(description="Test accuracy against epoch, as PNG and PDF.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", help="only this experiment (default: all)")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder or file name (default: %(default)s)")
    add_cache_flags(parser)
    return parser


def _target(out: Path, table: Table, tables: int) -> Path:
    """The figure's path without its suffix."""
    if out.suffix not in _SUFFIXES:
        return out / table.experiment
    if tables > 1:
        raise InputError(f"expected --out to be a folder for {tables} experiments, got {out}; choose one --experiment.")
    return out.with_suffix("")


def _write(table: Table, target: Path) -> list[Path]:
    if not any(cell.runs for row in table.rows for cell in row.cells.values()):
        print(f"{table.experiment}: no finished run, so no figure.", file=sys.stderr)
        return []
    figure = draw(table)
    paths = [target.with_name(target.name + suffix) for suffix in _SUFFIXES]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise InputError(f"expected --out to be a place to write to, got {target.parent} ({error.strerror}).") from None
    finally:
        plt.close(figure)
    return paths


def draw(table: Table) -> Figure:
    """A panel per row with at least one curve."""
    rows = [row for row in table.rows if any(cell.runs for cell in row.cells.values())]
    columns = min(_MOST_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    with plt.rc_context(_STYLE):
        beside = 0 if len(table.methods) <= _MOST_INSIDE else 2.0
        size = ((_PANEL[0] + beside) * columns, _PANEL[1] * lines + 0.3)
        figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axes, row in zip(grid.flat, rows, strict=False):
            _panel(axes, table, row)
        for axes in grid.flat[len(rows) :]:
            axes.remove()
        figure.suptitle(
            f"{table.experiment}: {table.metric}, mean ± one sample standard deviation; {_NOTE}", fontsize=9
        )
    return figure


def _panel(axes: Axes, table: Table, row: Row) -> None:
    curves = {label: curve_of(row.cells[label], table.metric) for label in table.methods}
    for index, (label, curve) in enumerate(curves.items()):
        if curve.epochs:
            _line(axes, curve, label, index)
    axes.set_ylim(bottom=_bottom(axes, [curve for curve in curves.values() if curve.epochs]))
    axes.set_title(", ".join(f"{name} = {plain(value)}" for name, value in row.settings.items()), fontsize=9)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if len(table.methods) <= _MOST_INSIDE:
        axes.legend(loc="lower right", fontsize=8)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def _bottom(axes: Axes, curves: Sequence[Curve]) -> float | None:
    """The lowest point of the bands after the early epochs, with a margin; None leaves the axis."""
    late = [
        mean - std
        for curve in curves
        for epoch, mean, std in zip(curve.epochs, curve.means, curve.stds, strict=True)
        if epoch > _EARLY * max(curve.epochs)
    ]
    top = axes.get_ylim()[1]
    return min(late) - 0.25 * (top - min(late)) if late and top > min(late) else None


def curve_of(cell: Cell, metric: str) -> Curve:
    """A cell's runs as one curve, over the epochs that all of them have."""
    curves = [run.curve(metric) for run in cell.runs.values()]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = {epoch: [curve[epoch] for curve in curves] for epoch in shared}
    summaries = {epoch: summarise(values) for epoch, values in points.items() if all(map(math.isfinite, values))}
    means = tuple(summary.mean for summary in summaries.values())
    stds = tuple(summary.std or 0.0 for summary in summaries.values())
    return Curve(len(curves), tuple(summaries), means, stds)


def _line(axes: Axes, curve: Curve, label: str, index: int) -> None:
    colour = _COLOURS[index % len(_COLOURS)]
    dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    marker = "o" if len(curve.epochs) <= 20 else None
    axes.plot(
        curve.epochs,
        curve.means,
        dashes,
        color=colour,
        lw=1.3,
        marker=marker,
        markersize=3,
        label=f"{label} (n = {curve.n})",
    )
    low = [mean - std for mean, std in zip(curve.means, curve.stds, strict=True)]
    high = [mean + std for mean, std in zip(curve.means, curve.stds, strict=True)]
    axes.fill_between(curve.epochs, low, high, color=colour, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    sys.exit(main())
