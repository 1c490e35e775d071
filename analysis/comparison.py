"""Runs of one experiment as a table: rows, cells, paired differences, and all that is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from analysis.grouping import ABSENT, flatten, method_labels, natural_order, plain, settings, short_names, varying_keys
from analysis.load import Run, expected_epochs
from analysis.speedup import Speedup, over_seconds, speedup
from analysis.statistics import PairedDifference, Summary, holm, paired_difference, smallest_detectable, summarise
from runfolder import tags
from runfolder.naming import AND

Setting = Callable[[dict[str, Any]], dict[str, Any]]
_SHOWN = 8  # names in one sentence
_PACKAGES = ("python", "torchvision", "numpy")  # whose versions matter beside torch's


@dataclass(frozen=True)
class Difference:
    """A method against the baseline within one row."""

    paired: PairedDifference
    seeds: tuple[int, ...]
    p_holm: float | None = None  # of the paired t-tests of the whole table
    p_holm_permutation: float | None = None
    detectable: float | None = None  # what a t-test of so many pairs finds in 80 % of all cases


@dataclass(frozen=True)
class Speedups:
    """How much earlier a method reaches the baseline's final value."""

    epochs: Speedup
    seconds: Speedup | None  # None where a run's times are not complete


@dataclass(frozen=True)
class Cell:
    """One method in one row; everything by seed, ascending."""

    values: dict[int, float]
    runs: dict[int, Run]
    summary: Summary
    difference: Difference | None = None
    speedups: Speedups | None = None  # where they were asked for


@dataclass(frozen=True)
class Row:
    """One configuration."""

    settings: dict[str, Any]  # by short name
    cells: dict[str, Cell]  # by method label


@dataclass(frozen=True)
class Table:
    """All of an experiment's runs, and what is missing from them."""

    experiment: str
    metric: str
    best: bool  # each run's best epoch instead of its final one
    baseline: str | None  # a method label
    axes: tuple[str, ...]
    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    named: tuple[str, ...]  # one sentence per gap or doubt
    comparisons: int = 0  # number of p-values that Holm's adjustment counts
    has_speedups: bool = False  # whether they were asked for


def build_table(
    experiment: str,
    runs: Sequence[Run],
    metric: str,
    baseline: str = "vanilla",
    best: bool = False,
    speedups: bool = False,
    setting_of: Setting = settings,
) -> Table:
    """Group runs into cells and compare each method with the baseline.

    Args:
        experiment: its name.
        runs: all its runs; only usable ones enter a mean, the others are named.
        metric: a TensorBoard tag.
        baseline: label or name of the method that the others are compared with.
        best: take each run's best epoch, which selects on the test set.
        speedups: also how much earlier each method reaches the baseline's final value.
        setting_of: of a configuration, what runs must share to be in one row.
    """
    placed = [run for run in runs if run.config is not None]
    keys = varying_keys([setting_of(run.config) for run in placed])
    names = short_names(keys)
    methods = _ordered_methods(placed, baseline)
    reference = find_baseline(methods, baseline)
    named = [problem.text for run in runs for problem in run.problems]
    rows = []
    for values, places in _grouped(placed, keys, setting_of):
        cells = {label: cell_of(places.get(label, []), metric, best, named) for label in methods}
        if reference is not None:
            cells = with_differences(cells, reference)
            cells = with_speedups(cells, reference, metric) if speedups else cells
        row = Row({names[key]: value for key, value in zip(keys, values, strict=True)}, cells)
        chosen = dict(zip(keys, values, strict=True)) if setting_of is settings else None
        named += _missing_seeds(experiment, row, places, chosen)
        rows.append(row)
    rows, count = with_holm(rows)
    named += _single_runs(rows)
    named += mixed_origins([run for row in rows for cell in row.cells.values() for run in cell.runs.values()])
    axes = tuple(names[key] for key in keys)
    return Table(
        experiment, metric, best, reference, axes, methods, tuple(rows), tuple(dict.fromkeys(named)), count, speedups
    )


def find_baseline(methods: Sequence[str], wanted: str) -> str | None:
    """The label that is ``wanted``, or the only variant of the method of that name."""
    if wanted in methods:
        return wanted
    variants = [label for label in methods if label.split(" ")[0] == wanted]
    return variants[0] if len(variants) == 1 else None


def _ordered_methods(runs: Sequence[Run], baseline: str) -> tuple[str, ...]:
    nodes = [run.config["method"] for run in runs]
    by_label = dict(zip(method_labels(nodes), nodes, strict=True))

    def order(label: str) -> tuple:
        node = by_label[label]
        first = baseline in (label, node["name"])
        return (not first, node["name"], natural_order(value for _, value in sorted(flatten(node).items())))

    return tuple(sorted(by_label, key=order))


def _grouped(runs: Sequence[Run], keys: Sequence[str], setting_of: Setting) -> list[tuple[tuple, dict[str, list[Run]]]]:
    """[(values of the keys, {method label: runs})], rows in natural order."""
    rows: dict[str, tuple[tuple, dict[str, list[Run]]]] = {}
    labels = method_labels([run.config["method"] for run in runs])
    for run, label in zip(runs, labels, strict=True):
        flat = setting_of(run.config)
        values = tuple(flat.get(key, ABSENT) for key in keys)
        row = rows.setdefault(repr(values), (values, {}))
        row[1].setdefault(label, []).append(run)
    return sorted(rows.values(), key=lambda row: natural_order(row[0]))


def cell_of(runs: Sequence[Run], metric: str, best: bool, named: list[str]) -> Cell:
    """One cell from the usable ones of its runs.

    Args:
        runs: all of one configuration and method.
        metric: a TensorBoard tag.
        best: each run's best epoch instead of its final one.
        named: gets a sentence for every run that is usable but not used.
    """
    values: dict[int, float] = {}
    used: dict[int, Run] = {}
    for seed, candidates in _by_seed([run for run in runs if run.usable]).items():
        if len(candidates) > 1:
            folders = " and ".join(str(run.folder) for run in candidates)
            named.append(f"{folders}: the same run several times, so none of them is used; move all but one elsewhere.")
            continue
        value, fault = _value(candidates[0], metric, best)
        if fault is not None:
            named.append(fault)
            continue
        values[seed], used[seed] = value, candidates[0]
    return Cell(values, used, summarise(list(values.values())))


def _by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    seeds: dict[int, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        seeds.setdefault(run.seed, []).append(run)
    return seeds


def _value(run: Run, metric: str, best: bool) -> tuple[float, None] | tuple[None, str]:
    """(value, None), or (None, why there is none)."""
    curve = run.curve(metric)
    again = f"evaluate it again: `{run.command}`"
    if not curve:
        return None, f"{run.folder}: finished, but without {metric}; {again}."
    if best and not tags.counts_steps(metric) and not _all_epochs(run) <= curve.keys():
        return None, f"{run.folder}: not every epoch has {metric}, so its best epoch is unknown; {again}."
    value = best_value(curve, metric) if best else run.final_value(metric)
    if value is None:
        return None, f"{run.folder}: {metric} is missing at the final epoch; {again}."
    if not math.isfinite(value):
        return None, f"{run.folder}: {metric} is {value}, so it enters no mean; look into its log."
    return value, None


def _all_epochs(run: Run) -> set[int]:
    return expected_epochs(run.final_epoch, run.config.get("eval_every", 1))


def best_value(curve: dict[int, float], metric: str) -> float:
    """The best point of a curve: the smallest loss, time or memory, the largest of anything else."""
    finite = [value for value in curve.values() if math.isfinite(value)]
    choose = min if tags.smaller_is_better(metric) else max
    return choose(finite, default=math.nan)


def with_differences(cells: dict[str, Cell], baseline: str) -> dict[str, Cell]:
    """The cells of a row, all but the baseline's with their difference from it."""
    reference = cells[baseline]
    return {
        label: cell if label == baseline else replace(cell, difference=_difference(cell, reference))
        for label, cell in cells.items()
    }


def _difference(cell: Cell, reference: Cell) -> Difference:
    seeds = tuple(seed for seed in cell.values if seed in reference.values)
    treated, plain_values = [cell.values[s] for s in seeds], [reference.values[s] for s in seeds]
    largest = max(map(abs, [*treated, *plain_values]), default=0.0)
    resolution = float32_spacing(largest)
    spread = summarise(np.subtract(treated, plain_values)).std
    detectable = smallest_detectable(spread, len(seeds))
    return Difference(paired_difference(treated, plain_values, resolution), seeds, detectable=detectable)


def float32_spacing(value: float) -> float:
    """The rounding of a number as event files hold it."""
    return float(np.spacing(np.float32(value)))


def with_speedups(cells: dict[str, Cell], baseline: str, metric: str) -> dict[str, Cell]:
    """The cells of a row with their speed-up against the baseline, where both have runs.

    That of the baseline against itself is what a noisy curve gains without any method.
    """
    reference = _curves(cells[baseline], metric)
    if not reference:
        return cells
    found = dict(cells)
    for label, cell in cells.items():
        curves = _curves(cell, metric)
        if curves:
            found[label] = replace(cell, speedups=_speedups(curves, reference, cell, cells[baseline]))
    return found


def _curves(cell: Cell, metric: str) -> dict[int, dict[int, float]]:
    """By seed, after the start, larger being better; {} where a point of a curve is not finite."""
    sign = -1.0 if tags.smaller_is_better(metric) else 1.0
    curves = {seed: {e: sign * value for e, value in run.curve(metric).items() if e} for seed, run in cell.runs.items()}
    finite = all(math.isfinite(value) for curve in curves.values() for value in curve.values())
    return curves if finite else {}


def _speedups(curves: dict, reference: dict, cell: Cell, baseline: Cell) -> Speedups:
    seconds, its_seconds = _over_seconds(curves, cell), _over_seconds(reference, baseline)
    known = seconds is not None and its_seconds is not None
    return Speedups(speedup(reference, curves), speedup(its_seconds, seconds) if known else None)


def _over_seconds(curves: dict, cell: Cell) -> dict[int, dict[float, float]] | None:
    found = {
        seed: over_seconds(
            curve,
            {epoch: seconds for epoch, seconds in cell.runs[seed].curve(tags.EPOCH_SECONDS).items() if epoch},
            cell.runs[seed].config.get("eval_every", 1),
        )
        for seed, curve in curves.items()
    }
    return None if None in found.values() else found


def with_holm(rows: list[Row]) -> tuple[list[Row], int]:
    """Adjust p-values over the whole table; also the number of defined ones."""
    places = [(i, label) for i, row in enumerate(rows) for label, cell in row.cells.items() if cell.difference]
    found = [rows[i].cells[label].difference.paired for i, label in places]
    by_t, by_permutation = holm([d.p_t for d in found]), holm([d.p_permutation for d in found])
    cells = [dict(row.cells) for row in rows]
    for (i, label), p_t, p_permutation in zip(places, by_t, by_permutation, strict=True):
        cell = cells[i][label]
        difference = replace(cell.difference, p_holm=p_t, p_holm_permutation=p_permutation)
        cells[i][label] = replace(cell, difference=difference)
    adjusted = [Row(row.settings, new) for row, new in zip(rows, cells, strict=True)]
    return adjusted, sum(p is not None for p in by_t)


def _missing_seeds(experiment: str, row: Row, places: dict[str, list[Run]], values: dict[str, Any] | None) -> list[str]:
    """Seeds that one method of the row has a folder for and another has not."""
    folders = {run.seed: run.folder for runs in places.values() for run in runs}
    found = []
    for label in row.cells if values is not None else places:
        missing = sorted(folders.keys() - {run.seed for run in places.get(label, [])})
        if missing:
            seeds = ", ".join(map(str, missing))
            others = ", ".join(str(folders[seed]) for seed in missing)
            where = _row_words(row)
            start = "start the grid of that run again"
            if values is not None:
                overrides = _overrides(label, missing, values)
                start = f"start it: `python experiments/{experiment}.py --local {overrides}`"
            found.append(f"missing: {label} with seed {seeds}{where}, which {others} has for another method; {start}.")
    return found


def _single_runs(rows: Sequence[Row]) -> list[str]:
    """Cells of one run: a number, but nothing on what another seed would give."""
    single = [f"{label}{_row_words(row)}" for row in rows for label, cell in row.cells.items() if cell.summary.n == 1]
    if not single:
        return []
    more = f" and {len(single) - _SHOWN} more" if len(single) > _SHOWN else ""
    return [f"one run alone, so no spread, interval or test: {'; '.join(single[:_SHOWN])}{more}; start more seeds."]


def _row_words(row: Row) -> str:
    words = ", ".join(f"{name}={plain(value)}" for name, value in row.settings.items())
    return f" ({words})" if words else ""


def _overrides(label: str, seeds: Sequence[int], values: dict[str, Any]) -> str:
    name, *options = label.split(" ")
    if AND in name:
        name = f"'[{name.replace(AND, ',')}]'"
    chosen = [f"{key.removesuffix('.name')}={plain(value)}" for key, value in values.items() if value != ABSENT]
    return " ".join(
        [f"method={name}", *(f"method.{option}" for option in options), *chosen, f"seed={','.join(map(str, seeds))}"]
    )


def mixed_origins(used: Sequence[Run]) -> list[str]:
    """What the runs behind the means were made with, where it differs: a sentence for each kind."""
    facts = {"commit": commit_of, "torch version": torch_of, "hardware": hardware_of, "data set": _data}
    facts |= {f"{name} version": partial(version_of, name=name) for name in _PACKAGES}
    found = []
    for name, fact in facts.items():
        folders: dict[str, list[str]] = {}
        for run in used:
            for value in dict.fromkeys(fact(attempt) for attempt in run.attempts):
                folders.setdefault(value, []).append(str(run.folder))
        if len(folders) > 1:
            found.append(_mixed_sentence(name, folders))
    return found + _unknown_commits(used)


def _unknown_commits(used: Sequence[Run]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for run in used:
        for attempt in run.attempts:
            if "commit" in attempt and attempt["commit"] is None:
                reasons.setdefault(str(attempt.get("unknown") or "git did not answer"), []).append(str(run.folder))
    return [
        f"the code of {_runs(folders)} is unknown ({reason}), so it may have been changed: {', '.join(folders[:3])}"
        f"{' and others' if len(folders) > 3 else ''}; run from a checkout that git can read."
        for reason, folders in reasons.items()
    ]


def _mixed_sentence(name: str, folders: dict[str, list[str]]) -> str:
    """All values with their counts; the folders of all but the most frequent one."""
    ordered = sorted(folders.items(), key=lambda item: -len(item[1]))
    most_value, most = ordered[0]
    words = [f"{most_value} ({_runs(most)})"]
    words += [f"{value} ({_runs(own)}: {', '.join(own)})" for value, own in ordered[1:]]
    return f"the runs differ in {name}: {'; '.join(words)}; start the odd ones again in one environment."


def _runs(folders: Sequence[str]) -> str:
    return "1 run" if len(folders) == 1 else f"{len(folders)} runs"


def commit_of(attempt: dict[str, Any]) -> str:
    """The commit of an attempt in a few characters, and whether the code differed from it."""
    commit = str(attempt.get("commit") or "unknown")[:12]
    return f"{commit} with uncommitted changes {attempt.get('diff') or ''}".rstrip() if attempt.get("dirty") else commit


def torch_of(attempt: dict[str, Any]) -> str:
    """The torch version of an attempt."""
    return version_of(attempt, "torch")


def version_of(attempt: dict[str, Any], name: str) -> str:
    """The version of a package in an attempt."""
    packages = attempt.get("packages")
    return str(packages.get(name, "unknown")) if isinstance(packages, dict) else "unknown"


def hardware_of(attempt: dict[str, Any]) -> str:
    """The device that an attempt trained on."""
    hardware = attempt.get("hardware")
    return str(hardware.get("device", "unknown")) if isinstance(hardware, dict) else str(hardware or "unknown")


def _data(attempt: dict[str, Any]) -> str:
    return str(attempt.get("data") or "unknown")
