"""Where this process runs: its rank, its node, its batch job. Nothing here is slow to import."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path


def place_of_this_rank() -> tuple[int, int, int]:
    """(rank, number of ranks, rank within the node).

    From RANK, WORLD_SIZE and LOCAL_RANK (torchrun), else from SLURM_PROCID,
    SLURM_STEP_NUM_TASKS and SLURM_LOCALID (a Slurm step of several tasks).
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if not all(name in os.environ for name in names[:2]):
        return 0, 1, 0
    rank, size, local = (int(os.environ.get(name, 0)) for name in names)
    return (rank, size, local) if size > 1 else (0, 1, 0)


def node_name() -> str:
    """The node as Slurm calls it, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str:
    """This Slurm job as its commands name it: 12, or 12_3 for an element of an array.

    SLURM_JOB_ID alone does not do: of one element of each array it is the array's own number,
    and commands take that for all its elements.
    """
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return os.environ.get("SLURM_JOB_ID", "") if array is None or element is None else f"{array}_{element}"


def slurm_start() -> dict:
    """{"job": id, "restart": how often it was started again}; {} outside a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return {}
    return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def cpu_name() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
