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

import errno
import fcntl
import gzip
import hashlib
import json
import os
import posixpath
import re
import shutil
import socket
import stat
import tarfile
import threading
import time
import uuid
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from experiments.errors import UserError
from experiments.training.files import read_json, write_json
from experiments.training.lease import describe, this_process

_TARS, _ZIPS = (".tar", ".tar.gz", ".tgz"), (".zip",)
_GONE = ".removed-"
_LOOKED_AT = 4096  # files and folders that a glimpse looks at
_AT_ONCE = 8  # files that are copied side by side: on a shared file system the waits add up, not the bytes
_CHUNK = 1 << 22
_DISK_BLOCK = 4096
_REPORT_EVERY = 30.0
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError)


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
    with _explained(f"expected a readable folder or archive at {source}", "check that it is mounted there", "data"):
        source = source.resolve(strict=True)
        state = _glimpse(source)
    owner, root = os.getpid(), _root(source, local)
    readable = re.sub(r"[^\w.-]|^\.", "_", source.name)[:40]
    entry = root / f"{readable}-{_hash(os.fsencode(source))}-{state}"
    with _explained(f"expected a folder that can be written and locked at {root}", "give another folder", "disk"):
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
        if not source.name.lower().endswith(_TARS + _ZIPS):
            known = ", ".join(_TARS + _ZIPS)
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
    status = _status(item)
    if status is None:
        return "nothing"
    kind = "folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes"
    return f"{kind} {status.st_mtime_ns}"


def _status(item: os.DirEntry) -> os.stat_result | None:
    """What an entry of a folder is, or what it links to; None for a link to nothing."""
    try:
        return item.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _root(source: Path, local: Path) -> Path:
    with _explained(f"expected a folder that can be written at {local}", "give another folder", "disk"):
        root = local.resolve() / "staged"
        if root.is_relative_to(source):
            raise UserError(f"expected a folder outside {source} for its copies, got {local}; give another folder.")
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextmanager
def _explained(expected: str, cure: str, kind: str) -> Iterator[None]:
    """Turn an OSError into a sentence that names the node and the file."""
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        got = f"{error.strerror or error}{place}"
        raise UserError(f"{expected} on node {socket.gethostname()}, got {got}; {cure}.", kind) from None


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
            tell_at = time.monotonic() + _REPORT_EVERY
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


# -- copying ----------------------------------------------------------------------------


class _Copying:
    """A copy in the making: its place, the space it needs, and how far it is."""

    def __init__(self, source: Path, entry: Path, report: Callable[[str], None]):
        self.source, self.target, self.report = source, entry / "copying", report
        self.files, self.bytes, self.total, self.at = 0, 0, 0, ""
        self._root, self._began, self._lock = entry.parent, time.monotonic(), threading.Lock()
        self._tell_at = self._began + _REPORT_EVERY

    def need(self, size: int) -> None:
        """Make sure of free space; removes unused copies for it, the longest unused first.

        Raises:
            UserError: there is not enough.
        """
        entries = _entries(self._root) if self._free() < size else []
        while self._free() < size:
            if not entries:
                raise UserError(
                    f"expected {_gb(size)} free for {self.source} in {self._root} on node {socket.gethostname()}, got "
                    f"{_gb(self._free())}; delete what is not needed there or give another folder.",
                    "disk",
                )
            entry = entries.pop(0)
            if (lock := _try_lock(entry)) is not None:  # our own is not to be had either
                with lock:
                    if _remove_if_due(entry, space_needed=True):
                        self.report(f"removed {entry.name}, which nobody uses, to make space")

    def _free(self) -> int:
        return shutil.disk_usage(self._root).free

    def pour(self, stream: IO[bytes], name: str, size: int) -> None:
        """Write one file of the copy.

        Raises:
            UserError: it has another size than expected.
        """
        done, self.at = 0, name
        try:
            with open(self.target / name, "xb") as file:
                while chunk := stream.read(_CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    self._count(len(chunk))
        except OSError as error:
            error.filename = error.filename or name
            raise
        if done != size:
            raise _damaged(self.source, f"{done:,} bytes of {size:,} in {name}")
        self._count(0, 1)

    def _count(self, size: int, files: int = 0) -> None:
        with self._lock:
            self.bytes, self.files = self.bytes + size, self.files + files
            rate = self.bytes / max(time.monotonic() - self._began, 1e-9)
            whole = f" of {_gb(self.total)}" if self.total else ""
            self.tell(f"{self.files:,} files, {_gb(self.bytes)}{whole}, {_gb(rate)}/s")

    def tell(self, text: str) -> None:
        """Report how far the copy is, not too often."""
        if time.monotonic() > self._tell_at:
            self._tell_at = time.monotonic() + _REPORT_EVERY
            self.report(f"staging {self.source}: {text}")

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began


def _make(source: Path, state: str, entry: Path, report: Callable[[str], None]) -> None:
    """Make a copy in its locked folder; on any error the folder goes.

    Raises:
        UserError: it could not be made.
    """
    if _is_used(entry):
        raise UserError(f"expected a whole copy in {entry}, got a broken one in use; stop its users first.", "disk")
    copying = _Copying(source, entry, report)
    try:
        for name in ("copying", "data"):
            shutil.rmtree(entry / name, ignore_errors=True)
        copying.target.mkdir()
        with _full_disk(source, entry.parent), _archive_errors(copying):
            sizes = _choose(source)(copying)
            _compare(copying, sizes)
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


def _choose(source: Path) -> Callable[[_Copying], dict[str, int]]:
    if source.is_dir():
        return _copy_folder
    return _unpack_zip if source.name.lower().endswith(_ZIPS) else _unpack_tar


def _compare(copying: _Copying, sizes: dict[str, int]) -> None:
    """Look whether a copy has all its files, each with all its bytes."""
    found, target = {}, os.path.realpath(copying.target)
    for folder, inner, names in os.walk(target):
        for path in (os.path.join(folder, name) for name in inner + names):
            status, name = os.lstat(path), os.path.relpath(path, target)
            if stat.S_ISLNK(status.st_mode) and os.path.commonpath([target, os.path.realpath(path)]) != target:
                raise _unsafe(copying.source, f"the link {name}")
            if not stat.S_ISDIR(status.st_mode):
                found[name] = status.st_size
    for name in sizes.keys() | found.keys():
        if sizes.get(name) != found.get(name):
            got, expected = (f"{n.get(name, 0):,}" if name in n else "no file" for n in (found, sizes))
            raise _damaged(copying.source, f"{got} instead of {expected} bytes in the copy of {name}")


def _copy_folder(copying: _Copying) -> dict[str, int]:
    """Copy a folder, several files at a time; links are followed."""
    source = copying.source

    def copy(item: tuple[str, int]) -> None:
        with open(source / item[0], "rb", buffering=0) as stream:
            copying.pour(stream, *item)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sizes, folders = _listing(copying, pool)
        copying.total = sum(sizes.values())
        copying.need(_on_disk(sizes.values()) + _DISK_BLOCK * len(folders))
        for folder in folders:
            (copying.target / folder).mkdir(exist_ok=True)
        items = iter(sizes.items())
        while batch := list(islice(items, 1024)):
            for _ in pool.map(copy, batch):
                pass
    return sizes


def _listing(copying: _Copying, pool: ThreadPoolExecutor) -> tuple[dict[str, int], list[str]]:
    """All files of a folder with their sizes, and all folders, the outer ones first."""

    def look(folder: tuple[str, tuple]) -> tuple[list, list, list]:
        files, inner, neither = [], [], []
        name, above = folder
        with os.scandir(copying.source / name) as items:
            for item in items:
                path = posixpath.join(name, item.name)
                status = _status(item)
                if status is not None and stat.S_ISREG(status.st_mode):
                    files.append((path, status.st_size))
                elif status is None or not stat.S_ISDIR(status.st_mode):
                    neither.append(path)
                elif (here := (status.st_dev, status.st_ino)) in above:
                    raise _damaged(copying.source, f"a link to a folder that it is in, {path}")
                else:
                    inner.append((path, (*above, here)))
        return files, inner, neither

    status = copying.source.stat()
    sizes, folders, left_out, level = {}, [], [], [("", ((status.st_dev, status.st_ino),))]
    while level:
        folders += [name for name, _ in level]
        found, level = pool.map(look, level), []
        for files, inner, neither in found:
            sizes.update(files)
            level += inner
            left_out += neither
            copying.tell(f"{len(sizes):,} files found so far")
    if left_out:
        first = ", ".join(sorted(left_out)[:3])
        copying.report(f"left out {len(left_out):,} links to nothing or special files in {copying.source}: {first}")
    return sizes, folders


class _Member(tarfile.TarInfo):
    """A tar header; unlike in `tarfile`, anything but an end marker in its place is an error."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Member:
        """Read a header."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end of the archive should be") from None


def _unpack_tar(copying: _Copying) -> dict[str, int]:
    """Unpack a tar archive, compressed or not."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError("expected Python 3.11.4 or newer to unpack tar archives safely, got an older one; update it.")
    source, target, sizes = copying.source, copying.target, {}
    copying.need(source.stat().st_size)  # compressed ones need more, which is only seen on the way
    mode = "r:" if source.name.lower().endswith(".tar") else "r:gz"
    with tarfile.open(source, mode, tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would remember millions
            _refuse_unsafe(source, member.name)
            member = tarfile.data_filter(member, str(target))
            path = target / member.name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            copying.need(_on_disk([member.size]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a later member of the same name counts
            if member.isfile():
                with archive.extractfile(member) as stream:
                    copying.pour(stream, member.name, member.size)
            else:
                archive.extract(member, target, filter="data")
            sizes[posixpath.normpath(member.name)] = member.size if member.isfile() else path.lstat().st_size
        while archive.fileobj.read(_CHUNK):
            pass  # a compressed file has its check sum at the end
    return sizes


def _unpack_zip(copying: _Copying) -> dict[str, int]:
    """Unpack a zip archive."""
    sizes = {}
    with zipfile.ZipFile(copying.source) as archive:
        members = archive.infolist()
        copying.total = sum(member.file_size for member in members)
        copying.need(_on_disk(member.file_size for member in members))
        for member in members:
            _refuse_unsafe(copying.source, member.filename)
            path = copying.target / member.filename
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            if stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
                raise _unsafe(copying.source, f"the link or encrypted member {member.filename}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with archive.open(member) as stream:
                copying.pour(stream, member.filename, member.file_size)
            sizes[posixpath.normpath(member.filename)] = member.file_size
    return sizes


def _refuse_unsafe(source: Path, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise _unsafe(source, f"the member {name}")


@contextmanager
def _archive_errors(copying: _Copying) -> Iterator[None]:
    """Turn the errors of archives into sentences."""
    try:
        yield
    except tarfile.FilterError as error:
        raise _unsafe(copying.source, str(error)) from None
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _damaged(copying.source, f"{reason} (last looked at: {copying.at or 'its beginning'})") from None


@contextmanager
def _full_disk(source: Path, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            cure = "look whether both file systems work and start again"
            with _explained(f"expected to copy {source} to {root}", cure, "data"):
                raise
        raise UserError(
            f"expected space for {source} in {root} on node {socket.gethostname()}, got a full disk with "
            f"{_gb(shutil.disk_usage(root).free)} free while copying (are there too many files?); delete what is not "
            "needed there or give another folder.",
            "disk",
        ) from None


def _damaged(source: Path, got: str) -> UserError:
    where = f"on node {socket.gethostname()}"
    return UserError(f"expected a complete copy of {source} {where}, got {got}; look whether it is damaged.", "data")


def _unsafe(source: Path, got: str) -> UserError:
    return UserError(f"expected members that stay inside {source}, got {got}; unpack it by hand if it is safe.", "data")


def _on_disk(sizes: Any) -> int:
    """Bytes that files take up, in whole blocks."""
    return sum(-(-size // _DISK_BLOCK) * _DISK_BLOCK for size in sizes)


def _amount(said: dict) -> str:
    return f"{said['files']:,} files, {_gb(said['bytes'])}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
