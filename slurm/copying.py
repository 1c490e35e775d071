"""Copies of folders and archives: in parallel, checked, with their progress told.

What is copied is what a source contains; owners, modes and times are not.
"""

from __future__ import annotations

import errno
import gzip
import os
import posixpath
import shutil
import socket
import stat
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from runfolder.errors import UserError
from runfolder.failures import FailureKind

TARS, ZIPS = (".tar", ".tar.gz", ".tgz"), (".zip",)
_AT_ONCE = 8  # files that are copied side by side: on a shared file system the waits add up, not the bytes
_CHUNK = 1 << 22
_DISK_BLOCK = 4096
REPORT_EVERY = 30.0
_DAMAGED = (  # what the readers of archives raise where bytes are not what they should be
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError,
    LookupError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
_MOST_LINKS = 40  # in one path, as Linux has it


class Copying:
    """A copy in the making: its place, the space it needs, and how far it is.

    Args:
        source: a folder, or an archive: .tar, .tar.gz, .tgz, .zip.
        target: the folder of the copy, which is made.
        report: gets a line every 30 seconds.
        removals: each step removes something from the target's disk that nobody needs.
    """

    def __init__(self, source: Path, target: Path, report: Callable[[str], None], removals: Iterator[object]):
        self.source, self.target, self.report = source, target, report
        self.files, self.bytes, self.total, self.at = 0, 0, 0, ""
        self._removals, self._began, self._lock = removals, time.monotonic(), threading.Lock()
        self._tell_at = self._began + REPORT_EVERY

    def make(self) -> dict[str, int]:
        """Copy all, look whether it is all there, and return every file's size.

        Raises:
            UserError: not enough space, or a damaged or unsafe archive.
        """
        self.target.mkdir()
        with _archive_errors(self):
            if self.source.is_dir():
                sizes = _copy_folder(self)
            elif self.source.name.lower().endswith(ZIPS):
                sizes = _unpack_zip(self)
            else:
                sizes = _unpack_tar(self)
            _compare(self, sizes)
        return sizes

    def need(self, size: int) -> None:
        """Make sure of free space.

        Raises:
            UserError: there is not enough.
        """
        while self._free() < size:
            if next(self._removals, None) is None:
                raise UserError(
                    f"expected {gigabytes(size)} free for {self.source} in {self.target.parent} on node "
                    f"{socket.gethostname()}, got {gigabytes(self._free())}; delete what is not needed there or give "
                    "another folder.",
                    FailureKind.disk,
                )

    def _free(self) -> int:
        return shutil.disk_usage(self.target.parent).free

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
            whole = f" of {gigabytes(self.total)}" if self.total else ""
            self.tell(f"{self.files:,} files, {gigabytes(self.bytes)}{whole}, {gigabytes(rate)}/s")

    def tell(self, text: str) -> None:
        """Report how far the copy is, not too often."""
        if time.monotonic() > self._tell_at:
            self._tell_at = time.monotonic() + REPORT_EVERY
            self.report(f"staging {self.source}: {text}")

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began


def _compare(copying: Copying, sizes: dict[str, int]) -> None:
    """Look whether a copy has all its files, each with all its bytes."""
    found, target = {}, str(copying.target)
    for folder, inner, names in os.walk(target):
        for path in (os.path.join(folder, name) for name in inner + names):
            status, name = os.lstat(path), os.path.relpath(path, target)
            if stat.S_ISLNK(status.st_mode) and not _stays_inside(target, name):
                raise _unsafe(copying.source, f"the link {name}")
            if not stat.S_ISDIR(status.st_mode):
                found[name] = status.st_size
    for name in sizes.keys() | found.keys():
        if sizes.get(name) != found.get(name):
            got, expected = (f"{n.get(name, 0):,}" if name in n else "no file" for n in (found, sizes))
            raise _damaged(copying.source, f"{got} instead of {expected} bytes in the copy of {name}")


def _copy_folder(copying: Copying) -> dict[str, int]:
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


def _listing(copying: Copying, pool: ThreadPoolExecutor) -> tuple[dict[str, int], list[str]]:
    """All files of a folder with their sizes, and all folders, the outer ones first."""

    def look(folder: tuple[str, tuple]) -> tuple[list, list, list]:
        files, inner, neither = [], [], []
        name, above = folder
        with os.scandir(copying.source / name) as items:
            for item in items:
                path = posixpath.join(name, item.name)
                status = status_of(item)
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


def _unpack_tar(copying: Copying) -> dict[str, int]:
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
            _require_plain(source, target, member.name if member.isdir() else posixpath.dirname(member.name))
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            copying.need(_on_disk([member.size]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a later member of the same name counts
            if member.isfile():
                with archive.extractfile(member) as stream:
                    copying.pour(stream, member.name, member.size)
            elif member.issym():
                path.symlink_to(member.linkname)  # where it leads in the end is looked at when all is there
            else:
                _require_plain(source, target, member.linkname)
                os.link(target / member.linkname, path, follow_symlinks=False)
            sizes[posixpath.normpath(member.name)] = member.size if member.isfile() else path.lstat().st_size
        while archive.fileobj.read(_CHUNK):
            pass  # a compressed file has its check sum at the end
    return sizes


def _unpack_zip(copying: Copying) -> dict[str, int]:
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


def _require_plain(source: Path, target: Path, name: str) -> None:
    """Refuse a way through a link: what is written there might land anywhere.

    `tarfile`'s own filter asks os.path.realpath, which takes a path that is too long for one without links.
    """
    path = target
    for part in Path(name).parts:
        path /= part
        if path.is_symlink():
            raise _unsafe(source, f"the way through the link {path.relative_to(target)} to {name}")


def _stays_inside(top: str, name: str) -> bool:
    """Whether a path below ``top`` leads to a place below it, whatever links it goes through."""
    waiting, place, links = name.split("/")[::-1], [], 0
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not place:
                return False
            place.pop()
            continue
        try:
            aim = os.readlink(os.path.join(top, *place, part))
        except FileNotFoundError:
            aim = None
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a path that is too long, say
                return False
            aim = None  # no link
        if aim is None:
            place.append(part)
            continue
        links += 1
        if aim.startswith("/") or links > _MOST_LINKS:
            return False
        waiting += aim.split("/")[::-1]
    return True


@contextmanager
def _archive_errors(copying: Copying) -> Iterator[None]:
    """Turn the errors of archives into sentences."""
    try:
        yield
    except tarfile.FilterError as error:
        raise _unsafe(copying.source, str(error)) from None
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _damaged(copying.source, f"{reason} (last looked at: {copying.at or 'its beginning'})") from None


def _damaged(source: Path, got: str) -> UserError:
    where = f"on node {socket.gethostname()}"
    return UserError(
        f"expected a complete copy of {source} {where}, got {got}; look whether it is damaged.", FailureKind.data
    )


def _unsafe(source: Path, got: str) -> UserError:
    return UserError(
        f"expected members that stay inside {source}, got {got}; unpack it by hand if it is safe.", FailureKind.data
    )


def _on_disk(sizes: Iterable[int]) -> int:
    """Bytes that files take up, in whole blocks."""
    return sum(-(-size // _DISK_BLOCK) * _DISK_BLOCK for size in sizes)


def gigabytes(size: float) -> str:
    """Bytes in a unit that a person reads."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"


def status_of(item: os.DirEntry) -> os.stat_result | None:
    """What an entry of a folder is, or what it links to; None for a link to nothing."""
    try:
        return item.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


@contextmanager
def disk_errors(source: Path, root: Path) -> Iterator[None]:
    """Turn an OSError while ``source`` is copied to ``root`` into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            cure = "look whether both file systems work and start again"
            with explained(f"expected to copy {source} to {root}", cure, "data"):
                raise
        raise UserError(
            f"expected space for {source} in {root} on node {socket.gethostname()}, got a full disk with "
            f"{gigabytes(shutil.disk_usage(root).free)} free while copying (are there too many files?); delete what "
            "is not needed there or give another folder.",
            FailureKind.disk,
        ) from None


@contextmanager
def explained(expected: str, cure: str, kind: str) -> Iterator[None]:
    """Turn an OSError into a sentence that names the node and the file."""
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        got = f"{error.strerror or error}{place}"
        raise UserError(f"{expected} on node {socket.gethostname()}, got {got}; {cure}.", kind) from None
