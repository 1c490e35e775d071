"""Before anything is queued: what would make every job fail, found on the login node in seconds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from experiments.config import Config, build
from runfolder.errors import UserError, nearest
from slurm import queue
from slurm.profile import ROOT, Cluster, Scheduler

_PATIENCE = 120.0  # seconds for the import of the code
_IMPORT = "import experiments.training.run, submitit"
_SETUP_FAILED = "tract: setup line"
# What Slurm's refusals mention, and the keys to look at, the first that fits.
_CURES = {
    "policy": "cluster.qos or the size of the jobs",
    "account": "cluster.account",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "feature": "cluster.constraint",
    "reservation": "cluster.reservation",
    "node name": "cluster.exclude",
    "time": "cluster.timeout_minutes",
    "node|memory|cpu|task|generic resource|gres": "cluster.nodes, gpus_per_node, memory_gb, cpus_per_task or "
    "cpus_without_gpu",
    "": "cluster.extra",
}
_PERHAPS_LATER = re.compile("node configuration|node not available|nodes are busy|nodes required", re.IGNORECASE)


def check(cluster: Cluster, runs: Path, configs: list[Config], options: list[str], code: Path = ROOT) -> list[str]:
    """Try all that a job will need. Makes the runs' folder and downloads data sets, and nothing else.

    Args:
        cluster: where the jobs will run.
        runs: the folder of all runs.
        configs: the runs, for their data sets.
        options: sbatch's options of a job.
        code: the folder that jobs will run in.

    Returns:
        Sentences on what is not wrong but worth knowing.

    Raises:
        UserError: the first thing that is wrong, with its cure.
    """
    notes = []
    if cluster.scheduler is Scheduler.slurm:
        _check_commands()
        notes += _check_partitions(cluster)
        notes += _check_request(cluster, options)
    notes += _check_runs(runs, cluster)
    notes += _check_staging(cluster)
    notes += _check_code(cluster, code)
    if cluster.stage_from is None:  # else the runs read what is staged from there
        for config in {(c.data["_target_"], c.data.get("root")): c for c in configs}.values():
            build(config.data).fetch()  # now, since compute nodes may have no network
    return notes


def doubts(cluster: Cluster, options: list[str]) -> list[str]:
    """What :func:`check` would say of the request, where Slurm can be asked; makes nothing."""
    if cluster.scheduler is not Scheduler.slurm or queue.missing_commands() or not queue.answers():
        return []
    try:
        return [*_check_partitions(cluster), *_check_request(cluster, options)]
    except UserError as error:
        return [f"--submit would refuse this now: {error}"]


def _check_commands() -> None:
    if absent := queue.missing_commands():
        raise UserError(
            f"expected Slurm's commands, found no {', '.join(absent)}; log in to the cluster, or give cluster=local."
        )
    if not queue.answers():
        raise UserError(
            "expected a Slurm controller that answers `scontrol ping`, got none; try again later, "
            "or give cluster=local."
        )


def _check_partitions(cluster: Cluster) -> list[str]:
    known = queue.partitions()
    if known is None:
        raise UserError("expected Slurm to list its partitions (`scontrol show partition`), got nothing; try again.")
    default = next((name for name, partition in known.items() if partition.default), None)
    chosen = cluster.partition or default
    if chosen is None:
        raise UserError(
            f"expected cluster.partition=NAME, since this cluster has no default, got null; {nearest('', known)}."
        )
    wanted = chosen.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"unknown partition cluster.partition={name}; {nearest(name, known)}.")
        if not known[name].up:
            up = [other for other, partition in known.items() if partition.up]
            raise UserError(f"expected partition {name} to be up, got one that starts no jobs; {nearest(name, up)}.")
    limits = [known[name].max_minutes for name in wanted]
    longest = None if None in limits else max(limits)
    if longest is None or cluster.timeout_minutes <= longest:
        return []
    if cluster.qos is not None:  # some let jobs run longer than their partition
        return [f"cluster.timeout_minutes={cluster.timeout_minutes} is above the {longest} of partition {chosen}."]
    raise UserError(
        f"expected cluster.timeout_minutes to be at most the {longest} of partition {chosen}, "
        f"got {cluster.timeout_minutes}; longer runs continue in the next job."
    )


def _check_request(cluster: Cluster, options: list[str]) -> list[str]:
    """Let Slurm judge a job that is not submitted."""
    command = ["sbatch", "--test-only", *options, "--wrap", "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60.0
        )
    except subprocess.TimeoutExpired:
        return ["sbatch --test-only took more than a minute, so Slurm has not been asked whether it takes the jobs."]
    accounts = queue.accounts() if cluster.account else []
    if done.returncode == 0:
        if accounts and cluster.account not in accounts:
            return [
                f"cluster.account={cluster.account} is not among your accounts; {nearest(cluster.account, accounts)}."
            ]
        return []
    lines = [re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line) for line in done.stderr.splitlines()]
    words = "; ".join(dict.fromkeys(line.rstrip(".") for line in lines if line and "--help" not in line))
    out, nodes = queue.nodes_out_of_service(cluster.partition) or (0, 0)
    if out and _PERHAPS_LATER.search(words):
        return [f"Slurm cannot start such jobs now ({words}); {out} of {nodes} nodes are out of service."]
    cure = next(keys for pattern, keys in _CURES.items() if re.search(pattern, words, re.IGNORECASE))
    close = f" ({nearest(cluster.account, accounts)})" if cure == "cluster.account" and accounts else ""
    raise UserError(
        f"expected jobs that Slurm takes, got: {words or f'exit code {done.returncode}'} "
        f"(from `sbatch --test-only {shlex.join(options)}`); change {cure}{close}."
    )


def _check_runs(runs: Path, cluster: Cluster) -> list[str]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs, prefix=".preflight-") as file:
            file.write(b"room for a byte")
            file.flush()
    except OSError as error:
        raise UserError(
            f"expected a folder for runs that can be written, got {runs}: {error.strerror}; give runtime.runs=DIR."
        ) from None
    free = shutil.disk_usage(runs).free / 2**30
    if free < cluster.free_gib:
        raise UserError(
            f"expected cluster.free_gib={cluster.free_gib:g} GiB free below {runs}, got {free:.1f}; "
            "make room, give runtime.runs=DIR, or ask for less."
        )
    if cluster.scheduler is Scheduler.slurm and _only_here(runs.resolve()):
        return [
            f"{runs} seems to be on this machine alone; jobs on other nodes need runtime.runs=DIR on a shared disk."
        ]
    return []


def _only_here(folder: Path) -> bool:
    """Whether other nodes cannot see a folder: it is in memory, or temporary."""
    if folder.is_relative_to("/tmp"):
        return True
    kinds = {}
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, kind = line.split(" - ", 1)
            place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4])
            if folder.is_relative_to(place):
                kinds[place] = kind.split()[0]
    return bool(kinds) and kinds[max(kinds, key=len)] in ("tmpfs", "ramfs", "devtmpfs")


def _check_staging(cluster: Cluster) -> list[str]:
    if cluster.stage_from is None:
        return []
    source = os.path.expanduser(os.path.expandvars(cluster.stage_from))
    if "$" in source:
        return [
            f"cluster.stage_from={cluster.stage_from} has a variable that is not set here, so it was not looked at."
        ]
    if not Path(source).exists():
        raise UserError(f"expected data in cluster.stage_from={cluster.stage_from}, got no such file or folder.")
    return []


def _check_code(cluster: Cluster, code: Path) -> list[str]:
    """Import what a job imports, in the shell, container and interpreter of a job."""
    python = shlex.quote(os.path.expanduser(cluster.python or sys.executable))
    start = f"{cluster.container} {python}".strip()
    parts = [
        f'{line}\n_code=$?; [ $_code -eq 0 ] || {{ echo "{_SETUP_FAILED} {number} $_code" >&2; exit 1; }}'
        for number, line in enumerate(cluster.setup)
    ]
    path = f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    # Elsewhere than in the code, whose folder would be searched without PYTHONPATH.
    status, errors = _shell("\n".join([*parts, "set +e", path, "cd /", f"{start} -c {shlex.quote(_IMPORT)}"]))
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    if status == 0:
        return []
    if status is None:
        raise UserError(
            f"expected `{start}` to import the code within {_PATIENCE:g} s, got no end; "
            "look at cluster.setup and cluster.container."
        )
    if lines and lines[-1].startswith(_SETUP_FAILED):
        number, reason = lines[-1].removeprefix(_SETUP_FAILED).split()
        words = f": {lines[-2].strip()}" if len(lines) > 1 else ""
        raise UserError(
            f"expected each line of cluster.setup to succeed, got exit code {reason} from "
            f"`{cluster.setup[int(number)]}`{words}; correct it, or append `|| true`."
        )
    last = lines[-1].strip() if lines else f"exit code {status}"
    if status == 127 and cluster.container:  # some clusters have containers on the compute nodes only
        return [f"`{start}` could not be tried here ({last})."]
    raise UserError(
        f"expected `{start}` to import the code in {code}, got: {last}; change cluster.setup, cluster.container or "
        "cluster.python, or install the requirements there."
    )


def _shell(script: str) -> tuple[int | None, str]:
    """Exit code and errors of a script; None if it took too long."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:  # a pipe may be held open
        process = subprocess.Popen(
            ["bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            status = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the script left running
        process.wait()
        errors.seek(0)
        return status, errors.read()
