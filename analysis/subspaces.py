"""The table and figures of network subspaces, from run folders.

    python analysis/subspaces.py --runs runs --out figures

Figure 4 of arXiv 2102.10472: accuracy along lines and curves, alone (dashed) and as the ensemble of alpha and
1 - alpha (solid), beside standard training and its ensembles of two. Figure 5: accuracy of a simplex's midpoint
against the number of its endpoints. The table, in Markdown on the standard output, has these with what they are
compared with: ensembles of separate runs (from their outputs.npz, over all choices of k runs), SWA, SWAG and
ensembles of snapshots. Everything has one sample standard deviation over seeds; runs on other data, with other label
noise or on corrupted images have tables of their own.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.command import EXIT_NAMED, exit_code
from analysis.drawing import in_style, mean_line, nth_style, target_of, write
from analysis.load import Run
from analysis.relatives import by_label, final_values, parser, readable, usable_runs
from analysis.statistics import summarise

EXPERIMENT = "subspaces"
STANDARD = "standard training"
_BINS = 20  # of the calibration error
_SIZE = (4.6, 3.2)  # inches
# (tag, words) of what is listed, where a run has it.
_LISTED = (
    ("test", "result"),
    ("swa", "mean of snapshots (SWA)"),
    ("swag/0", "a sample of SWAG"),
    ("swag", "samples of SWAG together"),
    ("snapshots", "snapshots together"),
    ("random/global", "random weights of snapshots"),
    ("random/layer", "the same for each layer"),
    ("random/weight", "the same for each weight"),
    ("weighted/0", "weight t on the first snapshot"),
    ("path/0", "one end"),
    ("pair/0", "both ends together"),
    ("corner/0", "one corner"),
    ("member/0", "a random point"),
    ("ensemble", "random points together"),
)


@dataclass(frozen=True)
class Cell:
    """Runs that differ in the seed alone."""

    label: str
    runs: tuple[Run, ...]

    def values(self, tag: str) -> list[float]:
        """The final values of those that have the tag."""
        return final_values(self.runs, tag)

    @property
    def method(self) -> dict[str, Any]:
        """The method's options."""
        return self.runs[0].config["method"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write the figures; returns the exit code."""
    return exit_code(lambda: _run(parser("The table and figures of network subspaces.").parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    settings, named = usable_runs(options, EXPERIMENT, setting_of)
    figures: dict[str, Figure] = {}
    for setting, members in settings.items():
        cells, left_out = cells_of(members)
        named += left_out
        print(f"{setting}\n\n{table(cells)}\n")
        for name, figure in (("figure4", along_paths(setting, cells)), ("figure5", over_endpoints(setting, cells))):
            if figure is not None:
                figures["_".join([name, *setting.replace(",", "").split()])] = figure
    for name, figure in figures.items():
        print(*write(figure, target_of(options.out, name, len(figures))), sep="\n", file=sys.stderr)
    for sentence in dict.fromkeys(named):
        print(sentence, file=sys.stderr)
    return EXIT_NAMED if options.strict and named else 0


def setting_of(config: dict[str, Any]) -> str:
    """What runs must share to be compared: network, data, and what was done to them."""
    data = config["data"]
    words = [f"{config['model']['name']} on {data['name']}"]
    if width := config["model"].get("width"):
        words.append(f"width {width}")
    words += [f"{name.replace('_', ' ')} {data[name]}" for name in ("label_noise", "corruption") if data.get(name)]
    if data.get("corruption"):
        words.append(f"severity {data.get('severity')}")
    return ", ".join([*words, f"{config['epochs']} epochs"])


def label_of(config: dict[str, Any]) -> str:
    """Words for a run's method."""
    method = config["method"]
    if method["name"] == "vanilla":
        return STANDARD
    words = [method["name"] if method["name"] != "simplex" else f"simplex of {method['endpoints']}"]
    if method["name"] == "swa":
        words.append(str(config["schedule"].get("policy", config["schedule"]["name"])))
    words += ["layerwise"] if method.get("layerwise") else []
    words += [f"{method['num_samples']} samples"] if method.get("num_samples", 1) > 1 else []
    words += [f"beta {method['beta']:g}"] if method.get("beta", 1.0) != 1.0 else []
    words += ["absolute cosine"] if method.get("cosine") == "absolute" else []
    return ", ".join(words)


def cells_of(runs: Iterable[Run]) -> tuple[list[Cell], list[str]]:
    """Runs by label, standard training first, and what was left out."""
    found, named = by_label(runs, label_of)
    cells = [Cell(label, of_label) for label, of_label in found.items()]
    return sorted(cells, key=lambda cell: (cell.label != STANDARD, cell.label)), named


def table(cells: Sequence[Cell]) -> str:
    """Accuracies, calibration and how different the networks are, in Markdown."""
    lines = ["| method | what | n | top-1 (%) | calibration error (%) | total variation | disagreement |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for cell in cells:
        for tag, words in _LISTED:
            top1 = cell.values(f"{tag}/top1")
            if not top1:
                continue
            more = [cell.values(f"{tag}/{name}") for name in ("ece", "total_variation", "disagreement")]
            lines.append(_line(cell.label, words, top1, more))
        if cell.label == STANDARD:
            lines += [_line(cell.label, f"{k} runs together", *found) for k, found in together(cell).items()]
    return "\n".join(lines)


def _line(label: str, words: str, top1: list[float], more: Sequence[list[float]]) -> str:
    numbers = [readable(top1, 2), readable(more[0], 2), *(readable(values, 4) for values in more[1:])]
    return f"| {label} | {words} | {len(top1)} | {' | '.join(numbers)} |"


def together(cell: Cell) -> dict[int, tuple[list[float], list[list[float]]]]:
    """Ensembles of k separate runs, k >= 2: (top1, [ece, total variation, disagreement]) of every choice of k."""
    scores, labels = [], None
    for run in cell.runs:
        if run.folder.outputs.is_file():
            with np.load(run.folder.outputs) as file:
                if labels is None or np.array_equal(labels, file["labels"]):
                    labels = file["labels"]
                    scores.append(file["scores"].astype(np.float64))
    found = {}
    for k in range(2, len(scores) + 1):
        measured = [measures(list(chosen), labels) for chosen in combinations(scores, k)]
        top1, *more = (list(values) for values in zip(*measured, strict=True))
        found[k] = (top1, more)
    return found


def measures(scores: Sequence[np.ndarray], labels: np.ndarray) -> tuple[float, float, float, float]:
    """An ensemble by the mean of class scores: top-1 and calibration error in percent, and over its pairs of
    networks the mean total variation of their probabilities and the share of images on which they disagree.
    """
    probability = _softmax(np.mean(scores, axis=0))
    hits = probability.argmax(1) == labels
    confidence = probability.max(1)
    bins = np.minimum((_BINS * confidence).astype(int), _BINS - 1)
    excess = np.bincount(bins, hits - confidence, _BINS)
    alone = [_softmax(one) for one in scores]
    pairs = list(combinations(alone, 2))
    variation = np.mean([0.5 * np.abs(p - q).sum(1).mean() for p, q in pairs])
    apart = np.mean([(p.argmax(1) != q.argmax(1)).mean() for p, q in pairs])
    return 100 * hits.mean(), 100 * np.abs(excess).sum() / len(labels), float(variation), float(apart)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def along_paths(setting: str, cells: Sequence[Cell]) -> Figure | None:
    """Figure 4, or None without lines and curves."""
    paths = [cell for cell in cells if cell.values("path/0/top1") and cell.method["name"] != "swa"]
    if not paths:
        return None
    with in_style():
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.subplots()
        for index, cell in enumerate(paths):
            style = nth_style(index + 1)
            for kind, dashes in (("path", "--"), ("pair", "-")):
                curve = _curve(cell, kind)
                words = "alone" if kind == "path" else "with 1 - α"
                line = nth_style(index + 1)
                mean_line(axes, *curve, type(line)(style.colour, dashes), label=f"{cell.label}, {words}")
        _levels(axes, cells)
        axes.set_xlabel("α")
        _finish(axes, setting, paths)
    return figure


def _curve(cell: Cell, kind: str) -> tuple[list[float], list[float], list[float]]:
    """(alphas, means, stds) along a path; pairs are the same at alpha and 1 - alpha."""
    found = {}
    for tag in cell.runs[0].events.series:
        if tag.startswith(f"{kind}/") and tag.endswith("/top1"):
            found[float(tag.split("/")[1])] = summarise(cell.values(tag))
    if kind == "pair":
        found |= {1 - alpha: summary for alpha, summary in found.items()}
        middle = cell.values("path/0.5/top1")
        found |= {0.5: summarise(middle)} if middle else {}
    ordered = sorted(found.items())
    return ([a for a, _ in ordered], [s.mean for _, s in ordered], [s.std or 0.0 for _, s in ordered])


def _levels(axes: Axes, cells: Sequence[Cell]) -> None:
    """Bands of standard training and of its ensembles of two."""
    standard = next((cell for cell in cells if cell.label == STANDARD), None)
    if standard is None:
        return
    levels = [(STANDARD, standard.values("test/top1")), ("two runs together", together(standard).get(2, ([],))[0])]
    for (words, values), style in zip(levels, (nth_style(0), nth_style(7)), strict=True):
        if values:
            summary, span = summarise(values), axes.get_xlim()
            spread = [summary.std or 0.0] * 2
            mean_line(axes, span, [summary.mean] * 2, spread, style, label=f"{words} (n = {len(values)})")
            axes.set_xlim(*span)


def over_endpoints(setting: str, cells: Sequence[Cell]) -> Figure | None:
    """Figure 5, or None without simplexes."""
    groups: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        if cell.method["name"] == "simplex":
            words = label_of(cell.runs[0].config).split(", ")[1:]
            groups.setdefault(", ".join(["simplex", *words]), {})[cell.method["endpoints"]] = cell
    if not groups:
        return None
    with in_style():
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.subplots()
        for index, (label, group) in enumerate(sorted(groups.items())):
            counts = sorted(group)
            summaries = [summarise(group[count].values("test/top1")) for count in counts]
            numbers = ([s.mean for s in summaries], [s.std or 0.0 for s in summaries])
            mean_line(axes, counts, *numbers, nth_style(index + 1), label=f"{label}, midpoint", marker="o")
        _levels(axes, cells)
        axes.set_xlabel("endpoints")
        axes.set_xticks(sorted({count for group in groups.values() for count in group}))
        _finish(axes, setting, [cell for group in groups.values() for cell in group.values()])
    return figure


def _finish(axes: Axes, setting: str, cells: Sequence[Cell]) -> None:
    seeds = sorted({len(cell.runs) for cell in cells})
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{setting}; n = {' or '.join(map(str, seeds))}, ± one sample std", fontsize=8)
    axes.legend(fontsize=6)


if __name__ == "__main__":
    sys.exit(main())
