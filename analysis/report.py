"""Everything that run folders say as one HTML page.

    python analysis/report.py --runs runs --out report.html

Tables, figures, every run's curves, what failed and what is doubtful, and what it cost. The page
is one file that needs no network; :func:`sections` is the list of what is on it.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from matplotlib import pyplot as plt

from analysis.cache import Cache
from analysis.command import add_cache_flags, chosen_cache, exit_code
from analysis.compare import comparison_sections
from analysis.comparison import Cell, Row, Table, commit_of, hardware_of, torch_of
from analysis.costs import Cost, cost_of, device_hours
from analysis.curves import MOST_POINTS, packed
from analysis.figures import draw
from analysis.grouping import method_labels, plain
from analysis.load import Problem, Run, Status, load_runs
from analysis.page.parts import Entry, Grid, Group, Link, Picture, Section, picture
from analysis.page.render import Head, render_page
from analysis.paper_sections import paper_sections
from analysis.rendering import (
    NONE,
    caption,
    header,
    readable_cell,
    readable_detectable,
    readable_difference,
    readable_number,
    readable_p,
)
from analysis.tables import tables_from
from runfolder.errors import Parser, UserError
from runfolder.failures import cure_of
from runfolder.folder import RunFolder, typed
from runfolder.records import is_number

_RUN_COLUMNS = (
    "Run",
    "Experiment",
    "State",
    "Method",
    "Seed",
    "Final value",
    "Epochs",
    "Device-hours",
    "Attempts",
)
_STATES = ("finished", "unfinished", "failed", "refused")
_FAILED, _UNFINISHED = "Failed", "Unfinished"
_REFUSED, _NOTED = "Finished, but kept out of every mean", "Doubtful, but counted"
_OTHER = "Missing runs, and runs that differ in what they were made with"


@dataclass(frozen=True)
class Collection:
    """What a page is made from: runs by experiment, their tables, and every run's number on the page."""

    runs: dict[str, list[Run]]
    tables: tuple[Table, ...]
    numbers: dict[RunFolder, int]

    @property
    def all(self) -> list[Run]:
        """Every run, in the order of the numbers."""
        return [run for group in self.runs.values() for run in group]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path; returns the exit code."""
    return exit_code(lambda: _run(_parser().parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    collection = collect(options.runs, options.experiment, chosen_cache(options))
    _require_place(options.out)
    page = render_page(head_of(collection, options.runs), sections(collection), [packed(r) for r in collection.all])
    try:
        options.out.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _no_place(options.out, error.strerror) from None
    print(options.out)
    return 0


def _parser() -> Parser:
    parser = Parser(description="Tables, figures, curves, failures and costs of all runs as one HTML page.")
    parser.add_argument("--runs", type=typed, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", help="only this experiment (default: all)")
    parser.add_argument("--out", type=typed, default=Path("report.html"), help="the file (default: %(default)s)")
    add_cache_flags(parser)
    return parser


def _require_place(out: Path) -> None:
    """Before the work, not after it."""
    if out.is_dir():
        raise _no_place(out, "it is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(out, error.strerror) from None


def _no_place(out: Path, why: str) -> UserError:
    return UserError(f"expected --out to be a file to write to, got {out} ({why}); choose another.")


def collect(root: Path, experiment: str | None = None, cache: Cache | None = None) -> Collection:
    """Load the runs and make their tables.

    Raises:
        UserError: no such folder or experiment, or no run in it.
    """
    runs = load_runs(root, experiment, cache)
    folders = [run.folder for group in runs.values() for run in group]
    return Collection(runs, tuple(tables_from(runs)), {folder: number for number, folder in enumerate(folders)})


def sections(collection: Collection) -> list[Section]:
    """What is on the page below its head, in order. Another table or figure is another :class:`Section` here."""
    return [
        *(experiment_section(table, collection.numbers) for table in collection.tables),
        *comparison_sections(collection.runs, collection.numbers),
        *paper_sections(collection.runs, collection.numbers),
        runs_section(collection),
        doubts_section(collection),
        cost_section(collection),
    ]


# -- head -------------------------------------------------------------------------------


def head_of(collection: Collection, root: Path) -> Head:
    """What the page is, from what and when, and what the runs were made with."""
    runs = collection.all
    states, cost = Counter(map(shown_state, runs)), cost_of(runs)
    facts = (
        ("Made", (datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),)),
        ("Runs", tuple(f"{states[state]} {state}" for state in _STATES)),
        ("Device-hours", (_hours(cost.hours), *_doubts_of(cost))),
        ("Folder", (str(root.resolve()),)),
        ("Commits", _counted(runs, commit_of)),
        ("torch", _counted(runs, torch_of)),
        ("Hardware", _counted(runs, hardware_of)),
    )
    intro = (
        "First-layer training with and without TrAct (arXiv 2410.23970): what the run folders say, from TensorBoard's "
        "event files to the tables. A refused run has finished, but something about it does not add up, so it enters "
        "no mean."
    )
    return Head("TrAct: report on runs", intro, facts)


def shown_state(run: Run) -> str:
    """One of finished, unfinished, failed and refused (finished, but kept out of every mean)."""
    return "refused" if run.status == Status.finished and not run.usable else str(run.status)


def _counted(runs: Sequence[Run], fact: Callable[[dict], str]) -> tuple[str, ...]:
    """The values of a fact with the number of runs that have it, most frequent first."""
    counts = Counter(value for run in runs for value in dict.fromkeys(fact(attempt) for attempt in run.attempts))
    return tuple(f"{value} ({_runs(count)})" for value, count in counts.most_common()) or ("unknown",)


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


# -- tables and figures -----------------------------------------------------------------


def experiment_section(table: Table, numbers: dict[RunFolder, int]) -> Section:
    """An experiment's table and curves."""
    return Section(f"Experiment {table.experiment}", grids=(grid_of(table, numbers),), pictures=_pictures(table))


def grid_of(table: Table, numbers: dict[RunFolder, int]) -> Grid:
    """A table as it is printed elsewhere, each cell with its runs.

    Args:
        table: of whatever metric.
        numbers: number of each run folder on the page.
    """
    rows = tuple(tuple(_entries(table, row, numbers)) for row in table.rows)
    return Grid(caption(table), tuple(header(table)), rows)


def _entries(table: Table, row: Row, numbers: dict[RunFolder, int]) -> list[Entry]:
    entries = [Entry(plain(value), _number_or_none(value)) for value in row.settings.values()]
    for label, cell in row.cells.items():
        links = _links(cell, table.metric, numbers)
        entries.append(Entry(readable_cell(cell, table.metric), cell.summary.mean, links))
        if cell.difference is not None:
            paired, pairs = cell.difference.paired, _pairs(label, table, row, numbers)
            entries.append(Entry(readable_difference(cell.difference, table.metric), paired.mean, pairs))
            entries.append(Entry(readable_p(cell.difference), paired.p_t))
            detectable = cell.difference.detectable
            entries.append(Entry(readable_detectable(cell.difference, table.metric), detectable))
    return entries


def _number_or_none(value: object) -> float | None:
    return value if is_number(value) else None


def _links(cell: Cell, metric: str, numbers: dict[RunFolder, int]) -> tuple[Link, ...]:
    return tuple(
        Link(f"seed {seed}: {readable_number(cell.values[seed], metric)}", numbers[run.folder])
        for seed, run in cell.runs.items()
    )


def _pairs(label: str, table: Table, row: Row, numbers: dict[RunFolder, int]) -> tuple[Link, ...]:
    """Both runs of each pair."""
    links = []
    for seed in row.cells[label].difference.seeds:
        for name in (label, table.baseline):
            cell = row.cells[name]
            value = readable_number(cell.values[seed], table.metric)
            links.append(Link(f"seed {seed}, {name}: {value}", numbers[cell.runs[seed].folder]))
    return tuple(links)


def _pictures(table: Table) -> tuple[Picture, ...]:
    if not any(cell.runs for row in table.rows for cell in row.cells.values()):
        return ()
    figure = draw(table)
    alt = (
        f"{table.experiment}: {table.metric} against epoch, a panel per row of the table, a line per method "
        f"({', '.join(table.methods)}), mean over seeds and a band of one sample standard deviation."
    )
    try:
        return (picture(figure, f"figure-{os.fsencode(table.experiment).hex()}", alt),)
    finally:
        plt.close(figure)


# -- runs -------------------------------------------------------------------------------


def runs_section(collection: Collection) -> Section:
    """A line per run; its curves and all that is known of it when it is opened."""
    rows = []
    for table in collection.tables:
        runs = collection.runs[table.experiment]
        labels = _labels(runs)
        rows += [_run_entries(run, labels, table.metric, collection.numbers) for run in runs]
    metrics = "; ".join(f"{table.experiment} {table.metric}" for table in collection.tables)
    what = (
        "Every run. A name opens its curves, configuration, provenance and the command that continues it. "
        f"Final values: {metrics}."
    )
    grid = Grid(what, _RUN_COLUMNS, tuple(rows), filter="Show only runs with these words")
    intro = (
        f"Curves have all test/* and train/* tags. One of more than {MOST_POINTS} points is thinned to its first and "
        "last point and the least and the greatest of each stretch between; the drawing says so.",
    )
    return Section("Runs", intro, (grid,), holds_runs=True)


def _labels(runs: Sequence[Run]) -> dict[RunFolder, str]:
    placed = [run for run in runs if run.config is not None]
    labels = method_labels([run.config["method"] for run in placed])
    return {run.folder: label for run, label in zip(placed, labels, strict=True)}


def _run_entries(
    run: Run, labels: dict[RunFolder, str], metric: str, numbers: dict[RunFolder, int]
) -> tuple[Entry, ...]:
    value = run.final_value(metric) if run.config is not None and run.status == Status.finished else None
    hours = device_hours(run)
    return (
        Entry(run.folder.name, opens=numbers[run.folder]),
        Entry(run.experiment),
        Entry(shown_state(run)),
        Entry(labels.get(run.folder, NONE)),
        Entry(NONE) if run.config is None else Entry(str(run.seed), run.seed),
        Entry(NONE) if value is None else Entry(readable_number(value, metric), value),
        Entry(_epochs(run), run.last_epoch),
        Entry(_hours(hours), hours),
        Entry(str(len(run.attempts)), len(run.attempts)),
    )


def _epochs(run: Run) -> str:
    return str(run.last_epoch) if run.config is None else f"{run.last_epoch}/{run.config['epochs']}"


def _hours(hours: float | None) -> str:
    """Three digits, but no fewer than the whole hours.

    Example:
        >>> [_hours(hours) for hours in (None, 0.01234, 12.34, 12345.6)]
        ['–', '0.0123', '12.3', '12,346']
    """
    if hours is None:
        return NONE
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


# -- failures and doubts ----------------------------------------------------------------


def doubts_section(collection: Collection) -> Section:
    """Failed runs with a way out, and every sentence that the tables name."""
    failed = [run for run in collection.all if run.status == Status.failed]
    grids = (_failures(failed, collection.numbers),) if failed else ()
    groups = tuple(_groups(collection))
    intro = () if failed or groups else ("None: every run has finished, and nothing about them is doubtful.",)
    return Section("Failures and doubts", intro, grids, groups=groups)


def _failures(failed: Sequence[Run], numbers: dict[RunFolder, int]) -> Grid:
    columns = ("Failed run", "Kind", "Reason", "Way out", "Where", "When")
    rows = tuple(_failure_entries(run, numbers[run.folder]) for run in failed)
    return Grid("Failed runs, as their failure.json says, and how to go on.", columns, rows)


def _failure_entries(run: Run, number: int) -> tuple[Entry, ...]:
    failure = run.failure or {}
    kind, reason, host, when = (str(failure.get(key) or NONE) for key in ("kind", "reason", "host", "when"))
    name = run.folder.name
    return (
        Entry(name, links=(Link(name, number),)),
        Entry(kind),
        Entry(reason),
        Entry(cure_of(kind)),
        Entry(host),
        Entry(when),
    )


def _groups(collection: Collection) -> list[Group]:
    """The sentences of all tables by what they are about."""
    about = {problem.text: _group_of(run, problem) for run in collection.all for problem in run.problems}
    groups: dict[str, list[str]] = {title: [] for title in (_FAILED, _REFUSED, _OTHER, _UNFINISHED, _NOTED)}
    for sentence in dict.fromkeys(sentence for table in collection.tables for sentence in table.named):
        groups[about.get(sentence, _OTHER)].append(sentence)
    return [Group(title, tuple(sentences)) for title, sentences in groups.items() if sentences]


def _group_of(run: Run, problem: Problem) -> str:
    if not problem.spoils:
        return _NOTED
    return {Status.failed: _FAILED, Status.unfinished: _UNFINISHED, Status.finished: _REFUSED}[run.status]


# -- costs ------------------------------------------------------------------------------


def cost_section(collection: Collection) -> Section:
    """Device-hours by experiment and method, and what they leave out."""
    columns = ("Experiment", "Method", "Runs", "Device-hours", "Hardware", "Not in it")
    rows = tuple(row for name, runs in collection.runs.items() for row in _cost_rows(name, runs))
    intro = (
        "Device-hours are a run's own seconds of training and evaluation, over all its attempts, times its ranks (one "
        "device each): GPU-hours where the hardware is a GPU. Runs that share a device count in full.",
        "A run that is not finished counts up to its last evaluation. What an attempt did after its last checkpoint, "
        "before it was cut off, is not recorded: runs of several attempts cost more than this.",
    )
    return Section("Cost", intro, (Grid("Device-hours by experiment and method.", columns, rows),))


def _cost_rows(experiment: str, runs: Sequence[Run]) -> list[tuple[Entry, ...]]:
    labels, by_method = _labels(runs), {}
    for run in runs:
        by_method.setdefault(labels.get(run.folder, NONE), []).append(run)
    return [_cost_entries(experiment, label, by_method[label]) for label in sorted(by_method)]


def _cost_entries(experiment: str, label: str, runs: Sequence[Run]) -> tuple[Entry, ...]:
    cost = cost_of(runs)
    return (
        Entry(experiment),
        Entry(label),
        Entry(str(len(runs)), len(runs)),
        Entry(_hours(cost.hours), cost.hours),
        Entry("; ".join(cost.hardware) or NONE),
        Entry("; ".join(_doubts_of(cost)) or NONE),
    )


def _doubts_of(cost: Cost) -> tuple[str, ...]:
    """What the hours leave out, as far as it applies."""
    counts = {
        "of unknown time": cost.unknown,
        "only up to the last evaluation": cost.partial,
        "without what was lost between attempts": cost.repeated,
        "of an uncertain number of ranks": cost.guessed,
    }
    return tuple(f"{_runs(count)} {words}" for words, count in counts.items() if count)


if __name__ == "__main__":
    sys.exit(main())
