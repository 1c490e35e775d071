"""The paper's tables and figures as parts of the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.load import Run
from analysis.page.parts import Entry, Grid, Group, Link, Section, picture
from analysis.paper import RUNTIME, PaperCell, PaperRow, PaperTable, build_paper_table, table_names
from analysis.paper_figures import draw_figure, figure_names
from analysis.paper_rendering import (
    COMPARISON_HEAD,
    PUBLISHED_HEAD,
    all_rows,
    caption,
    compared,
    comparison_caption,
    published_caption,
    readable_against,
    readable_cell,
    readable_equivalence,
    with_published,
)
from analysis.rendering import readable_detectable, readable_difference, readable_number, readable_p
from runfolder.folder import RunFolder

_GAPS = "Missing or doubtful"


def paper_sections(runs: Mapping[str, Sequence[Run]], numbers: Mapping[RunFolder, int]) -> list[Section]:
    """A section for each table and figure of which something was run, and one that lists the others.

    Args:
        runs: by experiment.
        numbers: number of each run folder on the page.
    """
    found, empty = [], []
    for name in (name for name in table_names() if name != RUNTIME):
        table = build_paper_table(name, lambda experiment: runs.get(experiment, ()))
        if any(cell.ours is not None and cell.ours.n for row in table.rows for cell in row.cells):
            found.append(table_section(table, numbers))
        else:
            empty.append(f"Table {name}")
    for name in figure_names():
        figure, named = draw_figure(name, runs)
        if figure is None:
            empty.append(f"Figure {name}")
            continue
        alt = f"Figure {name} of the paper, from these runs; its caption says what is drawn and how much is missing."
        found.append(_with_gaps(f"Paper: figure {name}", named, pictures=(picture(figure, f"paper-{name}", alt),)))
    if empty:
        words = f"No run here is one of the paper's runs for: {', '.join(empty)}."
        found.append(Section("Paper: not run yet", (words, "`analysis/tables.py --table` names the commands.")))
    return found


def _with_gaps(title: str, named: Sequence[str], **parts) -> Section:
    return Section(title, groups=(Group(_GAPS, tuple(named)),) if named else (), **parts)


def table_section(table: PaperTable, numbers: Mapping[RunFolder, int]) -> Section:
    """A table of the paper, its paired differences, and its comparison with the published numbers."""
    rows = tuple(tuple(_row(table, row, numbers)) for row in all_rows(table))
    grids = [Grid(caption(table), (*table.axes, *table.columns), rows)]
    pairs = compared(table)
    if pairs:
        entries = tuple(tuple(_comparison(table, cell)) for cell in pairs)
        grids.append(Grid(comparison_caption(table), ("row", *COMPARISON_HEAD[1:]), entries))
    against = with_published(table)
    if against:
        entries = tuple(tuple(_published(table, cell)) for cell in against)
        grids.append(Grid(published_caption(table), ("row", *PUBLISHED_HEAD[1:]), entries))
    section = _with_gaps(f"Paper: {table.name}", table.named, grids=tuple(grids))
    remarks = Group("Over all rows", table.remarks)
    return Section(section.title, grids=section.grids, groups=(*([remarks] if table.remarks else []), *section.groups))


def _row(table: PaperTable, row: PaperRow, numbers: Mapping[RunFolder, int]) -> list[Entry]:
    return [*map(Entry, row.words), *(_entry(table, cell, numbers) for cell in row.cells)]


def _entry(table: PaperTable, cell: PaperCell, numbers: Mapping[RunFolder, int]) -> Entry:
    value = None if cell.ours is None else cell.ours.mean
    return Entry(readable_cell(cell, table.digits), value, _links(table, cell, numbers))


def _links(table: PaperTable, cell: PaperCell, numbers: Mapping[RunFolder, int]) -> tuple[Link, ...]:
    if cell.cell is None:
        return ()
    values = cell.cell.values
    return tuple(
        Link(f"seed {seed}: {readable_number(values[seed], table.digits)}", numbers[run.folder])
        for seed, run in cell.cell.runs.items()
    )


def _words(table: PaperTable, cell: PaperCell) -> list[Entry]:
    return [Entry(cell.key.subject), Entry(table.names[cell.key.arm]), Entry(table.names[cell.key.quantity])]


def _comparison(table: PaperTable, cell: PaperCell) -> list[Entry]:
    found = cell.paired
    return [
        *_words(table, cell),
        Entry(readable_difference(found, table.digits), found.paired.mean),
        Entry(readable_p(found), found.paired.p_t),
        Entry(readable_detectable(found, table.digits), found.detectable),
    ]


def _published(table: PaperTable, cell: PaperCell) -> list[Entry]:
    return [
        *_words(table, cell),
        Entry(readable_against(cell.against, table.digits), cell.against.difference),
        Entry(readable_equivalence(cell.against), cell.against.p_equivalence),
    ]
