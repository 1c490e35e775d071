"""What ``--dry-run`` prints: every run with its state, the jobs, their cost and the batch script."""

from __future__ import annotations

from collections import Counter

from experiments.config import Config, folder_of
from runfolder.folder import RunFolder, relative
from runfolder.states import State
from slurm import batch, ledger, preflight
from slurm.cost import describe_cost
from slurm.launch import FREE, arranged, at_once, first_script
from slurm.profile import Cluster, Scheduler


def show(experiment: str, configs: list[Config], jobs: int, cluster: Cluster) -> None:
    """Print what ``--local`` and ``--submit`` would do; nothing is made or started.

    Args:
        experiment: the script's name.
        configs: all runs of the plan.
        jobs: how many at a time with ``--local``.
        cluster: the profile for ``--submit``.
    """
    folders = {folder_of(config): config for config in configs}
    entries = ledger.entries(next(iter(folders)).runs, folders=list(folders))
    states = {entry.folder: entry.state for entry in entries}
    for folder, state in states.items():
        detail = f" (step {folder.last_step()})" if state == State.resumable else ""
        print(f"{state:>9}{detail}  {relative(folder)}")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states.values()).items()))
    print(f"{len(states)} runs: {counts}. --local would train them here, {jobs} at a time.")
    wanted = {folder.absolute(): config for folder, config in folders.items() if states[folder] in FREE}
    if wanted:
        _show_jobs(experiment, wanted, cluster)
    else:
        print("--submit would submit nothing.")


def _show_jobs(experiment: str, configs: dict[RunFolder, Config], cluster: Cluster) -> None:
    parts = arranged(configs, cluster)
    jobs = sum(len(part.jobs) for part in parts)
    where = "here, through submitit's local executor" if cluster.scheduler is Scheduler.local else "to Slurm"
    print(
        f"--submit would send {len(configs)} runs in {jobs} jobs {where}, at most {at_once(parts, cluster)} at a time."
    )
    for part in parts:
        s = part.shape
        print(
            f"  {len(part.jobs)} x {s.nodes} node(s) with {s.tasks_per_node} task(s), {s.gpus_per_node} GPU(s) and "
            f"{s.tasks_per_node * s.cpus_per_task} core(s) each; {s.side_by_side} run(s) side by side in a job"
            + ("" if part.after is None else f"; after {part.after.experiment}/{part.after.name}")
        )
    print(describe_cost(configs))
    if cluster.scheduler is Scheduler.slurm:
        script = first_script(next(iter(configs)).submissions / f"{experiment}-DATE", parts, cluster)
        for doubt in preflight.doubts(cluster, batch.options_of(script)):
            print(f"note: {doubt}")
        print("The first batch script:\n")
        print(script)
