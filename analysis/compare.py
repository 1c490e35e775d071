"""The table and the plot of the comparison of all methods, from run folders.

    python analysis/compare.py --runs runs --out figures
    python analysis/compare.py --format csv > compare.csv

A line per network, budget and method: accuracy of the last epoch on the test images (mean ± sample standard
deviation), its difference from plain training, paired by seed, the learning rate and what finding it took, and
costs. The plot, a figure per network as PNG and PDF, has accuracy against seconds of training, of the runs for a
budget in seconds, and against images, of the runs for a budget in images.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from analysis.command import EXIT_NAMED, exit_code
from analysis.comparison import Cell, Row, Table, build_table
from analysis.costs import seconds_of
from analysis.drawing import Curve, bottom, in_style, mean_line, nth_style, target_of, write
from analysis.grouping import flatten, settings
from analysis.load import Run, load_runs
from analysis.page.parts import Entry, Grid, Link, Section, picture
from analysis.relatives import chosen_cache, csv_of, mean_curve, parser, seconds_per_step, words_of
from analysis.rendering import (
    DETECTABLE,
    DIFFERENCE_FIELDS,
    NONE,
    latex,
    markdown,
    plain_difference,
    readable_cell,
    readable_detectable,
    readable_difference,
    readable_number,
    readable_p,
)
from analysis.statistics import Summary, summarise
from runfolder import tags
from runfolder.folder import RunFolder
from runfolder.printing import printable

EXPERIMENT = "compare"
_ON_PATCHES = ("patchnorm", "dual_patchnorm")
_DECIDED = ("optim.lr", "max_steps", "budget_seconds", "validation_images", "validation_from")
_PANEL = (3.8, 3.0)  # inches


@dataclass(frozen=True)
class Line:
    """One method on one network by one budget. A quantity that no run has logged is None."""

    network: str
    budget: str  # "20 epochs", "4 s"
    method: str
    cell: Cell
    rates: tuple[float, ...]  # one, unless runs of several tunings are mixed
    edge: bool  # whether the rate is the lowest or highest that was tried
    tuning_runs: int
    tuning_seconds: float  # of training and evaluation
    steps: tuple[int, ...]
    images: float | None  # seen in training
    seconds: Summary  # of training
    per_step: Summary  # seconds
    fastest: float | None  # seconds per step of the fastest run, those of the tuning among them
    peak_mib: Summary
    trainable: float | None  # parameters
    inference: float | None
    state_bytes: float | None
    extra_bytes: float | None  # more than the baseline's


@dataclass(frozen=True)
class Comparison:
    """All lines, and the table of accuracies that they are from."""

    table: Table
    lines: tuple[Line, ...]
    named: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the figures; returns the exit code."""
    flags = parser("The table and the plot of the comparison of all methods.")
    flags.add_argument("--format", choices=_FORMATS, default="md", help="of the table (default: %(default)s)")
    return exit_code(lambda: _run(flags.parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    comparison = compare(load_runs(options.runs, EXPERIMENT, chosen_cache(options))[EXPERIMENT])
    print(printable(_FORMATS[options.format](comparison)), end="")
    figures = draw(comparison)
    for network, figure in figures.items():
        target = target_of(options.out, f"compare_{network.replace(' ', '_')}", len(figures))
        print(*write(figure, target), sep="\n", file=sys.stderr)
    if options.format == "csv":
        print(*map(printable, comparison.named), sep="\n", file=sys.stderr)
    return EXIT_NAMED if options.strict and comparison.named else 0


# -- from runs to lines -----------------------------------------------------------------


def setting_of(config: dict[str, Any]) -> dict[str, Any]:
    """What runs share that are compared: all but what tuning decides; a budget instead of epochs and steps."""
    flat = settings(config)
    seconds = flat.get("budget_seconds")
    kept = {} if seconds is not None or flat.get("max_steps") is None else {"max_steps": flat["max_steps"]}
    flat = {key: value for key, value in flat.items() if key not in _DECIDED} | kept
    epochs = flat.pop("epochs")
    return flat | {"budget": f"{epochs} epochs" if seconds is None else f"{seconds:g} s"}


def accuracies(runs: Sequence[Run], *arguments: Any) -> Table:
    """The runs of the comparison itself, without those of its tuning, as :func:`build_table` has any experiment's."""
    final = [run for run in runs if not _is_tuning(run)]
    return build_table(EXPERIMENT, final, *arguments, setting_of=setting_of)


def _is_tuning(run: Run) -> bool:
    return bool((run.config or {}).get("validation_images"))


def compare(runs: Sequence[Run]) -> Comparison:
    """The comparison that these runs are."""
    table = accuracies(runs, tags.primary_metric(*(run.result for run in runs)))
    tuning: dict[str, list[Run]] = {}
    for run in runs:
        if run.config is not None and _is_tuning(run):
            tuning.setdefault(_arm(run), []).append(run)
    lines, named = [], list(table.named)
    for row in table.rows:
        own = [_line(row, label, table.baseline, tuning) for label, cell in row.cells.items() if cell.runs]
        lines, named = lines + own, named + _doubts(own)
    return Comparison(table, tuple(lines), tuple(dict.fromkeys(named)))


def _arm(run: Run) -> str:
    """What a run shares with its tuning runs: everything but seed, rate and the images held out."""
    method = {key: value for key, value in flatten(run.config["method"]).items() if key.split(".")[-1] != "seed"}
    return repr((sorted(setting_of(run.config).items(), key=str), sorted(method.items(), key=str)))


def _line(row: Row, label: str, baseline: str | None, tuning: Mapping[str, list[Run]]) -> Line:
    cell, first = row.cells[label], next(iter(row.cells[label].runs.values()))
    searched = tuning.get(_arm(first), [])
    tried = sorted({run.config["optim"]["lr"] for run in searched})
    rates = tuple(sorted({run.config["optim"]["lr"] for run in cell.runs.values()}))
    steps = tuple(sorted({run.result["steps"] for run in cell.runs.values() if run.result.get("steps")}))
    per_step = list(filter(None, map(seconds_per_step, cell.runs.values())))
    state, of_baseline = _mean(cell, tags.STATE_BYTES), None
    if baseline is not None:
        of_baseline = _mean(row.cells[baseline], tags.STATE_BYTES)
    return Line(
        network=words_of(row, first.config, without=("budget",)),
        budget=setting_of(first.config)["budget"],
        method=label,
        cell=cell,
        rates=rates,
        edge=bool(tried) and bool({tried[0], tried[-1]} & set(rates)),
        tuning_runs=len(searched),
        tuning_seconds=math.fsum(seconds_of(run) or 0.0 for run in searched),
        steps=steps,
        images=steps[0] * first.config["batch_size"] if len(steps) == 1 and first.config.get("drop_last") else None,
        seconds=summarise(_values(cell, tags.TRAIN_SECONDS)),
        per_step=summarise(per_step),
        fastest=min([*per_step, *filter(None, map(seconds_per_step, searched))], default=None),
        peak_mib=summarise(_values(cell, tags.PEAK_MIB)),
        trainable=_mean(cell, tags.TRAINABLE),
        inference=_mean(cell, tags.AT_INFERENCE),
        state_bytes=state,
        extra_bytes=None if None in (state, of_baseline) else state - of_baseline,
    )


def _values(cell: Cell, tag: str) -> list[float]:
    return [value for run in cell.runs.values() if (value := run.final_value(tag)) is not None]


def _mean(cell: Cell, tag: str) -> float | None:
    return summarise(_values(cell, tag)).mean


def _doubts(lines: Sequence[Line]) -> list[str]:
    """What a reader of a row must know beside its numbers."""
    found = []
    for line in lines:
        where = f"{line.method}, {line.network}, {line.budget}"
        if len(line.rates) > 1 or len(line.steps) > 1:
            found.append(f"{where}: runs of several rates ({line.rates}) or steps ({line.steps}); move old ones away.")
        if not line.tuning_runs:
            found.append(f"{where}: no run of its tuning is here, so nothing shows where its rate is from.")
        elif line.edge:
            found.append(
                f"{where}: its rate {line.rates[0]:g} is the lowest or highest tried, so a better one may lie beyond; "
                "tune with more (recipe.rates)."
            )
    absent = [name for name in _ON_PATCHES if lines and name not in {line.method for line in lines}]
    if absent:
        found.append(f"{lines[0].network}: without {' and '.join(absent)}, for networks that cut images into patches.")
    return found


# -- the table --------------------------------------------------------------------------


def caption(comparison: Comparison) -> str:
    """What the numbers are, in sentences."""
    table = comparison.table
    return (
        f"{EXPERIMENT}: {table.metric} of the last epoch, mean ± sample standard deviation (number of runs). "
        f"Δ: method minus {table.baseline}, paired by seed, [95 % t-interval] (pairs). p: paired t-test / exact "
        f"sign-flip test / paired t-test with Holm's adjustment over this table's {table.comparisons} comparisons. "
        f"{DETECTABLE} Rate: the best of the tuning, on held-out training images; *: at the edge of what was tried. "
        "Tuning: runs, and their seconds with evaluations; a budget in seconds also takes the speed from the other "
        "budget's. Seconds: of training, without evaluations; fastest: ms per step of the fastest run of the line and "
        "its tuning, which other work on the machine disturbs least. Peak memory: of the device, on a CPU of the whole "
        "process. Inference: parameters of the network that is evaluated. Extra state: bytes of parameters, buffers "
        f"and optimizer beyond {table.baseline}'s, between steps."
    )


def columns(comparison: Comparison) -> list[str]:
    """The names of the readable columns."""
    names = ["network", "budget", "method", comparison.table.metric.rpartition("/")[2], "Δ", "p", "min Δ", "rate"]
    names += ["tuning", "steps", "images", "seconds", "ms per step", "fastest", "peak MiB", "trainable", "inference"]
    return [*names, "extra state"]


def words(comparison: Comparison, line: Line) -> list[str]:
    """A line, rounded."""
    metric, difference = comparison.table.metric, line.cell.difference
    compared = [NONE] * 3
    if difference is not None:
        compared = [readable_difference(difference, metric), readable_p(difference)]
        compared.append(readable_detectable(difference, metric))
    return [
        line.network,
        line.budget,
        line.method,
        readable_cell(line.cell, metric),
        *compared,
        "; ".join(f"{rate:g}" for rate in line.rates) + ("*" if line.edge else ""),
        f"{line.tuning_runs} runs, {line.tuning_seconds:.0f} s" if line.tuning_runs else NONE,
        "; ".join(f"{steps:,}" for steps in line.steps) or NONE,
        _whole(line.images),
        _spread(line.seconds, 1.0, 2),
        _spread(line.per_step, 1000.0, 2),
        NONE if line.fastest is None else f"{1000 * line.fastest:.2f}",
        _spread(line.peak_mib, 1.0, 0),
        _whole(line.trainable),
        _whole(line.inference),
        NONE if line.extra_bytes is None else f"{line.extra_bytes:+,.0f} B".replace("-", "−"),
    ]


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _spread(summary: Summary, factor: float, digits: int) -> str:
    if summary.mean is None:
        return NONE
    spread = "" if summary.std is None else f" ± {factor * summary.std:.{digits}f}"
    return f"{factor * summary.mean:.{digits}f}{spread}"


def to_markdown(comparison: Comparison) -> str:
    """A caption, a pipe table, and what is missing or doubtful."""
    rows = [words(comparison, line) for line in comparison.lines]
    return markdown(caption(comparison), columns(comparison), rows, comparison.named)


def to_latex(comparison: Comparison) -> str:
    """The same as a floating table."""
    rows = [words(comparison, line) for line in comparison.lines]
    return latex(caption(comparison), columns(comparison), rows, comparison.named, words=3)


def to_plain(line: Line) -> dict[str, Any]:
    """A line with every digit."""
    content = {key: value for key, value in vars(line).items() if not isinstance(value, Cell | Summary)}
    for name in ("seconds", "per_step", "peak_mib"):
        content |= {f"{name}_{key}": value for key, value in asdict(getattr(line, name)).items() if key != "n"}
    content |= asdict(line.cell.summary) | {"seeds": list(line.cell.values), "values": list(line.cell.values.values())}
    found = {} if line.cell.difference is None else plain_difference(line.cell.difference)
    content |= {f"difference_{key}": found.get(key) for key in DIFFERENCE_FIELDS}
    return content | {"runs": [str(run.folder) for run in line.cell.runs.values()]}


def to_json(comparison: Comparison) -> str:
    """Lines, the metric and all sentences."""
    table = comparison.table
    content = {"metric": table.metric, "baseline": table.baseline, "caption": caption(comparison)}
    content |= {"lines": [to_plain(line) for line in comparison.lines], "named": list(comparison.named)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line each; lists are separated by a semicolon; an empty field is undefined."""
    return csv_of([to_plain(line) for line in comparison.lines], first="network")


_FORMATS: dict[str, Callable[[Comparison], str]] = {
    "md": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json
}  # fmt: skip


# -- the plot ---------------------------------------------------------------------------


def draw(comparison: Comparison) -> dict[str, Figure]:
    """By network: accuracy against seconds and against images, by the runs for a budget in each."""
    networks: dict[str, list[Line]] = {}
    for line in comparison.lines:
        networks.setdefault(line.network, []).append(line)
    return {network: _figure(comparison.table, network, lines) for network, lines in networks.items()}


def _figure(table: Table, network: str, lines: Sequence[Line]) -> Figure:
    kinds = {True: "seconds of training", False: "images seen in training"}
    with in_style():
        figure = Figure((2 * _PANEL[0], _PANEL[1] + 0.6), layout="constrained")
        for axes, (seconds, name) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
            drawn = []
            for line in (line for line in lines if line.budget.endswith(" s") is seconds):
                curve = _curve(line, table.metric, seconds)
                style = nth_style(table.methods.index(line.method))
                label = f"{line.method} ({curve.n})"
                mean_line(axes, curve.epochs, curve.means, curve.stds, style, label=label)
                drawn.append(curve)
            if drawn:
                axes.set_ylim(bottom=bottom(axes, drawn))
            axes.set_xlabel(name)
            budgets = sorted({line.budget for line in lines if line.budget.endswith(" s") is seconds})
            axes.set_title(f"budget: {', '.join(budgets) or 'no run'}", fontsize=8)
        figure.axes[0].set_ylabel("test accuracy (%)" if table.metric == tags.TOP1 else table.metric)
        legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
        handles = {text: handle for legend in legends for handle, text in legend}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
        figure.suptitle(f"{network}: mean over seeds (number of runs) ± one sample standard deviation", fontsize=9)
    return figure


def _curve(line: Line, metric: str, seconds: bool) -> Curve:
    runs = list(line.cell.runs.values())
    points, config = mean_curve(runs, metric, seconds), runs[0].config
    images = line.images / config["epochs"] if line.images else 1.0  # of an epoch
    xs, means, stds = zip(*points, strict=True) if points else ((), (), ())
    return Curve(len(runs), tuple(x if seconds else images * x for x in xs), means, stds)


# -- in the report ----------------------------------------------------------------------


def comparison_sections(runs: Mapping[str, Sequence[Run]], numbers: Mapping[RunFolder, int]) -> list[Section]:
    """The table and the plots as a part of the HTML page; nothing without runs of the comparison."""
    comparison = compare(runs[EXPERIMENT]) if EXPERIMENT in runs else None
    if comparison is None or not comparison.lines:
        return []
    rows = tuple(_entries(comparison, line, numbers) for line in comparison.lines)
    grid = Grid(caption(comparison), tuple(columns(comparison)), rows)
    pictures = tuple(
        picture(figure, f"compare-{number}", f"{network}: accuracy against seconds and images, a line per method.")
        for number, (network, figure) in enumerate(draw(comparison).items())
    )
    own = [sentence for sentence in comparison.named if sentence not in comparison.table.named]
    return [Section("Comparison of all methods", tuple(own), (grid,), pictures)]


def _entries(comparison: Comparison, line: Line, numbers: Mapping[RunFolder, int]) -> tuple[Entry, ...]:
    metric, cell, difference = comparison.table.metric, line.cell, line.cell.difference
    links = tuple(
        Link(f"seed {seed}: {readable_number(cell.values[seed], metric)}", numbers[run.folder])
        for seed, run in cell.runs.items()
    )
    values: dict[str, float | None] = {"rate": line.rates[0], "tuning": line.tuning_seconds, "images": line.images}
    values |= {"seconds": line.seconds.mean, "ms per step": line.per_step.mean, "fastest": line.fastest}
    values["peak MiB"] = line.peak_mib.mean
    values |= {"trainable": line.trainable, "inference": line.inference, "extra state": line.extra_bytes}
    values |= {"steps": line.steps[0] if line.steps else None, columns(comparison)[3]: cell.summary.mean}
    if difference is not None:
        values |= {"Δ": difference.paired.mean, "p": difference.paired.p_t, "min Δ": difference.detectable}
    top1 = columns(comparison)[3]
    shown = zip(columns(comparison), words(comparison, line), strict=True)
    return tuple(Entry(text, values.get(name), links if name == top1 else ()) for name, text in shown)


if __name__ == "__main__":
    sys.exit(main())
