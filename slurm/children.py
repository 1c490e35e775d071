"""Training processes: how they are started, told to stop, and seen to end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from runfolder.folder import RunFolder

_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Child:
    """A training process of a run."""

    folder: RunFolder
    process: subprocess.Popen
    slot: int
    attempt: Path | None  # its note, which the first rank keeps
    is_deaf: bool  # until it has begun to train
    asked_to_stop: float = 0.0  # when it was last told to
    bereaved: float = 0.0  # since when another rank of its run has failed
    left_alone: bool = False  # ended by us, since another rank has left before it could train

    def ask_to_stop(self) -> None:
        """USR2; again and again to one that hears nothing while it is still starting."""
        if not self.asked_to_stop or (self.is_deaf and time.monotonic() - self.asked_to_stop > 1.0):
            self.asked_to_stop = time.monotonic()
            self.process.send_signal(signal.SIGUSR2)

    def end_if_bereaved(self, patience: float) -> None:
        """End a process that goes on waiting for a rank which is gone, as NCCL's may for long."""
        if not os.path.exists(self.folder.failure):
            return
        self.bereaved = self.bereaved or time.monotonic()
        if time.monotonic() - self.bereaved > patience:
            self.process.kill()


class Children(list[Child]):
    """The training processes of one job that have not been seen to end.

    Args:
        slots: how many there may be.
        share_gpus: whether each slot is given one of the GPUs that this process has.
        in_slurm: whether Slurm, not a terminal, sends this process signals.
    """

    def __init__(self, slots: int, share_gpus: bool, in_slurm: bool):
        super().__init__()
        self.slots, self._share_gpus, self._in_slurm = slots, share_gpus, in_slurm

    def start(
        self, folder: RunFolder, command: list[str], cwd: str, output: IO[bytes] | None, attempt: Path | None
    ) -> None:
        """Start the training process of a run.

        Args:
            folder: the run.
            command: what to start.
            cwd: where.
            output: takes all that it prints.
            attempt: its note.

        Raises:
            OSError: the program or the folder is not there.
        """
        slot = next(slot for slot in range(self.slots) if slot not in {child.slot for child in self})
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=self._environment(slot),
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            preexec_fn=_deaf_and_end_with_parent if self._in_slurm else _end_with_parent,
            # Ctrl-C at a terminal reaches it through us, once; Slurm may look for processes by their session.
            start_new_session=not self._in_slurm,
        )
        self.append(Child(folder, process, slot, attempt, is_deaf=self._in_slurm))

    def take_ended(self) -> list[Child]:
        """Those that have ended since the last time."""
        ended = [child for child in self if child.process.poll() is not None]
        for child in ended:
            self.remove(child)
        return ended

    def pass_term_on(self) -> None:
        """SIGTERM to all."""
        for child in self:
            if not child.is_deaf:
                child.asked_to_stop = time.monotonic()  # it does not mean less than USR2 there
            child.process.send_signal(signal.SIGTERM)

    def _environment(self, slot: int) -> dict[str, str]:
        """For a process of its own: one GPU of those that the job has, and its share of the cores."""
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
        environment = dict(os.environ)
        if not environment.get("OMP_NUM_THREADS"):  # to OpenMP an empty one means all cores
            environment["OMP_NUM_THREADS"] = str(max(1, cores // self.slots))
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if gpus and self._share_gpus and self.slots > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return environment


def _end_with_parent() -> None:
    """In a new process: USR2 when this one is gone, however it went (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGUSR2)


def _deaf_and_end_with_parent() -> None:
    """Also: no signal ends it before its own handlers are there."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_parent()
