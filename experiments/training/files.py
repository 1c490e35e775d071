"""Files that are either whole or not there, and a lock that dies with its owner."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from experiments.errors import RunBusyError, UserError

TEMPORARY = ".tmp"
_ATTEMPTS = 4


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename, flush the folder: readers see all or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk helps nobody
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    A POSIX record lock on ``lock``: the system releases it when its owner dies, and forked
    loader processes do not inherit it. The file's text only says who holds it.

    Raises:
        RunBusyError: another process holds it.
        UserError: the folder cannot be written.
    """
    try:
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.") from None
    with file:
        for attempt in range(_ATTEMPTS):  # `is_locked` elsewhere may hold it for an instant
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05 if attempt < _ATTEMPTS - 1 else 0)
        else:
            file.seek(0)
            raise RunBusyError(f"{folder} is being trained by {file.read().strip() or 'another process'}.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether another live process holds this run folder (asked inside the holder, the lock would be lost)."""
    if not (folder / "lock").exists():
        return False
    with open(folder / "lock", "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
