"""The ledger: what state every run is in, judged by run folders and the queue.

Neither a database nor Slurm's accounting is asked. A run folder tells by what lies in it:
``result.json`` (finished), a live lease (running), a claim whose job is in the queue
(queued), ``cancelled``, ``failure.json``, a checkpoint. Job states are not asked for, because
they are seen to be wrong: a job can be called failed and run again, or time out after its
run has finished.

A claim, ``claims/NNNNNNNN.json``, says which submission is to train a run. Claims are tickets
(see ``experiments/training/lease.py``): of two submitters who judge at the same time that a
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

from experiments.errors import UserError, nearest
from experiments.training.files import read_json, write_atomically, write_json
from experiments.training.lease import highest, is_dead, issue, now_in, this_process
from experiments.training.state import newest, state_of, step_of
from slurm.queue import Task, tasks

SUBMISSIONS = "slurm"  # the folder beside the runs that holds an experiment's submissions
_SECONDS_TO_SUBMIT = 600.0  # after which a submitter that cannot be seen from here counts as gone
_READERS = 16  # folders read at a time: on a network file system reading is mostly waiting
STATES = ("finished", "running", "queued", "resumable", "missing", "failed", "cancelled")

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """One run."""

    folder: Path
    state: str  # one of STATES
    attempts: int = 0
    progress: dict = field(default_factory=dict)  # progress.json: step, steps, epoch, headline, score, ...
    result: dict = field(default_factory=dict)
    failure: dict = field(default_factory=dict)  # failure.json: kind, reason, traceback
    claim: dict = field(default_factory=dict)
    task: Task | None = None  # the job in the queue that is to train it


class Queue:
    """Jobs by name and index; asked for once, when first needed.

    Args:
        claims: whose submitters' jobs are of interest; several people may share a folder of runs.
    """

    def __init__(self, claims: Iterable[Path | None] = ()):
        self._claims = claims
        self._tasks: dict[tuple[str, str], Task] | None = None
        self._asked = False
        self._lock = threading.Lock()

    def find(self, claim: dict) -> Task | None:
        """The job that a claim waits for, if it is in the queue."""
        return (self._known() or {}).get((claim.get("job_name", ""), str(claim.get("index", ""))))

    def is_known(self) -> bool:
        """Whether there is a Slurm here that answers."""
        return self._known() is not None

    def _known(self) -> dict[tuple[str, str], Task] | None:
        with self._lock:
            if not self._asked:
                self._asked = True
                users = {read_json(path).get("user") for path in self._claims if path is not None}
                found = tasks(users={user for user in users if isinstance(user, int)})
                if found is not None:
                    self._tasks = {(task.name, task.job.partition("_")[2] or "0"): task for task in found}
        return self._tasks


# -- reading ----------------------------------------------------------------------------


def entries(runs: Path, experiment: str | None = None, folders: list[Path] | None = None) -> list[Entry]:
    """All runs below ``runs`` (of one experiment), or these folders, each with its state.

    A folder that cannot be read, or holds nonsense, counts as failed and hides no other.

    Raises:
        UserError: no such folder.
    """
    if folders is None:
        folders = run_folders(runs, experiment)
    claims = dict(zip(folders, _each(_readable_claim, folders), strict=True))  # before the queue is asked:
    queue, now = Queue(claims.values()), now_in(runs)  # what is new there is claimed
    return _each(lambda folder: _readable_entry(folder, claims[folder], queue, now), folders)


def run_folders(runs: Path, experiment: str | None = None) -> list[Path]:
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
    folders = [entry.path for entry in found if entry.is_dir() and entry.name != SUBMISSIONS]
    are_runs = _each(_is_run, folders)
    return [Path(folder) for folder, is_run in zip(folders, are_runs, strict=True) if is_run]


def _is_run(folder: str) -> bool:
    try:
        os.stat(os.path.join(folder, "config.yaml"))
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


def _readable_claim(folder: Path) -> Path | None:
    with suppress(OSError):
        return newest_claim(folder)
    return None


def _readable_entry(folder: Path, claim_path: Path | None, queue: Queue, now: float) -> Entry:
    try:
        return _entry(folder, claim_path, queue, now)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"expected the folder of a run, got what cannot be read ({type(error).__name__}: {error})"
        return Entry(folder, "failed", failure={"kind": "disk", "reason": reason})


def _entry(folder: Path, claim_path: Path | None, queue: Queue, now: float) -> Entry:
    state, claim = state_of(folder, now), read_json(claim_path) if claim_path else {}
    if state not in ("finished", "running", "cancelled") and claim_is_live(claim, queue):
        state = "queued"
    of_slurm = claim.get("job_name") and not claim.get("released") and claim.get("scheduler") != "local"
    with_queue = of_slurm and state in ("running", "queued", "cancelled")
    return Entry(
        folder,
        state,
        attempts=_count(folder / "attempts"),
        progress=read_json(folder / "progress.json"),
        result=read_json(folder / "result.json") if state == "finished" else {},
        failure=read_json(folder / "failure.json") if state == "failed" else {},
        claim=claim,
        task=queue.find(claim) if with_queue else None,
    )


def _count(folder: Path) -> int:
    try:
        return sum(name.endswith(".json") for name in os.listdir(folder))
    except OSError:
        return 0


# -- claims -----------------------------------------------------------------------------


def newest_claim(folder: Path) -> Path | None:
    """The claim that counts."""
    return highest(folder / "claims")[1]


def claim_is_live(claim: dict, queue: Queue) -> bool:
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
        return is_dead(claim["worker"]) is not True
    return queue.find(claim) is not None or not queue.is_known()


def claim(folders: list[Path], submission: str) -> list[Path]:
    """Claim the runs that nobody else is going to train; which ones that is."""
    seen = {folder: highest(folder / "claims") for folder in folders}  # before the queue is asked
    queue, mine = Queue(path for _, path in seen.values()), []
    said = this_process() | {"user": os.geteuid(), "submission": submission, "made": time.time()}
    for folder in folders:
        number, path = seen[folder]
        if path is not None and claim_is_live(read_json(path), queue):
            continue
        if issue(folder / "claims", number + 1, said) is not None:
            mine.append(folder)
    return mine


def amend_claim(folder: Path, submission: str, **changes: object) -> None:
    """Add to this submission's claim, if it is still the one that counts."""
    path = newest_claim(folder)
    said = read_json(path) if path else {}
    if said.get("submission") == submission and said | changes != said:
        write_atomically(path, json.dumps(said | changes).encode(), durable=False)


def is_claimed_by(folder: Path, submission: str) -> bool:
    """Whether this submission's claim is the one that counts, and has not been given back."""
    path = newest_claim(folder)
    said = read_json(path) if path else {}
    return said.get("submission") == submission and not said.get("released")


def release(folder: Path, submission: str, reason: str) -> None:
    """Give a claim back: the run has finished or failed, or is not going to be trained."""
    amend_claim(folder, submission, released=reason)


# -- attempts ---------------------------------------------------------------------------


def begin_attempt(folder: Path, **said: object) -> Path:
    """Note that a run is about to be started: from which step, where."""
    attempts = folder / "attempts"
    number, before = highest(attempts)
    number += 1
    if before is not None and "outcome" not in read_json(before):
        end_attempt(before, "cut off")
    said = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "from_step": last_step(folder), **said}
    while (path := issue(attempts, number, said)) is None:
        number += 1
    return path


def end_attempt(path: Path, outcome: str, reason: str = "") -> None:
    """Note how an attempt ended; without this note, it was cut off."""
    folder, said = path.parents[1], read_json(path)
    if "outcome" not in said:  # else a later attempt has noted that this one was cut off, and has gone on since
        said["reached_step"] = read_json(folder / "progress.json").get("step")
        said["saved_step"] = last_step(folder)
    said |= {"ended": time.strftime("%Y-%m-%d %H:%M:%S"), "outcome": outcome, "reason": reason}
    write_json(path, said, durable=False)


def attempts(folder: Path) -> list[dict]:
    """All attempts in order."""
    paths = (folder / "attempts").glob("*.json")
    return [read_json(path) for path in sorted(paths)]


def fruitless(folder: Path, submission: str) -> int:
    """How many attempts in a row were stopped, cut off or killed and began where the next one would begin.

    Only those of one submission count: a person who submits again has a reason to.
    """
    here, count = last_step(folder), 0
    for attempt in reversed(attempts(folder)):
        cut_off = attempt.get("outcome") not in ("finished", "failed", "cancelled", "busy")
        if not cut_off or attempt.get("from_step") != here or attempt.get("submission") != submission:
            break
        count += 1
    return count


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return step_of(newest(folder / "checkpoints"))
