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
import fnmatch
import getpass
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runfolder.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TRY_AGAIN, Parser, UserError, nearest
from runfolder.files import read_json, write_json
from runfolder.folder import RunFolder, relative, typed
from runfolder.printing import printable
from runfolder.states import LIVE, State, is_cancelled, state_of
from slurm import ledger, queue
from slurm.details import details
from slurm.facts import Run, facts, text
from slurm.ledger import Entry
from slurm.overview import (
    WITHOUT_TERMINAL,
    by_experiment,
    counted,
    counts_of,
    cut,
    in_states,
    listing,
    seconds_left,
    several,
    states_of,
)
from slurm.tail import Tail

EXIT_INCOMPLETE = 1
_ASK_FROM = 20  # runs that are cancelled without a question
_POLL = 0.5  # seconds between looks at a growing file,
_SECONDS_BETWEEN_LOOKS = 2.0  # at the state of its run,
_SECONDS_BETWEEN_QUEUES = 10.0  # and at Slurm's queue
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
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_INCOMPLETE


# -- the command line -------------------------------------------------------------------


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
    options = _parser(verb).parse(arguments)
    options.verb = verb
    return options


def _parser(verb: str) -> Parser:
    script, others = "python slurm/status.py", [name for name in _VERBS if name != "list"]
    about = _VERBS[verb]
    if verb == "list":
        about += f".\n\n{script} COMMAND --help shows the flags of the other commands:\n"
        about += "\n".join(f"  {name:<7} {_VERBS[name]}" for name in others)
    parser = Parser(
        prog=script if verb == "list" else f"{script} {verb}",
        description=about[0].upper() + about[1:],
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=typed, default=Path("runs"), help="folder of experiments (default: %(default)s)")
    parser.add_argument("--experiment", metavar="NAME", help="only this one (default: all)")
    _add_flags(parser, verb)
    return parser


def _add_flags(parser: Parser, verb: str) -> None:
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
        parser.add_argument("--state", type=_states, metavar="S,S", help=f"{which} in these states: {', '.join(State)}")
    if verb == "list":
        parser.add_argument("--json", action="store_true", help="for scripts")
    if verb == "watch":
        parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="default: %(default)g")
    if verb == "logs":
        parser.add_argument("-n", type=int, default=50, metavar="LINES", help="from the end (default: %(default)s)")
        parser.add_argument("--no-follow", action="store_true", help="print what is there and leave")
    if verb == "retry":
        what = "take the profile of this submission, with its shell lines, though another user has written it"
        parser.add_argument("--trust", action="append", default=[], metavar="SUBMISSION", help=what)
    if verb == "cancel":
        parser.add_argument("--yes", action="store_true", help=f"ask nothing, not even for more than {_ASK_FROM} runs")


def _states(text: str) -> list[str]:
    states = [word for word in text.split(",") if word]
    for word in states or [text]:
        if word not in list(State):
            raise UserError(f"expected --state to be some of {', '.join(State)}, got {word!r}.")
    return states


# -- which runs -------------------------------------------------------------------------


def folders_of(options: argparse.Namespace, alone: bool) -> list[RunFolder]:
    """The run folders that the command line's words name; all of them without words.

    Args:
        options: with ``runs``, ``experiment`` and ``words``.
        alone: whether a word without * must name a single run.

    Raises:
        UserError: there are no runs, or a word names none or, with ``alone``, several.
    """
    given = {word: RunFolder(os.path.abspath(word)) for word in options.words}
    given = {word: folder for word, folder in given.items() if folder.config.is_file()}
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


def _named(word: str, known: list[RunFolder], alone: bool) -> list[RunFolder]:
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


def _entries(folders: list[RunFolder], states: list[str] | None = None) -> list[Entry]:
    found = ledger.entries(folders[0].runs, folders=folders)
    return [entry for entry in found if states is None or entry.state in states]


def exit_code(runs: list[Run]) -> int:
    """0 all finished, 75 something is running or queued, 1 otherwise."""
    if any(run["state"] in LIVE for run in runs):
        return EXIT_TRY_AGAIN
    done = all(run["state"] == State.finished and not run["damaged"] for run in runs)
    return 0 if done else EXIT_INCOMPLETE


# -- list -------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    runs = [facts(entry) for entry in _entries(folders_of(options, alone=False))]
    chosen = in_states(runs, options.state)
    print(
        json.dumps(_as_json(runs, chosen), indent=1)
        if options.json
        else printable("\n".join(listing(runs, chosen, options)))
    )
    return exit_code(chosen)


def _as_json(runs: list[Run], chosen: list[Run]) -> dict[str, Any]:
    experiments = {
        name: {"counts": counts_of(states_of(group)), "seconds_left": seconds_left(group)}
        for name, group in by_experiment(runs).items()
    }
    return {"counts": counts_of(states_of(runs)), "experiments": experiments, "runs": chosen}


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
    finished: dict[RunFolder, Run] = {}
    before = None
    while True:
        runs = _runs_again(options, finished)
        counts = counts_of(states_of(runs))
        lines = [
            time.strftime("%Y-%m-%d %H:%M:%S"),
            *map(printable, listing(runs, in_states(runs, options.state), options)),
        ]
        yield runs, lines, counts != before
        before = counts
        if not any(counts[state] for state in LIVE):
            return
        time.sleep(options.every)


def _runs_again(options: argparse.Namespace, finished: dict[RunFolder, Run]) -> list[Run]:
    """All runs; what has finished is remembered in ``finished`` and not read again."""
    folders = folders_of(options, alone=False)
    new = [folder for folder in folders if folder not in finished]
    fresh = {entry.folder: facts(entry) for entry in _entries(new)} if new else {}
    finished |= {folder: run for folder, run in fresh.items() if run["state"] == State.finished}
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
    width, height = shutil.get_terminal_size(WITHOUT_TERMINAL)
    lines = [f"{lines[0]}, every {every:g} s, Ctrl-C leaves", *lines[1:]]
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], f"... and {len(lines) - height + 2} more lines"]
    text = "".join(f"{cut(line, width)}\x1b[K\n" for line in lines)
    sys.stdout.write(f"\x1b[H{text}\x1b[J")
    sys.stdout.flush()


# -- show -------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    (folder,) = folders_of(options, alone=True)
    (entry,) = _entries([folder])
    print(printable("\n".join(details(entry, options))))
    return exit_code([facts(entry)])


# -- logs -------------------------------------------------------------------------------


def _logs(options: argparse.Namespace) -> int:
    if options.n < 0:
        raise UserError(f"expected -n to be a number of lines, got {options.n}.")
    (folder,) = folders_of(options, alone=True)
    tail, (entry,) = Tail(folder), _entries([folder])
    _write(tail.last(options.n))
    if not options.no_follow:
        if tail.path is None and entry.state in LIVE:
            print(printable(f"{folder.name} is {entry.state} and has said nothing yet"), file=sys.stderr)
        entry = _follow(tail, entry)
    run = facts(entry)
    failure = f": {run['failure']['kind']}: {run['failure']['reason']}" if run["failure"] else ""
    print(printable(f"{folder.name}: {entry.state}{failure}"), file=sys.stderr)
    return exit_code([run])


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
        ended = state == State.finished or (state != State.running and entry.state == State.running)
        if ended or (state != entry.state and look > ask):
            (entry,) = _entries([entry.folder])
            ask = look + _SECONDS_BETWEEN_QUEUES
    _write(tail.more())
    return entry


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# -- cancel -----------------------------------------------------------------------------


def _cancel(options: argparse.Namespace) -> int:
    _require_choice(options)
    chosen = _entries(folders_of(options, alone=True), options.state)
    wanted = [entry for entry in chosen if entry.state != State.finished]
    if not wanted:
        print(f"Nothing to cancel: {counted(entry.state for entry in chosen)}.")
        return 0
    states = counted(entry.state for entry in wanted)
    question = f"Cancel {len(wanted)} runs ({states})? [y/N] "
    if len(wanted) > _ASK_FROM and not options.yes and sys.stdin.isatty() and not _agrees(question):
        print("Nothing was cancelled.")
        return EXIT_INCOMPLETE
    mark = {"by": _user(), "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    for entry in wanted:
        try:
            write_json(entry.folder.cancelled, mark, durable=False)
        except OSError as error:
            raise UserError(f"expected a folder that can be written, got {entry.folder}: {error.strerror}.") from None
    print(f"Cancelled {several(len(wanted))}: {states}.")
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
    for runs, experiment in {(entry.folder.runs, entry.folder.experiment) for entry in wanted}:
        for entry in ledger.entries(runs, experiment):  # the marks first, then the queue
            if entry.job:
                jobs.setdefault(entry.job.id, []).append(entry)
    ours = {job: runs for job, runs in jobs.items() if any(str(run.folder) in marked for run in runs)}
    idle = [job for job, runs in ours.items() if all(is_cancelled(run.folder) for run in runs)]
    if idle:
        queue.cancel(idle)
        print(f"Out of the queue: {several(len(idle), 'job')} that had nothing else to train.")
    if len(ours) > len(idle):
        print(f"Still in the queue: {several(len(ours) - len(idle), 'job')} with other runs; only the cancelled stop.")
    in_jobs = {str(run.folder) for runs in ours.values() for run in runs}
    alone = [entry for entry in wanted if entry.state in LIVE and os.path.abspath(entry.folder) not in in_jobs]
    for entry in alone:
        if entry.state == State.running and (not entry.claim or entry.claim.get("released")):
            holder = text(ledger.holder(entry.folder))
            print(printable(f"{entry.folder.name} was started by hand and has to be stopped there: {holder}"))
    claimed = sum(bool(entry.claim) and not entry.claim.get("released") for entry in alone)
    if claimed:
        print(f"Without a job in the queue: {several(claimed)}; whatever starts or trains them stops by itself.")


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
    wanted = [entry for entry in chosen if entry.state not in (State.finished, *LIVE)]
    if not wanted:
        print(f"Nothing to retry: {counted(entry.state for entry in chosen)}.")
        return exit_code([facts(entry) for entry in chosen])
    wanted = _submitted_before(wanted)
    wanted = _not_in_a_job(wanted)
    if not wanted:
        return 0
    from slurm.launch import retry  # with Hydra, which is slow

    folders = [entry.folder for entry in wanted]
    with _forgotten(folders):
        return retry(folders, changes, options.trust)


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
    script = f"python experiments/{never[0].experiment}.py"
    cure = f"{script} --submit takes what has not failed, --resume {shlex.quote(relative(never[0]))} continues one here"
    if len(never) == len(entries):
        raise UserError(f"expected runs that were submitted before, got {never[0].name}; {cure}.")
    print(printable(f"Never submitted: {several(len(never))}, such as {never[0].name}; {cure}."))
    return [entry for entry in entries if entry.folder not in never]


def _not_in_a_job(entries: list[Entry]) -> list[Entry]:
    """Those that no job is going to train; a cancelled run whose job is still there only loses its mark."""
    known, rest, kept, ending = ledger.Queue(), [], 0, 0
    for entry in entries:
        may_live = entry.state == State.cancelled and ledger.claim_is_live(entry.claim, known)
        unknown = entry.claim.get("scheduler") == "slurm" and entry.job is None
        if not may_live or unknown:
            rest.append(entry)
        elif entry.job and entry.job.state not in ("PENDING", "RUNNING"):
            ending += 1
        else:
            entry.folder.cancelled.unlink(missing_ok=True)
            kept += 1
    if kept:
        print(f"Not cancelled any more: {several(kept)}; the jobs are still there and train them.")
    if ending:
        print(f"Just being ended by Slurm: the jobs of {several(ending)}; retry in a minute.")
    return rest


@contextmanager
def _forgotten(folders: list[RunFolder]) -> Iterator[None]:
    """Without the files that keep runs from being submitted; they come back to runs that were not."""
    claims = {folder: ledger.newest_claim(folder) for folder in folders}
    kept: dict[Path, bytes] = {}
    try:
        _take_away([path for folder in folders for path in (folder.failure, folder.cancelled)], kept)
        yield
    except BaseException:
        for path, content in kept.items():
            folder = RunFolder(path.parent)
            claim = ledger.newest_claim(folder)
            is_new = claim != claims[folder] and not read_json(claim).get("released")
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
