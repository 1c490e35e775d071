"""Checkpoints that are whole or rejected by name.

A checkpoint is one file, ``checkpoints/step-00000800-<16 hex>.pt``; the hex digits are the
start of the SHA-256 of its bytes, so one rename publishes content and checksum together. It
is read with ``torch.load(weights_only=True)`` only: nothing is unpickled but tensors and
plain values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import remove_leftovers, write_atomically
from runfolder.folder import newest_first

FORMAT = 2
DAMAGED = "is damaged at byte"  # what is said of a record
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why."""


class Keeper:
    """Writes the checkpoints of a run and deletes older ones.

    It deletes only what was there when it began and what it wrote itself: a process that has
    been superseded while it was writing must not delete what the newer one wrote.

    Args:
        folder: the run's ``checkpoints`` folder.
        config_hash: the configuration that the checkpoints belong to.
        keep: how many checkpoints stay.
        start: the checkpoint that the run continues from; newer ones were passed over and go
            with the first save.
    """

    def __init__(self, folder: Path, config_hash: str, keep: int, start: Path | None = None):
        self.folder, self._hash, self._keep = folder, config_hash, keep
        present = newest_first(folder)
        begin = present.index(start) if start in present else len(present)
        self._kept, self._bad = present[begin:], present[:begin]

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write a checkpoint and delete all but the newest ``keep``.

        Args:
            step: optimizer steps done.
            content: tensors, numbers, strings, lists and dictionaries.

        Returns:
            The new file.
        """
        self.folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "config_hash": self._hash, "step": step, **content}, buffer)
        data = buffer.getvalue()
        path = self.folder / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        write_atomically(path, data)
        self._kept = [path, *(old for old in self._kept if old != path)]
        self._prune()
        return path

    def _prune(self) -> None:
        superfluous = [old for old in self._bad if old not in self._kept] + self._kept[self._keep :]
        self._kept, self._bad = self._kept[: self._keep], []
        for old in superfluous:
            old.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """The bytes of a file; of a checkpoint those that the checksum in its name is of.

    Raises:
        CheckpointError: they are others.
        OSError: the file cannot be read, which does not say that it is damaged.
    """
    match, data = _NAME.fullmatch(path.name), path.read_bytes()
    if match and hashlib.sha256(data).hexdigest()[:16] != match[2]:
        raise CheckpointError(f"{path} is damaged: its {len(data)} bytes do not have the checksum in its name")
    return data


def load(path: Path, config_hash: str) -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        CheckpointError: damaged, of another configuration or of another format.
    """
    if not _NAME.fullmatch(path.name):
        raise CheckpointError(f"{path} is not named as a checkpoint, step-STEP-CHECKSUM.pt")
    data = read(path)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} has another format than {FORMAT}, which this version reads")
    if content.get("config_hash") != config_hash:
        raise CheckpointError(
            f"{path} belongs to another configuration ({content.get('config_hash')}, this run is {config_hash})"
        )
    return content


def newest_good(
    folder: Path,
    config_hash: str,
    report: Callable[[str], None],
    fault: Callable[[dict[str, Any]], str | None] = lambda content: None,
) -> Path | None:
    """The newest checkpoint that can be read, or None; every bad one is reported by name.

    Args:
        folder: the run's ``checkpoints`` folder; temporary files in it are deleted.
        config_hash: the configuration of the run.
        report: called with one sentence for each checkpoint that is passed over.
        fault: told a checkpoint's content, why it cannot be used all the same, or None.

    Raises:
        UserError: a checkpoint or what belongs to it cannot be read, and may be as good as ever; or all
            that is wrong with every checkpoint is that the record before it is damaged.
    """
    remove_leftovers(folder)
    damaged = ""
    for path in newest_first(folder):
        try:
            reason = fault(load(path, config_hash))
        except CheckpointError as error:
            reason = str(error)
        except FileNotFoundError as error:
            reason = f"{error.filename} is gone"
        except OSError as error:
            raise UserError(
                f"expected to read {error.filename or path}, got: {error.strerror}; nothing has been deleted, and the "
                "same command continues when it can be read.",
                FailureKind.disk if error.errno in (errno.EACCES, errno.EPERM) else FailureKind.node,
            ) from None
        if reason is None:
            return path
        report(f"{path.name}: {reason}; it is passed over")
        damaged = reason if DAMAGED in reason else damaged
    if damaged:  # days of training are not thrown away for a byte
        raise UserError(
            f"expected a checkpoint whose record is whole, got none: {damaged}; restore that file from a copy, or move "
            f"{folder} elsewhere to begin anew.",
            FailureKind.disk,
        )
    return None


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
