"""What becomes of a run after its training process has ended, judged by its folder and the exit code."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum, auto

from runfolder.errors import EXIT_BUSY, EXIT_TRY_AGAIN
from runfolder.failures import DISK_ERRORS, TRACEBACK_LINES, FailureKind, record
from runfolder.folder import RunFolder
from runfolder.lease import is_held
from runfolder.records import Failure, read_record
from runfolder.states import is_cancelled, is_finished
from slurm import ledger
from slurm.notices import signal_name


class Then(Enum):
    """What is done about a run next."""

    nothing = auto()  # its claim is given back
    leave = auto()  # another process has it, and its claim
    fail = auto()  # its claim is given back; failure.json says why
    later = auto()  # it goes on when this job is started again
    again = auto()  # it is started again, here if that is possible
    elsewhere = auto()  # it goes on when this job is started again on another node


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, in the words of its note, and what follows."""

    outcome: str
    reason: str
    then: Then
    failure: Failure = field(default_factory=dict)


def judge(folder: RunFolder, code: int, stopped: str, was_told: bool, has_elsewhere: bool) -> Verdict:
    """Judge the end of a training process; writes ``failure.json`` where the run could not.

    Args:
        folder: the run.
        code: the exit code; below 0 the signal that ended it.
        stopped: the word for a run that leaves with a checkpoint.
        was_told: whether it was told to.
        has_elsewhere: whether another node can be had.
    """
    if is_finished(folder):
        return Verdict("finished", "", Then.nothing)
    if is_cancelled(folder):
        return Verdict("cancelled", "by a person", Then.nothing)
    if code == EXIT_TRY_AGAIN:
        return Verdict(stopped, "".join(last_lines(folder, 1)), Then.later)
    if code == EXIT_BUSY or (code > 0 and is_held(folder)):  # a newer copy of this job trains it
        return Verdict("busy", f"trained by {ledger.holder(folder)}", Then.leave)
    failure = read_record(folder.failure, Failure)
    if failure.get("kind") in [kind for kind in FailureKind if kind.may_pass_elsewhere]:
        reason = f"{failure['kind']}: {failure.get('reason', '')}"
        return (
            Verdict("node", reason, Then.elsewhere, failure) if has_elsewhere else Verdict("failed", reason, Then.fail)
        )
    if was_told and -code in (signal.SIGUSR2, signal.SIGTERM):
        return Verdict(stopped, "before it could train", Then.later)
    if code < 0:
        return Verdict("killed", f"killed by {signal_name(-code)}", Then.again)
    failure = failure or _unexplained(folder, code)
    return Verdict("failed", f"{failure.get('kind')}: {failure.get('reason', '')}", Then.fail)


def _unexplained(folder: RunFolder, code: int) -> Failure:
    """The record of a process that has left none, from the end of its output."""
    lines = last_lines(folder, TRACEBACK_LINES)
    kind, reason = FailureKind.code, f"exit code {code}: {lines[-1] if lines else 'no output'}"
    try:
        record(folder, kind, reason, lines)
    except OSError as error:
        if error.errno in DISK_ERRORS:  # then this is what has ended the run, too
            kind, reason = FailureKind.disk, f"{folder} cannot be written: {error.strerror}"
    return {"kind": kind, "reason": reason}


def last_lines(folder: RunFolder, count: int) -> list[str]:
    """The end of what a run has printed."""
    try:
        return folder.output.read_text(errors="replace").strip().splitlines()[-count:]
    except OSError:
        return []
