"""Slurm's queue as it is now: this user's jobs, partitions and limits, through Slurm's own commands.

The standard library only, so that asking is quick. Answers are None where there is no Slurm or
its controller does not answer: then nothing is known, which is not the same as an empty queue.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from runfolder.errors import UserError

_COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_FIELD, _RECORD = "\x1f", "\x1e"  # no name of a job or node has these
# Width 0 means as wide as needed, which Slurm without suffixes of fields does not know.
_COLUMNS = ("JobArrayID", "State", "Reason", "NodeList", "RestartCnt", "TimeUsed", "Name")
_COLUMNS_OF_OLD = ("%i", "%T", "%r", "%N", "", "%M", "%j")
_CHUNK = 200  # jobs per command line


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, or one element of a job array."""

    id: str  # 12, or 12_3 for an element of an array
    name: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits: Priority, Resources, BeginTime, ...; "" while it runs
    nodes: str
    restarts: int | None  # None: this Slurm does not say
    seconds: int | None  # since it last started; 0 before


@dataclass(frozen=True)
class Partition:
    """A part of the cluster that jobs are sent to."""

    name: str
    default: bool
    up: bool
    max_minutes: int | None  # None: no limit


def missing_commands() -> list[str]:
    """The commands that submitting and watching need and that are not there."""
    return [name for name in _COMMANDS if shutil.which(name) is None]


def answers(timeout: float = 30.0) -> bool:
    """Whether a controller of the cluster is up."""
    return "is UP" in (_output(["scontrol", "ping"], timeout) or "")


def jobs(timeout: float = 10.0, users: Iterable[int] = ()) -> list[QueuedJob] | None:
    """Jobs that have not ended, elements of arrays one by one: this user's, and those of other users.

    Args:
        timeout: seconds to wait for the controller.
        users: further users, by number.

    Returns:
        None where there is no Slurm or the controller does not answer.
    """
    whose = ",".join(map(str, sorted({os.geteuid(), *users})))
    ask = ["squeue", "--noheader", "--array", "--all", f"--user={whose}"]
    columns = ",".join(f"{name}:0{_FIELD}" for name in _COLUMNS)
    text = _output([*ask, f"--Format={columns}{_RECORD}"], timeout)
    found = None if text is None else _parsed(text, _FIELD + _RECORD)
    if found is None and text is not None:
        text = _output([*ask, f"--format={_FIELD.join(_COLUMNS_OF_OLD)}{_RECORD}"], timeout)
        found = None if text is None else _parsed(text, _RECORD)
    return found


def _parsed(text: str, end: str) -> list[QueuedJob] | None:
    """One job per record; None if the text has another form."""
    found = []
    for record in text.split(f"{end}\n")[:-1]:
        values = record.split(_FIELD)
        if len(values) != len(_COLUMNS):
            return None
        job, state, reason, nodes, restarts, used, name = values
        reason, restarts = "" if reason == "None" else reason, int(restarts) if restarts.isdecimal() else None
        found.append(QueuedJob(job, name, state, reason, nodes, restarts, _seconds_of(used)))
    return found if found or not text.strip() else None


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs and elements of arrays; one that has ended is no error.

    Raises:
        UserError: not a job's id, or Slurm refuses; the other jobs are cancelled all the same.
    """
    jobs = list(jobs)
    for job in jobs:
        if not re.fullmatch(r"\d+(_\d+|_\[[\d,%-]+\])?", job):
            raise UserError(f"expected the id of a job such as 12 or 12_3, got {job!r}.")
    refused = []
    for start in range(0, len(jobs), _CHUNK):
        try:
            done = _run(["scancel", "--quiet", *jobs[start : start + _CHUNK]], timeout=60.0)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"expected scancel to cancel {len(jobs)} jobs, got: {error}; try again.") from None
        if done.returncode:
            refused += done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(f"expected Slurm to cancel {len(jobs)} jobs, got: {refused[0]}{more}.")


def max_array_size() -> int | None:
    """The most elements that a job array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output(["scontrol", "show", "config"], 30.0) or "", re.MULTILINE)
    return int(found[1]) if found else None


def partitions() -> dict[str, Partition] | None:
    """All partitions by name."""
    text = _output(["scontrol", "show", "partition", "--all", "--oneliner"], 30.0)
    if text is None:
        return None
    found = {}
    for line in filter(None, text.splitlines()):
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = values["PartitionName"]
        limit = minutes_of(values.get("MaxTime", "UNLIMITED"))
        found[name] = Partition(name, values.get("Default") == "YES", values.get("State") == "UP", limit)
    return found


def nodes_out_of_service(partition: str | None = None) -> tuple[int, int] | None:
    """How many nodes take no jobs now (down, drained, in maintenance), and how many there are."""
    where = "--all" if partition is None else f"--partition={partition}"
    text = _output(["sinfo", "--noheader", "--Node", where, "--format=%N %t"], 30.0)
    if text is None:
        return None
    states = dict(line.split() for line in text.splitlines() if line.strip())
    out = [s for s in states.values() if s.endswith("*") or s.startswith(("down", "dr", "fail", "maint", "unk"))]
    return len(out), len(states)


def accounts() -> list[str]:
    """The accounts of this user; none where there is no accounting or it does not answer."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return []
    ask = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account"]
    return sorted(set((_output(ask, 10.0) or "").split()))


def minutes_of(text: str) -> int | None:
    """Whole minutes of Slurm's [[DAYS-]HOURS:]MINUTES:SECONDS; None for no limit."""
    seconds = _seconds_of(text)
    return None if seconds is None else seconds // 60


def _seconds_of(text: str) -> int | None:
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _output(command: list[str], timeout: float) -> str | None:
    """What a command prints; None if it is missing, fails or takes too long."""
    try:
        done = _run(command, timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    # A person's SQUEUE_STATES or SCANCEL_INTERACTIVE would change what is asked and answered.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SCANCEL_", "SINFO_"))}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
    )


def seconds_left(job: str) -> int | None:
    """Seconds until Slurm ends this running job; None where there is no limit or no answer."""
    return _seconds_of((_output(["squeue", "--noheader", f"--jobs={job}", "--format=%L"], 30.0) or "").strip())
