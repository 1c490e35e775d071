"""The points of run folders, kept from one reading to the next.

    <folder>/<sha256 of the run folder's path>      one file per run folder

The folder is ``tract-analysis`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` unless the command line says
otherwise, and may be deleted at any time. A file is a line with the version and a checksum, a line of
JSON, and the points as arrays of 8-byte numbers, 24 bytes a point. Whatever is damaged, of another
version or of other files is not used; what cannot be written is not kept. The law is that a reading
through the cache gives what a reading without it gives (see :mod:`analysis.events`).

Why a file per run and no database: for 2,000 runs of 4,600 points both read in about the same time
(0.05 s, and 0.07 s from sqlite3; medians of 3, in memory, one core of an Intel Xeon, Python 3.11.7),
but a file can be replaced in one step, also by two processes at once and on a network disk, where
the locks of a database may not hold; and only what has changed is written. ``config.yaml`` and the
JSON files are not kept: they are small, and ``CSafeLoader`` needs 0.3 ms for the 71 lines of one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import sys
from array import array
from pathlib import Path

import google_crc32c

from analysis import events
from analysis.events import Damage, EventLog, Extent, Series, Skipped
from runfolder.files import write_atomically

_NAME = "tract-analysis"
_FAILING = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE}  # worth a sentence; no permission is not


def _version() -> str:
    """Changes with the code that reads, so that nobody need remember to count it up."""
    code = Path(events.__file__).read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(code + sys.byteorder.encode()).hexdigest()[:16]


_VERSION = _version()


def default_folder() -> Path | None:
    """``$XDG_CACHE_HOME/tract-analysis`` or ``~/.cache/tract-analysis``; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = os.path.expanduser("~/.cache")
    return Path(base, _NAME) if os.path.isabs(base) else None


class Cache:
    """What has been read of run folders, in ``folder``, which is made when something is written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writes = True

    def read_events(self, run: Path) -> EventLog:
        """As :func:`analysis.events.read_events`, but what is known is not read again."""
        known = self._get(run)
        before = list(known.extents) if known else []
        log = events.read_events(run, known)
        if log.extents and log.extents != before:
            self._put(run, log)
        return log

    def path_of(self, run: Path) -> Path:
        """Where the points of a run folder are kept."""
        return self.folder / hashlib.sha256(os.fsencode(os.path.abspath(run))).hexdigest()

    def _get(self, run: Path) -> EventLog | None:
        try:
            return unpack(self.path_of(run).read_bytes(), run)
        except OSError:
            return None

    def _put(self, run: Path, log: EventLog) -> None:
        if not self._writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path_of(run), pack(log, run), durable=False)
        except OSError as error:
            self._writes = False  # once is enough
            if error.errno in _FAILING:
                text = f"the cache {self.folder} cannot be written ({error.strerror}), so the next reading takes longer"
                print(f"{text}; --cache DIR chooses another.", file=sys.stderr)


def pack(log: EventLog, run: Path) -> bytes:
    """The cache file of a run folder's log."""
    facts = {
        "folder": os.path.abspath(run),
        "files": [path.name for path in log.files],
        "extents": [dataclasses.astuple(extent) for extent in log.extents],
        "damages": [(damage.file.name, *dataclasses.astuple(damage)[1:]) for damage in log.damages],
        "skipped": [(skipped.file.name, *dataclasses.astuple(skipped)[1:]) for skipped in log.skipped],
        "series": {tag: len(points) for tag, points in log.series.items()},
    }
    columns = (column for s in log.series.values() for column in (s.steps, s.values, s.wall_times))
    body = b"".join([json.dumps(facts).encode(), b"\n", *columns])
    return _first_line(body) + body


def unpack(content: bytes, run: Path) -> EventLog | None:
    """The log in a cache file; None where it is damaged, of another version or of another folder."""
    first, _, body = content.partition(b"\n")
    if first + b"\n" != _first_line(body):
        return None
    line, _, numbers = body.partition(b"\n")
    facts = json.loads(line)
    if facts["folder"] != os.path.abspath(run):
        return None
    return EventLog(
        files=tuple(run / name for name in facts["files"]),
        series=_series(facts["series"], numbers),
        damages=[Damage(run / name, *rest) for name, *rest in facts["damages"]],
        skipped=[Skipped(run / name, *rest) for name, *rest in facts["skipped"]],
        extents=[Extent(tuple(identity), *rest) for identity, *rest in facts["extents"]],
    )


def _first_line(body: bytes) -> bytes:
    return f"{_NAME} {_VERSION} {google_crc32c.value(body):08x}\n".encode()


def _series(lengths: dict[str, int], numbers: bytes) -> dict[str, Series]:
    series, start = {}, 0
    for tag, length in lengths.items():
        columns = []
        for code in "qdd":
            end = start + 8 * length
            columns.append(array(code, numbers[start:end]))
            start = end
        series[tag] = Series(*columns)
    return series
