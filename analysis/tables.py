"""Accuracy tables from run folders.

    python analysis/tables.py --runs runs --experiment cifar_resnet
    python analysis/tables.py --runs runs --table 1
    python analysis/tables.py --table runtime --runtime runtime.json

One table per experiment: a row per configuration, a column per method, mean ± sample standard
deviation (n) of the final epoch, and each method's difference from the baseline, paired by
seed. Runs that are unfinished, failed or damaged, and missing seeds, are named below the table.

With --table the paper's tables in its own layout, ours beside the published numbers; what was
not run is a gap, and below the table stands the command that makes it.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.cache import Cache
from analysis.command import EXIT_NAMED, add_cache_flags, chosen_cache, exit_code
from analysis.compare import EXPERIMENT as COMPARISON
from analysis.compare import accuracies
from analysis.comparison import Table, build_table
from analysis.explain import explain, find, numbers_of
from analysis.load import Run, load_runs
from analysis.paper import RUNTIME, PaperTable, build_paper_table, runs_of, table_names
from analysis.paper_rendering import render_paper
from analysis.paper_runtime import build_runtime_table
from analysis.rendering import render
from runfolder.errors import Parser, UserError, nearest
from runfolder.folder import typed
from runfolder.printing import printable
from runfolder.tags import primary_metric

_SUFFIX = {"md": "md", "latex": "tex", "csv": "csv", "json": "json"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the tables; returns the exit code."""
    return exit_code(lambda: _run(_parser().parse(arguments)))


def _run(options: argparse.Namespace) -> int:
    _refuse_contradictions(options)
    if options.table is not None:
        tables = _paper_tables(options)
    else:
        best = options.best or options.metric == "best"
        metric = None if options.metric == "best" else options.metric
        runs = load_runs(options.runs, options.experiment, chosen_cache(options))
        tables = tables_from(runs, metric, options.baseline, best, options.speedup)
    if options.explain is not None:
        print(printable(explain(find(numbers_of(tables), options.explain))), end="")
    elif options.table is not None:
        _write(tables, [table.name.replace(" ", "-") for table in tables], render_paper, options)
    else:
        _write(tables, [_experiment_name(table) for table in tables], render, options)
    return EXIT_NAMED if options.strict and any(table.named for table in tables) else 0


def _paper_tables(options: argparse.Namespace) -> list[PaperTable]:
    names = table_names() if options.table == "all" else [options.table]
    cache = chosen_cache(options)
    load = functools.cache(lambda experiment: runs_of(options.runs, experiment, cache))  # tables share experiments
    return [build_runtime_table(options.runtime) if n == RUNTIME else build_paper_table(n, load) for n in names]


def _refuse_contradictions(options: argparse.Namespace) -> None:
    for flag in ("experiment", "metric", "baseline", "best", "speedup"):
        if options.table is not None and getattr(options, flag):
            raise UserError(f"--table decides the {flag} itself, got --{flag} too; leave out one of the two.")
    if options.runtime is not None and options.table not in (RUNTIME, "all"):
        raise UserError(f"--runtime is for --table {RUNTIME} or --table all, got neither; give one of them.")


def _parser() -> Parser:
    parser = Parser(description="Tables from run folders: mean ± sample std (n) per configuration and method.")
    parser.add_argument("--runs", type=typed, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", help="only this experiment (default: all)")
    parser.add_argument("--table", choices=[*table_names(), "all"], help="a table of the paper, ours beside published")
    parser.add_argument("--runtime", type=typed, help="for --table runtime: what experiments/runtime.py --out wrote")
    parser.add_argument("--metric", help="TensorBoard tag (default: the one its runs are known by), or best")
    parser.add_argument("--baseline", help="method that the others are compared with (default: vanilla)")
    parser.add_argument("--best", action="store_true", help="each run's best epoch, which selects on the test set")
    parser.add_argument(
        "--speedup", action="store_true", help="also how much earlier the baseline's final value is reached"
    )
    parser.add_argument("--format", choices=_SUFFIX, default="md", help="default: %(default)s")
    parser.add_argument("--out", type=typed, help="write a file per table into this folder instead of printing")
    parser.add_argument(
        "--explain",
        metavar="CELL",
        help="the runs behind one cell, named by its row and column, such as 'VGG-11 / TrAct', and how to make them",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if any run is missing or doubtful")
    add_cache_flags(parser)
    return parser


def tables_of(
    root: Path,
    experiment: str | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    best: bool = False,
    cache: Cache | None = None,
) -> list[Table]:
    """A table per experiment under ``root``; without a metric of the one that its runs are known by.

    Raises:
        UserError: a folder, an experiment, a metric or a baseline that does not exist.
    """
    return tables_from(load_runs(root, experiment, cache), metric, baseline, best)


def tables_from(
    runs: dict[str, list[Run]],
    metric: str | None = None,
    baseline: str | None = None,
    best: bool = False,
    speedups: bool = False,
) -> list[Table]:
    """As :func:`tables_of`, of runs that are loaded already."""
    if metric is not None:
        _require_metric([run for group in runs.values() for run in group], metric)
    tables = []
    for name, group in runs.items():
        arguments = (metric or primary_metric(*(run.result for run in group)), baseline or "vanilla", best, speedups)
        tables.append(accuracies(group, *arguments) if name == COMPARISON else build_table(name, group, *arguments))
    if baseline is not None and all(table.baseline is None for table in tables):
        known = nearest(baseline, {label for table in tables for label in table.methods})
        raise UserError(f"expected --baseline to be one method, got {baseline}; {known}.")
    return tables


def _require_metric(runs: Sequence[Run], metric: str) -> None:
    known = {tag for run in runs if run.usable for tag in run.events.series}
    if known and not any(metric in run.events.series for run in runs):
        raise UserError(f"no run has the metric {metric}; {nearest(metric, known)}.")


def _experiment_name(table: Table) -> str:
    return f"{table.experiment}-{table.metric.replace('/', '-')}{'-best' if table.best else ''}"


def _write(tables: Sequence, names: Sequence[str], render: Callable[[Sequence, str], str], options) -> None:
    """Print the tables, or write each into a file of its name."""
    if options.out is None:
        print(printable(render(tables, options.format)), end="")
    else:
        _write_files(dict(zip(names, tables, strict=True)), render, options.format, options.out)
    if options.format == "csv":  # has no place for sentences
        for sentence in (sentence for table in tables for sentence in table.named):
            print(printable(sentence), file=sys.stderr)


def _write_files(tables: dict[str, Table | PaperTable], render: Callable, form: str, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            path = out / f"{name}.{_SUFFIX[form]}"
            path.write_text(render([table], form), encoding="utf-8", errors="backslashreplace")
            print(path)
    except OSError as error:
        raise UserError(f"expected --out to be a folder to write to, got {out} ({error.strerror}).") from None


if __name__ == "__main__":
    sys.exit(main())
