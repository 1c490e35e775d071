"""The plots and the table of ProxProp's own experiments, from run folders.

    python analysis/proxprop.py --runs runs --out figures

The seven plots of arXiv 1706.04638, as PNG and PDF: for the MLP the loss on the training images and the
validation accuracy against epochs, and the loss against seconds; for the ConvNet both against both. Seconds are
those of training, without evaluations. A line per mode, the mean over seeds, with a band of one sample standard
deviation. The table, in Markdown on the standard output, has the last epoch's numbers of each.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.command import EXIT_NAMED, exit_code
from analysis.drawing import in_style, mean_line, nth_style, target_of, write
from analysis.load import Run
from analysis.relatives import by_label, final_values, mean_curve, parser, readable, usable_runs
from runfolder import tags

EXPERIMENT = "proxprop"
FIT, VAL = "fit/loss", "val/top1"
_NAMES = {FIT: "loss on the training images", VAL: "validation accuracy (%)", "test/top1": "test accuracy (%)"}
_MLP_SECONDS = 300.0  # the paper's plot of the MLP against time ends here
_PANEL = (3.4, 2.7)  # inches


@dataclass(frozen=True)
class Plot:
    """One of the paper's: a metric against epochs or seconds of training."""

    metric: str
    seconds: bool
    shortest: bool = False  # ends where the shortest line of proximal steps does
    most: float | None = None  # the x axis ends here


# By network: figure 1 and figure 2 of the paper.
PLOTS = {
    "proxprop_mlp": (Plot(FIT, False, True), Plot(VAL, False, True), Plot(FIT, True, most=_MLP_SECONDS)),
    "proxprop_convnet": (Plot(FIT, False, True), Plot(VAL, False, True), Plot(FIT, True, True), Plot(VAL, True, True)),
}


@dataclass(frozen=True)
class Line:
    """Runs that differ in the seed alone."""

    label: str
    proximal: bool
    runs: tuple[Run, ...]

    def points(self, metric: str, seconds: bool) -> list[tuple[float, float, float]]:
        """(x, mean, std) at each epoch that all runs have; x is the mean of their seconds."""
        return mean_curve(self.runs, metric, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures and print the table; returns the exit code."""
    return exit_code(lambda: _run(parser("The plots and the table of ProxProp's own experiments.").parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    settings, named = usable_runs(options, EXPERIMENT, setting_of)
    lines = {}
    for setting, runs in settings.items():
        lines[setting], left_out = lines_of(runs)
        named += left_out
        target = target_of(options.out, setting.replace(" ", "_"), len(settings))
        print(*write(draw(setting, lines[setting]), target), sep="\n", file=sys.stderr)
    print(table(lines))
    for sentence in dict.fromkeys(named):
        print(sentence, file=sys.stderr)
    return EXIT_NAMED if options.strict and named else 0


def setting_of(config: dict[str, Any]) -> str:
    """What runs must share to be compared: network, optimizer, data, and a batch that is not the paper's."""
    words = [config["model"]["name"], config["optim"]["name"], config["data"]["name"]]
    return " ".join(words + [str(config["batch_size"])] * (config["batch_size"] != 500))


def lines_of(runs: Sequence[Run]) -> tuple[list[Line], list[str]]:
    """The lines of a setting, proximal steps first, and what was left out."""
    cells, named = by_label(runs, label_of)
    found = [Line(label, _is_proximal(label), members) for label, members in cells.items()]
    return sorted(found, key=lambda line: (not line.proximal, line.label)), named


def label_of(config: dict[str, Any]) -> str:
    """Words for a run's method."""
    method = config["method"]
    if method["name"] != "proxprop":
        return "back-propagation" if method["name"] == "vanilla" else method["name"]
    if method["mode"] == "gradient":
        return "gradient (mode of the layers)"
    tau = method["tau"]
    words = [method["mode"].removeprefix("prox_"), f"τ={tau:g}" if isinstance(tau, int | float) else "τ of layers"]
    words += [method["variant"]] if method["variant"] != "standard" else []
    return ", ".join(words + (["some layers"] if method["layers"] else []))


def _is_proximal(label: str) -> bool:
    return label.startswith(("cg", "exact"))


def draw(setting: str, lines: Sequence[Line]) -> Figure:
    """The plots of one setting side by side."""
    plots = PLOTS.get(setting.split()[0], PLOTS["proxprop_convnet"])
    with in_style():
        figure = Figure((_PANEL[0] * len(plots), _PANEL[1] + 0.3), layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False).flat, plots, strict=True):
            _panel(axes, plot, lines)
        figure.suptitle(f"{setting}: mean over seeds ± one sample standard deviation", fontsize=9)
    return figure


def _panel(axes: Axes, plot: Plot, lines: Sequence[Line]) -> None:
    points = {line.label: line.points(plot.metric, plot.seconds) for line in lines}
    ends = [points[line.label][-1][0] for line in lines if line.proximal and points[line.label]]
    for index, line in enumerate(lines):
        if points[line.label]:
            xs, means, stds = zip(*points[line.label], strict=True)
            mean_line(axes, xs, means, stds, nth_style(index), label=f"{line.label} (n = {len(line.runs)})")
    most = min(ends, default=None) if plot.shortest else plot.most
    if most:
        axes.set_xlim(0, most)
    axes.set_xlabel("seconds of training" if plot.seconds else "epoch")
    axes.set_ylabel(_NAMES[plot.metric])
    if not plot.seconds:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if plot.metric == FIT:
        axes.set_yscale("log")
    axes.legend(fontsize=7)


def table(lines: dict[str, list[Line]]) -> str:
    """The last epoch's numbers, in Markdown."""
    text = ["| network | steps | n | epochs | training loss | val. top-1 (%) | test top-1 (%) | seconds of training |"]
    text.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for network, of_network in lines.items():
        for line in of_network:
            epochs = ", ".join(sorted({str(run.final_epoch) for run in line.runs}))
            numbers = [
                readable(final_values(line.runs, tag), digits) for tag, digits in ((FIT, 4), (VAL, 2), (tags.TOP1, 2))
            ]
            numbers.append(readable(final_values(line.runs, tags.TRAIN_SECONDS), 0))
            text.append(f"| {network} | {line.label} | {len(line.runs)} | {epochs} | {' | '.join(numbers)} |")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
