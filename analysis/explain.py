"""Where a number of a table comes from: its runs, what they were made with, and how to make them again."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from analysis.comparison import Cell, Table, commit_of, hardware_of
from analysis.costs import device_hours
from analysis.grouping import plain
from analysis.load import Run
from analysis.paper import PaperTable
from analysis.paper_rendering import readable_cell as readable_paper_cell
from analysis.rendering import NONE, readable_cell, readable_number
from runfolder.errors import UserError, nearest

AGAIN = "again"  # a folder for runs that are made once more
_SEPARATOR = " / "
_HEAD = ["seed", "value", "run", "attempts", "GPU-hours", "commit", "Python, torch", "hardware", "started"]


@dataclass(frozen=True)
class Number:
    """One cell of a table by its name."""

    name: tuple[str, ...]  # the words of its row, then those of its column
    shown: str
    metric: str
    form: str | int  # how its values are printed, see readable_number
    cell: Cell


def numbers_of(tables: Sequence[Table | PaperTable]) -> list[Number]:
    """All cells with runs of ours to explain; the table's own name comes first where there are several tables."""
    found = []
    for table in tables:
        own = _paper_numbers(table) if isinstance(table, PaperTable) else _numbers(table)
        head = table.name if isinstance(table, PaperTable) else table.experiment
        found += [replace(one, name=(head, *one.name)) if len(tables) > 1 else one for one in own]
    return found


def _numbers(table: Table) -> list[Number]:
    return [
        Number(
            (*map(plain, row.settings.values()), label),
            readable_cell(cell, table.metric),
            table.metric,
            table.metric,
            cell,
        )
        for row in table.rows
        for label, cell in row.cells.items()
    ]


def _paper_numbers(table: PaperTable) -> list[Number]:
    return [
        Number(
            (*row.words, column),
            readable_paper_cell(own, table.digits),
            table.names[own.key.quantity],
            table.digits,
            own.cell,
        )
        for row in table.rows
        for column, own in zip(table.columns, row.cells, strict=True)
        if own.cell is not None
    ]


def find(numbers: Sequence[Number], wanted: str) -> Number:
    """The one cell that is called ``wanted``, or whose name has all its words; case does not matter.

    Words are separated by ``/``, where a word holds one itself by `` / ``.

    Raises:
        UserError: no such cell, or several.
    """
    names = {_SEPARATOR.join(number.name): number for number in numbers}
    exact = [number for name, number in names.items() if name.casefold() == wanted.strip().casefold()]
    fitting = exact or _with_words(names.values(), wanted.split(_SEPARATOR)) or _with_words(numbers, wanted.split("/"))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = "; ".join(_SEPARATOR.join(number.name) for number in fitting[:5])
        raise UserError(f"expected --explain to name one cell, got {wanted}, which fits {len(fitting)}: {several}.")
    raise UserError(f"no cell {wanted}; {nearest(wanted, names).replace(', ', '; ')}.")


def _with_words(numbers: Iterable[Number], words: Sequence[str]) -> list[Number]:
    wanted = {word.strip().casefold() for word in words}
    return [number for number in numbers if wanted <= {part.casefold() for part in number.name}]


def explain(number: Number) -> str:
    """The runs behind a cell as Markdown: a table of them, then the commands that make each one again.

    The commands give the complete configuration, so they hold whatever defaults have become.
    """
    runs = number.cell.runs
    title = f"**{_SEPARATOR.join(number.name)}: {number.shown}** ({number.metric})"
    if not runs:
        return f"{title}\n\nNo run is behind it.\n"
    rows = [_row(seed, number.cell.values[seed], run, number.form) for seed, run in runs.items()]
    known = [hours for hours in map(device_hours, runs.values()) if hours is not None]
    total = f"{math.fsum(known):.3g} GPU-hours in all{'' if len(known) == len(runs) else ', as far as known'}"
    total += " (hours of the device named, be it a GPU or not)."
    by_code = itertools.groupby(sorted(runs.values(), key=_code_of), key=_code_of)
    commands = [line for code, own in by_code for line in (*code, *(word for run in own for word in _again(run)))]
    lines = "\n".join(commands)
    return (
        f"{title}\n\n{tabulate(rows, _HEAD, tablefmt='pipe', disable_numparse=True)}\n\n{total}\n\n"
        f"To make them again, in a checkout of this repository:\n\n```\n{lines}\n```\n"
    )


def _row(seed: int, value: float, run: Run, form: str | int) -> list[str]:
    hours = device_hours(run)
    packages = [attempt.get("packages") for attempt in run.attempts]
    versions = [(own.get("python", "?"), own.get("torch", "?")) for own in packages if isinstance(own, dict)]
    return [
        str(seed),
        readable_number(value, form),
        str(run.folder),
        str(len(run.attempts) or NONE),
        NONE if hours is None else f"{hours:.3g}",
        _distinct(commit_of(attempt) for attempt in run.attempts),
        _distinct(", ".join(map(str, pair)) for pair in versions),
        _distinct(hardware_of(attempt) for attempt in run.attempts),
        _distinct(str(attempt.get("started", "?")) for attempt in run.attempts[:1]),
    ]


def _distinct(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words)) or NONE


def _code_of(run: Run) -> tuple[str, ...]:
    """Commands that bring back the code of a run's last attempt."""
    attempt = run.attempts[-1] if run.attempts else {}
    commit, patch = attempt.get("commit"), attempt.get("diff")
    lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    return (*lines, *([f"git apply {shlex.quote(str(run.folder / str(patch)))}"] if patch else []))


def _again(run: Run) -> list[str]:
    """Commands that train the run's configuration in a folder of its own."""
    target = shlex.quote(f"{AGAIN}/{run.experiment}/{run.folder.name}")
    return [
        f"mkdir -p {target}",
        f"cp {shlex.quote(str(run.folder.config))} {target}/",
        f"python experiments/{run.experiment}.py --resume {target}",
    ]
