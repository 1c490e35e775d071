"""From a plan to jobs in the queue: claims, a snapshot of the code, job arrays; and back again as ``retry``.

Returns at once: nothing waits for a job, and no job needs the process that submitted it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from experiments.config import Config, load_config
from experiments.errors import UserError
from experiments.grid import relative
from experiments.training.files import read_json, write_json
from experiments.training.folder import folder_of, prepare_folder
from experiments.training.lease import this_process
from experiments.training.state import start_of, state_of
from slurm import ledger, preflight, queue, snapshot
from slurm.cost import describe_cost
from slurm.job import Job
from slurm.profile import Cluster, Scheduler, from_tree, to_tree

_ME = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"  # as in place.job_id
_STILLBORN = 3  # starts of a job whose process did not even begin
_MAX_ARRAY_SIZE = 1000  # where Slurm does not say; its own default is 1001
_DEAF = """sh -c 'trap "" USR2 TERM; exec "$@"' sh"""  # until its handlers are there, no signal ends python


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
            return Shape(nodes, tasks, given, cluster.cpus_per_task, 1)
    if gpus <= 1:
        given = (cluster.gpus_per_job or 1) if gpus and cluster.gpus_per_node else 0
        slots = max(1, given)
        return Shape(1, 1, given, cluster.cpus_per_task * slots, cluster.runs_per_gpu * slots)
    if cluster.gpus_per_node == 0:
        raise UserError(f"expected a cluster with GPUs for runs of {gpus} GPUs each, got cluster.gpus_per_node=0.")
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    if gpus % nodes:
        raise UserError(
            f"expected runs whose GPUs spread evenly over nodes, got {gpus} GPUs on {nodes} nodes of "
            f"{cluster.gpus_per_node}; set runtime.gpus or cluster.gpus_per_node."
        )
    return Shape(nodes, gpus // nodes, gpus // nodes, cluster.cpus_per_task, 1)


@dataclass(frozen=True)
class Part:
    """One job array: jobs of one shape, each with its runs."""

    shape: Shape
    jobs: list[list[Path]]
    after: Path | None = None  # a run whose job must have ended well before


def arrange(folders: dict[Path, int], cluster: Cluster, limit: int) -> list[Part]:
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
        jobs = [chosen[start : start + per_job] for start in range(0, len(chosen), per_job)]
        parts += [Part(shape, jobs[start : start + limit]) for start in range(0, len(jobs), limit)]
    return parts


# -- submitting -------------------------------------------------------------------------


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
    wanted = {folder: folders[folder] for folder, state in states.items() if state in ("resumable", "missing")}
    counts = Counter(state for state in states.values() if state not in ("resumable", "missing"))
    if wanted:
        submitted = _Submission(experiment, cluster, os.getcwd()).send(wanted, prepare=True)
        for state in (state_of(folder) for folder in wanted if folder not in submitted):
            counts["queued already" if state in ("resumable", "missing") else state] += 1
    others = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"The other runs of the plan: {others}." if others else "That is the whole plan.")
    where = _runs_flag(next(iter(folders)).parents[1])
    if counts["failed"] or counts["cancelled"]:
        print(f"Failed and cancelled runs: python slurm/status.py retry --experiment {experiment}{where}")
    unfinished = len(folders) - counts["finished"]
    show = f"python slurm/status.py watch --experiment {experiment}" if unfinished else _table_command(experiment)
    print(f"Next: {show}{where}")
    return 0


def retry(folders: list[Path], changes: dict[str, Any] | None = None) -> int:
    """Submit runs again, each with the profile of its last submission and today's code.

    Args:
        folders: the runs.
        changes: {key: value} of the profile, such as more memory than last time.

    Returns:
        Exit code: 0.

    Raises:
        UserError: as :func:`submit`, and for a run that was never submitted.
    """
    groups: dict[Path, list[Path]] = {}
    for folder in folders:
        claim = read_json(ledger.newest_claim(folder) or folder / "claims")
        submission = folder.parent.absolute() / ledger.SUBMISSIONS / claim.get("submission", "")
        if not claim or not (submission / "submission.json").is_file():
            raise UserError(
                f"expected runs that were submitted before, got {folder.name}; "
                f"python experiments/{folder.parent.name}.py --submit submits it."
            )
        groups.setdefault(submission, []).append(folder.absolute())
    for submission, chosen in groups.items():
        said = read_json(submission / "submission.json")
        if not os.path.isdir(said["cwd"]):
            raise UserError(
                f"expected the folder {said['cwd']}, in which these runs were submitted, got none; make it again, or "
                f"submit from another one with python experiments/{said['experiment']}.py --submit."
            )
        with contextlib.chdir(said["cwd"]):
            configs = {folder: load_config(folder / "config.yaml") for folder in chosen}
            _Submission(said["experiment"], from_tree(said["cluster"], changes), said["cwd"]).send(
                configs, prepare=False
            )
    return 0


class _Submission:
    """One submission: its folder, its claims, its jobs."""

    def __init__(self, experiment: str, cluster: Cluster, cwd: str):
        self._experiment, self._cluster, self._cwd = experiment, cluster, cwd

    def send(self, configs: dict[Path, Config], prepare: bool) -> list[Path]:
        """Check, claim, copy the code, queue; the runs that were submitted."""
        runs = next(iter(configs)).parent.parent
        began = time.monotonic()
        parts = self.arranged(configs)
        self._require_starts(parts)
        with _clean_environment():
            notes = preflight.check(self._cluster, runs, list(configs.values()), options=self._options(parts))
        for note in notes:
            print(f"note: {note}")
        self._folder = self._make_folder(runs / self._experiment / ledger.SUBMISSIONS)
        # Whoever retries means failed and cancelled runs too.
        mine = self._claim(list(configs), ("resumable", "missing", *(() if prepare else ("failed", "cancelled"))))
        try:
            if mine:
                if prepare:
                    for folder in mine:
                        prepare_folder(configs[folder])
                left_out = snapshot.take(self._folder / "code", skip=[runs])["left_out"]
                if left_out:
                    print(f"note: large untracked files are not in the copy of the code: {', '.join(left_out)}")
                parts = self.arranged({folder: configs[folder] for folder in mine})
                self._write(parts)
                self._queue(parts)
        except BaseException:
            for folder in mine:
                if not read_json(ledger.newest_claim(folder)).get("submitted"):
                    ledger.release(folder, self._folder.name, "not submitted")
            raise
        finally:
            if not mine:
                shutil.rmtree(self._folder, ignore_errors=True)
        if mine:
            jobs = sum(len(part.jobs) for part in parts)
            at_once = sum(min(len(part.jobs), self._throttle(parts)) for part in parts)
            print(
                f"Submitted {len(mine)} runs in {jobs} jobs, at most {at_once} at a time, as {self._folder.name} "
                f"({time.monotonic() - began:.1f} s)."
            )
        return mine

    def _claim(self, folders: list[Path], states: tuple[str, ...]) -> list[Path]:
        """Claim what nobody else is going to train, nor has trained since it was looked at."""
        mine = []
        for folder in ledger.claim(folders, self._folder.name):
            if state_of(folder) in states:
                mine.append(folder)
            else:
                ledger.release(folder, self._folder.name, "not submitted")
        return mine

    def arranged(self, configs: dict[Path, Config]) -> list[Part]:
        """The jobs for these runs; one that starts from an unfinished run has a job of its own, behind all others."""
        gpus = {folder: config.runtime.gpus for folder, config in configs.items()}
        if self._cluster.scheduler is Scheduler.local:
            return arrange(gpus, self._cluster, self._limit())  # the job itself trains them in order
        starts = {folder: start_of(folder, config.start_from) for folder, config in configs.items()}
        later = {folder: start for folder, start in starts.items() if start and state_of(start) != "finished"}
        first = {folder: count for folder, count in gpus.items() if folder not in later}
        parts = arrange(first, self._cluster, self._limit())
        parts += [Part(shape_of(self._cluster, gpus[folder]), [[folder]], start) for folder, start in later.items()]
        return parts

    def _require_starts(self, parts: list[Part]) -> None:
        """Of what runs wait for, all must be in these jobs or in the queue."""
        known, ours = ledger.Queue(), {folder for part in parts for job in part.jobs for folder in job}
        for part in parts:
            start = part.after
            if start is not None and start not in ours and not ledger.claim_is_live(_claim(start), known):
                raise UserError(
                    f"expected {start.name}, from which {part.jobs[0][0].name} starts, to be finished or in the queue, "
                    f"got a run that is {state_of(start)}; submit it too, or give start_from=FILE."
                )

    def _limit(self) -> int:
        if self._cluster.scheduler is Scheduler.local:
            return 1
        return self._cluster.max_array_size or queue.max_array_size() or _MAX_ARRAY_SIZE

    def _make_folder(self, submissions: Path) -> Path:
        while True:
            folder = submissions / f"{self._experiment}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"expected a folder that can be written, got {submissions}: {error.strerror}."
                ) from None

    def _write(self, parts: list[Part]) -> None:
        content = {
            "experiment": self._experiment,
            "created": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(sys.argv),
            "cwd": self._cwd,
            "cluster": to_tree(self._cluster),
            "parts": [
                {
                    "job_name": self._job_name(number),
                    "side_by_side": self._side_by_side(part),
                    "jobs": [[folder.name for folder in job] for job in part.jobs],
                }
                for number, part in enumerate(parts)
            ],
        }
        write_json(self._folder / "submission.json", content)

    def _job_name(self, number: int) -> str:
        return f"{self._folder.name}.{number}"

    def _side_by_side(self, part: Part) -> int:
        return self._cluster.parallel if self._cluster.scheduler is Scheduler.local else part.shape.side_by_side

    def _queue(self, parts: list[Part]) -> None:
        local = self._cluster.scheduler is Scheduler.local
        for number, part in enumerate(parts):
            jobs = [Job(str(self._folder), number, index) for index in range(len(part.jobs))]
            try:
                with _clean_environment(self._folder / "code"), _without_hangup():
                    if local:
                        executor = self._local_executor(part)
                        with _output_into(self._folder / "jobs.log"):
                            queued = executor.submit_array(jobs)
                    else:
                        queued = self._slurm_executor(part, number, self._throttle(parts)).submit_array(jobs)
            except (FailedJobError, FailedSubmissionError, OSError) as error:
                raise UserError(
                    f"expected the queue to take {len(jobs)} jobs, got: {_what_sbatch_said(error)}; "
                    f"{number} of {len(parts)} arrays are queued, the same command submits the rest."
                ) from None
            for index, (job, folders) in enumerate(zip(queued, part.jobs, strict=True)):
                said = {"submitted": True, "scheduler": self._cluster.scheduler.value, "job": job.job_id}
                said |= {"job_name": self._job_name(number), "index": index}
                if local:
                    said["worker"] = this_process(int(job.job_id))
                for folder in folders:
                    ledger.amend_claim(folder, self._folder.name, **said)

    def _throttle(self, parts: list[Part]) -> int:
        """The most jobs of one array at a time, so that all arrays together keep to ``parallel`` if they can."""
        return max(1, self._cluster.parallel // max(1, sum(part.after is None for part in parts)))

    def _slurm_executor(self, part: Part, number: int, throttle: int) -> submitit.SlurmExecutor:
        executor = submitit.SlurmExecutor(self._folder / "jobs", max_num_timeout=10**6, python=self._python())
        parameters = self._parameters(part.shape, self._job_name(number), throttle)
        if part.after is not None and state_of(part.after) != "finished":
            parameters["dependency"] = f"afterok:{_claim(part.after)['job']}"  # a requeued job has not ended
            parameters["additional_parameters"]["kill_on_invalid_dep"] = "yes"
        executor.update_parameters(**parameters)
        return executor

    def _local_executor(self, part: Part) -> submitit.LocalExecutor:
        if part.shape.nodes * part.shape.tasks_per_node > 1:
            raise UserError(
                "expected runs of one rank for cluster=local, got more; torchrun --nproc-per-node N trains one run on "
                "several GPUs, runtime.gpus=1 on one with gradient accumulation."
            )
        python = _interpreter(self._cluster)
        executor = submitit.LocalExecutor(self._folder / "jobs", python=python)
        visible = [int(gpu) for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.isdigit()]
        visible = visible or [int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*")]
        executor.update_parameters(
            timeout_min=365 * 24 * 60, gpus_per_node=len(visible), visible_gpus=visible, setup=self._cluster.setup
        )
        return executor

    # -- the batch script -----------------------------------------------------------------

    def _python(self) -> str:
        words = [self._cluster.container, _DEAF, _interpreter(self._cluster)]
        return " ".join(word for word in words if word)

    def _parameters(self, shape: Shape, job_name: str, throttle: int) -> dict:
        c = self._cluster
        given = {
            "job_name": job_name,
            "time": c.timeout_minutes,
            "signal_delay_s": c.signal_seconds,
            "nodes": shape.nodes,
            "ntasks_per_node": shape.tasks_per_node,
            "cpus_per_task": shape.cpus_per_task,
            "gpus_per_node": shape.gpus_per_node or None,
            "mem": None if c.memory_gb is None else f"{round(1024 * c.memory_gb)}M",
            "array_parallelism": throttle,
            "setup": self._setup(),
            "teardown": _teardown(c.max_requeues, self._folder, c.exclude),
            "stderr_to_stdout": True,
            # Without the first, srun gives each task one core; with the second a rank that ends would end the others.
            "srun_args": [f"--cpus-per-task={shape.cpus_per_task}", "--kill-on-bad-exit=0"],
            "additional_parameters": {
                "requeue": True,
                **({"reservation": c.reservation} if c.reservation else {}),
                **c.extra,
            },
        }
        words = ("partition", "account", "qos", "constraint", "exclude")
        given |= {key: getattr(c, key) for key in words}
        # Sites that use workload keys have keys of their own; submitit's default is none of them.
        return {key: value for key, value in given.items() if value is not None} | {"wckey": None}

    def _setup(self) -> list[str]:
        code, jobs = shlex.quote(str(self._folder / "code")), shlex.quote(str(self._folder / "jobs"))
        return [
            "trap '' USR2 TERM",
            # What an attempt that was killed while submitit was saving has left would stop the next one.
            f'rm -f {jobs}/"{_ME}"_*.save_tmp',
            *self._cluster.setup,
            "set +e",
            f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        ]

    def sbatch_text(self, part: Part, folder: Path) -> str:
        """The batch script as it would be submitted from ``folder``."""
        self._folder = folder
        parameters = self._parameters(part.shape, self._job_name(0), self._cluster.parallel)
        command = f"{self._python()} -u -m submitit.core._submit {shlex.quote(str(folder / 'jobs'))}"
        count = {"map_count": len(part.jobs)} if len(part.jobs) > 1 else {}
        return _make_sbatch_string(command, folder / "jobs", **parameters, **count)

    def _options(self, parts: list[Part]) -> list[str]:
        """What ``sbatch --test-only`` is asked."""
        if self._cluster.scheduler is Scheduler.local:
            return []
        text = self.sbatch_text(parts[0], Path("submission"))
        options = re.findall(r"^#SBATCH (--.*)$", text, re.MULTILINE)
        skip = ("--array", "--output", "--error", "--open-mode", "--job-name")
        return [shlex.split(option)[0] for option in options if not option.startswith(skip)]


def _claim(folder: Path) -> dict:
    path = ledger.newest_claim(folder)
    return {} if path is None else read_json(path)


def _teardown(budget: int, folder: Path, excluded: str | None) -> list[str]:
    """Shell lines after the job's processes have ended: ask for a requeue where that is wanted.

    Exit code 75 is the job's own wish; above 128 a signal has ended its process. Slurm may
    have requeued the job itself meanwhile (then its count of restarts has grown), or a person
    may have cancelled it; else the request is repeated until the controller takes it. Nodes
    that were found faulty are excluded besides those that the profile excludes. A job that
    ended before its own process began (no interpreter, no container, no shared folder on this
    node) is tried on other nodes, a few times.

    All requests name one element of the array; see ``place.job_id``.
    """
    before = shlex.quote(f"{excluded},") if excluded else ""
    here = shlex.quote(str(folder))
    exclude = f'{here}/"exclude-$me"'
    return [
        "rc=$?",
        f'me="{_ME}" started=${{SLURM_RESTART_COUNT:-0}} again=no',
        f'if [ "$rc" -eq 75 ] || [ "$rc" -gt 128 ] && [ "$started" -lt {budget} ]; then again=yes; fi',
        f'if [ "$rc" -ne 0 ] && [ ! -e {here}/started/"$me-$started" ]; then  # the job did not even begin',
        f'  echo "$SLURMD_NODENAME" >> {exclude}',
        f'  again=no; if [ "$started" -lt {min(budget, _STILLBORN)} ]; then again=yes; fi',
        "fi",
        'if [ "$again" = yes ]; then',
        "  for try in $(seq 240); do",
        '    job=$(scontrol show job --oneliner "$me" 2>/dev/null)',
        '    if [ -z "$job" ]; then sleep 5; continue; fi',
        '    case "$job" in *JobState=CANCELLED*) break ;; esac',
        """    restarts=$(printf '%s' "$job" | sed -n 's/.* Restarts=\\([0-9]*\\).*/\\1/p')""",
        '    [ -n "$restarts" ] && [ "$restarts" -ne "$started" ] && break',
        '    scontrol requeue "$me" && break',
        "    sleep 5",
        "  done",
        f"  if [ -s {exclude} ]; then",
        f'    scontrol update JobId="$me" ExcNodeList={before}"$(sort -u {exclude} | paste -sd, -)"',
        "  fi",
        "  sleep 120  # Slurm ends this script when it requeues the job",
        "fi",
        "exit $rc",
    ]


# -- the plan ---------------------------------------------------------------------------


def states_of(configs: list[Config]) -> dict[Path, str]:
    """{run folder: state}, in the order of the plan; the queue is asked as well."""
    folders = [folder_of(config) for config in configs]
    return {entry.folder: entry.state for entry in ledger.entries(folders[0].parents[1], folders=folders)}


def show_plan(experiment: str, configs: list[Config], states: dict[Path, str], cluster: Cluster) -> None:
    """What ``--submit`` would do: jobs, cost and the batch script; nothing is made."""
    folders = {folder_of(config): config for config in configs}
    wanted = {f.absolute(): c for f, c in folders.items() if states[f] in ("resumable", "missing")}
    if not wanted:
        print("--submit would submit nothing.")
        return
    submission = _Submission(experiment, cluster, os.getcwd())
    parts = submission.arranged(wanted)
    jobs = sum(len(part.jobs) for part in parts)
    where = "here, through submitit's local executor" if cluster.scheduler is Scheduler.local else "to Slurm"
    print(f"--submit would send {len(wanted)} runs in {jobs} jobs {where}, at most {cluster.parallel} at a time.")
    for part in parts:
        s = part.shape
        print(
            f"  {len(part.jobs)} x {s.nodes} node(s) with {s.tasks_per_node} task(s), {s.gpus_per_node} GPU(s) and "
            f"{s.tasks_per_node * s.cpus_per_task} core(s) each; {s.side_by_side} run(s) side by side in a job"
            + ("" if part.after is None else f"; after {part.after.parent.name}/{part.after.name}")
        )
    print(describe_cost(wanted))
    if cluster.scheduler is Scheduler.slurm:
        folder = next(iter(wanted)).parent / ledger.SUBMISSIONS / f"{experiment}-DATE"
        print("The first batch script:\n")
        print(submission.sbatch_text(parts[0], folder))


# -- small things -----------------------------------------------------------------------


@contextlib.contextmanager
def _clean_environment(code: Path | None = None) -> Iterator[None]:
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


@contextlib.contextmanager
def _without_hangup() -> Iterator[None]:
    """What is started meanwhile survives the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
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


def _interpreter(cluster: Cluster) -> str:
    """Python as a word of a shell line."""
    return shlex.quote(os.path.expanduser(cluster.python or sys.executable))


def _what_sbatch_said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sbatch: error", "sbatch: fatal"))]
    return (said or lines or [type(error).__name__])[-1]


def _table_command(experiment: str) -> str:
    return f"python analysis/tables.py --experiment {experiment}"


def _runs_flag(runs: Path) -> str:
    return "" if relative(runs) == "runs" else f" --runs {shlex.quote(relative(runs))}"
