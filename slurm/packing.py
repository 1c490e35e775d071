"""Which runs share a job, what a job is given, and which jobs are one array."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.config import Config
from runfolder.errors import UserError
from runfolder.folder import RunFolder
from runfolder.states import is_finished
from slurm.profile import Cluster, Scheduler


@dataclass(frozen=True)
class Shape:
    """What one job is given, and how many runs share it."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    side_by_side: int

    def gpus(self) -> int:
        """GPUs of one job."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Part:
    """One job array: jobs of one shape, each with its runs."""

    shape: Shape
    jobs: list[list[RunFolder]]
    after: RunFolder | None = None  # a run whose job must have ended well before


def shape_of(cluster: Cluster, gpus: int) -> Shape:
    """The job for runs that train on so many GPUs each (0: on the CPU).

    Raises:
        UserError: the GPUs cannot be spread evenly over nodes.
    """
    if cluster.nodes is not None or cluster.tasks_per_node is not None:
        nodes = cluster.nodes or max(1, math.ceil(gpus / cluster.tasks_per_node))
        tasks = cluster.tasks_per_node or max(1, math.ceil(gpus / nodes))
        if None in (cluster.nodes, cluster.tasks_per_node) and gpus > 1 and nodes * tasks != gpus:
            raise UserError(
                f"expected runs whose GPUs spread evenly over nodes, got {gpus} GPUs on {nodes} nodes with {tasks} "
                "tasks each; set runtime.gpus, cluster.nodes or cluster.tasks_per_node."
            )
        if nodes * tasks > 1:
            given = tasks if gpus and cluster.gpus_per_node else 0
            return Shape(nodes, tasks, given, cluster.cpus_per_task if given else cluster.cpus_without_gpu, 1)
    if gpus <= 1:
        given = (cluster.gpus_per_job or 1) if gpus and cluster.gpus_per_node else 0
        runs = cluster.runs_per_gpu * max(1, given)
        return Shape(1, 1, given, cluster.cpus_per_task * given or cluster.cpus_without_gpu * runs, runs)
    if cluster.gpus_per_node == 0:
        raise UserError(f"expected a cluster with GPUs for runs of {gpus} GPUs each, got cluster.gpus_per_node=0.")
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    if gpus % nodes:
        raise UserError(
            f"expected runs whose GPUs spread evenly over nodes, got {gpus} GPUs on {nodes} nodes of "
            f"{cluster.gpus_per_node}; set runtime.gpus or cluster.gpus_per_node."
        )
    return Shape(nodes, gpus // nodes, gpus // nodes, cluster.cpus_per_task, 1)


def arrange(folders: dict[RunFolder, int], cluster: Cluster, limit: int) -> list[Part]:
    """Runs into jobs, jobs into arrays.

    Args:
        folders: {run folder: GPUs of the run}.
        cluster: the profile.
        limit: the most elements of an array.
    """
    parts = []
    for gpus in sorted(set(folders.values())):
        shape, chosen = shape_of(cluster, gpus), [folder for folder, own in folders.items() if own == gpus]
        per_job = len(chosen) if cluster.scheduler is Scheduler.local else shape.side_by_side
        jobs = [chosen[first : first + per_job] for first in range(0, len(chosen), per_job)]
        parts += [Part(shape, jobs[first : first + limit]) for first in range(0, len(jobs), limit)]
    return parts


def arrange_in_order(configs: dict[RunFolder, Config], cluster: Cluster, limit: int) -> list[Part]:
    """As :func:`arrange`; a run that starts from an unfinished one has a job of its own, behind all others."""
    gpus = {folder: config.runtime.gpus for folder, config in configs.items()}
    if cluster.scheduler is Scheduler.local:
        return arrange(gpus, cluster, limit)  # the job itself trains them in order
    sources = {folder: folder.start(config.start_from) for folder, config in configs.items()}
    later = {folder: source for folder, source in sources.items() if source and not is_finished(source)}
    parts = arrange({folder: count for folder, count in gpus.items() if folder not in later}, cluster, limit)
    return parts + [Part(shape_of(cluster, gpus[folder]), [[folder]], source) for folder, source in later.items()]
