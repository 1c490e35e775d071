"""Many runs on one screen: counts, a table, failures by kind and reason, what to type next."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from runfolder.failures import cure_of
from runfolder.folder import RunFolder, relative
from runfolder.states import LIVE, State
from slurm.facts import Run

_ORDER = (*LIVE, State.resumable, State.failed, State.cancelled, State.missing, State.finished)
_FEW_RUNS = 30  # so many are listed with the finished ones
_ROWS = 10  # of one state that are listed without --all
_GROUPS = 10  # of failures
WITHOUT_TERMINAL = (200, 50)
_HEADS = ("run", "state", "done", "epoch", "value", "img/s", "left", "tries", "job", "node (reason)")
_GO_FIRST = (7, 3, 5, 8, 4, 6)  # columns to leave out of a narrow terminal, in this order
_NAME_WIDTH = 28  # that names should have before columns go
_REASON_WIDTH = 40  # of the last column; a longer reason runs over the line


def listing(runs: list[Run], chosen: list[Run], options: argparse.Namespace) -> list[str]:
    """The lines of a list: counts, a table per experiment, failures, what to type next.

    Args:
        runs: what is counted.
        chosen: what has rows.
        options: with ``all``, ``state``, ``words``, ``runs`` and ``experiment``.
    """
    width = shutil.get_terminal_size(WITHOUT_TERMINAL).columns
    shown, blocks = by_experiment(chosen), []
    for name, group in by_experiment(runs).items():
        head = [f"{name}: {several(len(group))}: {counted(states_of(group))}"]
        left = seconds_left(group)
        if left is not None:
            queued = states_of(group).count("queued")
            others = f" and the {queued} queued" if queued else ""
            head.append(f"about {span(left)} left for the running{others}, if as many run at a time as now")
        blocks += [head, _table(shown.get(name, []), options, len(runs), width)]
    blocks += [_failure_report(chosen, options, width), _next_steps(chosen, options)]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def counted(states: Iterable[str]) -> str:
    """2 finished, 1 running."""
    counts = counts_of(states)
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no such run"


def counts_of(states: Iterable[str]) -> dict[str, int]:
    """How many there are of every state, in the states' order."""
    counts = Counter(states)
    return {state: counts[state] for state in State}


def in_states(runs: list[Run], states: list[str] | None) -> list[Run]:
    """The runs in one of these states; all for None."""
    return [run for run in runs if states is None or run["state"] in states]


def by_experiment(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their experiment."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["experiment"], []).append(run)
    return groups


def states_of(runs: list[Run]) -> list[str]:
    """The state of every run."""
    return [run["state"] for run in runs]


def several(count: int, noun: str = "run") -> str:
    """1 run, 2 runs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """Seconds as 1d02h, 1h02m or 1m02s."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


# -- the table --------------------------------------------------------------------------


def _table(runs: list[Run], options: argparse.Namespace, total: int, width: int) -> list[str]:
    """Rows in the order of interest; without ``--all`` or a choice, not all of those that only wait or have ended."""
    everything = options.all or bool(options.words) or options.state is not None
    rows: list[Run] = []
    rest: Counter[str] = Counter()
    for state in _ORDER:
        if state == State.finished and total > _FEW_RUNS and not everything:
            continue
        of_state = sorted((run for run in runs if run["state"] == state), key=lambda run: _natural(run["run"]))
        room = len(of_state) if everything or state == State.running or total <= _FEW_RUNS else _ROWS
        rows += of_state[:room]
        rest[state] = max(0, len(of_state) - room)
    more = ", ".join(f"{count} {state}" for state, count in rest.items() if count)
    return [*(_aligned(rows, width) if rows else []), *([f"and {more}; --all lists them"] if more else [])]


def _natural(name: str) -> list[str | int]:
    """A key that sorts s9 before s10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _aligned(runs: list[Run], width: int) -> list[str]:
    """Rows in columns; columns that say nothing are left out, and some where the terminal is narrow."""
    table = [_cells(run) for run in runs]
    sizes = {k: max(len(row[k]) for row in [_HEADS, *table]) for k in range(1, len(_HEADS))}
    sizes = {k: size for k, size in sizes.items() if any(row[k] != "-" for row in table)}
    if 9 in sizes:
        sizes[9] = min(_REASON_WIDTH, sizes[9])
    wanted = min(_NAME_WIDTH, max(len(row[0]) for row in table))
    for k in _GO_FIRST:
        if width - sum(sizes.values()) - 2 * len(sizes) < wanted:
            sizes.pop(k, None)
    names = shortened([row[0] for row in table], width - sum(sizes.values()) - 2 * len(sizes))
    first = max(len(name) for name in [_HEADS[0], *names])
    lines = []
    for name, row in zip([_HEADS[0], *names], [_HEADS, *table], strict=True):
        cells = [row[k].ljust(size) if k in (1, 8, 9) else row[k].rjust(size) for k, size in sizes.items()]
        lines.append("  ".join([name.ljust(first), *cells]).rstrip())
    return lines


def _cells(run: Run) -> list[str]:
    unknown = "?" if run["damaged"] else "-"

    def cell(key: str, form: Callable[[float], str]) -> str:
        return unknown if run[key] is None else form(run[key])

    done = f"{100 * run['step'] / run['steps']:.0f} %" if run["step"] is not None and run["steps"] else unknown
    known = run["epoch"] is not None and run["epochs"] is not None
    where = " ".join(filter(None, [run["node"], f"({run['reason']})" if run["reason"] else None]))
    return [
        run["run"],
        run["state"],
        done,
        f"{run['epoch']:.4g}/{run['epochs']:.4g}" if known else unknown,
        cell("value", lambda value: f"{value:.2f}"),
        cell("images_per_second", lambda value: f"{value:.0f}") if run["state"] == "running" else "-",
        cell("seconds_left", span) if run["state"] == "running" else "-",
        str(run["attempts"] or "-"),
        run["job"] or "-",
        where or "-",
    ]


def shortened(names: list[str], room: int) -> list[str]:
    """Names of at most ``room`` characters that are all different, or the whole names.

    What goes first is their common beginning, then the hash, then whatever is not their end.
    """
    common = os.path.commonprefix(names) if len(names) > 1 else ""
    start = common.rfind("-") + 1
    begun = [f"…{name[start:]}" if start else name for name in names]
    unhashed = [re.sub(r"-[0-9a-f]{8}$", "-…", name) for name in begun]
    ends = [name if len(name) <= room else f"…{name[len(name) - max(room, 10) + 1 :]}" for name in begun]
    for short in (names, begun, unhashed, ends):
        if len(set(short)) == len(set(names)) and (short is ends or max(map(len, short)) <= room):
            return short
    return names


def seconds_left(runs: list[Run]) -> float | None:
    """An estimate for the running and queued runs of an experiment, or None.

    Queued runs are taken to be as long and as fast as the median of those that run or are
    finished, and as many to run at a time as do now.
    """
    paces, lengths = [], [run["steps"] for run in runs if run["steps"]]
    for run in runs:
        if not run["steps"] or run["step"] is None:
            continue
        if run["state"] == State.finished and run["seconds"]:
            paces.append(run["seconds"] / run["steps"])
        elif run["seconds_left"] and run["step"] < run["steps"]:
            paces.append(run["seconds_left"] / (run["steps"] - run["step"]))
    running = states_of(runs).count("running")
    if not running or not paces:
        return None
    pace, length = statistics.median(paces), statistics.median(lengths)
    each = [
        pace * ((run["steps"] or length) - (run["step"] or 0)) if run["seconds_left"] is None else run["seconds_left"]
        for run in in_states(runs, list(LIVE))
    ]
    return max(max(each), sum(each) / running)


# -- failures, and what to do -------------------------------------------------------------


def _failure_report(runs: list[Run], options: argparse.Namespace, width: int) -> list[str]:
    """Failed runs by kind and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in in_states(runs, ["failed"]):
        alike = re.sub(r"0x[0-9a-f]+|\d+", "#", run["failure"]["reason"].replace(run["run"], "#"))
        groups.setdefault((run["failure"]["kind"], alike), []).append(run)
    if not groups:
        return []
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{several(sum(map(len, ordered)), 'failed run')}:"]
    for group in ordered[:_GROUPS]:
        lines += [cut(line, width) for line in _of_one_kind(group)]
        lines.append(
            f"      {cure_of(group[0]['failure']['kind'])}; details: {command_line(options, 'show', group[0]['run'])}"
        )
    others = ordered[_GROUPS:]
    if others:
        lines.append(f"  {sum(map(len, others))} more for {len(others)} other reasons; --state failed --json has them")
    return lines


def _of_one_kind(group: list[Run]) -> list[str]:
    failures = [run["failure"] for run in group]
    hosts = Counter(failure["host"] for failure in failures if failure["host"])
    nodes = ", ".join(f"{host} ({count})" if len(hosts) > 1 else host for host, count in hosts.most_common(4))
    nodes += ", ..." if len(hosts) > 4 else ""
    head = f"  {len(group)} x {failures[0]['kind']}{' on ' + nodes if nodes else ''}: {failures[0]['reason']}"
    return [head, *(f"      | {line}" for line in failures[0]["traceback"][-3:])]


def _next_steps(runs: list[Run], options: argparse.Namespace) -> list[str]:
    lines = []
    broken = [run for run in in_states(runs, ["finished"]) if run["damaged"]]
    if broken:
        some = ", ".join(relative(RunFolder(run["folder"]).result) for run in broken[:5])
        more = ", ..." if len(broken) > 5 else ""
        lines.append(
            f"{len(broken)} finished with a result that cannot be read; move it elsewhere, then retry: {some}{more}"
        )
    submitted = [run for run in runs if run["submission"]]
    for states, what in (
        (("failed",), "submit failed runs again"),
        (("resumable", "missing"), "submit runs that nobody trains"),
        (("cancelled",), "submit cancelled runs again"),
    ):
        present = [state for state in states if state in states_of(submitted)]
        if present:
            lines.append(f"{what}: {command_line(options, 'retry', '--state', ','.join(present))}")
    for name, group in by_experiment(in_states(runs, ["resumable", "missing"])).items():
        never = sum(not run["submission"] for run in group)
        if never:
            lines.append(f"{several(never)} never submitted: python experiments/{name}.py --submit (or --local)")
    return lines


def command_line(options: argparse.Namespace, verb: str, *words: str) -> str:
    """A command of this script as a person can type it here."""
    flags = [] if options.runs == Path("runs") else ["--runs", str(options.runs)]
    flags += ["--experiment", options.experiment] if options.experiment else []
    return shlex.join(["python", relative(Path(__file__).resolve().with_name("status.py")), verb, *flags, *words])


def cut(line: str, width: int) -> str:
    """A line of at most so many characters."""
    return line if len(line) <= width else f"{line[: width - 1]}…"
