"""From a plan to jobs in the queue: claims, a snapshot of the code, job arrays; and back again as ``retry``.

Returns at once: nothing waits for a job, and no job needs the process that submitted it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from experiments.config import Config, folder_of, load_config, prepare_folder
from runfolder.errors import UserError
from runfolder.folder import RunFolder, relative
from runfolder.process import this_process
from runfolder.states import State, is_finished, state_of
from slurm import batch, ledger, preflight, queue, snapshot
from slurm.job import Job
from slurm.packing import Part, arrange_in_order
from slurm.profile import Cluster, Scheduler, from_tree, to_tree
from slurm.submission import FILE, JobArray, Submission, closed_to_writers, make_folder

FREE = (State.resumable, State.missing)  # runs that nobody is going to train
_STOPPED = (*FREE, State.failed, State.cancelled)  # and those that whoever retries means too
_WORDS = {State.queued: "queued already"}
_MAX_ARRAY_SIZE = 1000  # where Slurm does not say; its own default is 1001


def submit(experiment: str, configs: list[Config], cluster: Cluster) -> int:
    """Submit what is neither finished nor being trained nor claimed by somebody else.

    Failed and cancelled runs are left to ``status.py retry``.

    Args:
        experiment: the script's name.
        configs: all runs of the plan.
        cluster: the profile.

    Returns:
        Exit code: 0 (nothing to submit is no error).

    Raises:
        UserError: something is wrong with the cluster or the request; nothing is left in the queue.
    """
    folders = {folder_of(config).absolute(): config for config in configs}
    states = {folder: state_of(folder) for folder in folders}
    free = [folder for folder, state in states.items() if state in FREE]
    if free:  # what is queued needs no preflight
        states |= {entry.folder: entry.state for entry in ledger.entries(free[0].runs, folders=free)}
    wanted = {folder: folders[folder] for folder, state in states.items() if state in FREE}
    counts = Counter(_WORDS.get(state, state) for state in states.values() if state not in FREE)
    if wanted:
        submitted = _send(experiment, cluster, os.getcwd(), wanted, FREE)
        for state in (state_of(folder) for folder in wanted if folder not in submitted):
            counts["queued already" if state in FREE else state] += 1
    others = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"The other runs of the plan: {others}." if others else "That is the whole plan.")
    where = _runs_flag(next(iter(folders)).runs)
    if counts["failed"] or counts["cancelled"]:
        print(f"Failed and cancelled runs: python slurm/status.py retry --experiment {experiment}{where}")
    script = "analysis/tables.py" if counts["finished"] == len(folders) else "slurm/status.py watch"
    print(f"Next: python {script} --experiment {experiment}{where}")
    return 0


def retry(folders: list[RunFolder], changes: dict[str, Any] | None = None, trusted: Iterable[str] = ()) -> int:
    """Submit runs again, each with the profile of its last submission and today's code.

    Args:
        folders: the runs.
        changes: {key: value} of the profile, such as more memory than last time.
        trusted: names of submissions by other users whose profiles, with their shell lines, are taken all the same.

    Returns:
        Exit code: 0.

    Raises:
        UserError: as :func:`submit`, for a run that was never submitted, and for a submission by another user.
    """
    groups: dict[Path, list[RunFolder]] = {}
    for folder in folders:
        name = ledger.claim_of(folder).get("submission", "")
        submission = folder.submissions / name
        groups.setdefault(submission, []).append(folder.absolute())
        if not name or not (submission / FILE).is_file():
            raise UserError(
                f"expected runs that were submitted before, got {folder.name}; "
                f"python experiments/{folder.experiment}.py --submit submits it."
            )
    for path, chosen in groups.items():
        before = Submission.read(path)
        if path.name not in trusted:
            _require_own(before)
        if not os.path.isdir(before.cwd):
            raise UserError(
                f"expected the folder {before.cwd}, in which these runs were submitted, got none; make it again, or "
                f"submit from another one with python experiments/{before.experiment}.py --submit."
            )
        with chdir(before.cwd):
            configs = {folder: load_config(folder.config) for folder in chosen}
            cluster = from_tree(to_tree(before.cluster), changes)
            _send(before.experiment, cluster, before.cwd, configs, _STOPPED)
    return 0


def _require_own(submission: Submission) -> None:
    """A profile has shell lines, which run on this node and in jobs with this user's rights."""
    owners = {(submission.folder / name).stat().st_uid for name in (".", FILE)}
    if owners == {os.geteuid()}:
        return
    (owner, *_) = owners - {os.geteuid()}
    cluster = submission.cluster
    words = {key: getattr(cluster, key) for key in ("container", "python")}
    lines = [*cluster.setup, *(f"{key}={value}" for key, value in words.items() if value)]
    raise UserError(
        f"expected a submission of your own, got {submission.name}, which user {owner} has written, with these shell "
        f"lines: {'; '.join(lines) or 'none'}; read {submission.folder / FILE} and give --trust {submission.name}, "
        f"or submit the runs with python experiments/{submission.experiment}.py --submit."
    )


def _send(
    experiment: str, cluster: Cluster, cwd: str, configs: dict[RunFolder, Config], states: tuple[State, ...]
) -> list[RunFolder]:
    """Check, claim, copy the code, queue; the runs, all in one of these states, that were submitted."""
    began, runs = time.monotonic(), next(iter(configs)).runs
    local = cluster.scheduler is Scheduler.local
    if not local and set(str(runs)) & set("%\\"):
        raise UserError(
            f"expected a folder of runs without % and backslash, which Slurm reads in the names of logs, got {runs}; "
            "give runtime.runs=DIR."
        )
    parts = arranged(configs, cluster)
    _require_sources(parts)
    options = [] if local else batch.options_of(first_script(Path("submission"), parts, cluster))
    with batch.clean_environment():
        notes = preflight.check(cluster, runs, list(configs.values()), options=options)
    for note in notes:
        print(f"note: {note}")
    with claimed(experiment, list(configs), states) as (folder, mine):
        if not mine:
            return []
        if states == FREE:  # else the folders are there, with the settings that they were given first
            for run in mine:
                prepare_folder(configs[run])
        with closed_to_writers():
            left_out = snapshot.take(folder / "code", skip=[runs])["left_out"]
        if left_out:
            print(f"note: large untracked files are not in the copy of the code: {', '.join(left_out)}")
        parts = arranged({run: configs[run] for run in mine}, cluster)
        with closed_to_writers():
            submission = write(folder, experiment, cluster, cwd, parts)
            _queue(submission, parts)
    jobs = sum(len(part.jobs) for part in parts)
    print(
        f"Submitted {len(mine)} runs in {jobs} jobs, at most {at_once(parts, cluster)} at a time, as {submission.name} "
        f"({time.monotonic() - began:.1f} s)."
    )
    return mine


def arranged(configs: dict[RunFolder, Config], cluster: Cluster) -> list[Part]:
    """The job arrays for these runs."""
    limit = 1
    if cluster.scheduler is Scheduler.slurm:
        limit = cluster.max_array_size or queue.max_array_size() or _MAX_ARRAY_SIZE
    return arrange_in_order(configs, cluster, limit)


def first_script(folder: Path, parts: list[Part], cluster: Cluster) -> str:
    """The first batch script of a submission in ``folder``; nothing is made there."""
    return batch.script(folder.absolute(), cluster, parts[0], f"{folder.name}.0", _throttle(parts, cluster))


def _require_sources(parts: list[Part]) -> None:
    """Of what runs start from, all must be in these jobs or in the queue."""
    known, ours = ledger.Queue(), {folder for part in parts for job in part.jobs for folder in job}
    for part in parts:
        source = part.after
        if source is not None and source not in ours and not ledger.claim_is_live(ledger.claim_of(source), known):
            raise UserError(
                f"expected {source.name}, from which {part.jobs[0][0].name} starts, to be finished or in the queue, "
                f"got a run that is {state_of(source)}; submit it too, or give start_from=FILE."
            )


# -- claims and records -------------------------------------------------------------------


@contextmanager
def claimed(
    experiment: str, folders: list[RunFolder], states: tuple[State, ...]
) -> Iterator[tuple[Path, list[RunFolder]]]:
    """A new submission's folder, and the runs that are its own now.

    That is what nobody else is going to train, nor has trained since it was looked at. What is
    not submitted in the end is free again, and a folder without runs is removed.
    """
    folder, mine = make_folder(folders[0].submissions, experiment), []
    try:
        for run in ledger.claim(folders, folder.name):
            if state_of(run) in states:
                mine.append(run)
            else:
                ledger.release(run, folder.name, "not submitted")
        yield folder, mine
    except BaseException:
        for run in mine:
            if not ledger.claim_of(run).get("submitted"):
                ledger.release(run, folder.name, "not submitted")
        raise
    finally:
        if not mine:
            shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, experiment: str, cluster: Cluster, cwd: str, parts: list[Part]) -> Submission:
    """Write down a submission in its folder."""
    local = cluster.scheduler is Scheduler.local
    arrays = [
        JobArray(
            f"{folder.name}.{number}",
            cluster.parallel if local else part.shape.side_by_side,
            [[run.name for run in job] for job in part.jobs],
        )
        for number, part in enumerate(parts)
    ]
    created = time.strftime("%Y-%m-%d %H:%M:%S")
    submission = Submission(folder, experiment, cluster, cwd, arrays, shlex.join(sys.argv), created)
    submission.write()
    return submission


def confirm(submission: Submission, part: int, index: int, job: str, worker: int | None = None) -> None:
    """Note in the claims of a job's runs that it is there.

    Args:
        submission: what it belongs to.
        part: which job array.
        index: which element.
        job: its id.
        worker: the process that trains, where there is no scheduler.
    """
    changes = {"submitted": True, "scheduler": submission.cluster.scheduler.value, "job": job}
    changes |= {"job_name": submission.parts[part].job_name, "index": index}
    changes |= {} if worker is None else {"worker": this_process(worker)}
    for run in submission.runs(part, index):
        ledger.amend_claim(run, submission.name, **changes)


# -- the queue ----------------------------------------------------------------------------


def _queue(submission: Submission, parts: list[Part]) -> None:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    local = submission.cluster.scheduler is Scheduler.local
    for number, part in enumerate(parts):
        jobs = [Job(str(submission.folder), number, index) for index in range(len(part.jobs))]
        try:
            with batch.clean_environment(submission.code), _without_hangup():
                if local:
                    executor = batch.local_executor(submission.folder, submission.cluster, part)
                    with _output_into(submission.folder / "jobs.log"):
                        queued = executor.submit_array(jobs)
                else:
                    before = None if part.after is None or is_finished(part.after) else ledger.claim_of(part.after)
                    executor = batch.slurm_executor(
                        submission.folder,
                        submission.cluster,
                        part,
                        submission.parts[number].job_name,
                        throttle=_throttle(parts, submission.cluster),
                        dependency=before and before["job"],
                    )
                    queued = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise UserError(
                f"expected the queue to take {len(jobs)} jobs, got: {_what_sbatch_said(error)}; "
                f"{number} of {len(parts)} arrays are queued, the same command submits the rest."
            ) from None
        for index, job in enumerate(queued):
            confirm(submission, number, index, job.job_id, int(job.job_id) if local else None)


def at_once(parts: list[Part], cluster: Cluster) -> int:
    """The most jobs of a submission at a time; with more arrays than ``parallel`` one of each."""
    return sum(min(len(part.jobs), _throttle(parts, cluster)) for part in parts)


def _throttle(parts: list[Part], cluster: Cluster) -> int:
    """The most jobs of one array at a time, so that all arrays together keep to ``parallel`` if they can."""
    return max(1, cluster.parallel // max(1, sum(part.after is None for part in parts)))


@contextmanager
def _without_hangup() -> Iterator[None]:
    """What is started meanwhile survives the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """What is started meanwhile writes into a file: whoever reads our output to its end need not wait for it."""
    kept = [os.dup(number) for number in range(3)]
    null, file = os.open(os.devnull, os.O_RDONLY), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    try:
        for number, other in enumerate((null, file, file)):
            os.dup2(other, number)
        yield
    finally:
        for number, other in enumerate(kept):
            os.dup2(other, number)
        for other in (*kept, null, file):
            os.close(other)


def _what_sbatch_said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refusals = [line for line in lines if line.startswith(("sbatch: error", "sbatch: fatal"))]
    return (refusals or lines or [type(error).__name__])[-1]


def _runs_flag(runs: Path) -> str:
    return "" if relative(runs) == "runs" else f" --runs {shlex.quote(relative(runs))}"
