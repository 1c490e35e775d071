"""Data sets on a node's own disk: copied there once, used by every process of the node.

The copy of a source is the folder ``<local>/staged/<name>-<path>-<state>``, where ``path`` is
a hash of where the source is and ``state`` one of what it looks like (see `_glimpse`). In it are

=============  ==========================================================================
``lock``       an flock, held while the copy is made and while its users change
``copying/``   a copy that is being made
``data/``      the copy
``copy.json``  written last: without it there is no copy
``users/``     a file for every process that uses the copy, which holds an flock on it
=============  ==========================================================================

Who lives is told by flocks: the kernel releases one when its last owner is gone, however it
went, and knows the owners in other containers too, whose process ids mean nothing here. A
forked loader worker shares its parent's. What is written in these files is for people.

The folder must be on the node: nodes that share it are not told apart. A copy from before the
node was last started is made again, since files are not flushed to disk one by one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import re
import shutil
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import read_json, write_json
from runfolder.lease import describe
from runfolder.process import this_process
from slurm.copying import REPORT_EVERY, TARS, ZIPS, Copying, disk_errors, explained, gigabytes, status_of

_GONE = ".removed-"
_LOOKED_AT = 4096  # files and folders that a glimpse looks at


@contextmanager
def staged(
    source: Path, local: Path, keep_hours: float = 24.0, report: Callable[[str], None] = print
) -> Iterator[Path]:
    """The node-local copy of ``source`` under ``local``, kept in use until the context ends.

    The first process of the node copies, the others wait. A folder is copied with what its
    links point to, an archive is unpacked; contents only, without owners, modes and times. A
    changed source gets a new copy, and the old one goes when its last user has left.

    Args:
        source: a data folder, or an archive: .tar, .tar.gz, .tgz, .zip.
        local: a folder on the node's own disk, the same for all processes that share copies.
        keep_hours: how long the copy stays after its last use; 0 deletes it with the last
            user. Of several users the last to come or go decides. Unused copies go sooner
            where their space is needed.
        report: gets one line when done, and one every 30 seconds until then.

    Yields:
        The folder with the source's files.

    Raises:
        UserError: no readable source, no writable folder, not enough space, or a damaged or
            unsafe archive; nothing of the copy is left then.
    """
    with explained(f"expected a readable folder or archive at {source}", "check that it is mounted there", "data"):
        source = source.resolve(strict=True)
        state = _glimpse(source)
    owner, root = os.getpid(), _root(source, local)
    readable = re.sub(r"[^\w.-]|^\.", "_", source.name)[:40]
    entry = root / f"{readable}-{_hash(os.fsencode(source))}-{state}"
    with explained(f"expected a folder that can be written and locked at {root}", "give another folder", "disk"):
        _clean(root, but=entry)
        with _locked(entry, report):
            if _is_whole(entry):
                report(f"reused {_amount(read_json(entry / 'copy.json'))} of {source} in {entry / 'data'}")
            else:
                _make(source, state, entry, report)
            user = _register(entry, keep_hours)
    try:
        with suppress(OSError):
            _clean(root)
        yield entry / "data"
    finally:
        if os.getpid() == owner:  # not in a forked child that ends here
            _leave(entry, user, keep_hours)


# -- what to copy, and where ------------------------------------------------------------


def _glimpse(source: Path) -> str:
    """A hash of what a source looks like, from few look-ups, since every process makes them.

    Of an archive: size and modification time. Of a folder: names, modification times and
    file sizes of its entries, level by level, as far as whole folders fit into 4,096 entries.
    A change that is not seen: of a file further down, unless it changes the time of a folder
    within reach. Touch the source's folder then.
    """
    status = source.stat()
    if not stat.S_ISDIR(status.st_mode):
        if not source.name.lower().endswith(TARS + ZIPS):
            known = ", ".join(TARS + ZIPS)
            raise UserError(f"expected a folder or an archive ({known}), got {source}; pack it or give its folder.")
        with open(source, "rb"):
            return _hash(f"{status.st_size} {status.st_mtime_ns}".encode())
    lines, folders, left = [f"{status.st_mtime_ns}".encode()], deque([""]), _LOOKED_AT
    while folders:
        folder = folders.popleft()
        with os.scandir(source / folder) as items:
            found = sorted(islice(items, left + 1), key=lambda item: item.name)
        if len(found) > left:
            break
        left -= len(found)
        for item in found:
            name = posixpath.join(folder, item.name)
            kind = _look(item)
            lines.append(os.fsencode(f"{name}\0{kind}"))
            if kind.startswith("folder"):
                folders.append(name)
    return _hash(b"\n".join(lines))


def _look(item: os.DirEntry) -> str:
    status = status_of(item)
    if status is None:
        return "nothing"
    kind = "folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes"
    return f"{kind} {status.st_mtime_ns}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _root(source: Path, local: Path) -> Path:
    with explained(f"expected a folder that can be written at {local}", "give another folder", "disk"):
        root = local.resolve() / "staged"
        if root.is_relative_to(source):
            raise UserError(f"expected a folder outside {source} for its copies, got {local}; give another folder.")
        root.mkdir(parents=True, exist_ok=True)
    return root


# -- who uses what ----------------------------------------------------------------------


def _try_lock(entry: Path, create: bool = False) -> IO[str] | None:
    """The held lock of a copy's folder; None where another process holds it or just removed it."""
    path = entry / "lock"
    try:
        if create:
            entry.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+" if create else "r+")  # noqa: SIM115
    except FileNotFoundError:
        return None
    except FileExistsError:  # mkdir: there was something, perhaps the folder, and perhaps it has just been removed
        if os.path.lexists(entry) and not entry.is_dir():
            raise
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


@contextmanager
def _locked(entry: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a copy's folder, made where it is missing; wait for the process that holds it."""
    tell_at = time.monotonic() + 1.0
    while (lock := _try_lock(entry, create=True)) is None:
        if time.monotonic() > tell_at:
            tell_at = time.monotonic() + REPORT_EVERY
            report(f"waiting for {entry.name}, which is being made by {describe(read_json(entry / 'lock'))}")
        time.sleep(0.05)
    with lock:
        lock.truncate(0)
        _sign(lock)
        yield


def _sign(file: IO[str]) -> None:
    json.dump(this_process() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()


def _register(entry: Path, keep_hours: float) -> IO[str]:
    """Make this process a user of a copy; its folder must be locked."""
    (entry / "users").mkdir(exist_ok=True)
    user = open(entry / "users" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}", "x")  # noqa: SIM115
    fcntl.flock(user, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _sign(user)
    _note_use(entry, keep_hours)
    return user


def _leave(entry: Path, user: IO[str], keep_hours: float) -> None:
    """Stop using a copy, and delete it if its time has come. The disk's errors are of no interest any more."""
    with suppress(OSError):
        while (lock := _try_lock(entry)) is None and os.path.exists(user.name):
            time.sleep(0.01)  # others hold it for moments only: as long as we are users it stays
        if lock is not None:
            with lock:
                _note_use(entry, keep_hours)
                os.unlink(user.name)
    user.close()
    with suppress(OSError):
        _clean(entry.parent)


def _note_use(entry: Path, keep_hours: float | None = None) -> None:
    """Write down that a copy is used now; its folder must be locked."""
    said = read_json(entry / "copy.json")
    if said:
        kept = {} if keep_hours is None else {"keep_hours": keep_hours}
        write_json(entry / "copy.json", said | kept | {"used": time.time()}, durable=False)


def _is_used(entry: Path) -> bool:
    """Whether a live process uses a copy; forgets those that died, as if they had left now."""
    dead = []
    for path in (entry / "users").glob("*"):
        with open(path, "r+") as user:
            try:
                fcntl.flock(user, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        dead.append(path)
    if dead:
        _note_use(entry)
    for path in dead:
        path.unlink()
    return False


# -- removing ---------------------------------------------------------------------------


def _is_whole(entry: Path) -> bool:
    """Whether there is a copy, made since the node was started."""
    said = read_json(entry / "copy.json")
    return bool(said) and said.get("boot") == this_process()["boot"]


def _clean(root: Path, but: Path | None = None) -> None:
    """Delete every copy (but one) that nobody uses and that has had its time, and what killed processes left."""
    for gone in root.glob(f"{_GONE}*"):
        shutil.rmtree(gone, ignore_errors=True)
    for entry in _entries(root):
        if entry != but and (lock := _try_lock(entry)) is not None:
            with lock:
                _remove_if_due(entry)


def _entries(root: Path) -> list[Path]:
    """The folders of all copies that are ours to lock, the one not used for the longest time first."""
    entries = [path.parent for path in root.glob("[!.]*/lock") if os.access(path, os.W_OK)]
    return sorted(entries, key=lambda entry: read_json(entry / "copy.json").get("used", 0.0))


def _remove_if_due(entry: Path, space_needed: bool = False) -> bool:
    """Delete a copy that has no user and is broken, outdated or old; its folder must be locked."""
    if _is_used(entry):
        return False
    said = read_json(entry / "copy.json")
    idle = (time.time() - said.get("used", 0.0)) / 3600
    if space_needed or not _is_whole(entry) or idle >= said.get("keep_hours", 0.0) or _is_outdated(entry, said):
        _remove(entry)
        return True
    return False


def _is_outdated(entry: Path, said: dict) -> bool:
    """Whether there is a later copy of the same source."""
    same = entry.parent.glob(f"{entry.name.rpartition('-')[0]}-*/copy.json")
    return any(read_json(path).get("made", 0.0) > said.get("made", 0.0) for path in same)


def _remove(entry: Path) -> None:
    """Delete a copy whose folder is locked: renamed first, so that nobody finds half of it."""
    gone = entry.with_name(f"{_GONE}{entry.name}-{uuid.uuid4().hex[:8]}")
    os.rename(entry, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _removals(root: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """Remove copies that nobody uses to make space, one a step, the longest unused first."""
    for entry in _entries(root):
        if (lock := _try_lock(entry)) is not None:  # the one that is being made is not to be had either
            with lock:
                removed = _remove_if_due(entry, space_needed=True)
            if removed:
                report(f"removed {entry.name}, which nobody uses, to make space")
                yield entry


# -- making -----------------------------------------------------------------------------


def _make(source: Path, state: str, entry: Path, report: Callable[[str], None]) -> None:
    """Make a copy in its locked folder; on any error the folder goes.

    Raises:
        UserError: it could not be made.
    """
    if _is_used(entry):
        raise UserError(
            f"expected a whole copy in {entry}, got a broken one in use; stop its users first.", FailureKind.disk
        )
    copying = Copying(source, entry / "copying", report, _removals(entry.parent, report))
    try:
        for name in ("copying", "data"):
            shutil.rmtree(entry / name, ignore_errors=True)
        with disk_errors(source, entry.parent):
            sizes = copying.make()
            if _glimpse(source) != state:
                raise UserError(f"expected {source} to stay as it is, got changes while it was copied; start again.")
            os.rename(copying.target, entry / "data")
            said = {"source": str(source), "files": len(sizes), "bytes": sum(sizes.values())}
            said |= {"boot": this_process()["boot"], "made": time.time(), "used": time.time()}
            write_json(entry / "copy.json", said, durable=False)
    except BaseException:
        with suppress(OSError):
            _remove(entry)
        raise
    report(f"staged {_amount(said)} in {copying.seconds():,.0f} s: {source} in {entry / 'data'}")


def _amount(said: dict) -> str:
    return f"{said['files']:,} files, {gigabytes(said['bytes'])}"
