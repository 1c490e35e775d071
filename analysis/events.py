"""Every scalar point of a folder's TensorBoard event files.

An event file is a sequence of TFRecord frames, all integers little-endian:

    length          uint64
    masked crc32c   uint32, of the eight bytes of length
    data            length bytes: one serialised Event
    masked crc32c   uint32, of data

    masked(c) = ((c >> 15) | (c << 17)) + 0xa282ead8   (mod 2^32)

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto. Files are
read in blocks; nothing is down-sampled, and damage is recorded, never raised.

What an earlier reading gave can be read on: a log is a fold over the records of all files in
their order, so it is still the beginning of the answer where every file begins with the same
bytes and only the last one has grown or files have come after it. A file is known to be the
same by its size, times and inode, if it had been left alone for a while when it was read;
otherwise by the checksum of all bytes that were read.
"""

from __future__ import annotations

import math
import os
import re
import struct
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util.tensor_util import make_ndarray

from runfolder.files import TEMPORARY

LARGEST = 2**24  # bytes of a record that is still parsed: room for many scalars, not for a film
EMPTY = "the file is empty"
_BLOCK = 2**20
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_SCALARS = "scalars"  # the plug-in that owns scalars in the newer format
# The coarsest clock of a file system ticks every 2 s; the rest is for a file server whose clock is off.
_SETTLED_NS = 10 * 10**9


@dataclass(frozen=True)
class Damage:
    """Where reading an event file had to stop; nothing after this byte was read."""

    file: Path
    offset: int  # of the first byte of the damaged record
    reason: str
    truncated: bool = False  # the file just ends, as after a kill or a full disk
    restarted: bool = False  # a later file starts by saying which points it replaces


class DamagedRecordError(Exception):
    """A record that cannot be read. Raised and caught inside this module."""

    def __init__(self, offset: int, reason: str, truncated: bool = False):
        super().__init__(reason)
        self.offset, self.reason, self.truncated = offset, reason, truncated


@dataclass(frozen=True)
class Skipped:
    """A sound record that is too large to be parsed: its points, if it has any, are missing."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Extent:
    """How far an event file was read, and what it was then."""

    identity: tuple[int, ...] = ()  # size, mtime and ctime in ns, inode; () where it could not be read
    settled: bool = False  # left alone for so long that the identity shows any later change
    offset: int = 0  # of the first byte that was not read
    checksum: int = 0  # crc32c of all bytes before
    plugins: dict[str, str] = field(default_factory=dict)  # the owner of a tag, named once per file


@dataclass
class Series:
    """The points of one tag in file order, 24 bytes each."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))
    wall_times: array = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, value: float, wall_time: float) -> None:
        """Add a point at the end."""
        self.steps.append(step)
        self.values.append(value)
        self.wall_times.append(wall_time)

    def purge(self, step: int) -> None:
        """Drop the points at ``step`` and later."""
        kept = [i for i, own in enumerate(self.steps) if own < step]
        if len(kept) < len(self):
            self.steps = array("q", (self.steps[i] for i in kept))
            self.values = array("d", (self.values[i] for i in kept))
            self.wall_times = array("d", (self.wall_times[i] for i in kept))

    def by_step(self) -> dict[int, float]:
        """{step: value} in ascending order; of a repeated step the last value."""
        latest = dict(zip(self.steps, self.values, strict=True))
        return dict(sorted(latest.items()))

    def repeated_steps(self) -> list[int]:
        """The steps that have more than one point, ascending."""
        steps, counts = np.unique(np.asarray(self.steps), return_counts=True)
        return steps[counts > 1].tolist()


@dataclass
class EventLog:
    """What a folder's event files hold, after all restarts."""

    files: tuple[Path, ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list, repr=False, compare=False)  # of each file

    def by_step(self, tag: str) -> dict[int, float]:
        """{step: value} of a tag, ascending; empty where the tag does not occur."""
        return self.series[tag].by_step() if tag in self.series else {}

    def restart(self, step: int) -> None:
        """A session starts at ``step``: every point there or later is replaced, of all tags.

        TensorBoard's rule (``purge_step`` of a SummaryWriter). What an earlier file lost at
        its end is what the new session writes again.
        """
        for points in self.series.values():
            points.purge(step)
        self.series = {tag: points for tag, points in self.series.items() if len(points)}
        self.damages = [replace(damage, restarted=True) for damage in self.damages]


def read_events(folder: Path, known: EventLog | None = None) -> EventLog:
    """Read all event files of a folder (not of its subfolders), in the order of their start.

    Args:
        folder: where they are.
        known: what an earlier call gave for this folder. Where it is still the beginning of the
            answer it is read on and returned, otherwise everything is read anew; the answer is
            the same.
    """
    if known is not None and _untouched(folder, known):
        return known
    try:
        paths = event_files(folder)
    except OSError as error:
        return EventLog(damages=[Damage(folder, 0, f"the folder cannot be read ({error.strerror})")])
    log = known if known is not None and _read_on(paths, known) else EventLog()
    for path in paths[len(log.extents) :]:
        _read_file(path, log)
    log.files = tuple(paths)
    return log


def event_files(folder: Path) -> list[Path]:
    """A folder's event files in the order of their start.

    The start is the second in the file's name, then the time of its first event, then the name.
    """
    paths = _event_files(folder)
    return sorted(paths, key=_start) if len(paths) > 1 else paths


def _event_files(folder: Path) -> list[Path]:
    """Without hidden ones, which macOS and rsync put beside those that they copy."""
    found = (path for path in folder.glob("*tfevents*") if path.suffix != TEMPORARY and path.name[0] != ".")
    return [path for path in found if path.is_file()]


def _start(path: Path) -> tuple[float, float, str]:
    first = _first_wall_time(path)
    stamp = re.search(r"tfevents\.(\d+)", path.name)
    return (float(stamp[1]) if stamp else math.floor(first), first, path.name)


def _first_wall_time(path: Path) -> float:
    try:
        with open(path, "rb") as file:
            wall_time = next((_parse(*found).wall_time for found in RecordReader(file, block=256)), 0.0)
    except (DamagedRecordError, OSError):
        return 0.0
    return wall_time if math.isfinite(wall_time) else 0.0


def _untouched(folder: Path, log: EventLog) -> bool:
    """Whether a folder has the very files of a log, without opening them."""
    try:
        now = {path: _identity(path.stat()) for path in _event_files(folder)}
    except OSError:
        return False
    then = {path: extent.identity for path, extent in zip(log.files, log.extents, strict=True) if extent.settled}
    return now == then and len(then) == len(log.files)


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _read_on(paths: list[Path], log: EventLog) -> bool:
    """Read on in a log's last file; False where a file is not what it was, and the log is of no use."""
    count = len(log.extents)
    if tuple(paths[:count]) != log.files:
        return False
    for index in range(count - 1):
        extent = _same(paths[index], log.extents[index])
        if extent is None:
            return False
        log.extents[index] = extent
    return count == 0 or _read_file(paths[count - 1], log, log.extents.pop())


def _same(path: Path, extent: Extent) -> Extent | None:
    """The extent of a file that was read to its end and has not changed since."""
    try:
        with open(path, "rb") as file:
            reader = RecordReader(file)
            if reader.identity == extent.identity and extent.settled:
                return extent
            whole = extent.identity[:1] == (reader.size,) == (extent.offset,)
            same = whole and reader.skip_to(extent)
            return replace(extent, identity=reader.identity, settled=reader.settled) if same else None
    except OSError:
        return None


def _read_file(path: Path, log: EventLog, extent: Extent | None = None) -> bool:
    """Add a file to a log; of one that is read on, what follows ``extent``.

    Returns:
        False where the file cannot be read on from there; the log is then of no use.
    """
    reader, broken = None, None
    try:
        with open(path, "rb") as file:
            reader = RecordReader(file)
            if extent is not None and not reader.skip_to(extent):
                return False
            log.damages = [damage for damage in log.damages if damage.file != path]
            _add(reader, log)
    except OSError as error:
        if extent is not None:  # what a full reading can read is the answer
            return False
        broken = f"the file cannot be read ({error.strerror})"
        log.damages.append(Damage(path, reader.offset if reader else 0, broken))
    except DamagedRecordError as damage:
        log.damages.append(Damage(path, damage.offset, damage.reason, damage.truncated))
    log.skipped += [Skipped(path, *where) for where in reader.skipped] if reader else []
    # A disk that fails may recover, and the file's identity would not show it.
    log.extents.append(Extent() if reader is None else reader.extent(broken is None))
    return True


def _add(reader: RecordReader, log: EventLog) -> None:
    for offset, data in reader:
        event = _parse(offset, data)
        what = event.WhichOneof("what")
        if what == "summary":
            for tag, value in _scalars(event, offset, reader.plugins):
                series = log.series.get(tag)
                if series is None:
                    series = log.series[tag] = Series()
                series.append(event.step, value, event.wall_time)
        elif what == "session_log" and event.session_log.status == SessionLog.START:
            log.restart(event.step)


class RecordReader:
    """The records of an open event file, a block in memory at a time.

    Iterating yields (byte offset, data) of each record. A record of more than ``LARGEST`` bytes
    is only checked, and listed in ``skipped``; nothing is allocated because a length says so.
    The file ends where it ended when the reader was made.

    Raises:
        DamagedRecordError: while iterating: a bad checksum, a truncated record or an empty file.
        OSError: the file cannot be read.
    """

    def __init__(self, file: BinaryIO, block: int = _BLOCK):
        now, facts = time.time_ns(), os.fstat(file.fileno())
        self.identity, self.size = _identity(facts), facts.st_size
        self.settled = now - max(facts.st_mtime_ns, facts.st_ctime_ns) > _SETTLED_NS
        self.skipped: list[tuple[int, int]] = []  # offset and length
        self.plugins: dict[str, str] = {}
        self.offset, self.checksum = 0, 0  # as in Extent: of the records that were taken and used
        self._file, self._block = file, block

    def extent(self, trusted: bool) -> Extent:
        """How far the file has been read."""
        return Extent(self.identity, self.settled and trusted, self.offset, self.checksum, self.plugins)

    def skip_to(self, extent: Extent) -> bool:
        """Go on where an earlier reader ended; False where the bytes before are not the same."""
        checksum = 0
        for block in self._blocks(0, extent.offset):
            checksum = google_crc32c.extend(checksum, block)
        if self.size < extent.offset or checksum != extent.checksum:
            return False
        self.offset, self.checksum, self.plugins = extent.offset, extent.checksum, dict(extent.plugins)
        return True

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        if self.size == 0:
            raise DamagedRecordError(0, EMPTY, truncated=True)
        wanted = self._block
        while self.offset < self.size:
            block = b"".join(self._blocks(self.offset, wanted))
            yield from self._whole_records(block)
            length = self._length_at(self.offset) if self.offset < self.size else 0
            if length > LARGEST:
                self._pass_over(length)
                length = 0
            wanted = max(self._block, _HEADER.size + length + _CHECKSUM.size)

    def _whole_records(self, block: bytes) -> Iterator[tuple[int, bytes]]:
        """The records that lie in a block as a whole, the first of which begins with it."""
        start = 0
        while start + _HEADER.size <= len(block):
            length = _length(block[start : start + _HEADER.size])
            end = start + _HEADER.size + length + _CHECKSUM.size if length is not None else 0
            if length is None or end > len(block):
                return
            data = block[start + _HEADER.size : end - _CHECKSUM.size]
            if _CHECKSUM.unpack_from(block, end - _CHECKSUM.size)[0] != _masked(google_crc32c.value(data)):
                raise DamagedRecordError(self.offset, "the checksum of a record's data is wrong")
            yield self.offset, data
            self.checksum = google_crc32c.extend(self.checksum, block[start:end])
            self.offset += end - start
            start = end

    def _length_at(self, offset: int) -> int:
        """The length of a record that the file holds as a whole."""
        header = b"".join(self._blocks(offset, _HEADER.size))
        if len(header) < _HEADER.size:
            raise DamagedRecordError(offset, "the last record is truncated", truncated=True)
        length = _length(header)
        if length is None:
            raise DamagedRecordError(offset, "the checksum of a record's length is wrong")
        if offset + _HEADER.size + length + _CHECKSUM.size > self.size:
            raise DamagedRecordError(offset, "the last record is truncated", truncated=True)
        return length

    def _pass_over(self, length: int) -> None:
        """Check a record without keeping it."""
        start, checksum = self.offset + _HEADER.size, 0
        whole = google_crc32c.extend(self.checksum, b"".join(self._blocks(self.offset, _HEADER.size)))
        for block in self._blocks(start, length):
            checksum, whole = google_crc32c.extend(checksum, block), google_crc32c.extend(whole, block)
        tail = b"".join(self._blocks(start + length, _CHECKSUM.size))
        if tail != _CHECKSUM.pack(_masked(checksum)):
            raise DamagedRecordError(self.offset, "the checksum of a record's data is wrong")
        self.skipped.append((self.offset, length))
        self.offset, self.checksum = start + length + len(tail), google_crc32c.extend(whole, tail)

    def _blocks(self, offset: int, count: int) -> Iterator[bytes]:
        """The next ``count`` bytes, or those that there are."""
        self._file.seek(offset)
        end = min(offset + count, self.size)
        while offset < end:
            block = self._file.read(min(self._block, end - offset))
            if not block:
                self.size = offset  # cut while it was read: this is the end
                return
            yield block
            offset += len(block)


@lru_cache(maxsize=4096)  # most records have one of a few lengths
def _length(header: bytes) -> int | None:
    """The length that a record's header states; None where its checksum is wrong."""
    length, checksum = _HEADER.unpack(header)
    return length if checksum == masked_crc32c(header[:8]) else None


def masked_crc32c(data: bytes) -> int:
    """The checksum of a TFRecord: crc32c, rotated right by 15 bits, plus a constant (mod 2^32)."""
    return _masked(google_crc32c.value(data))


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _parse(offset: int, data: bytes) -> Event:
    try:
        return Event.FromString(data)
    except DecodeError:
        raise DamagedRecordError(offset, "a record holds no event") from None


def _scalars(event: Event, offset: int, plugins: dict[str, str]) -> list[tuple[str, float]]:
    """(tag, value) of each scalar; ``plugins`` remembers the owner of a tag, named once per file."""
    points = []
    for item in event.summary.value:
        tag = item.tag or item.node_name
        kind = item.WhichOneof("value")
        if item.HasField("metadata") and item.metadata.plugin_data.plugin_name:
            plugins.setdefault(tag, item.metadata.plugin_data.plugin_name)
        if kind == "simple_value":
            points.append((tag, item.simple_value))
        elif kind == "tensor" and plugins.get(tag) == _SCALARS:
            points.append((tag, _tensor_value(item, offset)))
    return points


def _tensor_value(item: Summary.Value, offset: int) -> float:
    try:
        return float(make_ndarray(item.tensor).item())
    except (TypeError, ValueError, IndexError, KeyError):
        raise DamagedRecordError(offset, f"the scalar {item.tag} is not one number") from None
