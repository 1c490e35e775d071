"""Tables as Markdown, LaTeX, CSV and JSON. Rounds for readers; CSV and JSON keep every digit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from analysis.comparison import Cell, Difference, Row, Table
from analysis.grouping import plain
from analysis.speedup import Speedup

NONE = "–"
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": r"$-$", "Δ": r"$\Delta$", "–": r"\textendash{}", "\n": " ",
}  # fmt: skip
_CELL_FIELDS = ("method", "n", "mean", "std", "seeds", "values", "runs")
DIFFERENCE_FIELDS = ("n", "mean", "low", "high", "p_t", "p_permutation", "p_holm", "p_holm_permutation", "detectable")
DETECTABLE = (
    "min Δ: the smallest true difference that a t-test of so many pairs with this spread finds in 80 % of all cases."
)
_SPEEDUP_FIELDS = ("n", "censored", "target", "budget", "value", "bound", "low", "high")


def render(tables: Sequence[Table], form: str) -> str:
    """The tables in one of the formats ``md``, ``latex``, ``csv`` and ``json``, as one text."""
    if form == "csv":
        return to_csv(tables)
    if form == "json":
        return json.dumps([to_plain(table) for table in tables], indent=1, allow_nan=False) + "\n"
    return "\n".join((to_markdown if form == "md" else to_latex)(table) for table in tables)


def caption(table: Table) -> str:
    """What the numbers are, in sentences."""
    what = f"{table.experiment}: {table.metric}, mean ± sample standard deviation (number of runs)"
    if table.best:
        which = (
            " of each run's BEST epoch. WARNING: the epoch is SELECTED ON THE TEST SET, so these numbers are too good; "
            "report the final epoch instead."
        )
    else:
        which = " of the final epoch."
    rule = " Runs that are unfinished, failed or unreadable enter no mean."
    return what + which + rule + _comparison_caption(table)


def _comparison_caption(table: Table) -> str:
    if table.baseline is None:
        return " No differences: no single method here is the baseline; choose one by --baseline."
    if len(table.methods) < 2:
        return ""
    return (
        f" Δ: method minus {table.baseline}, paired by seed, [95 % t-interval] (number of pairs). p: paired t-test / "
        f"exact sign-flip permutation test / paired t-test with Holm's adjustment over this table's "
        f"{table.comparisons} comparisons. {DETECTABLE}{_speedup_caption(table)}"
    )


def _speedup_caption(table: Table) -> str:
    if not table.has_speedups:
        return ""
    return (
        f" Speed-up: epochs (or seconds, evaluation included) of {table.baseline} over the median of a method's epochs "
        f"to {table.baseline}'s mean final value, [95 % bootstrap interval over seeds] (runs; of which so many never "
        f"reach it). That of {table.baseline} against itself is above 1 where a noisy curve crosses its own end early."
    )


def header(table: Table) -> list[str]:
    """The column names of the readable formats."""
    names = list(table.axes)
    for label in table.methods:
        names.append(label)
        if _compared(table, label):
            names += [f"Δ {label}", f"p {label}", f"min Δ {label}"]
        if table.has_speedups:
            names += [f"speed-up {label} (epochs)", f"speed-up {label} (seconds)"]
    return names


def readable_row(table: Table, row: Row) -> list[str]:
    """One row of the readable formats, rounded."""
    words = [plain(value) for value in row.settings.values()]
    for label in table.methods:
        cell = row.cells[label]
        words.append(readable_cell(cell, table.metric))
        if _compared(table, label):
            words += [readable_difference(cell.difference, table.metric), readable_p(cell.difference)]
            words.append(readable_detectable(cell.difference, table.metric))
        if table.has_speedups:
            speedups = cell.speedups
            words += [
                readable_speedup(found) for found in (speedups and speedups.epochs, speedups and speedups.seconds)
            ]
    return words


def _compared(table: Table, label: str) -> bool:
    return table.baseline is not None and label != table.baseline


def readable_cell(cell: Cell, metric: str) -> str:
    """``71.23 ± 0.18 (5)``; without a spread for one run; ``– (0)`` for none."""
    summary = cell.summary
    if summary.mean is None:
        return f"{NONE} (0)"
    spread = "" if summary.std is None else f" ± {readable_number(summary.std, metric)}"
    return f"{readable_number(summary.mean, metric)}{spread} ({summary.n})"


def readable_difference(difference: Difference, metric: str | int) -> str:
    """``+0.52 [+0.10, +0.94] (5)``."""
    paired = difference.paired
    if paired.mean is None:
        return NONE
    ends = [readable_signed(end, metric) for end in (paired.low, paired.high) if end is not None]
    interval = f" [{', '.join(ends)}]" if ends else ""
    return f"{readable_signed(paired.mean, metric)}{interval} ({paired.n})"


def readable_p(difference: Difference) -> str:
    """``0.0128 / 0.0625 / 0.0255``: t, permutation, Holm."""
    numbers = (difference.paired.p_t, difference.paired.p_permutation, difference.p_holm)
    return " / ".join(NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3g}" for p in numbers)


def readable_speedup(found: Speedup | None) -> str:
    """``1.85 [1.60, 2.10] (5)``; ``< 1.20 (5; 3 never)`` where half of the runs or more never arrive."""
    if found is None:
        return NONE
    value = f"< {found.bound:.2f}" if found.value is None else f"{found.value:.2f}"
    low = "0" if found.low is None else f"{found.low:.2f}"
    interval = "" if found.high is None else f" [{low}, {found.high:.2f}]"
    never = f"; {found.censored} never" if found.censored else ""
    return f"{value}{interval} ({found.n}{never})"


def readable_detectable(difference: Difference, metric: str | int) -> str:
    """``0.31``."""
    return NONE if difference.detectable is None else readable_number(difference.detectable, metric)


def readable_number(value: float, metric: str | int) -> str:
    """``71.23`` for a percentage, four digits of any other metric; with a number so many digits after the point."""
    digits = 2 if str(metric).rpartition("/")[2].startswith(("top", "map")) else metric
    text = f"{value:.{digits}f}" if isinstance(digits, int) else f"{value:.4g}"
    return text.replace("-", "−")


def readable_signed(value: float, metric: str | int) -> str:
    """The same of a difference: ``+0.52``."""
    text = readable_number(value, metric)
    return text if text.startswith("−") else f"+{text}"


def to_markdown(table: Table) -> str:
    """A caption, a pipe table, and what is missing as a list."""
    return markdown(caption(table), header(table), [readable_row(table, row) for row in table.rows], table.named)


def markdown(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], named: Sequence[str]) -> str:
    """Any table of texts likewise."""
    lines, names = [list(map(markdown_cell, row)) for row in rows], list(map(markdown_cell, names))
    body = tabulate(lines, names, tablefmt="pipe", disable_numparse=True) if rows else "(no run with a readable config)"
    sentences = "".join(f"- {one_line(sentence)}\n" for sentence in named)
    gaps = f"\nMissing or doubtful ({len(named)}):\n\n{sentences}" if named else ""
    return f"**{title}**\n\n{body}\n{gaps}"


def markdown_cell(text: str) -> str:
    """A text as it can stand between two bars."""
    return one_line(text).replace("|", r"\|")


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.splitlines())


def to_latex(table: Table) -> str:
    """A floating table; needs the packages booktabs and textcomp (part of LaTeX since 2020)."""
    rows = [readable_row(table, row) for row in table.rows]
    return latex(caption(table), header(table), rows, table.named, len(table.axes))


def latex(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], named: Sequence[str], words: int) -> str:
    """Any table of texts likewise, the first so many columns being words."""
    lines = [" & ".join(map(latex_escape, row)) + r" \\" for row in rows]
    columns = "l" * words + "r" * (len(names) - words)
    items = [rf"\item {latex_escape(sentence)}" for sentence in named]
    gaps = [r"\begin{itemize}", *items, r"\end{itemize}"] if named else []
    return "\n".join([
        "% needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}",
        r"\begin{table}", r"\centering", rf"\caption{{{latex_escape(title)}}}",
        rf"\begin{{tabular}}{{{columns or 'l'}}}", r"\toprule",
        " & ".join(map(latex_escape, names)) + r" \\", r"\midrule", *lines, r"\bottomrule",
        r"\end{tabular}", *gaps, r"\end{table}", "",
    ])  # fmt: skip


def latex_escape(text: str) -> str:
    r"""Text that LaTeX prints as it stands.

    Example:
        >>> print(latex_escape("lambda_ = 5 %"))
        lambda\_ = 5 \%
    """
    escaped = "".join(_LATEX.get(character, character) for character in text).replace("--", "-{}-")
    return "{}" + escaped if escaped.startswith("[") else escaped  # no optional argument of a line break


def to_plain(table: Table) -> dict[str, Any]:
    """The whole table as dictionaries, lists and full-precision numbers."""
    return {
        "experiment": table.experiment,
        "metric": table.metric,
        "epoch": "best" if table.best else "final",
        "baseline": table.baseline,
        "caption": caption(table),
        "axes": list(table.axes),
        "methods": list(table.methods),
        "rows": [
            {"settings": row.settings, "cells": [_plain_cell(label, cell) for label, cell in row.cells.items()]}
            for row in table.rows
        ],
        "named": list(table.named),
    }


def _plain_cell(label: str, cell: Cell) -> dict[str, Any]:
    return {
        "method": label,
        **asdict(cell.summary),
        "seeds": list(cell.values),
        "values": list(cell.values.values()),
        "runs": [str(run.folder) for run in cell.runs.values()],
        "difference": None if cell.difference is None else plain_difference(cell.difference),
        "speedup": None if cell.speedups is None else asdict(cell.speedups),
    }


def plain_difference(difference: Difference) -> dict[str, Any]:
    """A difference as a dictionary of full-precision numbers."""
    more = ("p_holm", "p_holm_permutation", "detectable")
    return (
        asdict(difference.paired) | {key: getattr(difference, key) for key in more} | {"seeds": list(difference.seeds)}
    )


def to_csv(tables: Sequence[Table]) -> str:
    """One line per cell of all tables; lists are separated by a semicolon; an empty field is undefined."""
    axes = list(dict.fromkeys(axis for table in tables for axis in table.axes))
    differences = [f"difference_{name}" for name in DIFFERENCE_FIELDS]
    names = ["experiment", "metric", "epoch", *axes, *_CELL_FIELDS, "baseline", *differences]
    if any(table.has_speedups for table in tables):
        names += [f"speedup_{unit}_{name}" for unit in ("epochs", "seconds") for name in _SPEEDUP_FIELDS]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            writer.writerows(_csv_line(table, row, label, cell) for label, cell in row.cells.items())
    return text.getvalue()


def _csv_line(table: Table, row: Row, label: str, cell: Cell) -> dict[str, Any]:
    content = _plain_cell(label, cell)
    difference, speedups = content.pop("difference") or {}, content.pop("speedup") or {}
    line = {key: ";".join(map(str, value)) if isinstance(value, list) else value for key, value in content.items()}
    line |= {"experiment": table.experiment, "metric": table.metric, "epoch": "best" if table.best else "final"}
    line |= {name: plain(value) for name, value in row.settings.items()}
    line |= {f"difference_{key}": difference[key] for key in DIFFERENCE_FIELDS if key in difference}
    for unit, found in speedups.items():
        line |= {f"speedup_{unit}_{key}": found[key] for key in _SPEEDUP_FIELDS} if found else {}
    return line | {"baseline": table.baseline}
