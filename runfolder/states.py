"""The state of a run, as the files in its folder tell it."""

from __future__ import annotations

import os
from enum import StrEnum

from runfolder.folder import RunFolder
from runfolder.lease import is_held


class State(StrEnum):
    """What is to be expected of a run."""

    finished = "finished"
    running = "running"
    queued = "queued"  # a submission is going to train it; whether it still is, the ledger knows
    resumable = "resumable"  # a checkpoint is there
    missing = "missing"  # nothing has been saved
    failed = "failed"
    cancelled = "cancelled"


LIVE = (State.running, State.queued)


def state_of(folder: RunFolder, now: float | None = None) -> State:
    """The state of a run; never ``queued``, which its folder alone does not tell.

    Args:
        folder: the run folder.
        now: the file system's time, where it is known already.
    """
    if is_finished(folder):
        return State.finished
    if is_held(folder, now):
        return State.running
    if is_cancelled(folder):
        return State.cancelled
    if folder.failure.exists():
        return State.failed
    return State.resumable if folder.newest_checkpoint() else State.missing


def is_finished(folder: RunFolder) -> bool:
    """Whether a run has its result; a file system that fails is no error here."""
    return os.path.exists(folder.result)


def is_cancelled(folder: RunFolder) -> bool:
    """Whether a person does not want a run any more; a file system that fails is no error here."""
    return os.path.exists(folder.cancelled)
