"""What lies where in a run folder, ``RUNS/EXPERIMENT/NAME-HASH/``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

SUBMISSIONS = "slurm"  # the folder beside the runs of an experiment that holds their submissions
EVENTS = "events.out.tfevents.*"
TIMM = "timm:"  # what start_from begins with where weights are timm's


@dataclass(frozen=True, order=True)
class RunFolder:
    """One run folder; ``folder / NAME`` is any other file in it.

    Args:
        path: where it is, whether it is there yet or not.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def absolute(self) -> RunFolder:
        """The same folder, wherever this process goes."""
        return RunFolder(self.path.absolute())

    # -- where it belongs ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """Readable words and the hash of the configuration."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """The script that trains it."""
        return self.path.absolute().parent.name

    @property
    def runs(self) -> Path:
        """The folder of experiments that it lies in."""
        return self.path.absolute().parent.parent

    @property
    def submissions(self) -> Path:
        """The folder with the submissions of its experiment."""
        return self.path.absolute().parent / SUBMISSIONS

    # -- files --------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        """The complete configuration: it makes a folder a run's."""
        return self / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Code, packages, hardware and command of every attempt; see :class:`runfolder.records.Provenance`."""
        return self / "provenance.json"

    @property
    def result(self) -> Path:
        """Written last, by rename: it exists when the run is finished; see :class:`runfolder.records.Result`."""
        return self / "result.json"

    @property
    def outputs(self) -> Path:
        """Class scores of all test images and their labels, by the network that is the result (.npz)."""
        return self / "outputs.npz"

    @property
    def progress(self) -> Path:
        """How far it is, for whoever watches it; see :class:`runfolder.records.Progress`."""
        return self / "progress.json"

    @property
    def failure(self) -> Path:
        """Why it cannot go on; see :class:`runfolder.records.Failure`."""
        return self / "failure.json"

    @property
    def room(self) -> Path:
        """Some bytes that ``failure.json`` takes where the disk is full."""
        return self / "failure.json.room"

    @property
    def cancelled(self) -> Path:
        """A person does not want it any more."""
        return self / "cancelled"

    @property
    def log(self) -> Path:
        """What training said."""
        return self / "log.txt"

    @property
    def output(self) -> Path:
        """Everything its processes printed, where a supervisor started them."""
        return self / "output.txt"

    @property
    def events(self) -> list[Path]:
        """TensorBoard's event files, by name."""
        return sorted(self.path.glob(EVENTS))

    # -- folders ------------------------------------------------------------------------

    @property
    def lease(self) -> Path:
        """Tickets of the processes that trained it: the highest is who may write."""
        return self / "lease"

    @property
    def claims(self) -> Path:
        """Tickets of the submissions that were to train it: the highest counts."""
        return self / "claims"

    @property
    def attempts(self) -> Path:
        """A note for each time that a supervisor started it."""
        return self / "attempts"

    @property
    def checkpoints(self) -> Path:
        """``step-STEP-CHECKSUM.pt``."""
        return self / "checkpoints"

    # -- checkpoints --------------------------------------------------------------------

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint file by step, unread."""
        return next(iter(newest_first(self.checkpoints)), None)

    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return step_of(self.newest_checkpoint())

    # -- the run that it starts from ----------------------------------------------------

    def start(self, start_from: object) -> RunFolder | None:
        """The run whose weights this one begins with, whether it is there yet or not; None if that is no run.

        Args:
            start_from: the value in its configuration: EXPERIMENT/NAME is a run in the same folder of
                experiments, NAME alone one of the same experiment. A checkpoint file (.pt, .pth), timm:NAME
                and null are no runs.
        """
        if not isinstance(start_from, str) or start_from.startswith(TIMM) or start_from.endswith((".pt", ".pth")):
            return None
        base = self.runs if "/" in start_from else self.path.absolute().parent
        return RunFolder(base / os.path.expanduser(start_from))  # which is itself where it is absolute


def typed(path: str) -> Path:
    """A path as a person typed it, with ~ for their home."""
    return Path(os.path.expanduser(path))  # which stays as it is where there is no home


def relative(path: Path | RunFolder) -> str:
    """A path as a person types it: relative to the current folder where it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def newest_first(checkpoints: Path) -> list[Path]:
    """All checkpoint files in a folder, the highest step first."""
    found = (path for path in checkpoints.glob("step-*.pt") if path.is_file())
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path | None) -> int:
    """The optimizer step in a checkpoint's name; 0 without one."""
    match = re.match(r"step-(\d+)", path.name) if path else None
    return int(match[1]) if match else 0
