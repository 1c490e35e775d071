"""What the tables of the relatives' own experiments share: their command line, runs by label, readable means."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.command import Parser, add_cache_flags, chosen_cache
from analysis.comparison import Row
from analysis.grouping import plain
from analysis.load import Run, load_runs
from analysis.statistics import summarise
from runfolder import tags
from runfolder.folder import typed


def parser(description: str) -> Parser:
    """The flags --runs, --out, --strict and the cache's."""
    made = Parser(description=description)
    made.add_argument("--runs", type=typed, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    made.add_argument("--out", type=typed, default=Path("figures"), help="folder, or file (default: %(default)s)")
    made.add_argument("--strict", action="store_true", help="exit code 1 if any run is left out")
    add_cache_flags(made)
    return made


def usable_runs(
    options: argparse.Namespace, experiment: str, setting_of: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, list[Run]], list[str]]:
    """An experiment's usable runs by what they must share to be compared, and what is wrong with any of its runs."""
    runs = load_runs(options.runs, experiment, chosen_cache(options))[experiment]
    found: dict[str, list[Run]] = {}
    for run in filter(lambda run: run.usable, runs):
        found.setdefault(setting_of(run.config), []).append(run)
    return dict(sorted(found.items())), [problem.text for run in runs for problem in run.problems]


def by_label(
    runs: Iterable[Run], label_of: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Runs that differ in the seed alone, and what is left out: a second run of one label and seed."""
    found: dict[str, dict[int, Run]] = {}
    named = []
    for run in runs:
        kept = found.setdefault(label_of(run.config), {}).setdefault(run.seed, run)
        if kept is not run:
            named.append(f"{run.folder}: left out, as {kept.folder.name} has its method and seed; move one away.")
    return {label: tuple(seeds.values()) for label, seeds in found.items()}, named


def readable(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; – without values."""
    if not values:
        return "–"
    summary = summarise(values)
    return f"{summary.mean:.{digits}f}" + ("" if summary.std is None else f" ± {summary.std:.{digits}f}")


def final_values(runs: Iterable[Run], tag: str) -> list[float]:
    """The final values of the runs that have the tag."""
    return [value for run in runs if (value := run.final_value(tag)) is not None]


def mean_curve(runs: Sequence[Run], metric: str, seconds: bool) -> list[tuple[float, float, float]]:
    """(x, mean, std) at each epoch that all runs have; x is the epoch or the mean of their seconds of training."""
    curves = [run.curve(metric) for run in runs]
    times = [run.curve(tags.TRAIN_SECONDS) for run in runs]
    shared = sorted(set.intersection(*map(set, curves), *(map(set, times) if seconds else ())))
    found = []
    for epoch in shared:
        summary = summarise([curve[epoch] for curve in curves])
        x = summarise([time[epoch] for time in times]).mean if seconds else epoch
        found.append((x, summary.mean, summary.std or 0.0))
    return found


def seconds_per_step(run: Run) -> float | None:
    """Seconds of training per step, without evaluations, if both are known."""
    seconds, steps = run.final_value(tags.TRAIN_SECONDS), (run.result or {}).get("steps")
    return seconds / steps if seconds and steps else None


def words_of(row: Row, config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Network, data and whatever else tells a row from the others, except some settings."""
    left = [(key, value) for key, value in row.settings.items() if key not in ("model", "data", *without)]
    more = [f"{key}={plain(value)}" for key, value in left]
    return ", ".join([f"{config['model']['name']} on {config['data']['name']}", *more])


def csv_of(lines: Sequence[Mapping[str, Any]], first: str) -> str:
    """One line each; lists are separated by a semicolon; an empty field is undefined.

    Args:
        lines: with the same keys, which name the columns.
        first: the only column where there is no line.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [first], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: ";".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in line.items()})
    return text.getvalue()
