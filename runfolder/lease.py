"""Who may write into a run folder: the holder of the highest ticket in its ``lease/``.

A newcomer takes a run by making the next ticket, and the process that held the one before
finds out the next time it looks, which it does before everything it writes: it stops, and
damages nothing. Its heartbeat is the ticket's modification time.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runfolder.errors import RunBusyError, SupersededError
from runfolder.files import TEMPORARY
from runfolder.place import slurm_start
from runfolder.process import is_dead, this_process
from runfolder.records import Holder, read_record
from runfolder.tickets import highest, is_left_behind, issue, now_in, temporary

MISSED_BEATS = 6  # a holder is taken for dead after so many heartbeats have not come


class Lease:
    """The right to write into a run folder, for as long as no newer ticket exists."""

    def __init__(self, path: Path, number: int, holder: Holder):
        self.path, self.number, self._holder = path, number, holder

    def check(self) -> None:
        """Look whether the run is still ours; before every write.

        Raises:
            SupersededError: it is not.
        """
        now_in(self.path.parent)
        number, path = highest(self.path.parent)
        if number == self.number:
            return
        if number > self.number:
            by = describe(read_record(path, Holder))
            raise SupersededError(f"{self.path.parents[1]} has been taken over by {by}.")
        raise SupersededError(f"{self.path.parents[1]} has lost its lease folder; something removed it.")

    def beat(self) -> None:
        """Say that this process lives.

        Raises:
            SupersededError: a newer process has the run.
        """
        self.check()
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Give the run back: the next one need not wait."""
        with suppress(OSError):
            beside = temporary(self.path.parent, self.path.stem)
            beside.write_text(json.dumps(self._holder | {"released": True}))
            if highest(self.path.parent)[0] == self.number:
                os.replace(beside, self.path)
            else:
                beside.unlink()


def take(folder: Path, beats_every: float, patience: float = 0.0) -> Lease:
    """Take a run folder for this process.

    The holder before counts as gone when it has given the run back, when its process is dead
    (as far as that can be seen from here), when ``MISSED_BEATS`` of its heartbeats have not
    come, or when it is an earlier start of the same Slurm job: then a second copy was
    started because Slurm believes the first one lost, and the newer one wins.

    Args:
        folder: the run folder.
        beats_every: seconds between the heartbeats that this process will give.
        patience: how long to wait for another process to go.

    Raises:
        RunBusyError: another process is training this run.
        SupersededError: a later start of this Slurm job is training it.
        UserError: the folder cannot be written.
    """
    end, leases = time.monotonic() + patience, folder / "lease"
    me = this_process() | slurm_start() | {"beats_every": beats_every, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    while True:
        number, path = highest(leases)
        if path is None or not is_live(path, now_in(leases)) or _is_later(me, read_record(path, Holder)):
            ticket = issue(leases, number + 1, me)
            if ticket is not None:
                _remove_older(leases, number + 1)
                return Lease(ticket, number + 1, me)
            continue
        holder = read_record(path, Holder)
        if _is_later(holder, me):
            raise SupersededError(f"{folder} has been taken over by {describe(holder)}.")
        if time.monotonic() > end:
            seconds = MISSED_BEATS * holder.get("beats_every", 10.0)
            raise RunBusyError(
                f"{folder} is being trained by {describe(holder)}; wait for it, or stop it: python slurm/status.py "
                f"cancel {folder.name}. If it is gone without a word, the run is free {seconds:.0f} s after its last "
                "sign of life."
            )
        time.sleep(min(0.5, beats_every))


def is_held(folder: Path, now: float | None = None) -> bool:
    """Whether a live process holds this run folder."""
    path = highest(folder / "lease")[1]
    return path is not None and is_live(path, now_in(folder / "lease") if now is None else now)


def is_live(path: Path, now: float) -> bool:
    """Whether the process of this ticket lives, as far as can be told at the file system's time ``now``."""
    holder = read_record(path, Holder)
    if holder.get("released") or (holder and is_dead(holder)):
        return False
    try:
        age = now - path.stat().st_mtime
    except OSError:
        return False
    return abs(age) <= MISSED_BEATS * holder.get("beats_every", 10.0)  # a date in the future says nothing either


def describe(holder: Holder) -> str:
    """A holder in a few words."""
    job = f"job {holder['job']} (start {holder.get('restart', 0) + 1}), " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"


def _is_later(holder: Holder, other: Holder) -> bool:
    """Whether one holder is a later start of the other's Slurm job."""
    same = bool(holder.get("job")) and holder["job"] == other.get("job")
    return same and holder.get("restart", 0) > other.get("restart", 0)


def _remove_older(leases: Path, number: int) -> None:
    now = now_in(leases)
    for path in leases.iterdir():
        old = path.stem.isdigit() and int(path.stem) < number
        if old or (path.suffix == TEMPORARY and is_left_behind(path, now)):
            with suppress(OSError):
                path.unlink()


class Heartbeat:
    """A thread that keeps a lease alive and says how far the run is.

    Args:
        lease: the lease to keep.
        every: seconds between beats.
        tell: called at every beat, in the thread, while the lease is held.
        lost: called once, in the thread, with the reason when the lease is lost.
    """

    def __init__(self, lease: Lease, every: float, tell: Callable[[], None], lost: Callable[[str], None]):
        self._lease, self._every, self._tell, self._lost = lease, every, tell, lost
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(self._every):
            try:
                self._lease.beat()
            except SupersededError as error:
                self._lost(str(error))
                return
            except OSError:  # a file system that fails for a moment: the next beat may reach it
                continue
            with suppress(OSError):  # a full disk is the checkpoint's to report
                self._tell()
