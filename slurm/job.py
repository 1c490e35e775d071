"""What a job of a submission does: it keeps the training processes of its runs going.

A job is started by submitit with the name of its submission and its place in it, nothing
else. Every run is trained by a process of its own, ``python experiments/NAME.py --resume
FOLDER``, from the submission's snapshot of the code; this process never imports torch, so
that it is quick to start, quick to hear signals, and alive when a training process is not.

==============================  =================================================================
what happens                    what this process does
==============================  =================================================================
USR2 (time limit, preemption)   passes it on until every run has saved and left; asks for a requeue
SIGTERM (requeue, scancel)      passes it on: the runs save and go on until Slurm kills them
the time is up, no signal came  the runs leave by their deadline; asks for a requeue
a run is killed                 starts it again here; of several ranks, asks for a requeue
a run finds its node faulty     asks for a requeue without this node
a run fails in another way      records it; the other runs of the job go on
attempts without a checkpoint   records the run as failed after ``max_fruitless`` of them
this process is killed          its runs save and leave (or die); the batch script asks for a requeue
==============================  =================================================================

To ask for a requeue is to end with exit code 75; the batch script does it (``launch.py``),
since there ``scontrol`` is at hand even if this process runs in a container.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from experiments.errors import EXIT_BUSY, EXIT_TRY_AGAIN, UserError
from experiments.training.failures import LINES, record
from experiments.training.files import read_json, write_json
from experiments.training.lease import describe, highest, is_held
from experiments.training.place import job_id, node_name, place_of_this_rank, slurm_start
from experiments.training.state import start_of
from slurm import ledger
from slurm.memory import oom_kills
from slurm.queue import seconds_left
from slurm.stage import staged

_POLL = 0.1  # seconds
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)
_PATIENCE = 120.0  # seconds that a run waits for a process elsewhere that seems to train it
_MARGIN = 30.0  # seconds between the runs' deadline and the job's end
_SECONDS_TO_NOTICE = 60.0  # for a rank, that another one has gone
_LATEST_NOTICE = 90.0  # seconds by which Slurm's notice may come before its time
_NO_MEMORY = "for lack of the job's memory (more: cluster.memory_gb)"
_ELSEWHERE = ("node", "peer")  # kinds of failure that a requeue may cure


class Job:
    """What submitit pickles: where the submission is, and which of its jobs this is."""

    def __init__(self, submission: str, part: int, index: int):
        self.submission, self.part, self.index = submission, part, index

    def __call__(self) -> None:
        """Train the runs of this job; ends the process with the exit code."""
        sys.exit(Supervisor(Path(self.submission), self.part, self.index).run())

    def checkpoint(self):
        """Before this job's own handlers are in force, submitit may be told to stop: start again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class _Child:
    folder: Path
    process: subprocess.Popen
    slot: int
    attempt: Path | None
    asked_to_stop: float = 0.0  # when it was last told to
    bereaved: float = 0.0  # since when another rank of its run has failed


@dataclass
class _Outcome:
    """What became of the runs of this job so far."""

    done: list[Path] = field(default_factory=list)  # finished, failed, cancelled or somebody else's
    failed: list[Path] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)  # to be continued in the job's next start
    bad_nodes: set[str] = field(default_factory=set)


class Supervisor:
    """Keeps the runs of one job going, on one of its ranks.

    Args:
        submission: the submission's folder.
        part: which of its job arrays.
        index: which element of it.
    """

    def __init__(self, submission: Path, part: int, index: int):
        said = read_json(submission / "submission.json")
        if not said:
            raise UserError(f"expected a submission in {submission}, got a folder without submission.json.")
        self._submission, self._cluster, self._cwd = submission, said["cluster"], said["cwd"]
        self._experiment = said["experiment"]
        runs = submission.parents[1]
        self._folders = [runs / name for name in said["parts"][part]["jobs"][index]]
        self._slots = said["parts"][part]["side_by_side"]
        self._rank, self._size, _ = place_of_this_rank()
        self._start = slurm_start()
        self._told: list[int] = []
        self._stopping = False
        self._outcome = _Outcome()
        self._children: list[_Child] = []
        self._copies: dict[Path, Path] = {}
        self._end: float | None = None
        self._staging = False
        self._oom_kills = oom_kills()

    # -- the whole ----------------------------------------------------------------------

    def run(self) -> int:
        """Train what is left to train.

        Returns:
            0 all done, 1 some runs failed, 75 to be started again; always 0 of ranks other
            than the first.
        """
        with self._listening(), ExitStack() as held:
            waiting: list[Path] = []
            try:
                self._show_life()
                self._end = self._job_end()
                waiting += self._agreed_runs()
                self._say(f"{len(waiting)} of {len(self._folders)} runs to train on {node_name()}, rank {self._rank}")
                self._stage(waiting, held)
                self._supervise(waiting)
            except _StoppedError:
                self._outcome.left += waiting
            except UserError as error:
                self._give_up_here(waiting, error)
            except OSError as error:  # a shared file system that fails for a moment: start again
                self._say(f"stopped by {type(error).__name__}: {error}")
                self._end_children()
                self._outcome.left += waiting
            return self._exit_code()

    def _show_life(self) -> None:
        """For the batch script: this job came to life, so what goes wrong from here on is known here."""
        if self._start:
            path = self._submission / "started" / f"{job_id()}-{self._start['restart']}"
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def _give_up_here(self, folders: list[Path], error: UserError, attempt: Path | None = None) -> None:
        """The data cannot be had on this node, or the ranks did not find each other: other nodes may do."""
        for folder in folders:
            if error.kind == "data" and not self._start:
                self._fail(folder, "data", str(error))
            elif self._rank > 0:
                with suppress(OSError):  # for the first rank to read
                    record(folder, "node", str(error))
            else:
                with suppress(OSError, UserError):
                    ledger.end_attempt(attempt or ledger.begin_attempt(folder, **self._said()), "node", str(error))
                if not self._is_fruitless(folder):
                    self._outcome.left.append(folder)
                    self._outcome.bad_nodes.add(node_name())

    def _end_children(self) -> None:
        """Let every run save and leave, and continue it in the job's next start."""
        for child in self._children:
            with suppress(OSError, subprocess.TimeoutExpired):
                child.process.send_signal(signal.SIGUSR2)
                child.process.wait(_MARGIN)
            self._outcome.left.append(child.folder)

    def _supervise(self, waiting: list[Path]) -> None:
        while waiting or self._children:
            self._stopping |= self._time_is_up()
            if self._stopping:
                self._outcome.left += waiting
                waiting.clear()
            while len(self._children) < self._slots and (folder := self._next(waiting)) is not None:
                waiting.remove(folder)
                self._begin(folder)
            self._heed_signals()
            for child in [child for child in self._children if child.process.poll() is not None]:
                self._children.remove(child)
                if self._after(child):
                    waiting.append(child.folder)
            time.sleep(_POLL)

    def _next(self, waiting: list[Path]) -> Path | None:
        """The first run that does not start from another one which this job has yet to train."""
        before = {folder.absolute() for folder in [*waiting, *(child.folder for child in self._children)]}
        return next((folder for folder in waiting if _start_of(folder) not in before), None)

    def _exit_code(self) -> int:
        outcome = self._outcome
        if self._rank > 0:
            return 0  # the first rank speaks for all
        left = [folder for folder in outcome.left if not self._is_cancelled(folder)]
        budget = self._cluster["max_requeues"]
        if left and self._start and self._start["restart"] >= budget:
            for folder in left:
                self._fail(folder, "requeues", f"the budget of {budget} requeues is used up; retry gives it a new one")
            left = []
        if left and outcome.bad_nodes and self._start:
            with suppress(OSError), open(self._submission / f"exclude-{job_id()}", "a") as file:
                file.writelines(f"{node}\n" for node in sorted(outcome.bad_nodes))
        finished = sum(map(_is_finished, self._folders))
        self._say(f"{finished} of {len(self._folders)} runs finished, {len(outcome.failed)} failed, {len(left)} left")
        if left:
            return EXIT_TRY_AGAIN
        return 1 if outcome.failed else 0

    # -- which runs ---------------------------------------------------------------------

    def _agreed_runs(self) -> list[Path]:
        """The runs to train; the first rank decides, the others read what it wrote."""
        if self._size == 1:
            return self._runs_to_train()
        step = f"{self._start.get('job', 'here')}-{self._start.get('restart', 0)}"
        path = self._submission / "ranks" / f"{step}.json"
        if self._rank == 0:
            runs = self._runs_to_train()
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"runs": [str(run) for run in runs]})
            except OSError as error:
                for folder in runs:
                    self._fail(folder, "disk", str(error))
                return []
            return runs
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            said = read_json(path)
            if said:
                return [Path(run) for run in said["runs"]]
            time.sleep(0.2)
        raise UserError(f"expected the first rank to write {path} within {_PATIENCE:.0f} s; is this folder shared?")

    def _runs_to_train(self) -> list[Path]:
        runs = []
        for folder in self._folders:
            if _is_finished(folder):
                self._release(folder, "finished")
            elif not ledger.is_claimed_by(folder, self._submission.name):
                self._say(f"{folder.name}: not ours any more")
            elif self._is_cancelled(folder):
                self._release(folder, "cancelled")
            elif self._is_fruitless(folder):
                continue
            else:
                runs.append(folder)
        return runs

    def _is_fruitless(self, folder: Path) -> bool:
        """Whether enough attempts were in vain; records the run as failed then."""
        count = ledger.fruitless(folder, self._submission.name)
        if count < self._cluster["max_fruitless"]:
            return False
        last = ledger.attempts(folder)[-1]
        how = last.get("reason") or "cut off without a word (the node or the whole job was killed)"
        where = f"after step {ledger.last_step(folder)}"
        kind = "out-of-memory" if how.endswith(_NO_MEMORY) else "no-progress"
        self._fail(folder, kind, f"{count} attempts in a row wrote no checkpoint {where}; the last one: {how}")
        return True

    def _is_cancelled(self, folder: Path) -> bool:
        return os.path.exists(folder / "cancelled")  # which, unlike Path.exists, forgives a file system that fails

    # -- one run ------------------------------------------------------------------------

    def _begin(self, folder: Path) -> None:
        taken = {child.slot for child in self._children}
        slot = next(slot for slot in range(self._slots) if slot not in taken)
        attempt = None
        if self._rank == 0:
            try:
                attempt = ledger.begin_attempt(folder, **self._said())
                (folder / "failure.json").unlink(missing_ok=True)  # an earlier start's
                output = open(folder / "output.txt", "ab")  # noqa: SIM115
            except (UserError, OSError) as error:  # this run's trouble alone
                self._fail(folder, "disk", str(error))
                return
            self._say(f"{folder.name}: started at step {ledger.last_step(folder)}")
        else:
            output = open(os.devnull, "ab")  # noqa: SIM115
        try:
            with output:
                process = subprocess.Popen(
                    self._command(folder),
                    cwd=self._cwd,
                    env=self._environment(slot),
                    stdout=output if self._rank == 0 else None,
                    stderr=subprocess.STDOUT if self._rank == 0 else None,
                    preexec_fn=_deaf_until_ready,
                )
        except OSError as error:  # the folder it is started from, or the interpreter, is not on this node
            reason = f"{error.strerror}: {error.filename}; is this folder shared with {node_name()}?"
            self._give_up_here([folder], UserError(reason, "node"), attempt)
            return
        self._children.append(_Child(folder, process, slot, attempt))

    def _said(self) -> dict:
        """Where this is, for the note of an attempt."""
        start = self._start | {"job": job_id()} if self._start else {}
        return start | {"node": node_name(), "submission": self._submission.name}

    def _command(self, folder: Path) -> list[str]:
        script = self._submission / "code" / "experiments" / f"{self._experiment}.py"
        settings = {"progress": "false", "patience_seconds": _PATIENCE}
        if self._start:
            settings["on_term"] = "save"
        if self._end is not None:
            settings["deadline_at"] = round(time.time() + self._end - _MARGIN - time.monotonic(), 1)
        if folder in self._copies:
            settings["data_copy"] = f"'{self._copies[folder]}'"
        return [
            *(sys.executable, str(script), "--resume", str(folder)),
            *(f"runtime.{key}={value}" for key, value in settings.items()),
        ]

    def _environment(self, slot: int) -> dict[str, str]:
        """For a process of its own: one GPU of those that the job has, and its share of the cores."""
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self._slots))} | os.environ
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if gpus and self._size == 1 and self._slots > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return environment

    def _after(self, child: _Child) -> bool:
        """Judge by the run folder how a process ended; whether the run is to be started again here."""
        folder, code = child.folder, child.process.returncode
        if self._rank > 0:
            if code < 0 and not self._stopping:  # else it has written what it knows itself
                with suppress(OSError):
                    record(folder, "peer", f"rank {self._rank} was killed by {_signal_name(-code)} on {node_name()}")
            return False
        failure = read_json(folder / "failure.json")
        if _is_finished(folder):
            return self._note(child, "finished")
        if self._is_cancelled(folder):
            return self._note(child, "cancelled", "by a person")
        if code == EXIT_TRY_AGAIN:
            self._stopping = True  # told to by a signal, or by the deadline that holds for all
            self._outcome.left.append(folder)
            return self._note(child, self._why_stopped(), _last_line(folder), release=False)
        if code == EXIT_BUSY or (code > 0 and is_held(folder)):  # a newer copy of this job trains it
            holder = read_json(highest(folder / "lease")[1] or folder)
            return self._note(child, "busy", f"trained by {describe(holder)}", release=False)
        if failure.get("kind") in _ELSEWHERE:
            return self._try_elsewhere(child, failure)
        if code < 0:
            return self._try_again(child, f"killed by {_signal_name(-code)}")
        if not failure:
            lines = _tail(folder / "output.txt", LINES)
            failure = {"kind": "code", "reason": f"exit code {code}: {lines[-1] if lines else 'no output'}"}
            with suppress(OSError):
                record(folder, **failure, lines=lines)
        self._outcome.failed.append(folder)
        return self._note(child, "failed", f"{failure['kind']}: {failure['reason']}")

    def _why_stopped(self) -> str:
        """Timed out near the job's end, else preempted; without such an end just stopped."""
        if self._end is None:
            return "stopped"
        notice = self._cluster["signal_seconds"] + _LATEST_NOTICE
        return "timed out" if self._end - time.monotonic() < notice else "preempted"

    def _note(self, child: _Child, outcome: str, reason: str = "", release: bool = True) -> bool:
        with suppress(OSError):  # what cannot be noted shall stop no other run
            ledger.end_attempt(child.attempt, outcome, reason)
        if release:
            self._release(child.folder, outcome)
        self._say(f"{child.folder.name}: {outcome}{': ' if reason else ''}{reason}")
        return False

    def _try_again(self, child: _Child, reason: str) -> bool:
        if -child.process.returncode == signal.SIGKILL:
            kills = oom_kills()
            reason += f" {_NO_MEMORY}" if kills > self._oom_kills else " (kill -9, or the machine ran out of memory)"
            self._oom_kills = kills
        self._note(child, "killed", reason, release=False)
        if self._is_fruitless(child.folder):
            return False
        if self._size > 1 or self._stopping:
            self._outcome.left.append(child.folder)
            return False
        return True

    def _try_elsewhere(self, child: _Child, failure: dict) -> bool:
        reason = f"{failure['kind']}: {failure['reason']}"
        if not self._start:  # there is no elsewhere
            self._outcome.failed.append(child.folder)
            return self._note(child, "failed", reason)
        with suppress(OSError):
            (child.folder / "failure.json").unlink(missing_ok=True)
        self._note(child, "node", reason, release=False)
        if not self._is_fruitless(child.folder):
            self._outcome.left.append(child.folder)
            if failure["kind"] == "node":
                self._outcome.bad_nodes.add(failure.get("host") or node_name())
        return False

    def _fail(self, folder: Path, kind: str, reason: str) -> None:
        if self._rank == 0:
            with suppress(OSError):
                record(folder, kind, reason)
            self._outcome.failed.append(folder)
            self._release(folder, "failed")
            self._say(f"{folder.name}: failed: {kind}: {reason}")

    def _release(self, folder: Path, reason: str) -> None:
        with suppress(OSError):
            ledger.release(folder, self._submission.name, reason)

    # -- time and signals ---------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        signals = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)
        before = {number: signal.signal(number, self._hear) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():  # those of submitit would requeue the job themselves
                signal.signal(number, signal.SIG_IGN if self._start else handler)

    def _hear(self, number: int, _frame: object) -> None:
        self._told.append(number)
        if self._staging and number == signal.SIGUSR2:
            self._staging = False
            raise _StoppedError

    def _heed_signals(self) -> None:
        told, self._told = self._told, []
        if signal.SIGUSR2 in told or (signal.SIGTERM in told and not self._start):
            self._stopping = True
        for child in self._children:
            if signal.SIGTERM in told:
                child.process.send_signal(signal.SIGTERM)
            stop = self._stopping or (self._rank == 0 and self._is_cancelled(child.folder))
            if self._rank == 0 and self._size > 1:
                self._end_if_bereaved(child)
            # Again and again: a process that is still starting hears nothing.
            if stop and time.monotonic() - child.asked_to_stop > 1.0:
                child.asked_to_stop = time.monotonic()
                child.process.send_signal(signal.SIGUSR2)

    def _end_if_bereaved(self, child: _Child) -> None:
        """End a training process that goes on waiting for a rank which is gone, as NCCL's may for long."""
        if not os.path.exists(child.folder / "failure.json"):
            return
        child.bereaved = child.bereaved or time.monotonic()
        if time.monotonic() - child.bereaved > _SECONDS_TO_NOTICE:
            child.process.kill()

    def _job_end(self) -> float | None:
        """When Slurm will end this job, on the monotonic clock."""
        if not self._start:
            return None
        left = seconds_left(job_id())
        return time.monotonic() + (60 * self._cluster["timeout_minutes"] if left is None else left)

    def _time_is_up(self) -> bool:
        return self._end is not None and time.monotonic() > self._end - _MARGIN

    # -- data ---------------------------------------------------------------------------

    def _stage(self, folders: list[Path], held: ExitStack) -> None:
        """Copy the data to this node's disk, if the profile says so."""
        if self._cluster["stage_to"] is None:
            return
        local = _expanded(self._cluster["stage_to"])
        copies: dict[Path, Path] = {}
        self._staging = True
        try:
            if signal.SIGUSR2 in self._told:
                raise _StoppedError
            for folder in folders:
                source = self._source(folder)
                if source is None:
                    continue
                if source not in copies:
                    copies[source] = held.enter_context(
                        staged(source, local, self._cluster["stage_keep_hours"], report=self._say)
                    )
                self._copies[folder] = copies[source]
        finally:
            self._staging = False

    def _source(self, folder: Path) -> Path | None:
        """What to copy for a run; small data sets in ``data_dir`` are read once and stay where they are."""
        if self._cluster["stage_from"] is not None:
            return _expanded(self._cluster["stage_from"])
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            root, data_dir = config["data"].get("root"), config["runtime"]["data_dir"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return None  # the run itself will say what is wrong
        return None if root is None or root == data_dir else Path(self._cwd, root)

    def _say(self, sentence: str) -> None:
        with suppress(OSError):  # the log may be on a full disk
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}", flush=True)


class _StoppedError(Exception):
    """Told to stop while nothing was running yet."""


def _deaf_until_ready() -> None:
    """In a new process: no signal ends it before its own handlers are there; USR2 when this process is gone."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGUSR2)


def _start_of(folder: Path) -> Path | None:
    try:
        return start_of(folder, yaml.safe_load((folder / "config.yaml").read_text()).get("start_from"))
    except (OSError, yaml.YAMLError, AttributeError):
        return None  # the run itself will say what is wrong


def _is_finished(folder: Path) -> bool:
    return os.path.exists(folder / "result.json")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _tail(path: Path, lines: int) -> list[str]:
    try:
        return path.read_text(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return []


def _last_line(folder: Path) -> str:
    return next(iter(_tail(folder / "output.txt", 1)), "")
