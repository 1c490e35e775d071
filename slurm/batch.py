"""How jobs are handed over, by submitit: to Slurm with a batch script, or to this machine."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.errors import UserError
from slurm.job import Job
from slurm.packing import Part
from slurm.profile import Cluster

if TYPE_CHECKING:
    import submitit

_REQUEUE = Path(__file__).with_name("requeue.sh")
_DEAF = """sh -c 'trap "" USR2 TERM; exec "$@"' sh"""  # until its handlers are there, no signal ends python
_SLURM = ("sbatch", "srun")  # the commands of Slurm that submitit calls


def slurm_executor(
    folder: Path, cluster: Cluster, part: Part, job_name: str, throttle: int, dependency: str | None = None
) -> submitit.SlurmExecutor:
    """What submits the jobs of one array.

    Args:
        folder: the submission's, absolute.
        cluster: the profile.
        part: the jobs.
        job_name: their name.
        throttle: the most of them at a time.
        dependency: the job that must have ended well before.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder / "jobs", python=_python(cluster))
    parameters = _parameters(folder, cluster, part, job_name, throttle)
    if dependency is not None:
        parameters["dependency"] = f"afterok:{dependency}"  # a requeued job has not ended
        parameters["additional_parameters"]["kill_on_invalid_dep"] = "yes"
    executor.update_parameters(**parameters)
    return executor


def local_executor(folder: Path, cluster: Cluster, part: Part) -> submitit.LocalExecutor:
    """What starts a job as a process of this machine.

    Raises:
        UserError: its runs have several ranks.
    """
    import submitit

    if part.shape.nodes * part.shape.tasks_per_node > 1:
        raise UserError(
            "expected runs of one rank for cluster=local, got more; torchrun --nproc-per-node N trains one run on "
            "several GPUs, runtime.gpus=1 on one with gradient accumulation."
        )
    executor = submitit.LocalExecutor(folder / "jobs", python=_interpreter(cluster))
    visible = [int(gpu) for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.isdigit()]
    visible = visible or [int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*")]
    executor.update_parameters(
        timeout_min=365 * 24 * 60, gpus_per_node=len(visible), visible_gpus=visible, setup=cluster.setup
    )
    return executor


# -- the batch script -------------------------------------------------------------------


def script(folder: Path, cluster: Cluster, part: Part, job_name: str, throttle: int) -> str:
    """The batch script of a submission in ``folder``, without a Slurm and without making anything there.

    submitit submits the jobs to a stand-in for Slurm, below a temporary folder.
    """
    with tempfile.TemporaryDirectory() as root, clean_environment():
        for name in _SLURM:
            command = Path(root, name)
            command.write_text("#!/bin/sh\necho Submitted batch job 1\n")
            command.chmod(0o755)
        os.environ["PATH"] = os.pathsep.join([root, os.environ.get("PATH", "")])
        elsewhere = Path(f"{root}{folder}")
        executor = slurm_executor(elsewhere, cluster, part, job_name, throttle)
        first, *_ = executor.submit_array([Job(str(folder), 0, index) for index in range(len(part.jobs))])
        return first.paths.submission_file.read_text().replace(root, "")


def options_of(text: str) -> list[str]:
    """The options in a batch script, for ``sbatch --test-only``: what a job is given and where it may run."""
    options = re.findall(r"^#SBATCH (--.*)$", text, re.MULTILINE)
    skip = ("--array", "--output", "--error", "--open-mode", "--job-name")
    return [shlex.split(option)[0] for option in options if not option.startswith(skip)]


def _parameters(folder: Path, cluster: Cluster, part: Part, job_name: str, throttle: int) -> dict[str, Any]:
    shape = part.shape
    given = {
        "job_name": job_name,
        "time": cluster.timeout_minutes,
        "signal_delay_s": cluster.signal_seconds,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": shape.cpus_per_task,
        "gpus_per_node": shape.gpus_per_node or None,
        "mem": None if cluster.memory_gb is None else f"{round(1024 * cluster.memory_gb)}M",
        "array_parallelism": throttle,
        "setup": _setup(folder, cluster),
        "teardown": _teardown(folder, cluster),
        "stderr_to_stdout": True,
        # Without the first, srun gives each task one core; with the second a rank that ends would end the others.
        "srun_args": [f"--cpus-per-task={shape.cpus_per_task}", "--kill-on-bad-exit=0"],
        "additional_parameters": {
            "requeue": True,
            **({"reservation": cluster.reservation} if cluster.reservation else {}),
            **cluster.extra,
        },
    }
    given |= {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    # Sites that use workload keys have keys of their own; submitit's default is none of them.
    return {key: value for key, value in given.items() if value is not None} | {"wckey": None}


def _setup(folder: Path, cluster: Cluster) -> list[str]:
    return [
        "trap '' USR2 TERM",
        # submitit's own handler would requeue the job or fail it in the moment before ours are there: it gets a
        # signal that nobody sends. Ours are the first thing in Job.__call__; until then USR2 is ignored.
        "export SUBMITIT_PREEMPT_SIGNAL=RTMAX",
        *cluster.setup,
        "set +e",
        f'export PYTHONPATH={shlex.quote(str(folder / "code"))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
    ]


def _teardown(folder: Path, cluster: Cluster) -> list[str]:
    """``requeue.sh`` and what it needs."""
    return [
        "code=$?",
        f"submission={shlex.quote(str(folder))}",
        f"budget={cluster.max_requeues}",
        f"excluded={shlex.quote(cluster.exclude or '')}",
        _REQUEUE.read_text().rstrip(),
    ]


def _python(cluster: Cluster) -> str:
    words = [cluster.container, _DEAF, _interpreter(cluster)]
    return " ".join(word for word in words if word)


def _interpreter(cluster: Cluster) -> str:
    """Python as a word of a shell line."""
    return shlex.quote(os.path.expanduser(cluster.python or sys.executable))


# -- what jobs inherit --------------------------------------------------------------------


@contextmanager
def clean_environment(code: Path | None = None) -> Iterator[None]:
    """For the jobs' environment: nothing of a Slurm job that this process may itself be in, code from the snapshot.

    SBATCH_* stay: they are a person's or a site's own defaults.
    """
    before = dict(os.environ)
    for key in before:
        if key.startswith(("SLURM_", "SRUN_")) and key != "SLURM_CONF":
            del os.environ[key]
    if code is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
