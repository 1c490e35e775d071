"""A grid trained by this process: ``--local``, the same as a submission of one job but for the queue."""

from __future__ import annotations

import os
from collections import Counter

from tqdm import tqdm

from experiments.config import Config, folder_of, prepare_folder
from runfolder.errors import EXIT_TRY_AGAIN
from runfolder.folder import RunFolder, relative
from runfolder.states import State, is_finished, state_of
from slurm import ledger
from slurm.launch import FREE, claimed, confirm, write
from slurm.notices import Notices
from slurm.packing import Part, Shape
from slurm.profile import ROOT, load_cluster
from slurm.supervisor import Log, Place, Supervisor

_WANTED = (*FREE, State.failed)


class Screen(Log):
    """Beside a progress bar: a line per run, when it has ended."""

    def __init__(self, runs: int, finished: int):
        self.outcomes: dict[RunFolder, str] = {}
        self._bar = tqdm(total=runs, initial=finished, unit="run", dynamic_ncols=True, disable=None)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, sentence: str) -> None:
        """One line."""
        tqdm.write(sentence)

    def note(self, sentence: str) -> None:
        """For logs only."""

    def started(self, folder: RunFolder) -> None:
        """For logs only."""

    def ended(self, folder: RunFolder, outcome: str, reason: str) -> None:
        """How an attempt ended and, where it did not go well, where to look."""
        self.outcomes[folder] = outcome
        self._bar.update(outcome == "finished")
        place = f" (all of it in {relative(folder.output)})" if outcome == "failed" else ""
        tqdm.write(f"{outcome:<9} {folder.name}{': ' if reason else ''}{reason}{place}")


def train_here(experiment: str, configs: list[Config], jobs: int) -> int:
    """Train what nobody else trains, each run in its own process; one that fails stops no other.

    A run that starts from another one of the plan comes after it. Failed runs are tried again.
    Ctrl-C, SIGTERM, SIGHUP and USR2 make every run write a checkpoint and leave; on Linux so
    does the end of this process by any other means.

    Args:
        experiment: the script's name.
        configs: all runs of the plan.
        jobs: how many at a time; the machine's cores are shared among them.

    Returns:
        Exit code: 0 all finished (but for what a person has cancelled), 1 some failed, 75 stopped or
        busy; the same command continues.
    """
    folders = {folder_of(config).absolute(): config for config in configs}
    done = sum(map(is_finished, folders))
    print(f"{len(folders)} runs, {done} finished already, {jobs} at a time.", flush=True)
    with Screen(len(folders), done) as screen:
        wanted = {folder: config for folder, config in folders.items() if state_of(folder) in _WANTED}
        _say_why_not([folder for folder in folders if folder not in wanted], screen)
        if wanted:
            _train(experiment, wanted, jobs, screen)
    return _summary(folders, screen.outcomes)


def _say_why_not(folders: list[RunFolder], screen: Screen) -> None:
    """Of runs that are not trained here, what keeps them."""
    for folder in folders:
        match state_of(folder):
            case State.finished:
                continue
            case State.cancelled:
                screen.ended(folder, "cancelled", "by a person")
            case State.running:
                screen.ended(folder, "busy", f"trained by {ledger.holder(folder)}")
            case _:
                screen.ended(folder, "busy", f"claimed by {ledger.claim_of(folder).get('submission')}")


def _train(experiment: str, configs: dict[RunFolder, Config], jobs: int, screen: Screen) -> None:
    cluster = load_cluster("local", {"parallel": jobs})
    with claimed(experiment, list(configs), _WANTED) as (path, mine):
        _say_why_not([folder for folder in configs if folder not in mine], screen)
        if not mine:
            return
        for folder in mine:
            prepare_folder(configs[folder])
        shape = Shape(nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1, side_by_side=jobs)
        submission = write(path, experiment, cluster, os.getcwd(), [Part(shape, [mine])])
        confirm(submission, 0, 0, str(os.getpid()), os.getpid())
        deadline = configs[mine[0]].runtime.deadline_minutes
        settings = {} if deadline is None else {"deadline_minutes": deadline}
        with Notices() as notices:
            Supervisor(submission, 0, 0, notices, Place(), ROOT, screen, settings).run()


def _summary(folders: dict[RunFolder, Config], outcomes: dict[RunFolder, str]) -> int:
    """Say how many runs are finished and what keeps the others; the exit code."""
    ended = {folder: outcomes.get(folder, "not started") for folder in folders if not is_finished(folder)}
    counts = Counter(ended.values())
    words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    again = "; the same command tries again" if set(counts) - {"cancelled"} else ""
    rest = f" ({words}{again})" if words else ""
    print(f"{len(folders) - len(ended)} of {len(folders)} runs finished{rest}.")
    if counts["failed"]:
        return 1
    return EXIT_TRY_AGAIN if again else 0
