"""The tables of the TrAct paper (arXiv 2410.23970) from run folders, beside its published numbers.

``paper.yaml`` says which runs a cell is made from and how a table is laid out,
``published.yaml`` what the paper prints. A cell whose runs are missing stays empty, and a
sentence under the table has the command that makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.cache import Cache
from analysis.comparison import Cell, Difference, Row, float32_spacing, mixed_origins, with_differences, with_holm
from analysis.load import Run, experiments_in, load_runs
from analysis.paper_runs import Cohort, Members, cells_of, cohorts, missing, missing_sentence
from analysis.paper_sets import members_of_set, table_layout
from analysis.statistics import PublishedDifference, Summary, against_published, summarise, wilcoxon_p

BASELINE = "baseline"
MARGIN = 0.5  # percentage points within which two means count as the same; see against_published
RUNTIME = "runtime"
AVERAGE = "average"
_HERE = Path(__file__).parent
_DIGITS = 2  # of an accuracy in percent, as printed


@dataclass(frozen=True)
class Published:
    """A number as the paper prints it."""

    mean: float
    std: float | None  # None: printed without one


@dataclass(frozen=True)
class Key:
    """Which number: what was trained, how, and what was measured."""

    subject: str
    arm: str
    quantity: str


@dataclass(frozen=True)
class PaperCell:
    """Our runs beside the published number; empty where nothing was run."""

    key: Key
    ours: Summary | None  # None: not ours to run; of an average: over the rows, and std the mean of theirs
    published: Published | None
    cell: Cell | None = None  # the runs themselves; None for an average and for what is not ours to run
    quartiles: tuple[float, float] | None = None  # of run times, whose "mean" is a median
    against: PublishedDifference | None = None  # ours against the published number; None without two runs of ours

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        if self.ours is None or self.ours.mean is None or self.published is None:
            return None
        return self.ours.mean - self.published.mean

    @property
    def paired(self) -> Difference | None:
        """Against the baseline of the same subject, paired by seed."""
        return None if self.cell is None else self.cell.difference


@dataclass(frozen=True)
class PaperRow:
    """A row of the printed table."""

    words: tuple[str, ...]  # one per axis
    cells: tuple[PaperCell, ...]


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables."""

    name: str  # "table 1" to "table 7", "section 4.6"
    title: str
    axes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    average: PaperRow | None
    names: dict[str, str]  # of arms and quantities
    digits: int
    remarks: tuple[str, ...]  # what the numbers say together
    named: tuple[str, ...]  # one sentence per gap or doubt
    comparisons: int = 0  # number of p-values that Holm's adjustment counts


@functools.cache
def published() -> dict[str, Any]:
    """The content of ``published.yaml``."""
    return yaml.safe_load((_HERE / "published.yaml").read_text(encoding="utf-8"))


def table_names() -> list[str]:
    """What ``--table`` takes: the numbers of the tables, and runtime."""
    return [*table_layout()["tables"], RUNTIME]


def runs_of(root: Path, experiment: str, cache: Cache | None = None) -> list[Run]:
    """All runs of an experiment, [] where there are none.

    Raises:
        UserError: no such folder of experiments.
    """
    return load_runs(root, experiment, cache)[experiment] if experiment in experiments_in(root) else []


def build_paper_table(name: str, load: Callable[[str], Sequence[Run]]) -> PaperTable:
    """One of the tables 1 to 7.

    Args:
        name: its number.
        load: gives all runs of an experiment.
    """
    plan = table_layout()["tables"][name]
    spec = table_layout()["sets"][plan["set"]]
    named: list[str] = []
    keys = _keys(plan, spec)
    shown = {(key.subject, key.arm) for row in keys for key in row}
    found = [cohort for cohort in cohorts(spec) if (cohort.subject, cohort.arm) in shown]
    members = members_of_set(spec, load(spec["experiment"]), named, found)
    cells, count = _compared(_cells(members, spec, {key for row in keys for key in row}, named))
    names = table_layout()["names"] | spec.get("names", {})
    digits = spec.get("digits", _DIGITS)
    rows = tuple(
        PaperRow(words, tuple(_beside(key, cells.get(key), spec, plan["set"]) for key in row))
        for words, row in zip(_words(plan, spec, names), keys, strict=True)
    )
    average = _average(rows, plan["set"], digits) if plan.get("average") else None
    named += _too_few(members, spec["seeds"], names)
    named += [missing_sentence(spec, item, names) for item in missing(members, spec["seeds"])]
    named += mixed_origins(_used(cells))
    remarks = _remarks(rows, names, digits) if plan.get("average") else ()
    head = (f"table {name}", plan["title"], tuple(plan["axes"]), _columns(plan, names))
    return PaperTable(*head, rows, average, names, digits, remarks, tuple(dict.fromkeys(named)), count)


# -- the layout -----------------------------------------------------------------------------------


def _keys(plan: dict, spec: dict) -> list[list[Key]]:
    """The keys of every row, in the printed order."""
    subjects, arms, (first, *_) = spec["subjects"], spec["arms"], spec["metrics"]
    if plan["rows"] == "subjects":
        return [[Key(subject, arm, quantity) for arm, quantity in plan["cells"]] for subject in subjects]
    if plan["rows"] == "arms":
        return [[Key(subject, arm, first) for subject in plan["cells"]] for arm in arms]
    return [[Key(subject, arm, quantity) for quantity in plan["cells"]] for subject in subjects for arm in arms]


def _words(plan: dict, spec: dict, names: dict[str, str]) -> list[tuple[str, ...]]:
    """What stands in front of every row."""
    if plan["rows"] == "subjects":
        return [tuple(subject.split(", ")) for subject in spec["subjects"]]
    if plan["rows"] == "arms":
        return [(names[arm],) for arm in spec["arms"]]
    return [(*subject.split(", "), names[arm]) for subject in spec["subjects"] for arm in spec["arms"]]


def _columns(plan: dict, names: dict[str, str]) -> tuple[str, ...]:
    """The heads of the cells; a quantity is named where there are several."""
    cells = plan["cells"]
    if plan["rows"] == "subjects":
        several = len({quantity for _, quantity in cells}) > 1
        return tuple(f"{names[arm]} {names[quantity]}" if several else names[arm] for arm, quantity in cells)
    return tuple(names.get(cell, cell) for cell in cells)


# -- cells ----------------------------------------------------------------------------------------


def _cells(members: dict[Cohort, Members], spec: dict, wanted: set[Key], named: list[str]) -> dict[Key, Cell]:
    shown = {key.quantity for key in wanted}
    found = cells_of(members, {name: tag for name, tag in spec["metrics"].items() if name in shown}, named)
    cells = {Key(cohort.subject, cohort.arm, quantity): cell for (cohort, quantity), cell in found.items()}
    return {key: _scaled(cell, spec.get("scale", 1.0)) for key, cell in cells.items() if key in wanted}


def _scaled(cell: Cell, scale: float) -> Cell:
    values = {seed: scale * value for seed, value in cell.values.items()}
    return Cell(values, cell.runs, summarise(list(values.values())))


def _compared(cells: dict[Key, Cell]) -> tuple[dict[Key, Cell], int]:
    """The cells with their paired differences, Holm-adjusted over the table; the number of p-values."""
    places: dict[tuple[str, str], dict[str, Cell]] = {}
    for key, cell in cells.items():
        places.setdefault((key.subject, key.quantity), {})[key.arm] = cell
    rows = [
        Row({"subject": subject, "quantity": quantity}, with_differences(arms, BASELINE))
        for (subject, quantity), arms in places.items()
        if BASELINE in arms
    ]
    rows, count = with_holm(rows)
    compared = {
        Key(row.settings["subject"], arm, row.settings["quantity"]): cell
        for row in rows
        for arm, cell in row.cells.items()
    }
    return cells | compared, count


def _beside(key: Key, cell: Cell | None, spec: dict, of: str) -> PaperCell:
    number = published_number(of, key)
    ours = None if cell is None else cell.summary
    if number is None or ours is None or ours.n < 2:
        return PaperCell(key, ours, number, cell)
    theirs = (number.mean,) if number.std is None else (number.mean, number.std, spec["seeds"])
    margin = spec.get("scale", 1.0) * MARGIN
    return PaperCell(
        key, ours, number, cell, against=against_published([*cell.values.values()], *theirs, margin=margin)
    )


def published_number(of: str, key: Key) -> Published | None:
    """What the paper prints for a cell of a set of runs, if it prints anything."""
    numbers = published()[of].get(key.subject, {}).get(key.arm, {}).get(key.quantity)
    return None if numbers is None else Published(numbers[0], numbers[1] if len(numbers) > 1 else None)


def _used(cells: dict[Key, Cell]) -> list[Run]:
    runs = {run.folder: run for cell in cells.values() for run in cell.runs.values()}
    return list(runs.values())


def _too_few(members: dict[Cohort, Members], seeds: int, names: dict[str, str]) -> list[str]:
    counts = {c: len({run.seed for run in own.runs if run.usable}) for c, own in members.items()}
    few = [f"{c.subject} / {names[c.arm]} ({count})" for c, count in counts.items() if 0 < count < seeds]
    return [f"fewer seeds than the paper's {seeds}: {', '.join(few)}; start the missing ones."] if few else []


# -- what the rows say together -------------------------------------------------------------------


def _average(rows: Sequence[PaperRow], of: str, digits: int) -> PaperRow:
    """Over all rows, as the paper's: the mean of the printed means, and of the printed std."""
    cells = []
    for column in zip(*(row.cells for row in rows), strict=True):
        key = replace(column[0].key, subject=AVERAGE)
        ours = average([cell.ours for cell in column], digits)
        cells.append(PaperCell(key, ours, published_number(of, key)))
    blank = [""] * (len(rows[0].words) - 1)
    return PaperRow((AVERAGE.capitalize(), *blank), tuple(cells))


def average(summaries: Sequence[Summary], digits: int) -> Summary:
    """The mean of printed means and the mean of printed standard deviations; n counts the means.

    Without a mean where one of them is missing, and without a std where one of those is.
    """
    means = [summary.mean for summary in summaries if summary.mean is not None]
    stds = [summary.std for summary in summaries if summary.std is not None]
    if len(means) < len(summaries):
        return Summary(len(means), None, None)
    whole = len(stds) == len(summaries)
    mean_of = functools.partial(_mean_of_printed, digits=digits)
    return Summary(len(means), mean_of(means), mean_of(stds) if whole else None)


def _mean_of_printed(values: Sequence[float], digits: int) -> float:
    return float(np.mean([printed(value, digits) for value in values]))


def printed(value: float, digits: int) -> float:
    """A number as it reads in a table.

    Example:
        >>> printed(70.126, 2)
        70.13
    """
    return float(f"{value:.{digits}f}")


def _remarks(rows: Sequence[PaperRow], names: dict[str, str], digits: int) -> tuple[str, ...]:
    """Sentences on all rows of a table. What is computed over the rows (tests over models) belongs here."""
    columns: dict[tuple[str, str], list[PaperCell]] = {}
    for cell in (cell for row in rows for cell in row.cells):
        columns.setdefault((cell.key.arm, cell.key.quantity), []).append(cell)
    return tuple(
        f"{_count_sentence(column, columns[BASELINE, quantity], names, digits)} {_wilcoxon_sentence(column)}".strip()
        for (arm, quantity), column in columns.items()
        if arm != BASELINE and (BASELINE, quantity) in columns
    )


def _wilcoxon_sentence(column: Sequence[PaperCell]) -> str:
    """A test over the rows, each of which counts once, whatever its seeds."""
    paired = [cell.paired.paired.mean for cell in column if cell.paired is not None]
    differences = [mean for mean in paired if mean is not None]
    largest = max((cell.ours.mean for cell in column if cell.ours is not None and cell.ours.n), default=0.0)
    p = wilcoxon_p(differences, 2 * float32_spacing(largest)) if differences else None
    if p is None:
        return ""
    shown = "<0.001" if p < 0.001 else f"{p:.3g}"
    return f"Wilcoxon's signed-rank test over the paired differences of {len(differences)} rows: p {shown}."


def _count_sentence(
    column: Sequence[PaperCell], baseline: Sequence[PaperCell], names: dict[str, str], digits: int
) -> str:
    ours, all_ours = better(*([_printed_mean(cell.ours, digits) for cell in own] for own in (column, baseline)))
    theirs, all_theirs = better(*([cell.published.mean for cell in own] for own in (column, baseline)))
    key = column[0].key
    return (
        f"{names[key.arm]} is above {names[BASELINE]} in {names[key.quantity]} on {ours} of the {all_ours} rows that "
        f"have both (published: {theirs} of {all_theirs})."
    )


def _printed_mean(summary: Summary, digits: int) -> float | None:
    return None if summary.mean is None else printed(summary.mean, digits)


def better(treated: Sequence[float | None], baseline: Sequence[float | None]) -> tuple[int, int]:
    """How many of the pairs have a larger first number, and how many pairs there are; equal is not larger.

    Example:
        >>> better([70.5, 71.0, None, 72.0], [70.0, 71.0, 70.0, 73.0])
        (1, 3)
    """
    pairs = [(a, b) for a, b in zip(treated, baseline, strict=True) if a is not None and b is not None]
    return sum(a > b for a, b in pairs), len(pairs)
