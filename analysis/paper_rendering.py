"""The paper's tables as Markdown, LaTeX, CSV and JSON. Rounds for readers; CSV and JSON keep every digit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from analysis.paper import BASELINE, PaperCell, PaperRow, PaperTable
from analysis.paper_runtime import clock
from analysis.rendering import (
    DETECTABLE,
    DIFFERENCE_FIELDS,
    NONE,
    latex_escape,
    markdown_cell,
    one_line,
    plain_difference,
    readable_detectable,
    readable_difference,
    readable_p,
    readable_signed,
)
from analysis.statistics import PublishedDifference, summarise

_LINE = ("table", "row", "column", "subject", "arm", "quantity", "n", "mean", "std", "seeds", "values", "runs")
_PUBLISHED = ("published_mean", "published_std", "difference")
_AGAINST = ("low", "high", "p_equivalence", "margin", "published_exact")


def render_paper(tables: Sequence[PaperTable], form: str) -> str:
    """The tables in one of the formats ``md``, ``latex``, ``csv`` and ``json``, as one text."""
    if form == "csv":
        return to_csv(tables)
    if form == "json":
        return json.dumps([to_plain(table) for table in tables], indent=1, allow_nan=False) + "\n"
    return "\n".join((to_markdown if form == "md" else to_latex)(table) for table in tables)


def caption(table: PaperTable) -> str:
    """What the numbers are, in sentences."""
    head = f"{table.name[0].upper()}{table.name[1:]} of arXiv 2410.23970: {table.title}."
    if any(cell.key.quantity == "seconds" for cell in table.rows[0].cells):
        return f"{head} Ours: median, lower to upper quartile (blocks measured) [published, ours − published]."
    average = " Average: the mean of the printed numbers, with the number of rows." if table.average else ""
    return (
        f"{head} Ours: mean ± sample standard deviation of the final epoch (runs) [published mean ± std, ours − "
        f"published].{average} Runs that are unfinished, failed, unreadable or of another recipe enter no mean."
    )


def comparison_caption(table: PaperTable) -> str:
    """What the differences under a table are."""
    return (
        f"Δ: the method minus {table.names[BASELINE]}, ours, paired by seed, [95 % t-interval] (number of pairs). p: "
        f"paired t-test / exact sign-flip permutation test / paired t-test with Holm's adjustment over this table's "
        f"{table.comparisons} comparisons. {DETECTABLE}"
    )


# -- words ----------------------------------------------------------------------------------------


def readable_rows(table: PaperTable) -> list[list[str]]:
    """The rows of the readable formats, rounded, with the average last."""
    return [[*row.words, *(readable_cell(cell, table.digits) for cell in row.cells)] for row in all_rows(table)]


def all_rows(table: PaperTable) -> list[PaperRow]:
    """The rows, with the average last."""
    return [*table.rows, *([] if table.average is None else [table.average])]


def readable_cell(cell: PaperCell, digits: int) -> str:
    """``70.01 ± 0.20 (5) [69.66 ± 0.20, +0.35]``; ``– (0) [69.66 ± 0.20]`` where nothing was run."""
    if cell.ours is None:
        return NONE if cell.published is None else f"[{_number(cell, cell.published.mean, digits)}]"
    ours = NONE if cell.ours.mean is None else _value(cell, cell.ours.mean, cell.ours.std, digits)
    if cell.quartiles is not None:
        low, high = (_number(cell, value, digits) for value in cell.quartiles)
        ours += f", {low} to {high}"
    if cell.published is None:
        return f"{ours} ({cell.ours.n}) [{NONE}]"
    beside = _value(cell, cell.published.mean, cell.published.std, digits)
    if cell.difference is not None:
        beside += f", {_signed(cell, digits)}"
    return f"{ours} ({cell.ours.n}) [{beside}]"


def _value(cell: PaperCell, mean: float, std: float | None, digits: int) -> str:
    spread = "" if std is None else f" ± {_number(cell, std, digits)}"
    return f"{_number(cell, mean, digits)}{spread}"


def _number(cell: PaperCell, value: float, digits: int) -> str:
    if cell.key.quantity == "seconds":
        return clock(value)
    return f"{value:.{digits}f}".replace("-", "−")


def _signed(cell: PaperCell, digits: int) -> str:
    sign = "−" if cell.difference < 0 else "+"
    return sign + _number(cell, abs(cell.difference), digits)


def compared(table: PaperTable) -> list[PaperCell]:
    """The cells whose difference from the baseline has a pair."""
    cells = (cell for row in table.rows for cell in row.cells)
    return [cell for cell in cells if cell.paired is not None and cell.paired.paired.n]


def comparison_rows(table: PaperTable) -> list[list[str]]:
    """[subject, method, quantity, difference, p, detectable] of every comparison that has a pair."""
    return [
        [
            *_words(table, cell),
            readable_difference(cell.paired, table.digits),
            readable_p(cell.paired),
            readable_detectable(cell.paired, table.digits),
        ]
        for cell in compared(table)
    ]


def _words(table: PaperTable, cell: PaperCell) -> list[str]:
    return [cell.key.subject, table.names[cell.key.arm], table.names[cell.key.quantity]]


def with_published(table: PaperTable) -> list[PaperCell]:
    """The cells of two runs or more that have a published number."""
    return [cell for row in table.rows for cell in row.cells if cell.against is not None]


def published_rows(table: PaperTable) -> list[list[str]]:
    """[subject, method, quantity, ours minus published, equivalence] of cells with two runs or more."""
    return [
        [
            *_words(table, cell),
            readable_against(cell.against, table.digits),
            readable_equivalence(cell.against),
        ]
        for cell in with_published(table)
    ]


def readable_against(found: PublishedDifference, digits: int) -> str:
    """``+0.35 [+0.12, +0.58] (5)``."""
    low, high = readable_signed(found.low, digits), readable_signed(found.high, digits)
    return f"{readable_signed(found.difference, digits)} [{low}, {high}] ({found.n})"


def readable_equivalence(found: PublishedDifference) -> str:
    """``0.0031``."""
    return NONE if found.p_equivalence is None else f"{found.p_equivalence:.3g}"


def published_caption(table: PaperTable) -> str:
    """What the comparison with the published numbers is."""
    found = [cell.against for cell in with_published(table)]
    exact = any(one.published_exact for one in found)
    return (
        "Ours minus published, [95 % interval by Welch] (runs of ours). p of equivalence: two one-sided t-tests; below "
        f"0.05 the two means are the same to ±{found[0].margin:g}."
        + (
            " Where the paper prints no spread its number counts as exact, and the interval is too narrow."
            if exact
            else ""
        )
    )


COMPARISON_HEAD = ["", "method", "measured", "Δ", "p", "min Δ"]
PUBLISHED_HEAD = ["", "method", "measured", "ours − published", "p of equivalence"]


# -- formats --------------------------------------------------------------------------------------


def to_markdown(table: PaperTable) -> str:
    """A caption, a pipe table, the paired differences, and what is missing as a list."""
    parts = [f"**{caption(table)}**", _pipes(readable_rows(table), [*table.axes, *table.columns])]
    differences = comparison_rows(table)
    if differences:
        parts += [comparison_caption(table), _pipes(differences, COMPARISON_HEAD)]
    against = published_rows(table)
    if against:
        parts += [published_caption(table), _pipes(against, PUBLISHED_HEAD)]
    parts += table.remarks
    if table.named:
        parts += [
            f"Missing or doubtful ({len(table.named)}):",
            "\n".join(f"- {one_line(text)}" for text in table.named),
        ]
    return "\n\n".join(parts) + "\n"


def _pipes(rows: list[list[str]], head: list[str]) -> str:
    escaped = [list(map(markdown_cell, row)) for row in rows]
    return tabulate(escaped, head, tablefmt="pipe", disable_numparse=True)


def to_latex(table: PaperTable) -> str:
    """A floating table; needs the packages booktabs and textcomp (part of LaTeX since 2020)."""
    differences, against, below = comparison_rows(table), published_rows(table), []
    if differences:
        below += [r"\par\medskip", latex_escape(comparison_caption(table)), r"\par\smallskip"]
        below += _tabular(differences, COMPARISON_HEAD, 3)
    if against:
        below += [r"\par\medskip", latex_escape(published_caption(table)), r"\par\smallskip"]
        below += _tabular(against, PUBLISHED_HEAD, 3)
    below += [rf"\par {latex_escape(remark)}" for remark in table.remarks]
    if table.named:
        below += [r"\begin{itemize}", *(rf"\item {latex_escape(text)}" for text in table.named), r"\end{itemize}"]
    head = ["% needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}", r"\begin{table}", r"\centering"]
    body = _tabular(readable_rows(table), [*table.axes, *table.columns], len(table.axes))
    return "\n".join([*head, rf"\caption{{{latex_escape(caption(table))}}}", *body, *below, r"\end{table}", ""])


def _tabular(rows: list[list[str]], head: list[str], words: int) -> list[str]:
    lines = [" & ".join(map(latex_escape, row)) + r" \\" for row in [head, *rows]]
    columns = "l" * words + "r" * (len(head) - words)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return [*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]


def to_plain(table: PaperTable) -> dict[str, Any]:
    """The whole table as dictionaries, lists and full-precision numbers."""
    return {
        "table": table.name,
        "caption": caption(table),
        "axes": list(table.axes),
        "columns": list(table.columns),
        "rows": [_plain_row(table, row) for row in table.rows],
        "average": None if table.average is None else _plain_row(table, table.average),
        "remarks": list(table.remarks),
        "named": list(table.named),
    }


def _plain_row(table: PaperTable, row: PaperRow) -> dict[str, Any]:
    cells = [_plain_cell(column, cell) for column, cell in zip(table.columns, row.cells, strict=True)]
    return {"words": dict(zip(table.axes, row.words, strict=True)), "cells": cells}


def _plain_cell(column: str, cell: PaperCell) -> dict[str, Any]:
    values, runs = ({}, {}) if cell.cell is None else (cell.cell.values, cell.cell.runs)
    quartiles = {} if cell.quartiles is None else {"quartiles": list(cell.quartiles)}
    return {
        "column": column,
        **asdict(cell.key),
        **asdict(cell.ours or summarise([])),
        **quartiles,
        "seeds": list(values),
        "values": list(values.values()),
        "runs": [str(run.folder) for run in runs.values()],
        "published": None if cell.published is None else asdict(cell.published),
        "difference": cell.difference,
        "paired": None if cell.paired is None else plain_difference(cell.paired),
        "against_published": None if cell.against is None else asdict(cell.against),
    }


def to_csv(tables: Sequence[PaperTable]) -> str:
    """One line per cell of all tables; lists are separated by a semicolon; an empty field is undefined."""
    text = io.StringIO()
    names = [*_LINE, "quartiles", *_PUBLISHED, *(f"against_{name}" for name in _AGAINST)]
    names += [*(f"paired_{name}" for name in DIFFERENCE_FIELDS)]
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    for table in tables:
        for row in all_rows(table):
            writer.writerows(_csv_lines(table, row))
    return text.getvalue()


def _csv_lines(table: PaperTable, row: PaperRow) -> Iterator[dict[str, Any]]:
    for content in _plain_row(table, row)["cells"]:
        published, paired = content.pop("published") or {}, content.pop("paired") or {}
        against = content.pop("against_published") or {}
        line = {key: ";".join(map(str, value)) if isinstance(value, list) else value for key, value in content.items()}
        line |= {"table": table.name, "row": " ".join(filter(None, row.words))}
        line |= {f"published_{key}": value for key, value in published.items()}
        line |= {f"against_{key}": against[key] for key in _AGAINST if key in against}
        yield line | {f"paired_{key}": paired[key] for key in DIFFERENCE_FIELDS if key in paired}
