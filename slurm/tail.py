"""The end of a run's output, as it grows."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from runfolder.folder import RunFolder
from runfolder.printing import printable


def output_of(folder: RunFolder) -> Path | None:
    """The file with a run's output, if there is one yet."""
    return next((path for path in (folder.output, folder.log) if os.path.isfile(path)), None)


class Tail:
    """The end of a run's output as it grows; the file may come later, be replaced or be cut."""

    def __init__(self, folder: RunFolder):
        self.path: Path | None = None
        self._folder, self._file_id, self._place = folder, (0, 0), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def last(self, lines: int) -> str:
        """The last lines; what comes after them is for :meth:`more`."""
        return self._read(lambda file: last_lines(file, lines))

    def more(self) -> str:
        """What has come since the last call."""
        return self._read(self._rest)

    def _read(self, read: Callable[[BinaryIO], bytes]) -> str:
        self.path = self.path or output_of(self._folder)
        if self.path is None:
            return ""
        try:
            with open(self.path, "rb") as file:
                content = read(file)
                status = os.fstat(file.fileno())
                self._file_id, self._place = (status.st_dev, status.st_ino), file.tell()
        except OSError:  # between two files
            return ""
        return printable(self._decoder.decode(content), but="\r")

    def _rest(self, file: BinaryIO) -> bytes:
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) != self._file_id or status.st_size < self._place:
            self._place = 0
            self._decoder.reset()
        file.seek(self._place)
        return file.read()


def last_lines(file: BinaryIO, count: int) -> bytes:
    """The last lines of a file, of which no more is read than needed; leaves it at its end."""
    start = end = file.seek(0, os.SEEK_END)
    found = b""
    while start > 0 and found.count(b"\n") <= count:
        begin = max(0, start - 2**16)
        file.seek(begin)
        found, start = file.read(start - begin) + found, begin
    file.seek(end)
    lines = found.split(b"\n")
    wanted = count + (lines[-1] == b"")
    return b"\n".join(lines[-wanted:]) if wanted else b""
