"""Accuracy curves, and the figures of the paper, from run folders.

    python analysis/figures.py --runs runs --experiment cifar_resnet --out figures
    python analysis/figures.py --figure 3

One figure per experiment, as PNG and PDF (with --out FILE.svg as SVG): a panel per row of its
table, a line per method (mean over seeds) and a band of one sample standard deviation to either
side. With --figure instead the figures 3 to 12 of arXiv 2410.23970, one or all, as far as there
are runs of them.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.command import add_cache_flags, chosen_cache, exit_code
from analysis.comparison import Row, Table
from analysis.drawing import EARLY, bottom, curve_of, in_style, mean_line, nth_style, target_of, write
from analysis.grouping import plain
from analysis.paper_figures import ALL, draw_figure, figure_names, runs_for
from analysis.tables import EXIT_NAMED, tables_of
from runfolder import tags
from runfolder.errors import Parser, UserError
from runfolder.folder import typed

_PANEL = (3.6, 2.8)  # inches
_MOST_COLUMNS = 3
_LETTERS = 13  # of the title in an inch
_MOST_INSIDE = 5  # methods in a legend within the panel; more stand beside it
_MOST_MARKED = 20  # points of a curve that are marked


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures; returns the exit code."""
    return exit_code(lambda: _run(_parser().parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    named = _of_experiments(options) if options.figure is None else _of_the_paper(options)
    for sentence in named:
        print(sentence, file=sys.stderr)
    return EXIT_NAMED if options.strict and named else 0


def _of_experiments(options: argparse.Namespace) -> list[str]:
    tables = tables_of(options.runs, options.experiment, cache=chosen_cache(options))
    targets = [target_of(options.out, table.experiment, len(tables)) for table in tables]
    paths = [path for table, target in zip(tables, targets, strict=True) for path in _written(table, target)]
    print("\n".join(map(str, paths)))
    return [sentence for table in tables for sentence in table.named]


def _of_the_paper(options: argparse.Namespace) -> list[str]:
    if options.experiment is not None:
        raise UserError("expected --experiment or --figure, got both; a figure of the paper has its own experiment.")
    names = figure_names() if options.figure == ALL else [options.figure]
    runs = runs_for(names, options.runs, chosen_cache(options))
    targets = {name: target_of(options.out, f"figure{name}", len(names)) for name in names}
    named: list[str] = []
    for name, target in targets.items():
        figure, sentences = draw_figure(name, runs)
        named += sentences
        for path in [] if figure is None else write(figure, target):
            print(path)
    return list(dict.fromkeys(named))


def _parser() -> Parser:
    parser = Parser(description="Test accuracy against epoch, or a figure of the paper, as PNG and PDF.")
    parser.add_argument("--runs", type=typed, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", help="only this experiment (default: all)")
    parser.add_argument("--figure", help=f"one of the paper's, {', '.join(figure_names())} or {ALL}")
    parser.add_argument("--out", type=typed, default=Path("figures"), help="folder, or file (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if any run is missing or doubtful")
    add_cache_flags(parser)
    return parser


def _written(table: Table, target: Path) -> list[Path]:
    if any(cell.runs for row in table.rows for cell in row.cells.values()):
        return write(draw(table), target)
    print(f"{table.experiment}: no finished run, so no figure.", file=sys.stderr)
    return []


def draw(table: Table) -> Figure:
    """A panel per row with at least one curve."""
    rows = [row for row in table.rows if any(cell.runs for cell in row.cells.values())]
    columns = min(_MOST_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    with in_style():
        beside = 0 if len(table.methods) <= _MOST_INSIDE else 2.0
        size = ((_PANEL[0] + beside) * columns, _PANEL[1] * lines + 0.3)
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, row in zip(grid.flat, rows, strict=False):
            _panel(axes, table, row)
        for axes in grid.flat[len(rows) :]:
            axes.remove()
        spread = f"{table.experiment}: {table.metric}, mean ± one sample standard deviation"
        early = f"the first {EARLY:.0%} of the epochs may lie below a panel"
        title = [textwrap.fill(part, int(_LETTERS * size[0])) for part in (spread, early)]
        figure.suptitle("\n".join(title), fontsize=9)
    return figure


def _panel(axes: Axes, table: Table, row: Row) -> None:
    curves = {label: curve_of(row.cells[label], table.metric) for label in table.methods}
    for index, (label, curve) in enumerate(curves.items()):
        if curve.epochs:
            marker = "o" if len(curve.epochs) <= _MOST_MARKED else None
            numbers = (curve.epochs, curve.means, curve.stds)
            mean_line(axes, *numbers, nth_style(index), label=f"{label} (n = {curve.n})", marker=marker)
    axes.set_ylim(bottom=bottom(axes, [curve for curve in curves.values() if curve.epochs]))
    axes.set_title(", ".join(f"{name} = {plain(value)}" for name, value in row.settings.items()), fontsize=9)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)" if table.metric == tags.TOP1 else table.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if len(table.methods) <= _MOST_INSIDE:
        axes.legend(loc="lower right", fontsize=8)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
