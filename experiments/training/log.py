"""The record of a run: TensorBoard scalars, ``log.txt`` and a progress bar.

A checkpoint holds the length of every event file at its moment. Resuming cuts the files
back to it, so the record has each point once, whichever reader is used. (TensorBoard's own
``purge_step`` compares one step number for all tags and cannot serve here, where ``train/*``
counts steps and ``test/*`` epochs.)
"""

from __future__ import annotations

import io
import logging
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from experiments.training.checkpoint import DAMAGED
from runfolder.errors import SupersededError, UserError
from runfolder.failures import FailureKind
from runfolder.files import write_atomically
from runfolder.folder import RunFolder
from runfolder.naming import hyper_parameters
from runfolder.place import node_name

_SECONDS_BETWEEN_FLUSHES = 10.0


class RunLog:
    """Writes the record of one run; on ranks other than the first it does nothing.

    Args:
        folder: the run folder, or None to write nothing.
        guard: called before points go to disk; raises SupersededError where another process
            has taken the run.
    """

    def __init__(self, folder: RunFolder | None = None, guard: Callable[[], None] = lambda: None):
        self._folder, self.guard = folder, guard
        self._writer: SummaryWriter | None = None
        self._waiting: list[tuple[str, float, int, float]] = []
        self._flushed = time.monotonic()
        self._logger = logging.getLogger("experiments.run")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._handlers: list[logging.Handler] = []
        if folder is None:
            return
        self._handlers = [logging.FileHandler(folder.log, errors="backslashreplace"), _BesideTheBar()]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            self._logger.addHandler(handler)

    def begin(self, sizes: dict[str, int], config: dict[str, Any], primary_metric: str) -> None:
        """Open the event files; points can be written from here on.

        Args:
            sizes: {event file name: bytes to keep} of the checkpoint that is resumed; {} at a start.
            config: written for TensorBoard's HParams page at a start.
            primary_metric: the tag that this page shows.
        """
        if self._folder is None:
            return
        self.guard()
        cut_events(self._folder, sizes)
        self._writer = SummaryWriter(str(self._folder))
        if not sizes:
            for summary in hparams(hyper_parameters(config), {primary_metric: 0.0}):
                self._writer.file_writer.add_summary(summary)

    def scalar(self, tag: str, value: float, x: int) -> None:
        """One point; what x counts, :mod:`runfolder.tags` says."""
        if self._writer is not None:
            self._waiting.append((tag, value, x, time.time()))
            if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
                self._flush_if_ours()

    def outputs(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """The result's class scores (n, classes) and the labels of the test images."""
        if self._folder is not None:
            self.guard()
            content = io.BytesIO()
            np.savez_compressed(content, scores=scores, labels=labels)
            write_atomically(self._folder.outputs, content.getvalue())

    def say(self, sentence: str) -> None:
        """One line for ``log.txt`` and the screen."""
        if self._folder is not None:
            self._logger.info(sentence)

    def sizes(self) -> dict[str, int]:
        """Bring all points to disk (after ``guard``); the length of every event file.

        Raises:
            UserError: a file holds other bytes than were written.
        """
        if self._folder is None:
            return {}
        self._write()
        sizes = {}
        for path in self._folder.events:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        fault = lost_events(self._folder, sizes)
        if fault is not None:
            raise UserError(
                f"expected the record as it was written, got other bytes: {fault}; the disk or memory of {node_name()} "
                "fails, and the same command continues from the last checkpoint before these.",
                FailureKind.node,
            )
        return sizes

    def close(self) -> None:
        """Flush, unless the run has been taken, and close everything."""
        if self._writer is not None and self._flush_if_ours():
            self._writer.close()
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()

    def _flush_if_ours(self) -> bool:
        self._flushed = time.monotonic()
        try:
            self.guard()
        except (SupersededError, OSError):  # not ours, or not to be asked just now
            return False
        self._write()
        return True

    def _write(self) -> None:
        """TensorBoard's writer has a thread that writes whenever it likes: it gets the points only now."""
        for point in self._waiting:
            self._writer.add_scalar(*point)
        self._waiting.clear()
        self._writer.flush()


def cut_events(folder: RunFolder, sizes: dict[str, int]) -> None:
    """Cut event files back to these lengths; delete files that are not named."""
    for path in folder.events:
        if path.name not in sizes:
            path.unlink()
        elif path.stat().st_size > sizes[path.name]:
            with open(path, "rb") as file:
                write_atomically(path, file.read(sizes[path.name]))


def lost_events(folder: RunFolder, sizes: dict[str, int]) -> str | None:
    """Why event files cannot be cut back to these lengths: one is missing, too short or damaged."""
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found is None or found < size:
            return f"its record {name} should have {size} bytes and {'is missing' if found is None else f'has {found}'}"
        damage = _first_damage(path, size)
        if damage is not None:
            return f"its record {name} {DAMAGED} {damage} of {size}, so the points from there on are lost"
    return None


def _first_damage(path: Path, size: int) -> int | None:
    """Where the first bad record of an event file begins, within its first ``size`` bytes.

    A record is its length (8 bytes), that number's checksum (4), the data and their checksum (4); a
    checksum is CRC-32C, turned by 15 bits and shifted by a constant.
    """
    with open(path, "rb") as file:
        content = memoryview(file.read(size))
    place = 0
    while place < size:
        (length,) = struct.unpack_from("<Q", content, place) if place + 12 <= size else (size,)
        end = place + 12 + length + 4
        if end > size or _checksum(content[place : place + 8]) != bytes(content[place + 8 : place + 12]):
            return place
        if _checksum(content[place + 12 : end - 4]) != bytes(content[end - 4 : end]):
            return place
        place = end
    return None


def _checksum(data: memoryview) -> bytes:
    crc = google_crc32c.value(bytes(data))
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class _BesideTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
