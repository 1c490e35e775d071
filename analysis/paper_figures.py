"""The figures 3 to 12 of the TrAct paper (arXiv 2410.23970) from run folders.

``paper_figures.yaml`` says which runs a figure is drawn from and how. Runs that are not the
paper's are left out and named; a figure whose runs are missing in part is drawn from the others
and says how many are missing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from analysis import paper
from analysis.cache import Cache
from analysis.comparison import Cell, mixed_origins
from analysis.drawing import COLOURS, Curve, LineStyle, bottom, curve_of, in_style, mean_line
from analysis.grouping import plain
from analysis.load import Run, experiments_in, load_runs
from analysis.paper_runs import Cohort, cells_of, missing, missing_sentence
from analysis.paper_sets import figure_layout, members_of_set, set_of
from runfolder.errors import UserError

Runs = Mapping[str, Sequence[Run]]  # by experiment

ALL = "all"
_HEIGHT = 2.5  # of a panel, in inches
_WIDTHS = {1: 4.6, 2: 3.3, 3: 2.6}  # of a panel, by their number
_MOST_TICKS = 6  # of a logarithmic axis that all have their number; of more, every other one
_MARKS = 8  # on a curve, to tell it from the others without colours
_CHARACTERS = 19  # of the caption, per inch


@dataclass(frozen=True)
class Point:
    """One cohort's runs."""

    x: float | None  # None: not a choice of this cohort
    cell: Cell
    published: float | None


@dataclass(frozen=True)
class Line:
    """What has one name and one style in a panel; its points ascend in x."""

    label: str
    style: str
    level: bool
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One axes."""

    title: str
    tag: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class PaperFigure:
    """All that is drawn, as numbers."""

    name: str
    plan: dict[str, Any]  # of paper_figures.yaml
    seeds: int  # that the paper has
    panels: tuple[Panel, ...]
    used: int  # runs of the paper's that are drawn
    total: int  # runs that the paper has
    named: tuple[str, ...]  # one sentence per gap or doubt


# -- which runs -----------------------------------------------------------------------------------


def figure_names() -> list[str]:
    """The numbers of the figures."""
    return sorted(figure_layout()["figures"], key=int)


def figure_plan(name: str) -> dict[str, Any]:
    """How a figure is drawn, with all its values.

    Raises:
        UserError: no such figure.
    """
    own = figure_layout()["figures"].get(name)
    if own is None:
        known = f"{', '.join(figure_names())} or {ALL}"
        raise UserError(f"expected a figure of the paper ({known}), got {name}.")
    return (figure_plan(own["like"]) if "like" in own else {}) | own


def runs_for(names: Sequence[str], root: Path, cache: Cache | None = None) -> dict[str, list[Run]]:
    """The runs of the experiments that these figures are drawn from, as far as there are any.

    Raises:
        UserError: no such folder, or no such figure.
    """
    wanted = {set_of(figure_plan(name)["set"])["experiment"] for name in names}
    return {name: load_runs(root, name, cache)[name] for name in experiments_in(root) if name in wanted}


# -- numbers --------------------------------------------------------------------------------------


def build_figure(name: str, runs: Runs) -> PaperFigure:
    """All numbers of a figure.

    Args:
        name: its number.
        runs: {experiment: runs}, as :func:`runs_for` and ``load_runs`` give them.

    Raises:
        UserError: no such figure.
    """
    plan = figure_plan(name)
    spec = set_of(plan["set"])
    named: list[str] = []
    members = members_of_set(spec, runs.get(spec["experiment"], []), named)
    cells = cells_of(members, spec["metrics"], named)
    panels = tuple(_panel(title, choice, plan, spec, cells) for title, choice in plan["panels"].items())
    names = figure_layout()["names"] | spec.get("names", {})
    named += [missing_sentence(spec, item, names) for item in missing(members, spec["seeds"])]
    used = {run.folder: run for cell in cells.values() for run in cell.runs.values()}
    named += mixed_origins(list(used.values()))
    first = next(iter(spec["metrics"]))
    drawn = sum(min(spec["seeds"], len(cells[cohort, first].runs)) for cohort in members)
    total = spec["seeds"] * len(members)
    if not used:
        named.insert(0, f"figure {name}: not drawn, because none of its {total} runs is here and usable.")
    return PaperFigure(name, plan, spec["seeds"], panels, drawn, total, tuple(dict.fromkeys(named)))


def _panel(title: str, choice: dict, plan: dict, spec: dict, cells: dict[tuple[Cohort, str], Cell]) -> Panel:
    quantity = choice.get("quantity", next(iter(spec["metrics"])))
    tag = spec["metrics"][quantity]
    wanted = choice.get("of", {}).items()
    shown = [
        c for c, own in cells if own == quantity and all(c.choices.get(key, value) == value for key, value in wanted)
    ]
    lines = []
    for label, line in plan["lines"].items():
        points = [
            Point(cohort.choices.get(plan["x"]["of"]), cells[cohort, quantity], _published(plan, cohort, quantity))
            for cohort in shown
            if cohort.arm in line["arms"]
        ]
        points.sort(key=lambda point: point.x or 0)
        lines.append(Line(label, line["style"], line.get("level", False), tuple(points)))
    return Panel(title, tag, tuple(lines))


def _published(plan: dict, cohort: Cohort, quantity: str) -> float | None:
    if plan.get("published") is None:
        return None
    number = paper.published_number(plan["published"], paper.Key(cohort.subject, cohort.arm, quantity))
    return None if number is None else number.mean


# -- drawing --------------------------------------------------------------------------------------


def draw_figure(name: str, runs: Runs) -> tuple[Figure | None, tuple[str, ...]]:
    """A figure of the paper from runs.

    Args:
        name: its number.
        runs: {experiment: runs}, as :func:`runs_for` and ``load_runs`` give them.

    Returns:
        The figure, ``None`` where not one of its runs is usable; and a sentence per gap or doubt.

    Raises:
        UserError: no such figure.
    """
    built = build_figure(name, runs)
    return (draw(built) if built.used else None), built.named


def draw(built: PaperFigure) -> Figure:
    """The panels side by side, the names of the lines above and a caption below."""
    count = len(built.panels)
    width = _WIDTHS[count] * count
    text = "\n".join(textwrap.fill(part, int(_CHARACTERS * width)) for part in caption(built))
    labels = _labels(built)
    rows = math.ceil(len(labels) * (0.5 + 0.06 * max(map(len, labels.values()))) / width)
    with in_style():
        height = _HEIGHT + 0.17 * rows + 0.12 * (text.count("\n") + 1) + 0.5
        figure = Figure((width, height), layout="constrained")
        grid = figure.subplots(1, count, squeeze=False, sharey=built.plan.get("share_y", False))
        for axes, panel in zip(grid.flat, built.panels, strict=True):
            (_finals if built.plan["kind"] == "finals" else _curves)(axes, built, panel, labels)
        for axes in grid.flat[1:] if built.plan.get("share_y") else []:
            axes.set_ylabel("")
        handles = _handles(grid.flat, bool(built.plan.get("published")))
        columns = math.ceil(len(handles) / rows)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=8)
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7)
    return figure


def _handles(panels: Iterable[Axes], published: bool) -> list[Line2D]:
    """One for each name in the panels."""
    handles = {handle.get_label(): handle for axes in panels for handle in axes.get_legend_handles_labels()[0]}
    star = Line2D([], [], linestyle="none", marker="*", markersize=8, color="grey", label="published")
    return [*handles.values(), star] if published else list(handles.values())


def caption(built: PaperFigure) -> list[str]:
    """What is drawn, and how many runs are missing, in sentences."""
    finals = built.plan["kind"] == "finals"
    parts = [f"Figure {built.name} of arXiv 2410.23970: {built.plan['title']}."]
    spread = ", band: one sample standard deviation" if built.seeds > 1 else ""
    parts.append(f"{'Final test' if finals else 'Test'} accuracy, mean over the runs (n){spread}.")
    few = any(0 < p.cell.summary.n < built.seeds for panel in built.panels for line in panel.lines for p in line.points)
    if finals and few:
        parts.append(f"Open markers: fewer than {built.seeds} runs.")
    if not finals:
        parts.append(f"The first {100 * built.plan['early']:.0f} % of the epochs may lie below a panel.")
    if built.plan.get("claim"):
        parts.append(f"The paper says: {built.plan['claim']}.")
    gap = built.total - built.used
    command = f"`python analysis/figures.py --figure {built.name}`"
    return [" ".join(parts), *([f"{gap} of {built.total} runs missing or not usable: see {command}."] if gap else [])]


def _labels(built: PaperFigure) -> dict[str, str]:
    """Each line's name with its number of runs, a range over all its points; lines without runs have none."""
    counts: dict[str, list[int]] = {}
    for line in (line for panel in built.panels for line in panel.lines):
        counts.setdefault(line.label, []).extend(point.cell.summary.n for point in line.points)
    return {label: f"{label} (n = {_range(own)})" for label, own in counts.items() if any(own)}


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _line_style(name: str) -> tuple[LineStyle, int]:
    """A style, and its place above the others."""
    own = figure_layout()["styles"][name]
    front = own.get("front", False)
    return LineStyle(COLOURS[own["colour"]], own["dashes"], own["marker"], 1.6 if front else 1.3), 3 if front else 2


def _finals(axes: Axes, built: PaperFigure, panel: Panel, labels: dict[str, str]) -> None:
    """Final value against a setting."""
    for line in panel.lines:
        if line.level:
            _level(axes, line, labels)
        elif line.label in labels:
            _joined(axes, line, labels, built.seeds)
    _words(axes, built.plan["x"], panel, "final test accuracy (%)")
    ticks = sorted({point.x for line in panel.lines if not line.level for point in line.points})
    if built.plan["x"].get("scale") == "log2":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    every = 1 if len(ticks) <= _MOST_TICKS else 2
    axes.set_xticks(ticks, [plain(tick) if i % every == 0 else "" for i, tick in enumerate(ticks)])
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)


def _joined(axes: Axes, line: Line, labels: dict[str, str], seeds: int) -> None:
    """The points of a line, interrupted where there is no run; open markers for too few runs."""
    style, place = _line_style(line.style)
    xs = [point.x for point in line.points]
    summaries = [point.cell.summary for point in line.points]
    means = [_or_nan(summary.mean) for summary in summaries]
    stds = [_or_nan(summary.std) for summary in summaries]
    mean_line(axes, xs, means, stds, style, label=labels[line.label], marker=style.marker, zorder=place)
    for x, mean, std, *around in zip(xs, means, stds, [math.nan, *stds], [*stds[1:], math.nan], strict=False):
        if all(map(math.isnan, around)):  # a point alone has no room for a band
            axes.plot([x, x], [mean - std, mean + std], color=style.colour, lw=style.width, zorder=place)
    few = [(x, s.mean) for x, s in zip(xs, summaries, strict=True) if 0 < s.n < seeds]
    if few:
        marks = {"marker": style.marker, "markersize": 4, "markerfacecolor": "white", "markeredgecolor": style.colour}
        axes.plot(*zip(*few, strict=True), linestyle="none", zorder=place + 1, **marks)


def _level(axes: Axes, line: Line, labels: dict[str, str]) -> None:
    """A horizontal line with its band, if it has runs."""
    style, place = _line_style(line.style)
    (point,) = line.points
    summary = point.cell.summary
    if summary.mean is None:
        return
    look = {"linestyle": style.dashes, "color": style.colour, "lw": style.width}
    axes.axhline(summary.mean, **look, label=labels[line.label], zorder=place)
    if summary.std is not None:
        low, high = summary.mean - summary.std, summary.mean + summary.std
        axes.axhspan(low, high, color=style.colour, alpha=0.2, linewidth=0)


def _curves(axes: Axes, built: PaperFigure, panel: Panel, labels: dict[str, str]) -> None:
    """Value while training; the published final value at its end."""
    curves = [(index, point, curve_of(point.cell, panel.tag)) for index, point in _numbered(panel)]
    drawn = [curve for _, _, curve in curves if curve.epochs]
    apart = max((curve.epochs[-1] for curve in drawn), default=0) // _MARKS + 1  # marks, in epochs
    for index, point, curve in curves:
        line = panel.lines[index]
        style, place = _line_style(line.style)
        if curve.epochs:
            numbers = (curve.epochs, curve.means, curve.stds)
            marked = [i for i, e in enumerate(curve.epochs) if (e - index * apart // len(panel.lines)) % apart == 0]
            marks = {"marker": style.marker, "markevery": marked}
            mean_line(axes, *numbers, style, label=labels[line.label], zorder=place, **marks)
        if point.published is not None:
            _star(axes, point.x, point.published, style.colour)
    low = bottom(axes, drawn, built.plan["early"])
    stars = [point.published for _, point, _ in curves if point.published is not None]
    if low is not None and stars:  # never beyond the edge, however far ours are from them
        low = min(low, min(stars) - 0.02 * (axes.get_ylim()[1] - min(stars)))
    axes.set_ylim(bottom=low)
    _ends(axes, panel, drawn)
    _words(axes, built.plan["x"], panel, "test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)


def _numbered(panel: Panel) -> list[tuple[int, Point]]:
    return [(index, point) for index, line in enumerate(panel.lines) for point in line.points]


def _star(axes: Axes, x: float, value: float, colour: str) -> None:
    marks = {"marker": "*", "markersize": 9, "markerfacecolor": colour, "markeredgecolor": "white"}
    axes.plot([x], [value], linestyle="none", zorder=5, **marks)


def _ends(axes: Axes, panel: Panel, drawn: Sequence[Curve]) -> None:
    """Where there are runs of several lengths, how long they are, above their ends."""
    tops = [(curve.epochs[-1], curve.means[-1]) for curve in drawn]
    tops += [(p.x, p.published) for line in panel.lines for p in line.points if p.published is not None]
    ends = sorted({epoch for epoch, _ in tops})
    for end in ends if len(ends) > 1 else []:
        top = max(value for epoch, value in tops if epoch == end)
        place = {"textcoords": "offset points", "xytext": (0, 6), "ha": "right", "fontsize": 7}
        axes.annotate(f"{end} epochs", (end, top), **place)
    low, high = axes.get_ylim()
    axes.set_ylim(top=high + 0.1 * (high - low) if len(ends) > 1 else None)


def _words(axes: Axes, x: dict[str, str], panel: Panel, label: str) -> None:
    if not any(point.cell.runs for line in panel.lines for point in line.points):
        axes.text(0.5, 0.5, "no usable run", transform=axes.transAxes, ha="center", va="center")
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(x["label"])
    axes.set_ylabel(label)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
