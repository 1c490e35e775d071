"""Watch a grid of runs from any login node: what is finished, running or waiting, and why runs failed.

Everything comes from the run folders and one call of squeue (see ``ledger.py``); neither torch nor
Hydra is imported, so that an answer takes a second for a thousand runs. ``--help`` shows the commands.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import os
    import sys

    # Before anything else: this folder's queue.py must not be taken for Python's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import codecs
import fnmatch
import getpass
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from experiments.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TRY_AGAIN, UserError, nearest
from experiments.training.files import read_json, write_json
from experiments.training.lease import describe, highest
from experiments.training.state import state_of
from slurm import ledger, queue
from slurm.ledger import STATES, Entry

EXIT_INCOMPLETE = 1
LIVE = ("running", "queued")
CANCELLED, FAILURE = "cancelled", "failure.json"
_ORDER = ("running", "queued", "resumable", "failed", "cancelled", "missing", "finished")
_FEW_RUNS = 30  # so many are listed with the finished ones
_ROWS = 10  # of one state that are listed without --all
_GROUPS = 10  # of failures
_ASK_FROM = 20  # runs that are cancelled without a question
_POLL = 0.5  # seconds between looks at a growing file,
_SECONDS_BETWEEN_LOOKS = 2.0  # at the state of its run,
_SECONDS_BETWEEN_QUEUES = 10.0  # and at Slurm's queue
_WITHOUT_TERMINAL = (200, 50)
_HINTS = {
    "out-of-memory": "the same settings need the same memory; a larger GPU or a smaller micro_batch",
    "non-finite": "it would happen again; the recipe has to change",
    "data": "mend the data, then retry",
    "disk": "make room or permit writing, then retry",
    "node": "the machine is at fault; retry",
    "peer": "another rank went away; the job's own log says why",
    "input": "correct the configuration",
    "code": "correct the program, then retry",
    "no-progress": "longer jobs or a smaller runtime.checkpoint_seconds, then retry",
    "requeues": "retry gives a new budget",
}
Run = dict[str, Any]  # what facts() gives
_CODES = """\
exit codes:
  0    all runs that were asked for are finished (cancel: done; retry: submitted)
  1    nothing is running or queued, and some are failed, cancelled, resumable or missing
  2    bad input
  75   something is still running or queued
  130  Ctrl-C; the runs go on"""
_VERBS = {
    "list": "the state of all runs, why runs failed, and what to type next (without a word: this)",
    "watch": "the same, again and again until nothing is running or queued; Ctrl-C stops watching only",
    "show": "everything about one run: progress, attempts, failure, files, how to continue it here",
    "logs": "the end of one run's output.txt (else log.txt), followed until the run ends",
    "cancel": "stop runs and take them out of the queue; checkpoints stay",
    "retry": "submit failed, resumable, missing and cancelled runs again, as they were submitted last, "
    "or with changes: cluster.memory_gb=64",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    sys.stdout.reconfigure(errors="replace")
    try:
        verb, rest = _verb(sys.argv[1:] if arguments is None else arguments)
        code = _COMMANDS[verb](_parsed(verb, rest))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_INCOMPLETE


# -- the command line -------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the flags.")


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and the rest: the first word that is no flag and no flag's value, if it is a command."""
    before = ""
    for index, word in enumerate(arguments):
        if not word.startswith("-") and before not in ("--runs", "--experiment", "--state", "--every", "-n"):
            known = word in _VERBS
            return (word, arguments[:index] + arguments[index + 1 :]) if known else ("list", arguments)
        before = word
    return "list", arguments


def _parsed(verb: str, arguments: list[str]) -> argparse.Namespace:
    parser = _parser(verb)
    options, unknown = parser.parse_known_intermixed_args(arguments)
    for word in unknown:
        raise UserError(f"unknown flag {word}; {nearest(word, parser._option_string_actions)}.")
    options.verb = verb
    return options


def _parser(verb: str) -> _Parser:
    script, others = "python slurm/status.py", [name for name in _VERBS if name != "list"]
    about = _VERBS[verb]
    if verb == "list":
        about += f".\n\n{script} COMMAND --help shows the flags of the other commands:\n"
        about += "\n".join(f"  {name:<7} {_VERBS[name]}" for name in others)
    parser = _Parser(
        prog=script if verb == "list" else f"{script} {verb}",
        description=about[0].upper() + about[1:],
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", metavar="NAME", help="only this one (default: all)")
    _add_flags(parser, verb)
    return parser


def _add_flags(parser: _Parser, verb: str) -> None:
    if verb in ("list", "watch"):
        what = "only runs with this in their name, a pattern with *, or a run folder"
        parser.add_argument("words", nargs="*", metavar="MATCH", help=what)
        parser.add_argument("--all", action="store_true", help="a row for every run, finished ones too")
    elif verb in ("show", "logs"):
        parser.add_argument("words", nargs=1, metavar="RUN", help="its folder, its name, or a part that no other has")
    else:
        what = "a folder, a name, a part of one name, or a pattern with *"
        parser.add_argument("words", nargs="*", metavar="RUN", help=what)
        parser.add_argument("--all", action="store_true", help="all runs that are not finished")
    if verb not in ("show", "logs"):
        which = "show only rows" if verb == "watch" else "only runs"
        parser.add_argument(
            "--state", type=_states, metavar="S,S", help=f"{which} in these states: {', '.join(STATES)}"
        )
    if verb == "list":
        parser.add_argument("--json", action="store_true", help="for scripts")
    if verb == "watch":
        parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="default: %(default)g")
    if verb == "logs":
        parser.add_argument("-n", type=int, default=50, metavar="LINES", help="from the end (default: %(default)s)")
        parser.add_argument("--no-follow", action="store_true", help="print what is there and leave")
    if verb == "cancel":
        parser.add_argument("--yes", action="store_true", help=f"ask nothing, not even for more than {_ASK_FROM} runs")


def _states(text: str) -> list[str]:
    states = [word for word in text.split(",") if word]
    for word in states or [text]:
        if word not in STATES:
            raise UserError(f"expected --state to be some of {', '.join(STATES)}, got {word!r}.")
    return states


# -- which runs -------------------------------------------------------------------------


def folders_of(options: argparse.Namespace, alone: bool) -> list[Path]:
    """The run folders that the command line's words name; all of them without words.

    Args:
        options: with ``runs``, ``experiment`` and ``words``.
        alone: whether a word without * must name a single run.

    Raises:
        UserError: there are no runs, or a word names none or, with ``alone``, several.
    """
    given = {word: Path(os.path.abspath(word)) for word in options.words}
    given = {word: path for word, path in given.items() if (path / "config.yaml").is_file()}
    if options.words and len(given) == len(options.words):
        return list(dict.fromkeys(given.values()))
    known = ledger.run_folders(options.runs, options.experiment)
    if not known:
        place = options.runs / (options.experiment or "")
        raise UserError(
            f"expected runs in {place}, got none; python experiments/NAME.py --submit (or --local) starts some."
        )
    if not options.words:
        return known
    found = [
        folder for word in options.words for folder in ([given[word]] if word in given else _named(word, known, alone))
    ]
    return list({os.path.abspath(folder): folder for folder in found}.values())


def _named(word: str, known: list[Path], alone: bool) -> list[Path]:
    part = word.strip("…").rstrip("/")
    names = {folder: str(folder) if "/" in part else folder.name for folder in known}
    if any(sign in part for sign in "*?["):
        found, alone = [folder for folder in known if fnmatch.fnmatchcase(names[folder], part)], False
    else:
        found = [folder for folder in known if names[folder] == part]
        found = found or [folder for folder in known if part in names[folder]]
    if not found:
        raise UserError(
            f"expected a run's folder or (a part of) its name, got {word}; {nearest(part, names.values())}."
        )
    if alone and len(found) > 1:
        some = ", ".join(folder.name for folder in found[:10]) + (", ..." if len(found) > 10 else "")
        raise UserError(
            f"expected one run, got {word}, which {len(found)} have in their names; give more of it: {some}."
        )
    return found


def _entries(folders: list[Path], states: list[str] | None = None) -> list[Entry]:
    found = ledger.entries(folders[0].absolute().parents[1], folders=folders)
    return [entry for entry in found if states is None or entry.state in states]


def _counted(states: Iterable[str]) -> str:
    """2 finished, 1 running."""
    counts = _counts(states)
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no such run"


def _counts(states: Iterable[str]) -> dict[str, int]:
    counts = Counter(states)
    return {state: counts[state] for state in STATES}


def exit_code(runs: list[Run]) -> int:
    """0 all finished, 75 something is running or queued, 1 otherwise."""
    if any(run["state"] in LIVE for run in runs):
        return EXIT_TRY_AGAIN
    done = all(run["state"] == "finished" and not run["damaged"] for run in runs)
    return 0 if done else EXIT_INCOMPLETE


# -- one run in figures -----------------------------------------------------------------


def facts(entry: Entry) -> Run:
    """What is known of a run, as ``--json`` gives it; None is unknown.

    ``damaged`` says that a file which should tell more cannot be read.
    """
    source, values, damaged = _told_figures(entry), {}, False
    for key in ("step", "steps", "epoch", "epochs", "top1", "images_per_second", "seconds_left", "seconds"):
        value = source.get(key)
        values[key] = value if _is_number(value) else None
        damaged |= value is not None and values[key] is None
    if entry.state != "running":
        values |= {"images_per_second": None, "seconds_left": None}
    name = "result.json" if entry.state == "finished" else "progress.json"
    damaged |= values["step"] is None and os.path.exists(entry.folder / name)
    failure = _failure_of(entry) if entry.state == "failed" else None
    return {
        "run": entry.folder.name,
        "experiment": entry.folder.absolute().parent.name,
        "folder": str(entry.folder),
        "state": entry.state,
        **values,
        "attempts": entry.attempts or (source["attempts"] if _is_number(source.get("attempts")) else 0),
        "node": _node_of(entry, failure),
        "job": entry.task.job if entry.task else None,
        "submission": _text(entry.claim.get("submission")),
        "reason": _reason_of(entry, failure),
        "failure": failure,
        "damaged": damaged,
    }


def _told_figures(entry: Entry) -> dict[str, Any]:
    """Figures of ``progress.json``, or of ``result.json`` in the same form."""
    if entry.state != "finished":
        return entry.progress
    result, metrics = entry.result, entry.result.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    whole = {"step": result.get("steps"), "epoch": result.get("epochs"), "top1": metrics.get("test/top1")}
    return result | whole


def _failure_of(entry: Entry) -> dict[str, Any]:
    said = entry.failure
    lines = said.get("traceback")
    return {
        "kind": _text(said.get("kind")) or "?",
        "reason": _text(said.get("reason")) or f"{FAILURE} cannot be read",
        "host": _text(said.get("host")),
        "when": _text(said.get("when")),
        "traceback": [_text(line) or "" for line in lines] if isinstance(lines, list) else [],
    }


def _node_of(entry: Entry, failure: dict | None) -> str | None:
    if entry.task and entry.task.nodes:
        return entry.task.nodes
    if entry.state in ("finished", "queued", "missing"):
        return None
    return (failure or {}).get("host") or _text(entry.progress.get("host"))


def _reason_of(entry: Entry, failure: dict | None) -> str | None:
    """Why a run is not (or no longer) computing, in a word or two."""
    if failure:
        return failure["kind"]
    if entry.state == "running":
        return "is being cancelled" if os.path.exists(entry.folder / CANCELLED) else None
    if entry.state != "queued":
        return None
    if entry.task:
        starts = "starting" if entry.task.state == "RUNNING" else entry.task.state.lower()
        return entry.task.reason or starts
    if not entry.claim.get("submitted"):
        return "being submitted"
    return "local" if entry.claim.get("scheduler") == "local" else "Slurm does not answer"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # finite


def _text(value: object) -> str | None:
    """A value from a file as text for one line of a terminal; None where there is none."""
    if value is None or value == "":
        return None
    return "".join(sign if sign.isprintable() else " " for sign in str(value))


def _span(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


# -- list -------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    runs = [facts(entry) for entry in _entries(folders_of(options, alone=False))]
    chosen = _in_states(runs, options.state)
    print(json.dumps(_as_json(runs, chosen), indent=1) if options.json else "\n".join(listing(runs, chosen, options)))
    return exit_code(chosen)


def _in_states(runs: list[Run], states: list[str] | None) -> list[Run]:
    return [run for run in runs if states is None or run["state"] in states]


def _as_json(runs: list[Run], chosen: list[Run]) -> dict[str, Any]:
    experiments = {
        name: {"counts": _counts(_states_of(group)), "seconds_left": seconds_left(group)}
        for name, group in _by_experiment(runs).items()
    }
    return {"counts": _counts(_states_of(runs)), "experiments": experiments, "runs": chosen}


def _by_experiment(runs: list[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["experiment"], []).append(run)
    return groups


def _states_of(runs: list[Run]) -> list[str]:
    return [run["state"] for run in runs]


def listing(runs: list[Run], chosen: list[Run], options: argparse.Namespace) -> list[str]:
    """The lines of a list: counts, a table per experiment, failures, what to type next.

    Args:
        runs: what is counted.
        chosen: what has rows.
        options: with ``all``, ``state``, ``words``, ``runs`` and ``experiment``.
    """
    width = shutil.get_terminal_size(_WITHOUT_TERMINAL).columns
    shown, blocks = _by_experiment(chosen), []
    for name, group in _by_experiment(runs).items():
        head = [f"{name}: {_several(len(group))}: {_counted(_states_of(group))}"]
        left = seconds_left(group)
        if left is not None:
            queued = _states_of(group).count("queued")
            others = f" and the {queued} queued" if queued else ""
            head.append(f"about {_span(left)} left for the running{others}, if as many run at a time as now")
        blocks += [head, _table(shown.get(name, []), options, len(runs), width)]
    blocks += [_failure_report(chosen, options, width), _next_steps(chosen, options)]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def _several(count: int, noun: str = "run") -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _table(runs: list[Run], options: argparse.Namespace, total: int, width: int) -> list[str]:
    """Rows in the order of interest; without ``--all`` or a choice, not all of those that only wait or have ended."""
    everything = options.all or bool(options.words) or options.state is not None
    rows: list[Run] = []
    rest: Counter[str] = Counter()
    for state in _ORDER:
        if state == "finished" and total > _FEW_RUNS and not everything:
            continue
        of_state = sorted((run for run in runs if run["state"] == state), key=lambda run: _natural(run["run"]))
        room = len(of_state) if everything or state == "running" or total <= _FEW_RUNS else _ROWS
        rows += of_state[:room]
        rest[state] = max(0, len(of_state) - room)
    more = ", ".join(f"{count} {state}" for state, count in rest.items() if count)
    return [*(_aligned(rows, width) if rows else []), *([f"and {more}; --all lists them"] if more else [])]


def _natural(name: str) -> list[str | int]:
    """A key that sorts s9 before s10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


_HEADS = ("run", "state", "done", "epoch", "top1", "img/s", "left", "tries", "job", "node (reason)")
_GO_FIRST = (7, 3, 5, 8, 4, 6)  # columns to leave out of a narrow terminal, in this order
_NAME_WIDTH = 28  # that names should have before columns go


def _aligned(runs: list[Run], width: int) -> list[str]:
    """Rows in columns; columns that say nothing are left out, and some where the terminal is narrow."""
    table = [_cells(run) for run in runs]
    sizes = {k: max(len(row[k]) for row in [_HEADS, *table]) for k in range(1, len(_HEADS))}
    sizes = {k: size for k, size in sizes.items() if any(row[k] != "-" for row in table)}
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


def _cells(said: Run) -> list[str]:
    unknown = "?" if said["damaged"] else "-"

    def cell(key: str, form: Callable[[float], str]) -> str:
        return unknown if said[key] is None else form(said[key])

    done = f"{100 * said['step'] / said['steps']:.0f} %" if said["step"] is not None and said["steps"] else unknown
    known = said["epoch"] is not None and said["epochs"] is not None
    where = " ".join(filter(None, [said["node"], f"({said['reason']})" if said["reason"] else None]))
    return [
        said["run"],
        said["state"],
        done,
        f"{said['epoch']:.4g}/{said['epochs']:.4g}" if known else unknown,
        cell("top1", lambda value: f"{value:.2f}"),
        cell("images_per_second", lambda value: f"{value:.0f}") if said["state"] == "running" else "-",
        cell("seconds_left", _span) if said["state"] == "running" else "-",
        str(said["attempts"] or "-"),
        said["job"] or "-",
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
        if run["state"] == "finished" and run["seconds"]:
            paces.append(run["seconds"] / run["steps"])
        elif run["seconds_left"] and run["step"] < run["steps"]:
            paces.append(run["seconds_left"] / (run["steps"] - run["step"]))
    running = _states_of(runs).count("running")
    if not running or not paces:
        return None
    pace, length = statistics.median(paces), statistics.median(lengths)
    each = [
        pace * ((run["steps"] or length) - (run["step"] or 0)) if run["seconds_left"] is None else run["seconds_left"]
        for run in _in_states(runs, list(LIVE))
    ]
    return max(max(each), sum(each) / running)


# -- failures ---------------------------------------------------------------------------


def _failure_report(runs: list[Run], options: argparse.Namespace, width: int) -> list[str]:
    """Failed runs by kind and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in _in_states(runs, ["failed"]):
        alike = re.sub(r"0x[0-9a-f]+|\d+", "#", run["failure"]["reason"].replace(run["run"], "#"))
        groups.setdefault((run["failure"]["kind"], alike), []).append(run)
    if not groups:
        return []
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{_several(sum(map(len, ordered)), 'failed run')}:"]
    for group in ordered[:_GROUPS]:
        lines += [_cut(line, width) for line in _of_one_kind(group)]
        hint = _HINTS.get(group[0]["failure"]["kind"], "unknown kind")
        lines.append(f"      {hint}; details: {_typed(options, 'show', group[0]['run'])}")
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
    broken = [run for run in _in_states(runs, ["finished"]) if run["damaged"]]
    if broken:
        some = ", ".join(_shown(Path(run["folder"]) / "result.json") for run in broken[:5])
        more = ", ..." if len(broken) > 5 else ""
        lines.append(f"{len(broken)} finished with a result that cannot be read; delete it, then retry: {some}{more}")
    submitted = [run for run in runs if run["submission"]]
    for states, what in (
        (("failed",), "submit failed runs again"),
        (("resumable", "missing"), "submit runs that nobody trains"),
        (("cancelled",), "submit cancelled runs again"),
    ):
        present = [state for state in states if state in _states_of(submitted)]
        if present:
            lines.append(f"{what}: {_typed(options, 'retry', '--state', ','.join(present))}")
    for name, group in _by_experiment(_in_states(runs, ["resumable", "missing"])).items():
        never = sum(not run["submission"] for run in group)
        if never:
            lines.append(f"{_several(never)} never submitted: python experiments/{name}.py --submit (or --local)")
    return lines


def _typed(options: argparse.Namespace, verb: str, *words: str) -> str:
    """A command of this script as a person can type it here."""
    flags = [] if options.runs == Path("runs") else ["--runs", str(options.runs)]
    flags += ["--experiment", options.experiment] if options.experiment else []
    return shlex.join(["python", _shown(Path(__file__).resolve()), verb, *flags, *words])


def _shown(path: Path) -> str:
    """A path relative to the current folder where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


# -- watch ------------------------------------------------------------------------------


def _watch(options: argparse.Namespace) -> int:
    if not options.every > 0:
        raise UserError(f"expected --every to be seconds above 0, got {options.every:g}.")
    screen, lines, code = sys.stdout.isatty(), [], 0
    try:
        with _other_screen(screen):
            for runs, lines, is_new in _looks(options):
                code = exit_code(runs)
                if screen:
                    _draw(lines, options.every)
                elif is_new:
                    print("\n".join([*lines, ""]), flush=True)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if screen:
        print("\n".join(lines))
    return code


def _looks(options: argparse.Namespace) -> Iterator[tuple[list[Run], list[str], bool]]:
    """All runs, their listing, and whether counts have changed; until nothing is running or queued."""
    finished: dict[Path, Run] = {}
    before = None
    while True:
        runs = _runs_again(options, finished)
        counts = _counts(_states_of(runs))
        lines = [time.strftime("%Y-%m-%d %H:%M:%S"), *listing(runs, _in_states(runs, options.state), options)]
        yield runs, lines, counts != before
        before = counts
        if not any(counts[state] for state in LIVE):
            return
        time.sleep(options.every)


def _runs_again(options: argparse.Namespace, finished: dict[Path, Run]) -> list[Run]:
    """All runs; what has finished is remembered in ``finished`` and not read again."""
    folders = folders_of(options, alone=False)
    new = [folder for folder in folders if folder not in finished]
    fresh = {entry.folder: facts(entry) for entry in _entries(new)} if new else {}
    finished |= {folder: run for folder, run in fresh.items() if run["state"] == "finished"}
    return [fresh.get(folder) or finished[folder] for folder in folders]


@contextmanager
def _other_screen(wanted: bool) -> Iterator[None]:
    """A terminal's second screen, so that its history stays as it was."""
    if not wanted:
        yield
        return
    sys.stdout.write("\x1b[?1049h")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?1049l")
        sys.stdout.flush()


def _draw(lines: list[str], every: float) -> None:
    width, height = shutil.get_terminal_size(_WITHOUT_TERMINAL)
    lines = [f"{lines[0]}, every {every:g} s, Ctrl-C leaves", *lines[1:]]
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], f"... and {len(lines) - height + 2} more lines"]
    text = "".join(f"{_cut(line, width)}\x1b[K\n" for line in lines)
    sys.stdout.write(f"\x1b[H{text}\x1b[J")
    sys.stdout.flush()


# -- show -------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    (folder,) = folders_of(options, alone=True)
    (entry,) = _entries([folder])
    said = facts(entry)
    blocks = [
        _head(entry, said),
        _attempts(entry),
        _whole_failure(said),
        _last_output(folder),
        _files(entry),
        _ways_on(entry, options),
    ]
    print("\n\n".join("\n".join(block) for block in blocks if block))
    return exit_code([said])


def _head(entry: Entry, said: Run) -> list[str]:
    unknown = "?" if said["damaged"] else "-"
    values = {key: round(value, 2) if _is_number(value) else unknown for key, value in said.items()}
    progress = f"step {values['step']} of {values['steps']}, epoch {values['epoch']} of {values['epochs']}"
    speed = [f"test/top1 {values['top1']}"]
    speed += [f"{said['images_per_second']:.0f} images/s"] if said["images_per_second"] is not None else []
    speed += [f"{_span(said['seconds_left'])} left"] if said["seconds_left"] is not None else []
    speed += [f"{_span(said['seconds'])} of training"] if said["seconds"] is not None else []
    lines = [
        f"run         {said['run']}",
        f"state       {said['state']}{' (' + said['reason'] + ')' if said['reason'] else ''}",
        f"folder      {_shown(entry.folder)}",
        f"progress    {', '.join([progress, *speed])}",
    ]
    if said["submission"]:
        lines.append(f"submission  {said['submission']}")
    if entry.task:
        lines.append(f"job         {entry.task.job}, {entry.task.state} {entry.task.nodes}".rstrip())
    if entry.state == "running":
        lines.append(f"trained by  {_holder(entry.folder)}")
    return lines


def _holder(folder: Path) -> str:
    path = highest(folder / "lease")[1]
    with suppress(KeyError, TypeError):
        return _text(describe(read_json(path) if path else {})) or "?"
    return "?"


def _attempts(entry: Entry) -> list[str]:
    """A table of all attempts; lost steps are those that the next attempt had to repeat."""
    attempts = ledger.attempts(entry.folder)
    if not attempts:
        return []
    rows = [("attempt", "job", "node", "from", "reached", "saved", "lost", "outcome", "started", "ended", "reason")]
    total = 0
    for number, attempt in enumerate(attempts, start=1):
        last = number == len(attempts)
        reached = attempt.get("reached_step")
        if last and reached is None:
            reached = entry.progress.get("step")
        began = None if last else attempts[number].get("from_step")
        if last and entry.state not in ("running", "finished"):
            began = ledger.last_step(entry.folder)
        lost = max(0, reached - began) if _is_number(reached) and _is_number(began) else None
        total += lost or 0
        outcome = attempt.get("outcome") or ("running" if last and entry.state == "running" else "cut off")
        again = f" (start {attempt['restart'] + 1})" if _is_number(attempt.get("restart")) else ""
        job = f"{attempt['job']}{again}" if attempt.get("job") else None
        steps = (attempt.get("from_step"), reached, attempt.get("saved_step"), lost)
        times = (attempt.get("started"), attempt.get("ended"))
        cells = (number, job, attempt.get("node"), *steps, outcome, *times, attempt.get("reason"))
        rows.append(tuple("-" if _text(cell) is None else _text(cell) for cell in cells))
    sizes = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    return [*lines, f"steps that had to be repeated: {total}"]


def _whole_failure(said: Run) -> list[str]:
    failure = said["failure"]
    if failure is None:
        return []
    place = " on " + failure["host"] if failure["host"] else ""
    when = " at " + failure["when"] if failure["when"] else ""
    head = f"failure: {failure['kind']}{place}{when}: {failure['reason']}"
    return [head, *(f"  | {line}" for line in failure["traceback"])]


def _last_output(folder: Path) -> list[str]:
    path = _output_of(folder)
    if path is None:
        return []
    with open(path, "rb") as file:
        lines = last_lines(file, 5).decode(errors="replace").splitlines()
    return [f"the end of {path.name}:", *(f"  {_text(line) or ''}" for line in lines)]


def _files(entry: Entry) -> list[str]:
    folder = entry.folder
    found = [folder / name for name in ("output.txt", "log.txt") if os.path.isfile(folder / name)]
    submission = entry.claim.get("submission")
    if isinstance(submission, str) and submission:
        jobs = folder.absolute().parent / ledger.SUBMISSIONS / submission / "jobs"
        job = entry.claim.get("job") or (entry.task.job if entry.task else None)
        logs = sorted(jobs.glob(f"{job}_*_log.*")) if isinstance(job, str) else []
        found += logs or ([jobs] if jobs.is_dir() else [])
    return ["files:", *(f"  {_shown(path)}" for path in found)] if found else []


def _ways_on(entry: Entry, options: argparse.Namespace) -> list[str]:
    name = entry.folder.name
    if entry.state == "finished":
        return []
    if entry.state in LIVE:
        return [f"follow: {_typed(options, 'logs', name)}", f"stop:   {_typed(options, 'cancel', name)}"]
    script = Path(__file__).resolve().parents[1] / "experiments" / f"{entry.folder.absolute().parent.name}.py"
    here = shlex.join(["python", _shown(script), "--resume", _shown(entry.folder)])
    again = _typed(options, "retry", name) if entry.claim.get("submission") else None
    return [*([f"submit again:  {again}"] if again else []), f"continue here: {here}"]


# -- logs -------------------------------------------------------------------------------


def _logs(options: argparse.Namespace) -> int:
    if options.n < 0:
        raise UserError(f"expected -n to be a number of lines, got {options.n}.")
    (folder,) = folders_of(options, alone=True)
    tail, (entry,) = Tail(folder), _entries([folder])
    _write(tail.last(options.n))
    if not options.no_follow:
        if tail.path is None and entry.state in LIVE:
            print(f"{folder.name} is {entry.state} and has said nothing yet", file=sys.stderr)
        entry = _follow(tail, entry)
    said = facts(entry)
    failure = f": {said['failure']['kind']}: {said['failure']['reason']}" if said["failure"] else ""
    print(f"{folder.name}: {entry.state}{failure}", file=sys.stderr)
    return exit_code([said])


def _follow(tail: Tail, entry: Entry) -> Entry:
    """Print what comes until the run neither runs nor waits; its entry then."""
    look, ask = 0.0, time.monotonic() + _SECONDS_BETWEEN_QUEUES
    while entry.state in LIVE:
        _write(tail.more())
        time.sleep(_POLL)
        if time.monotonic() < look:
            continue
        look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        state = state_of(entry.folder)
        ended = state == "finished" or (state != "running" and entry.state == "running")
        if ended or (state != entry.state and look > ask):
            (entry,) = _entries([entry.folder])
            ask = look + _SECONDS_BETWEEN_QUEUES
    _write(tail.more())
    return entry


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _output_of(folder: Path) -> Path | None:
    return next((folder / name for name in ("output.txt", "log.txt") if os.path.isfile(folder / name)), None)


class Tail:
    """The end of a run's output as it grows; the file may come later, be replaced or be cut."""

    def __init__(self, folder: Path):
        self.path: Path | None = None
        self._folder, self._file_id, self._place = folder, (0, 0), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def last(self, lines: int) -> str:
        """The last lines; what comes after them is for :meth:`more`."""
        return self._read(lambda file: last_lines(file, lines))

    def more(self) -> str:
        """What has come since the last call."""
        return self._read(self._rest)

    def _read(self, read: Callable[[BinaryIO], bytes]) -> str:
        self.path = self.path or _output_of(self._folder)
        if self.path is None:
            return ""
        try:
            with open(self.path, "rb") as file:
                content = read(file)
                status = os.fstat(file.fileno())
                self._file_id, self._place = (status.st_dev, status.st_ino), file.tell()
        except OSError:  # between two files
            return ""
        return self._decoder.decode(content)

    def _rest(self, file: BinaryIO) -> bytes:
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) != self._file_id or status.st_size < self._place:
            self._place = 0
            self._decoder.reset()
        file.seek(self._place)
        return file.read()


def last_lines(file: BinaryIO, count: int) -> bytes:
    """The last lines of a file, of which no more is read than needed; leaves it at its end."""
    start = end = file.seek(0, os.SEEK_END)
    found = b""
    while start > 0 and found.count(b"\n") <= count:
        begin = max(0, start - 2**16)
        file.seek(begin)
        found, start = file.read(start - begin) + found, begin
    file.seek(end)
    lines = found.split(b"\n")
    wanted = count + (lines[-1] == b"")
    return b"\n".join(lines[-wanted:]) if wanted else b""


# -- cancel -----------------------------------------------------------------------------


def _cancel(options: argparse.Namespace) -> int:
    _require_choice(options)
    chosen = _entries(folders_of(options, alone=True), options.state)
    wanted = [entry for entry in chosen if entry.state != "finished"]
    if not wanted:
        print(f"Nothing to cancel: {_counted(entry.state for entry in chosen)}.")
        return 0
    counted = _counted(entry.state for entry in wanted)
    question = f"Cancel {len(wanted)} runs ({counted})? [y/N] "
    if len(wanted) > _ASK_FROM and not options.yes and sys.stdin.isatty() and not _agrees(question):
        print("Nothing was cancelled.")
        return EXIT_INCOMPLETE
    said = {"by": _user(), "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    for entry in wanted:
        try:
            write_json(entry.folder / CANCELLED, said, durable=False)
        except OSError as error:
            raise UserError(f"expected a folder that can be written, got {entry.folder}: {error.strerror}.") from None
    print(f"Cancelled {_several(len(wanted))}: {counted}.")
    _stop_jobs(wanted)
    return 0


def _require_choice(options: argparse.Namespace) -> None:
    if options.words and options.all:
        raise UserError("expected runs or --all, got both; leave one out.")
    if not options.words and not options.all and options.state is None:
        raise UserError("expected runs to cancel, got none; name them, or give --state S,S or --all.")


def _stop_jobs(wanted: list[Entry]) -> None:
    """Cancel the jobs that have nothing left to train; the others stop single runs by themselves."""
    marked = {os.path.abspath(entry.folder) for entry in wanted}
    jobs: dict[str, list[Entry]] = {}
    for experiment in {entry.folder.absolute().parent for entry in wanted}:  # the marks first, then the queue
        for entry in ledger.entries(experiment.parent, experiment.name):
            if entry.task:
                jobs.setdefault(entry.task.job, []).append(entry)
    ours = {job: runs for job, runs in jobs.items() if any(str(run.folder) in marked for run in runs)}
    idle = [job for job, runs in ours.items() if all((run.folder / CANCELLED).exists() for run in runs)]
    if idle:
        queue.cancel(idle)
        print(f"Out of the queue: {_several(len(idle), 'job')} that had nothing else to train.")
    if len(ours) > len(idle):
        print(f"Still in the queue: {_several(len(ours) - len(idle), 'job')} with other runs; only the cancelled stop.")
    in_jobs = {str(run.folder) for runs in ours.values() for run in runs}
    alone = [entry for entry in wanted if entry.state in LIVE and os.path.abspath(entry.folder) not in in_jobs]
    for entry in alone:
        if entry.state == "running" and (not entry.claim or entry.claim.get("released")):
            print(f"{entry.folder.name} was started by hand and has to be stopped there: {_holder(entry.folder)}")
    claimed = sum(bool(entry.claim) and not entry.claim.get("released") for entry in alone)
    if claimed:
        print(f"Without a job in the queue: {_several(claimed)}; whatever starts or trains them stops by itself.")


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())


# -- retry ------------------------------------------------------------------------------


def _retry(options: argparse.Namespace) -> int:
    changes = _changes(options)
    if options.words and options.all:
        raise UserError("expected runs or --all, got both; leave one out.")
    chosen = _entries(folders_of(options, alone=True), options.state)
    wanted = [entry for entry in chosen if entry.state not in ("finished", *LIVE)]
    if not wanted:
        print(f"Nothing to retry: {_counted(entry.state for entry in chosen)}.")
        return exit_code([facts(entry) for entry in chosen])
    wanted = _submitted_before(wanted)
    wanted = _not_in_a_job(wanted)
    if not wanted:
        return 0
    from slurm.launch import retry

    folders = [entry.folder for entry in wanted]
    with _forgotten(folders):
        return retry(folders, changes)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Take ``cluster.KEY=VALUE`` out of the words."""
    import yaml

    words = [word for word in options.words if word.startswith("cluster.") and "=" in word]
    options.words = [word for word in options.words if word not in words]
    pairs = (word.removeprefix("cluster.").split("=", 1) for word in words)
    return {key: yaml.safe_load(value) for key, value in pairs}


def _submitted_before(entries: list[Entry]) -> list[Entry]:
    """Those with settings to submit with; the others are named."""
    never = [entry.folder for entry in entries if not entry.claim.get("submission")]
    if not never:
        return entries
    script = f"python experiments/{never[0].absolute().parent.name}.py"
    cure = f"{script} --submit takes what has not failed, --resume {shlex.quote(_shown(never[0]))} continues one here"
    if len(never) == len(entries):
        raise UserError(f"expected runs that were submitted before, got {never[0].name}; {cure}.")
    print(f"Never submitted: {_several(len(never))}, such as {never[0].name}; {cure}.")
    return [entry for entry in entries if entry.folder not in never]


def _not_in_a_job(entries: list[Entry]) -> list[Entry]:
    """Those that no job is going to train; a cancelled run whose job is still there only loses its mark."""
    known, rest, kept, ending = ledger.Queue(), [], 0, 0
    for entry in entries:
        may_live = entry.state == "cancelled" and ledger.claim_is_live(entry.claim, known)
        unknown = entry.claim.get("scheduler") == "slurm" and entry.task is None
        if not may_live or unknown:
            rest.append(entry)
        elif entry.task and entry.task.state not in ("PENDING", "RUNNING"):
            ending += 1
        else:
            (entry.folder / CANCELLED).unlink(missing_ok=True)
            kept += 1
    if kept:
        print(f"Not cancelled any more: {_several(kept)}; the jobs are still there and train them.")
    if ending:
        print(f"Just being ended by Slurm: the jobs of {_several(ending)}; retry in a minute.")
    return rest


@contextmanager
def _forgotten(folders: list[Path]) -> Iterator[None]:
    """Without the files that keep runs from being submitted; they come back to runs that were not."""
    claims = {folder: ledger.newest_claim(folder) for folder in folders}
    kept: dict[Path, bytes] = {}
    try:
        _take_away([folder / name for folder in folders for name in (FAILURE, CANCELLED)], kept)
        yield
    except BaseException:
        for path, content in kept.items():
            claim = ledger.newest_claim(path.parent)
            is_new = claim != claims[path.parent] and not read_json(claim).get("released")
            if not is_new and not path.exists():
                path.write_bytes(content)
        raise


def _take_away(paths: list[Path], kept: dict[Path, bytes]) -> None:
    for path in paths:
        try:
            content = path.read_bytes()
            path.unlink()
            kept[path] = content
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"expected a file that can be removed, got {path}: {error.strerror}.") from None


_COMMANDS = {"list": _list, "watch": _watch, "show": _show, "logs": _logs, "cancel": _cancel, "retry": _retry}

if __name__ == "__main__":
    sys.exit(main())
