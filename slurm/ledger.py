"""The ledger: what state every run is in, judged by run folders and the queue.

Neither a database nor Slurm's accounting is asked. A run folder tells by what lies in it:
``result.json`` (finished), a live lease (running), a claim whose job is in the queue
(queued), ``cancelled``, ``failure.json``, a checkpoint. Job states are not asked for, because
they are seen to be wrong: a job can be called failed and run again, or time out after its
run has finished.

A claim, ``claims/NNNNNNNN.json``, says which submission is to train a run. Claims are tickets
(see ``runfolder/tickets.py``): of two submitters who judge at the same time that a
run is free, one gets the next number.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from runfolder.errors import UserError, nearest
from runfolder.failures import FailureKind
from runfolder.files import write_atomically, write_json
from runfolder.folder import SUBMISSIONS, RunFolder
from runfolder.lease import describe
from runfolder.process import is_dead, this_process
from runfolder.records import AttemptNote, Claim, Failure, Holder, Progress, Result, read_record
from runfolder.states import LIVE, State, state_of
from runfolder.tickets import highest, issue, now_in
from slurm import queue
from slurm.queue import QueuedJob

_SECONDS_TO_SUBMIT = 600.0  # after which a submitter that cannot be seen from here counts as gone
_READERS = 16  # folders read at a time: on a network file system reading is mostly waiting

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """One run."""

    folder: RunFolder
    state: State
    attempts: int = 0
    progress: Progress = field(default_factory=dict)
    result: Result = field(default_factory=dict)
    failure: Failure = field(default_factory=dict)
    claim: Claim = field(default_factory=dict)
    job: QueuedJob | None = None  # that is in the queue and is to train it


class Queue:
    """Jobs by name and index; asked for once, when first needed.

    Args:
        claims: whose submitters' jobs are of interest; several people may share a folder of runs.
    """

    def __init__(self, claims: Iterable[Path | None] = ()):
        self._claims = claims
        self._jobs: dict[tuple[str, str], QueuedJob] | None = None
        self._asked = False
        self._lock = threading.Lock()

    def find(self, claim: Claim) -> QueuedJob | None:
        """The job that a claim waits for, if it is in the queue."""
        return (self._known() or {}).get((claim.get("job_name", ""), str(claim.get("index", ""))))

    def is_known(self) -> bool:
        """Whether there is a Slurm here that answers."""
        return self._known() is not None

    def _known(self) -> dict[tuple[str, str], QueuedJob] | None:
        with self._lock:
            if not self._asked:
                self._asked = True
                users = {read_claim(path).get("user") for path in self._claims if path is not None}
                found = queue.jobs(users={user for user in users if isinstance(user, int)})
                if found is not None:
                    self._jobs = {(job.name, job.id.partition("_")[2] or "0"): job for job in found}
        return self._jobs


# -- reading ----------------------------------------------------------------------------


def entries(runs: Path, experiment: str | None = None, folders: list[RunFolder] | None = None) -> list[Entry]:
    """All runs below ``runs`` (of one experiment), or these folders, each with its state.

    A folder that cannot be read, or holds nonsense, counts as failed and hides no other.

    Raises:
        UserError: no such folder.
    """
    if folders is None:
        folders = run_folders(runs, experiment)
    claims = dict(zip(folders, _each(_readable_claim, folders), strict=True))  # before the queue is asked:
    known, now = Queue(claims.values()), now_in(runs)  # what is new there is claimed
    return _each(lambda folder: _readable_entry(folder, claims[folder], known, now), folders)


def run_folders(runs: Path, experiment: str | None = None) -> list[RunFolder]:
    """Every folder with a ``config.yaml``, in order.

    Raises:
        UserError: no such folder, or one that cannot be read.
    """
    if not runs.is_dir():
        raise UserError(f"expected a folder of runs, got {runs}; give --runs DIR.")
    try:
        names = sorted(entry.name for entry in os.scandir(runs) if entry.is_dir() and not entry.name.startswith("."))
        if experiment is not None:
            if experiment not in names:
                raise UserError(f"expected an experiment in {runs}, got {experiment}; {nearest(experiment, names)}.")
            names = [experiment]
        found = [entry for name in names for entry in sorted(os.scandir(runs / name), key=lambda entry: entry.name)]
    except OSError as error:
        raise UserError(
            f"expected folders that can be read, got {error.filename}: {error.strerror}; give --experiment NAME."
        ) from None
    folders = [RunFolder(entry.path) for entry in found if entry.is_dir() and entry.name != SUBMISSIONS]
    are_runs = _each(_is_run, folders)
    return [folder for folder, is_run in zip(folders, are_runs, strict=True) if is_run]


def _is_run(folder: RunFolder) -> bool:
    try:
        os.stat(folder.config)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # its entry will say what is wrong
        return True
    return True


def _each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """The function's results in order, several being computed at a time."""
    chunk = -(-len(items) // _READERS) or 1
    parts = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    with ThreadPoolExecutor(_READERS) as pool:
        return [result for part in pool.map(lambda part: [*map(function, part)], parts) for result in part]


def _readable_claim(folder: RunFolder) -> Path | None:
    with suppress(OSError):
        return newest_claim(folder)
    return None


def _readable_entry(folder: RunFolder, claim_path: Path | None, known: Queue, now: float) -> Entry:
    try:
        return _entry(folder, claim_path, known, now)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"expected the folder of a run, got what cannot be read ({type(error).__name__}: {error})"
        return Entry(folder, State.failed, failure={"kind": FailureKind.unreadable, "reason": reason})


def _entry(folder: RunFolder, claim_path: Path | None, known: Queue, now: float) -> Entry:
    state, claim = state_of(folder, now), read_claim(claim_path)
    if state not in (State.finished, State.running, State.cancelled) and claim_is_live(claim, known):
        state = State.queued
    of_slurm = claim.get("job_name") and not claim.get("released") and claim.get("scheduler") != "local"
    with_queue = of_slurm and state in (*LIVE, State.cancelled)
    return Entry(
        folder,
        state,
        attempts=_count(folder.attempts),
        progress=read_record(folder.progress, Progress),
        result=read_record(folder.result, Result) if state == State.finished else {},
        failure=read_record(folder.failure, Failure) if state == State.failed else {},
        claim=claim,
        job=known.find(claim) if with_queue else None,
    )


def _count(folder: Path) -> int:
    try:
        return sum(name.endswith(".json") for name in os.listdir(folder))
    except OSError:
        return 0


# -- claims -----------------------------------------------------------------------------


def newest_claim(folder: RunFolder) -> Path | None:
    """The claim that counts."""
    return highest(folder.claims)[1]


def read_claim(path: Path | None) -> Claim:
    """What a claim says; {} without one, and of a claim that was copied with its run from another folder."""
    claim = {} if path is None else read_record(path, Claim)
    if claim.get("submission") in (".", "..") or "/" in claim.get("submission", ""):
        del claim["submission"]  # it is the name of a folder, not a way elsewhere
    if "folder" not in claim or path is None:
        return claim
    here = path.parents[1]
    with suppress(OSError):
        if os.stat(here).st_ino == claim.get("inode") or os.path.samefile(here, claim["folder"]):
            return claim
    return {}


def claim_of(folder: RunFolder) -> Claim:
    """What that claim says; {} without one."""
    return read_claim(newest_claim(folder))


def holder(folder: RunFolder) -> str:
    """Who trains a run, by its lease; ? where that cannot be read."""
    path = highest(folder.lease)[1]
    with suppress(KeyError, TypeError):
        return describe(read_record(path, Holder) if path else {})
    return "?"


def claim_is_live(claim: Claim, known: Queue) -> bool:
    """Whether a claim's submission is still going to train the run.

    A claim that has been submitted lives as long as its job is in the queue (or, with
    scheduler=local, as long as its process). Where the queue cannot be asked it counts as live.
    """
    if not claim or claim.get("released"):
        return False
    if not claim.get("submitted"):
        dead = is_dead(claim)
        return not dead if dead is not None else time.time() - claim.get("made", 0) < _SECONDS_TO_SUBMIT
    if claim.get("scheduler") == "local":
        return "worker" in claim and is_dead(claim["worker"]) is not True
    return known.find(claim) is not None or not known.is_known()


def claim(folders: list[RunFolder], submission: str) -> list[RunFolder]:
    """Claim the runs that nobody else is going to train; which ones that is."""
    seen = {folder: highest(folder.claims) for folder in folders}  # before the queue is asked
    known, mine = Queue(path for _, path in seen.values()), []
    content = this_process() | {"user": os.geteuid(), "submission": submission, "made": time.time()}
    for folder in folders:
        number, path = seen[folder]
        if path is not None and claim_is_live(read_claim(path), known):
            continue
        with suppress(OSError):  # making the ticket will say so
            os.makedirs(folder, exist_ok=True)
            content |= {"folder": str(folder.absolute()), "inode": os.stat(folder).st_ino}
        if issue(folder.claims, number + 1, content) is not None:
            mine.append(folder)
    return mine


def amend_claim(folder: RunFolder, submission: str, **changes: object) -> None:
    """Add to this submission's claim, if it is still the one that counts."""
    path = newest_claim(folder)
    claim = read_claim(path)
    if claim.get("submission") == submission and claim | changes != claim:
        write_atomically(path, json.dumps(claim | changes).encode(), durable=False)


def is_claimed_by(folder: RunFolder, submission: str) -> bool:
    """Whether this submission's claim is the one that counts, and has not been given back."""
    claim = claim_of(folder)
    return claim.get("submission") == submission and not claim.get("released")


def release(folder: RunFolder, submission: str, reason: str) -> None:
    """Give a claim back: the run has finished or failed, or is not going to be trained."""
    amend_claim(folder, submission, released=reason)


# -- attempts ---------------------------------------------------------------------------


def begin_attempt(folder: RunFolder, **place: object) -> Path:
    """Note that a run is about to be started: from which step, where."""
    number, before = highest(folder.attempts)
    number += 1
    if before is not None and "outcome" not in read_record(before, AttemptNote):
        end_attempt(before, "cut off")
    note = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "from_step": folder.last_step(), **place}
    while (path := issue(folder.attempts, number, note)) is None:
        number += 1
    return path


def end_attempt(path: Path, outcome: str, reason: str = "") -> None:
    """Note how an attempt ended; without this note, it was cut off."""
    folder, note = RunFolder(path.parents[1]), read_record(path, AttemptNote)
    if "outcome" not in note:  # else a later attempt has noted that this one was cut off, and has gone on since
        note["reached_step"] = read_record(folder.progress, Progress).get("step")
        note["saved_step"] = folder.last_step()
    note |= {"ended": time.strftime("%Y-%m-%d %H:%M:%S"), "outcome": outcome, "reason": reason}
    write_json(path, note, durable=False)


def attempts(folder: RunFolder) -> list[AttemptNote]:
    """All attempts in order."""
    return [read_record(path, AttemptNote) for path in sorted(folder.attempts.glob("*.json"))]


def fruitless(folder: RunFolder, submission: str) -> int:
    """How many attempts in a row were stopped, cut off or killed and began where the next one would begin.

    Only those of one submission count: a person who submits again has a reason to.
    """
    here, count = folder.last_step(), 0
    for attempt in reversed(attempts(folder)):
        cut_off = attempt.get("outcome") not in ("finished", "failed", "cancelled", "busy")
        if not cut_off or attempt.get("from_step") != here or attempt.get("submission") != submission:
            break
        count += 1
    return count
