"""Who may write into a run folder: numbered tickets, of which the highest counts.

A ticket is a small JSON file ``NNNNNNNN.json``, made so that of all who try only one
succeeds, on network file systems too (a hard link to a finished file; nothing relies on
flock). A newcomer takes a run by making the next number, and the process that held the
number before finds out the next time it looks, which it does before everything it writes:
it stops, and damages nothing. Its heartbeat is the ticket's modification time; ages are
differences of times of the file system itself, so that clocks need not agree.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from experiments.errors import RunBusyError, UserError
from experiments.training.files import TEMPORARY, read_json
from experiments.training.place import slurm_start

MISSED_BEATS = 6  # a holder is taken for dead after so many heartbeats have not come
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class SupersededError(RunBusyError):
    """A newer process has taken this run: leave without writing anything."""


# -- processes --------------------------------------------------------------------------


def this_process(pid: int | None = None) -> dict:
    """What tells this process (or ``pid``) from every other one, also after a reboot or in a container."""
    pid = os.getpid() if pid is None else pid
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": pid,
        "began": _began(pid),
    }


def is_dead(process: dict) -> bool | None:
    """Whether a process is gone; None where that cannot be told from here."""
    here = this_process()
    if any(process.get(key) != here[key] for key in ("boot", "processes")) or process.get("host") != here["host"]:
        return None
    return _began(process["pid"]) != process.get("began")


def _began(pid: int) -> str:
    """The start time of a living process in clock ticks since boot, else ""."""
    text = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not text or text[0] in "ZX":
        return ""
    return text[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# -- tickets ----------------------------------------------------------------------------


def highest(folder: Path) -> tuple[int, Path | None]:
    """The highest ticket in a folder and its number; (0, None) without one."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".json") and name[:-5].isdigit()]
    except (FileNotFoundError, NotADirectoryError):
        return 0, None
    if not names:
        return 0, None
    name = max(names, key=lambda name: int(name[:-5]))
    return int(name[:-5]), folder / name


def issue(folder: Path, number: int, said: dict) -> Path | None:
    """Make ticket ``number`` unless somebody else has; None then.

    Raises:
        UserError: the folder cannot be written.
    """
    target = folder / f"{number:08d}.json"
    beside = _temporary(folder, f"{number:08d}")
    text = json.dumps(said).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(text)
        try:
            os.link(beside, target)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return _issue_without_links(target, text)
            if os.stat(beside).st_nlink != 2:  # over a network a link can be made and reported as failed
                if error.errno == errno.EEXIST:
                    return None
                raise
        return target
    except OSError as error:
        raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.", "disk") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def _issue_without_links(target: Path, text: bytes) -> Path | None:
    try:
        file = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(file, "wb") as opened:
        opened.write(text)
    return target


def _temporary(folder: Path, purpose: str) -> Path:
    """A file for this thread alone; its name tells others when its process is gone."""
    return folder / f"{purpose}.{_origin()}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}"


def _is_left_behind(path: Path, now: float) -> bool:
    """Whether the process of a temporary file is dead or, where that cannot be told from here, an hour has passed."""
    _, *words = path.name.split(".")  # purpose, origin (may have dots), process, thread, tmp
    if ".".join(words[:-3]) == _origin():
        return not _began(int(words[-3]))
    return now - _modified(path) > 3600


@cache
def _origin() -> str:
    """Where process ids mean what they mean here."""
    here = this_process()
    return f"{here['host']}-{here['boot'][:8]}-{re.sub(r'[^0-9]', '', here['processes'])}"


def now_in(folder: Path) -> float:
    """The file system's own time; making a file also makes a network client look afresh."""
    probe = _temporary(folder, "now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


# -- leases -----------------------------------------------------------------------------


class Lease:
    """The right to write into a run folder, for as long as no newer ticket exists."""

    def __init__(self, path: Path, number: int, said: dict):
        self.path, self.number, self._said = path, number, said

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
            raise SupersededError(f"{self.path.parents[1]} has been taken over by {describe(read_json(path))}.")
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
            beside = _temporary(self.path.parent, self.path.stem)
            beside.write_text(json.dumps(self._said | {"released": True}))
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
    said = this_process() | slurm_start() | {"beats_every": beats_every, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    while True:
        number, path = highest(leases)
        if path is None or not is_live(path, now_in(leases)) or _is_later(said, read_json(path)):
            mine = issue(leases, number + 1, said)
            if mine is not None:
                _remove_older(leases, number + 1)
                return Lease(mine, number + 1, said)
            continue
        holder = read_json(path)
        if _is_later(holder, said):
            raise SupersededError(f"{folder} has been taken over by {describe(holder)}.")
        if time.monotonic() > end:
            raise RunBusyError(f"{folder} is being trained by {describe(holder)}.")
        time.sleep(min(0.5, beats_every))


def is_held(folder: Path, now: float | None = None) -> bool:
    """Whether a live process holds this run folder."""
    path = highest(folder / "lease")[1]
    return path is not None and is_live(path, now_in(folder / "lease") if now is None else now)


def is_live(path: Path, now: float) -> bool:
    """Whether the process of this ticket lives, as far as can be told at the file system's time ``now``."""
    said = read_json(path)
    if said.get("released") or (said and is_dead(said)):
        return False
    try:
        age = now - path.stat().st_mtime
    except OSError:
        return False
    return age <= MISSED_BEATS * said.get("beats_every", 10.0)


def describe(said: dict) -> str:
    """A holder in a few words."""
    job = f"job {said['job']} (start {said['restart'] + 1}), " if said.get("job") else ""
    return f"{job}process {said.get('pid', '?')} on {said.get('host', '?')} since {said.get('since', '?')}"


def _is_later(said: dict, other: dict) -> bool:
    """Whether one holder is a later start of the other's Slurm job."""
    return bool(said.get("job")) and said["job"] == other.get("job") and said["restart"] > other["restart"]


def _remove_older(leases: Path, number: int) -> None:
    now = now_in(leases)
    for path in leases.iterdir():
        old = path.stem.isdigit() and int(path.stem) < number
        if old or (path.suffix == TEMPORARY and _is_left_behind(path, now)):
            with suppress(OSError):
                path.unlink()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")


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
