"""The table and plots of low-rank training (OIALR), from run folders.

    python analysis/oialr.py --runs runs --out figures
    python analysis/oialr.py --format csv > oialr.csv

A line per setting and method: accuracy of the last epoch on the test images (mean ± sample standard deviation),
parameters in percent of the plain network's, floating point operations, seconds of a step, layers of low rank. The
plots, a figure per setting as PNG and PDF, have a row per method and three panels over training: Stability of every
layer's basis, by how much its mixing matrix R has moved since the check before, and its rank. `freeze=never` gives
the first two for a network that trains as ever, as figures of arXiv 2401.08505 have them.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.command import EXIT_NAMED, chosen_cache, exit_code
from analysis.comparison import Cell, Row, Table, build_table
from analysis.drawing import LineStyle, in_style, nth_style, target_of, write
from analysis.load import Run, load_runs
from analysis.relatives import csv_of, final_values, mean_curve, parser, seconds_per_step, words_of
from analysis.rendering import NONE, latex, markdown, readable_cell
from analysis.statistics import Summary, summarise
from runfolder import tags
from runfolder.printing import printable

EXPERIMENT = METHOD = "oialr"
_OF_LAYERS = ("stability", "mixing_distance", "rank", "full_rank")
STABILITY, DISTANCE, RANK, FULL_RANK = (f"oialr/{name}/" for name in _OF_LAYERS)
LAYERS = "oialr/low_rank_layers"
PERCENTAGES = tuple(f"oialr/{name}_percent" for name in ("trainable", "total", "inference"))
FLOPS = ("oialr/flops_step", "oialr/flops_inference")
_PLAIN = dict.fromkeys(PERCENTAGES, 100.0) | {LAYERS: 0.0}  # of plain training, which logs none of it
_PANELS = {
    STABILITY: "Stability of the basis",
    DISTANCE: "distance of the mixing matrix R",
    RANK: "rank (% of the full one)",
}
_PANEL = (3.3, 2.6)  # inches
_PALEST = 0.35  # of the first layer's line


@dataclass(frozen=True)
class Line:
    """One method in one setting."""

    setting: str
    method: str
    cell: Cell
    numbers: dict[str, Summary]  # by tag
    per_step: Summary  # seconds of training


@dataclass(frozen=True)
class Report:
    """All lines, the table of accuracies that they are from, and what is missing."""

    table: Table
    lines: tuple[Line, ...]
    named: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the figures; returns the exit code."""
    flags = parser("The table and plots of low-rank training (OIALR).")
    flags.add_argument("--format", choices=_FORMATS, default="md", help="of the table (default: %(default)s)")
    return exit_code(lambda: _run(flags.parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    report = report_of(load_runs(options.runs, EXPERIMENT, chosen_cache(options))[EXPERIMENT])
    print(printable(_FORMATS[options.format](report)), end="")
    figures = draw(report)
    for number, figure in enumerate(figures.values(), start=1):
        name = EXPERIMENT if len(figures) == 1 else f"{EXPERIMENT}_{number}"
        print(*write(figure, target_of(options.out, name, len(figures))), sep="\n", file=sys.stderr)
    if options.format == "csv":
        print(*map(printable, report.named), sep="\n", file=sys.stderr)
    return EXIT_NAMED if options.strict and report.named else 0


# -- from runs to lines -----------------------------------------------------------------


def report_of(runs: Sequence[Run]) -> Report:
    """What these runs of the experiment say."""
    table = build_table(EXPERIMENT, runs, tags.primary_metric(*(run.result for run in runs)))
    cells = [(row, label, cell) for row in table.rows for label, cell in row.cells.items() if cell.runs]
    named = [sentence for _, _, cell in cells for run in cell.runs.values() for sentence in _gaps(run)]
    lines = tuple(_line(row, label, cell) for row, label, cell in cells)
    return Report(table, lines, tuple(dict.fromkeys([*table.named, *named])))


def _gaps(run: Run) -> list[str]:
    """What a run of the method should have logged and has not."""
    if run.config["method"]["name"] != METHOD:
        return []
    missing = [tag for tag in (*PERCENTAGES, LAYERS, *FLOPS) if run.final_value(tag) is None]
    # A layer is followed from one of its checks on, and to the end of the run.
    missing += [tag for tag in _layer_tags(run) if run.final_value(tag) is None]
    if not missing:
        return []
    return [f"{run.folder}: without {', '.join(missing)} at the last epoch; evaluate it again: `{run.command}`."]


def _layer_tags(run: Run, prefixes: tuple[str, ...] = tuple(_PANELS)) -> list[str]:
    return [tag for tag in run.events.series if tag.startswith(prefixes)]


def _line(row: Row, label: str, cell: Cell) -> Line:
    runs = list(cell.runs.values())
    numbers = {tag: summarise(final_values(runs, tag)) for tag in (*PERCENTAGES, *FLOPS, LAYERS)}
    if runs[0].config["method"]["name"] == "vanilla":
        plain = _PLAIN | _operations_in_full_rank(row)
        numbers |= {tag: summarise([value] * len(runs)) for tag, value in plain.items()}
    seconds = summarise([value for value in map(seconds_per_step, runs) if value is not None])
    return Line(words_of(row, runs[0].config), label, cell, numbers, seconds)


def _operations_in_full_rank(row: Row) -> dict[str, float]:
    """Those of the plain network: of evaluations before any layer was of low rank, if there was one."""
    for run in (run for cell in row.cells.values() for run in cell.runs.values()):
        plain = [epoch for epoch, count in run.curve(LAYERS).items() if count == 0]
        found = {tag: [curve[epoch] for epoch in plain if epoch in curve] for tag in FLOPS if (curve := run.curve(tag))}
        if len(found) == len(FLOPS) and all(found.values()):
            return {tag: values[0] for tag, values in found.items()}
    return {}


# -- the table --------------------------------------------------------------------------


def caption(report: Report) -> str:
    """What the numbers are, in sentences."""
    return (
        f"{EXPERIMENT}: {report.table.metric} of the last epoch, mean ± sample standard deviation (number of runs). "
        "Trainable, total, inference: parameters in percent of the plain network's. MFLOP: millions of floating point "
        "operations for each image, a multiplication and an addition as two, of products, convolutions and attention, "
        "at the last evaluation; a step has its backward pass. Those of vanilla are what OIALR counts while all layers "
        "have full rank. Ms per step: of the whole training, without evaluations. Low-rank: layers at the end."
    )


def columns(report: Report) -> list[str]:
    """The names of the readable columns."""
    names = ["setting", "method", report.table.metric.rpartition("/")[2], "trainable %", "total %", "inference %"]
    return [*names, "MFLOP of a step", "MFLOP of inference", "ms per step", "low-rank"]


def words(report: Report, line: Line) -> list[str]:
    """A line, rounded."""
    shown = [_readable(line.numbers[tag], 1.0, 1) for tag in PERCENTAGES]
    shown += [_readable(line.numbers[tag], 1e-6, 1) for tag in FLOPS]
    shown += [_readable(line.per_step, 1000.0, 1), _readable(line.numbers[LAYERS], 1.0, 0)]
    return [line.setting, line.method, readable_cell(line.cell, report.table.metric), *shown]


def _readable(summary: Summary, factor: float, digits: int) -> str:
    if summary.mean is None:
        return NONE
    spread = "" if not summary.std else f" ± {factor * summary.std:.{digits}f}"
    return f"{factor * summary.mean:.{digits}f}{spread}"


def to_markdown(report: Report) -> str:
    """A caption, a pipe table, and what is missing or doubtful."""
    rows = [words(report, line) for line in report.lines]
    return markdown(caption(report), columns(report), rows, report.named)


def to_latex(report: Report) -> str:
    """The same as a floating table."""
    rows = [words(report, line) for line in report.lines]
    return latex(caption(report), columns(report), rows, report.named, words=2)


def to_plain(line: Line) -> dict[str, Any]:
    """A line with every digit."""
    content: dict[str, Any] = {"setting": line.setting, "method": line.method, **asdict(line.cell.summary)}
    content |= {"seeds": list(line.cell.values), "values": list(line.cell.values.values())}
    for name, summary in {**line.numbers, "seconds_per_step": line.per_step}.items():
        short = name.removeprefix("oialr/")
        content |= {short: summary.mean, f"{short}_std": summary.std, f"{short}_n": summary.n}
    return content | {"runs": [str(run.folder) for run in line.cell.runs.values()]}


def to_json(report: Report) -> str:
    """Lines, the metric and all sentences."""
    content = {"metric": report.table.metric, "caption": caption(report)}
    content |= {"lines": [to_plain(line) for line in report.lines], "named": list(report.named)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def to_csv(report: Report) -> str:
    """One line each; lists are separated by a semicolon; an empty field is undefined."""
    return csv_of([to_plain(line) for line in report.lines], first="setting")


_FORMATS: dict[str, Callable[[Report], str]] = {"md": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json}


# -- the plots --------------------------------------------------------------------------


def draw(report: Report) -> dict[str, Figure]:
    """By setting: a row per method that follows its layers, a panel per quantity; colours are kinds of layers."""
    settings: dict[str, list[Line]] = {}
    for line in report.lines:
        if _layers(line):
            settings.setdefault(line.setting, []).append(line)
    return {setting: _figure(setting, lines) for setting, lines in settings.items()}


def _layers(line: Line) -> list[str]:
    """The layers that its runs follow, in the network's order."""
    found = [tag.removeprefix(RANK) for run in line.cell.runs.values() for tag in _layer_tags(run, (RANK,))]
    return list(dict.fromkeys(found))


def _figure(setting: str, lines: Sequence[Line]) -> Figure:
    full = _full_ranks(lines)
    styles = {kind: nth_style(index) for index, kind in enumerate(dict.fromkeys(map(kind_of, full)))}
    with in_style():
        figure = Figure((_PANEL[0] * len(_PANELS), _PANEL[1] * len(lines) + 0.6), layout="constrained")
        for line, row in zip(lines, figure.subplots(len(lines), len(_PANELS), squeeze=False), strict=True):
            for axes, prefix in zip(row, _PANELS, strict=True):
                _panel(axes, prefix, line, full, styles)
            row[1].set_title(f"{line.method} ({len(line.cell.runs)})", fontsize=8)
        legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes[2 :: len(_PANELS)]]
        handles = {text: handle for legend in legends for handle, text in legend}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=7)
        title = f"{setting}: mean over seeds (number of runs); a line for each layer, the first ones pale"
        figure.suptitle(title, fontsize=9)
    return figure


def _panel(axes: Axes, prefix: str, line: Line, full: dict[str, float], styles: dict[str, LineStyle]) -> None:
    layers, runs = _layers(line), list(line.cell.runs.values())
    last = {kind_of(layer): layer for layer in layers}  # of each kind
    for index, layer in enumerate(layers, start=1):
        points = {epoch: mean for epoch, mean, _ in mean_curve(runs, prefix + layer, seconds=False)}
        if not points:  # never checked, or not by all runs
            continue
        scale, kind = 100 / full[layer] if prefix == RANK else 1.0, kind_of(layer)
        epochs = [epoch for epoch in runs[0].curve(tags.TOP1) if min(points) <= epoch <= max(points)]
        means = [scale * points.get(epoch, math.nan) for epoch in epochs]
        style, depth = styles[kind], _PALEST + (1 - _PALEST) * index / len(layers)
        options = {"label": kind if layer == last[kind] else None, "color": style.colour, "lw": style.width}
        alone = len(means) == 1 or any(map(math.isnan, means))  # points that no line would show
        axes.plot(epochs, means, style.dashes, marker="." if alone else "", markersize=3, alpha=depth, **options)
    if prefix == DISTANCE:
        axes.set_yscale("log", nonpositive="mask")  # 0 where a check follows the conversion at once
    if prefix == RANK:
        axes.set_ylim(0, 105)
    axes.set_xlabel("epoch")
    axes.set_ylabel(_PANELS[prefix])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def kind_of(layer: str) -> str:
    """The last two words of a layer's name that are no numbers.

    Example:
        >>> kind_of("blocks.3.attn.qkv")
        'attn.qkv'
    """
    return ".".join([word for word in layer.split(".") if not word.isdigit()][-2:])


def _full_ranks(lines: Sequence[Line]) -> dict[str, float]:
    """Each layer's smaller side by name."""
    found: dict[str, float] = {}
    for run in (run for line in lines for run in line.cell.runs.values()):
        for tag in _layer_tags(run, (FULL_RANK,)):
            found[tag.removeprefix(FULL_RANK)] = max(run.curve(tag).values())
    return found


if __name__ == "__main__":
    sys.exit(main())
