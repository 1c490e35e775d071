"""Numbered tickets: of all processes that want something at the same time, one gets it.

A ticket is a small JSON file ``NNNNNNNN.json``, made so that of all who try only one
succeeds, on network file systems too (a hard link to a finished file; nothing relies on
flock). The highest number counts. Ages are differences of times of the file system itself,
so that clocks need not agree.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import TEMPORARY
from runfolder.process import is_gone, this_process

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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


def issue(folder: Path, number: int, content: dict) -> Path | None:
    """Make ticket ``number`` unless somebody else has; None then.

    Raises:
        UserError: the folder cannot be written.
    """
    target = folder / f"{number:08d}.json"
    beside = temporary(folder, f"{number:08d}")
    text = json.dumps(content).encode()
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
        raise UserError(
            f"expected a folder that can be written, got {folder}: {error.strerror}.", FailureKind.disk
        ) from None
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


def temporary(folder: Path, purpose: str) -> Path:
    """A file for this thread alone; its name tells others when its process is gone."""
    return folder / f"{purpose}.{_origin()}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}"


def is_left_behind(path: Path, now: float) -> bool:
    """Whether the process of a temporary file is dead or, where that cannot be told from here, an hour has passed."""
    _, *words = path.name.split(".")  # purpose, origin (may have dots), process, thread, tmp
    if ".".join(words[:-3]) == _origin():
        gone = is_gone(int(words[-3]))
        if gone is not None:
            return gone
    return now - modified(path) > 3600


@cache
def _origin() -> str:
    """Where process ids mean what they mean here."""
    here = this_process()
    return f"{here['host']}-{here['boot'][:8]}-{re.sub(r'[^0-9]', '', here['processes'])}"


def now_in(folder: Path) -> float:
    """The file system's own time; making a file also makes a network client look afresh."""
    probe = temporary(folder, "now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def modified(path: Path) -> float:
    """When a file was last written; infinity where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")
