"""What keeps the training processes of some runs going: the job of a cluster, or ``--local`` at a terminal.

Every run is trained by a process of its own, ``python experiments/NAME.py --resume FOLDER``.
This one never imports torch, so that it is quick to start, quick to hear signals, and alive
when a training process is not.

==============================  =================================================================
what happens                    what this process does
==============================  =================================================================
USR2 (time limit, preemption)   passes it on until every run has saved and left; asks for a requeue
a rank leaves before it trains  ends this rank's process, which waits for it; asks for a requeue
SIGTERM (requeue, scancel)      passes it on: the runs save and go on until Slurm kills them
the time is up, no signal came  the runs leave by their deadline; asks for a requeue
a run is killed                 starts it again here; of several ranks, asks for a requeue
a run finds its node faulty     asks for a requeue without this node
a run fails in another way      records it; the other runs of the job go on
attempts without a checkpoint   records the run as failed after ``max_fruitless`` of them
this process is killed          its runs save and leave (or die); the batch script asks for a requeue
==============================  =================================================================

To ask for a requeue is to end with exit code 75; the batch script does it (``requeue.sh``),
since there ``scontrol`` is at hand even if this process runs in a container. Outside Slurm
nobody does: SIGTERM, SIGHUP and Ctrl-C then stop the runs as USR2 does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from runfolder.errors import EXIT_TRY_AGAIN, UserError
from runfolder.failures import FailureKind, record
from runfolder.files import read_json, write_json
from runfolder.folder import RunFolder
from runfolder.place import job_id, node_name
from runfolder.plain_yaml import read_yaml
from runfolder.states import is_cancelled, is_finished
from slurm import ledger
from slurm.children import Child, Children
from slurm.copies import Copies
from slurm.memory import oom_kills
from slurm.notices import Notices, StoppedError, signal_name
from slurm.queue import seconds_left
from slurm.submission import Submission
from slurm.verdict import Then, judge

_POLL = 0.1  # seconds
_POLL_RANKS = 1.0  # seconds, since it asks a shared disk
PATIENCE = 120.0  # seconds to wait for another process: one that seems to train the run, or the first rank
_MARGIN = 30.0  # seconds between the runs' deadline and the job's end
SECONDS_TO_NOTICE = 60.0  # for a rank, that another one has gone
_LATEST_NOTICE = 90.0  # seconds by which Slurm's notice may come before its time
_NO_MEMORY = "for lack of the job's memory (more: cluster.memory_gb)"


@dataclass(frozen=True)
class Place:
    """Which process of which job this is."""

    job_start: dict = field(default_factory=dict)  # Slurm's job and how often it was started again; {} without Slurm
    rank: int = 0
    ranks: int = 1


class Log:
    """What a supervisor says, each event with its time."""

    def say(self, sentence: str) -> None:
        """One line."""
        with suppress(OSError):  # the log may be on a full disk
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}", flush=True)

    def note(self, sentence: str) -> None:
        """One line that only a log needs."""
        self.say(sentence)

    def started(self, folder: RunFolder) -> None:
        """An attempt begins."""
        self.note(f"{folder.name}: started at step {folder.last_step()}")

    def ended(self, folder: RunFolder, outcome: str, reason: str) -> None:
        """An attempt has ended, or the run is not going to be trained."""
        self.say(f"{folder.name}: {outcome}{': ' if reason else ''}{reason}")


class Supervisor:
    """Keeps the runs of one job going, on one of its ranks.

    Args:
        submission: what it is a job of.
        part: which of its job arrays.
        index: which element of it.
        notices: the signals that this process gets.
        place: where it is.
        code: the folder whose ``experiments/`` are started.
        log: where it says what happens.
        settings: further ``runtime`` settings of every run.
    """

    def __init__(
        self,
        submission: Submission,
        part: int,
        index: int,
        notices: Notices,
        place: Place,
        code: Path,
        log: Log | None = None,
        settings: dict[str, object] | None = None,
    ):
        self._submission, self._cluster = submission, submission.cluster
        self._folders = submission.runs(part, index)
        self._notices, self._place, self._log = notices, place, log or Log()
        self._script = code / "experiments" / f"{submission.experiment}.py"
        self._settings = {"progress": "false", **(settings or {})}
        slots = submission.parts[part].side_by_side
        self._children = Children(slots, share_gpus=place.ranks == 1, in_slurm=bool(place.job_start))
        self._copies = Copies(self._cluster, submission.cwd, self._log.say)
        self._end: float | None = None  # of the job, on the monotonic clock
        self._stopping = False
        self._waiting: list[RunFolder] = []
        self._failed: list[RunFolder] = []
        self._left: list[RunFolder] = []  # to be continued in the job's next start
        self._unstarted: list[RunFolder] = []  # those of them that this rank has not begun
        self._next_look = 0.0  # at what other ranks have left, on the monotonic clock
        self._bad_nodes: set[str] = set()
        self._oom_kills = oom_kills()

    # -- the whole ----------------------------------------------------------------------

    def run(self) -> int:
        """Train what is left to train.

        Returns:
            0 all done, 1 some runs failed, 75 to be started again; always 0 of ranks other
            than the first.
        """
        with ExitStack() as held:
            try:
                self._show_life()
                self._end = self._job_end()
                self._waiting += self._agreed_runs()
                self._stage(held)
                self._supervise()
            except StoppedError:
                self._leave_waiting()
            except UserError as error:
                self._give_up_here(self._waiting, error)
                self._unstarted += self._waiting or self._folders
            except OSError as error:  # a shared file system that fails for a moment: start again
                self._log.say(f"stopped by {type(error).__name__}: {error}")
                self._unstarted += [] if self._waiting or self._children else self._folders
                self._end_children()
                self._leave_waiting()
            self._tell_other_ranks()
            return self._exit_code()

    @property
    def _is_first(self) -> bool:
        return self._place.rank == 0

    @property
    def _in_slurm(self) -> bool:
        return bool(self._place.job_start)

    @property
    def _job_and_restart(self) -> tuple[str, int]:
        start = self._place.job_start
        return start.get("job", "here"), start.get("restart", 0)

    def _show_life(self) -> None:
        """For the batch script: this job came to life, so what goes wrong from here on is known here."""
        if self._in_slurm:
            path = self._submission.sign_of_life(job_id(), self._place.job_start["restart"])
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def _supervise(self) -> None:
        while self._waiting or self._children:
            self._stopping |= self._end is not None and time.monotonic() > self._end - _MARGIN
            if self._stopping:
                self._leave_waiting()
            while len(self._children) < self._children.slots and (folder := self._next()) is not None:
                self._waiting.remove(folder)
                self._begin(folder)
            self._heed_signals()
            for child in self._children.take_ended():
                self._settle(child)
            time.sleep(_POLL)

    def _leave_waiting(self) -> None:
        self._left += self._waiting
        self._unstarted += self._waiting
        self._waiting.clear()

    def _next(self) -> RunFolder | None:
        """The first run that does not start from another one which this job has yet to train."""
        before = {folder.absolute() for folder in [*self._waiting, *(child.folder for child in self._children)]}
        return next((folder for folder in self._waiting if _start_of(folder) not in before), None)

    def _end_children(self) -> None:
        """Let every run save and leave, and continue it in the job's next start."""
        for child in self._children:
            with suppress(OSError, subprocess.TimeoutExpired):
                child.process.send_signal(signal.SIGUSR2)
                child.process.wait(_MARGIN)
            self._left.append(child.folder)

    def _exit_code(self) -> int:
        if not self._is_first:
            return 0  # the first rank speaks for all
        left = [folder for folder in self._left if not is_cancelled(folder)]
        budget = self._cluster.max_requeues
        if left and self._in_slurm and self._place.job_start["restart"] >= budget:
            for folder in left:
                reason = f"the budget of {budget} requeues is used up; retry gives it a new one"
                self._fail(folder, FailureKind.requeues, reason)
            left = []
        if left and self._bad_nodes and self._in_slurm:
            with suppress(OSError), open(self._submission.excluded_nodes(job_id()), "a") as file:
                file.writelines(f"{node}\n" for node in sorted(self._bad_nodes))
        finished, failed = sum(map(is_finished, self._folders)), len(self._failed)
        self._log.note(f"{finished} of {len(self._folders)} runs finished, {failed} failed, {len(left)} left")
        if left:
            return EXIT_TRY_AGAIN
        return 1 if self._failed else 0

    # -- which runs ---------------------------------------------------------------------

    def _agreed_runs(self) -> list[RunFolder]:
        """The runs to train; the first rank decides, the others read what it wrote."""
        if self._place.ranks == 1:
            return self._runs_to_train()
        path = self._submission.runs_of_ranks(*self._job_and_restart)
        if self._is_first:
            runs = self._runs_to_train()
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"runs": [str(run) for run in runs]})
            except OSError as error:
                for folder in runs:
                    self._fail(folder, FailureKind.disk, str(error))
                return []
            return runs
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            written = read_json(path)
            if written:
                return [RunFolder(run) for run in written["runs"]]
            time.sleep(0.2)
        raise UserError(f"expected the first rank to write {path} within {PATIENCE:.0f} s; is this folder shared?")

    def _runs_to_train(self) -> list[RunFolder]:
        runs = []
        for folder in self._folders:
            if is_finished(folder):
                self._release(folder, "finished")
            elif not ledger.is_claimed_by(folder, self._submission.name):
                self._log.say(f"{folder.name}: not ours any more")
            elif is_cancelled(folder):
                self._release(folder, "cancelled")
            elif not self._is_fruitless(folder):
                runs.append(folder)
        return runs

    def _is_fruitless(self, folder: RunFolder) -> bool:
        """Whether enough attempts were in vain; records the run as failed then."""
        count = ledger.fruitless(folder, self._submission.name)
        if count < self._cluster.max_fruitless:
            return False
        last = ledger.attempts(folder)[-1]
        how = last.get("reason") or "cut off without a word (the node or the whole job was killed)"
        where = f"after step {folder.last_step()}"
        kind = FailureKind.out_of_memory if how.endswith(_NO_MEMORY) else FailureKind.no_progress
        self._fail(folder, kind, f"{count} attempts in a row wrote no checkpoint {where}; the last one: {how}")
        return True

    # -- one run ------------------------------------------------------------------------

    def _begin(self, folder: RunFolder) -> None:
        attempt = None
        if self._is_first:
            try:
                attempt = ledger.begin_attempt(folder, **self._whereabouts())
                folder.failure.unlink(missing_ok=True)  # an earlier attempt's
                output = open(folder.output, "ab")  # noqa: SIM115
            except (UserError, OSError) as error:  # this run's trouble alone
                self._fail(folder, FailureKind.disk, str(error))
                return
            self._log.started(folder)
        else:
            output = open(os.devnull, "ab")  # noqa: SIM115
        try:
            with output:
                self._children.start(
                    folder, self._command(folder), self._submission.cwd, output if self._is_first else None, attempt
                )
        except OSError as error:  # the folder it is started from, or the interpreter, is not on this node
            reason = f"{error.strerror}: {error.filename}; is this folder shared with {node_name()}?"
            self._give_up_here([folder], UserError(reason, FailureKind.node), attempt)

    def _whereabouts(self) -> dict:
        """For the note of an attempt."""
        start = self._place.job_start | {"job": job_id()} if self._in_slurm else {}
        return start | {"node": node_name(), "submission": self._submission.name}

    def _command(self, folder: RunFolder) -> list[str]:
        settings = dict(self._settings)
        if self._end is not None:
            settings["deadline_at"] = round(time.time() + self._end - _MARGIN - time.monotonic(), 1)
        if folder in self._copies:
            settings["data_copy"] = f"'{self._copies[folder]}'"
        return [
            *(sys.executable, str(self._script), "--resume", str(folder)),
            *(f"runtime.{key}={value}" for key, value in settings.items()),
        ]

    def _settle(self, child: Child) -> None:
        """Do about a run what follows from how its process ended."""
        code = child.process.returncode
        if not self._is_first:
            self._note_killed_rank(child.folder, code)
            return
        # A process that waited for a rank which is gone was killed by us, and has lost nothing.
        code = -signal.SIGTERM if child.left_alone and code == -signal.SIGKILL else code
        verdict = judge(child.folder, code, self._why_stopped(), self._stopping, self._in_slurm)
        reason = verdict.reason
        if code == -signal.SIGKILL and verdict.then is Then.again:
            reason += f" {self._why_killed()}"
        with suppress(OSError):  # what cannot be noted shall stop no other run
            ledger.end_attempt(child.attempt, verdict.outcome, reason)
        if verdict.then in (Then.nothing, Then.fail):
            self._release(child.folder, verdict.outcome)
        self._log.ended(child.folder, verdict.outcome, reason)
        match verdict.then:
            case Then.fail:
                self._failed.append(child.folder)
            case Then.later:
                self._stopping |= self._in_slurm  # by a signal, or by the deadline, which holds for all
                self._left.append(child.folder)
            case Then.again:
                self._try_again(child.folder)
            case Then.elsewhere:
                self._leave_to_other_nodes(child.folder, verdict.failure)

    def _note_killed_rank(self, folder: RunFolder, code: int) -> None:
        """For the first rank to read; what was not killed has written itself what it knows."""
        if code < 0 and not self._stopping:
            reason = f"rank {self._place.rank} was killed by {signal_name(-code)} on {node_name()}"
            with suppress(OSError):
                record(folder, FailureKind.peer, reason)

    def _why_stopped(self) -> str:
        """Timed out near the job's end, else preempted; without such an end just stopped."""
        if self._end is None:
            return "stopped"
        notice = self._cluster.signal_seconds + _LATEST_NOTICE
        return "timed out" if self._end - time.monotonic() < notice else "preempted"

    def _why_killed(self) -> str:
        before, self._oom_kills = self._oom_kills, oom_kills()
        return _NO_MEMORY if self._oom_kills > before else "(kill -9, or the machine ran out of memory)"

    def _try_again(self, folder: RunFolder) -> None:
        """Here; several ranks only together, when the whole job is started again."""
        if not self._is_fruitless(folder):
            is_possible = self._place.ranks == 1 and not self._stopping
            (self._waiting if is_possible else self._left).append(folder)

    def _leave_to_other_nodes(self, folder: RunFolder, failure: dict) -> None:
        with suppress(OSError):
            folder.failure.unlink(missing_ok=True)
        if not self._is_fruitless(folder):
            self._left.append(folder)
            if failure["kind"] == FailureKind.node:
                self._bad_nodes.add(failure.get("host") or node_name())

    def _give_up_here(self, folders: list[RunFolder], error: UserError, attempt: Path | None = None) -> None:
        """The data cannot be had on this node, or the ranks did not find each other: other nodes may do."""
        for folder in folders:
            if error.kind == FailureKind.data and not self._in_slurm:
                self._fail(folder, error.kind, str(error))
            elif not self._is_first:
                with suppress(OSError):  # for the first rank to read
                    record(folder, FailureKind.node, str(error))
            else:
                with suppress(OSError, UserError):
                    attempt = attempt or ledger.begin_attempt(folder, **self._whereabouts())
                    ledger.end_attempt(attempt, "node", str(error))
                if not self._is_fruitless(folder):
                    self._left.append(folder)
                    self._bad_nodes.add(node_name())
                attempt = None

    def _fail(self, folder: RunFolder, kind: FailureKind, reason: str) -> None:
        if self._is_first:
            with suppress(OSError):
                record(folder, kind, reason)
            self._failed.append(folder)
            self._release(folder, "failed")
            self._log.ended(folder, "failed", f"{kind}: {reason}")

    def _release(self, folder: RunFolder, reason: str) -> None:
        with suppress(OSError):
            ledger.release(folder, self._submission.name, reason)

    # -- time and signals ---------------------------------------------------------------

    def _heed_signals(self) -> None:
        heard = self._notices.take()
        asks = [number for number in heard if number == signal.SIGUSR2 or not self._in_slurm]
        asks = [number for number in asks if number != signal.SIGCONT]
        if asks and not self._stopping:
            self._log.say(f"{asks[0].name}: each run writes a checkpoint; the same command continues")
        self._stopping |= bool(asks)
        if signal.SIGTERM in heard:
            self._children.pass_term_on()
        if self._place.ranks > 1:
            self._heed_ranks()
        for child in self._children:
            if self._stopping or (self._is_first and is_cancelled(child.folder)):
                child.ask_to_stop()

    def _heed_ranks(self) -> None:
        """End processes that wait in vain for a rank that has failed, or that left before it could train."""
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _POLL_RANKS
            pattern = self._submission.runs_left_by(*self._job_and_restart, "*")
            left = {run for path in pattern.parent.glob(pattern.name) for run in read_json(path).get("runs", [])}
            for child in self._children:
                if str(child.folder) in left and not child.left_alone:
                    self._stopping = child.left_alone = True
                    child.process.kill()
        for child in self._children if self._is_first else ():
            child.end_if_bereaved(SECONDS_TO_NOTICE)

    def _tell_other_ranks(self) -> None:
        if self._place.ranks > 1 and self._unstarted:
            path = self._submission.runs_left_by(*self._job_and_restart, self._place.rank)
            with suppress(OSError):
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"runs": [str(folder) for folder in self._unstarted]})

    def _job_end(self) -> float | None:
        """When Slurm will end this job, on the monotonic clock."""
        if not self._in_slurm:
            return None
        left = seconds_left(job_id())
        return time.monotonic() + (60 * self._cluster.timeout_minutes if left is None else left)

    # -- data ---------------------------------------------------------------------------

    def _stage(self, held: ExitStack) -> None:
        """Copy the data to this node's disk, if the profile says so."""
        name, rank = node_name(), self._place.rank
        self._log.note(f"{len(self._waiting)} of {len(self._folders)} runs to train on {name}, rank {rank}")
        with self._notices.interrupting():
            self._copies.make(self._waiting, held)


def _start_of(folder: RunFolder) -> RunFolder | None:
    try:
        return folder.start(read_yaml(folder.config).get("start_from"))
    except (OSError, ValueError, AttributeError):
        return None  # the run itself will say what is wrong
