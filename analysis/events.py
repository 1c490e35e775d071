"""Every scalar point of a folder's TensorBoard event files.

An event file is a sequence of TFRecord frames, all integers little-endian:

    length          uint64
    masked crc32c   uint32, of the eight bytes of length
    data            length bytes: one serialised Event
    masked crc32c   uint32, of data

    masked(c) = ((c >> 15) | (c << 17)) + 0xa282ead8   (mod 2^32)

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto. Files are
read frame by frame; nothing is down-sampled, and damage is recorded, never raised.
"""

from __future__ import annotations

import math
import os
import re
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util.tensor_util import make_ndarray

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_SCALARS = "scalars"  # the plug-in that owns scalars in the newer format


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
        return sorted(step for step, count in Counter(self.steps).items() if count > 1)


@dataclass
class EventLog:
    """What a folder's event files hold, after all restarts."""

    files: tuple[Path, ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)

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


def read_events(folder: Path) -> EventLog:
    """Read all event files of a folder (not of its subfolders), in the order of their start."""
    log = EventLog(files=tuple(event_files(folder)))
    for path in log.files:
        _read_file(path, log)
    return log


def event_files(folder: Path) -> list[Path]:
    """A folder's event files in the order of their start.

    The start is the second in the file's name, then the time of its first event, then the name.
    """
    return sorted((path for path in folder.glob("*tfevents*") if path.is_file()), key=_start)


def _start(path: Path) -> tuple[float, float, str]:
    first = _first_wall_time(path)
    stamp = re.search(r"tfevents\.(\d+)", path.name)
    return (float(stamp[1]) if stamp else math.floor(first), first, path.name)


def _first_wall_time(path: Path) -> float:
    try:
        offset, data = next(records(path))
        wall_time = _parse(offset, data).wall_time
    except DamagedRecordError:
        return 0.0
    return wall_time if math.isfinite(wall_time) else 0.0


def _read_file(path: Path, log: EventLog) -> None:
    plugins: dict[str, str] = {}
    try:
        for offset, data in records(path):
            event = _parse(offset, data)
            points = _scalars(event, offset, plugins)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                log.restart(event.step)
            for tag, value in points:
                log.series.setdefault(tag, Series()).append(event.step, value, event.wall_time)
    except DamagedRecordError as damage:
        log.damages.append(Damage(path, damage.offset, damage.reason, damage.truncated))


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, data) of each record, one in memory at a time.

    Raises:
        DamagedRecordError: a bad checksum, a truncated record, no record, or no access.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DamagedRecordError(0, "the file is empty", truncated=True)
            while (offset := file.tell()) < size:
                yield offset, _read_record(file, offset, size)
    except OSError as error:
        raise DamagedRecordError(0, f"the file cannot be read ({error.strerror})") from None


def _read_record(file: BinaryIO, offset: int, size: int) -> bytes:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DamagedRecordError(offset, "the last record is truncated", truncated=True)
    length, checksum = _HEADER.unpack(header)
    if checksum != masked_crc32c(header[:8]):
        raise DamagedRecordError(offset, "the checksum of a record's length is wrong")
    if offset + _HEADER.size + length + _CHECKSUM.size > size:
        raise DamagedRecordError(offset, "the last record is truncated", truncated=True)
    data = file.read(length)
    tail = file.read(_CHECKSUM.size)
    if len(data) < length or len(tail) < _CHECKSUM.size:
        raise DamagedRecordError(offset, "the file became shorter while it was read", truncated=True)
    if _CHECKSUM.unpack(tail)[0] != masked_crc32c(data):
        raise DamagedRecordError(offset, "the checksum of a record's data is wrong")
    return data


def masked_crc32c(data: bytes) -> int:
    """The checksum of a TFRecord: crc32c, rotated right by 15 bits, plus a constant (mod 2^32)."""
    crc = google_crc32c.value(data)
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
        if item.metadata.plugin_data.plugin_name:
            plugins.setdefault(tag, item.metadata.plugin_data.plugin_name)
        if item.HasField("simple_value"):
            points.append((tag, item.simple_value))
        elif item.HasField("tensor") and plugins.get(tag) == _SCALARS:
            points.append((tag, _tensor_value(item, offset)))
    return points


def _tensor_value(item: Summary.Value, offset: int) -> float:
    try:
        return float(make_ndarray(item.tensor).item())
    except (TypeError, ValueError, IndexError, KeyError):
        raise DamagedRecordError(offset, f"the scalar {item.tag} is not one number") from None
