"""Many images in a few large files: tar archives, and an index of where in them each image lies.

=====================  ===========================================================
``train-00000.tar``    some thousand images each, uncompressed, as CLASS/FILE
``val-00000.tar``      the same for validation
``index.npz``          written last: without it there is no copy
=====================  ===========================================================

The index holds for each split the arrays ``SPLIT_FIELD`` with an entry per image for each
field of `FIELDS`, and ``about``, JSON with the classes, the settings and each archive's bytes
and SHA-256.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import write_atomically

INDEX = "index.npz"
FORMAT = 1
SPLITS = ("train", "val")
FIELDS = {"archive": np.int32, "offset": np.int64, "length": np.int64, "label": np.int32, "crc32": np.uint32}
_OPEN = 256  # archives a process keeps open
_UNREADABLE = (  # what numpy and zipfile raise where bytes are not what they should be
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error,
    AttributeError, LookupError, MemoryError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class Shards:
    """The images of one split.

    Any process may read any image at any time: reads give their position, so forked processes
    can share open files.

    Args:
        archives: the files.
        fields: an array per field of `FIELDS`, and ``name``: the images' file names.
    """

    def __init__(self, archives: list[Path], fields: dict[str, np.ndarray]):
        self.archives, self.fields = archives, fields
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.fields["offset"])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def __del__(self):
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    @property
    def names(self) -> np.ndarray:
        """The images' file names, bytes."""
        return self.fields["name"]

    def where(self, index: int) -> str:
        """What to call an image in an error."""
        archive = self.archives[self.fields["archive"][index]]
        return f"{archive} ({os.fsdecode(bytes(self.names[index]))})"

    def read(self, index: int) -> bytes:
        """The bytes of one image.

        Raises:
            UserError: they are not the ones that were written.
        """
        offset, length, expected = (int(self.fields[name][index]) for name in ("offset", "length", "crc32"))
        try:
            content = os.pread(self._descriptor(int(self.fields["archive"][index])), length, offset)
            reason = "other bytes"
        except OSError as error:
            content, reason = b"", error.strerror
        if len(content) != length or zlib.crc32(content) != expected:
            raise UserError(
                f"expected the image that was packed in {self.where(index)}, got {reason}; copy that file again.",
                FailureKind.data,
            )
        return content

    def _descriptor(self, archive: int) -> int:
        if archive not in self._open:
            if len(self._open) >= _OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[archive] = os.open(self.archives[archive], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[archive]


def write_index(folder: Path, about: dict, splits: dict[str, dict[str, np.ndarray]]) -> None:
    """Write ``index.npz`` from what `open_shards` gives back."""
    arrays = {f"{split}_{field}": values for split, fields in splits.items() for field, values in fields.items()}
    arrays["about"] = np.frombuffer(json.dumps(about | {"format": FORMAT}).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(folder / INDEX, buffer.getvalue())


def read_about(folder: Path) -> dict:
    """Classes, settings and archives of a sharded copy.

    Raises:
        UserError: no index, or a damaged one.
    """
    return _read_index(folder)[0]


def open_shards(folder: Path) -> tuple[dict, dict[str, Shards]]:
    """A sharded copy: what `read_about` gives, and its splits by name.

    Raises:
        UserError: no index, a damaged one, or archives that are not as they were written.
    """
    about, arrays = _read_index(folder)
    for name, archive in about["archives"].items():
        try:
            got = f"{(folder / name).stat().st_size:,}"
        except OSError as error:
            got = error.strerror.lower()
        if got != f"{archive['bytes']:,}":
            raise UserError(
                f"expected {archive['bytes']:,} bytes in {folder / name}, got {got}; copy that file again.",
                FailureKind.data,
            )
    splits = {}
    for split in SPLITS:
        archives = [folder / name for name in about["archives"] if name.startswith(f"{split}-")]
        splits[split] = Shards(archives, {field: arrays[f"{split}_{field}"] for field in (*FIELDS, "name")})
    return about, splits


def _read_index(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        with np.load(folder / INDEX, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(arrays.pop("about").tobytes())
        expected = {f"{split}_{field}" for split in SPLITS for field in (*FIELDS, "name")}
        if about["format"] != FORMAT or not expected <= set(arrays):
            raise ValueError(f"format {about['format']}")
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"expected an index that experiments/tools/shard_images.py has written in {folder / INDEX}, "
            f"got: {reason}; make the copy again.",
            FailureKind.data,
        ) from None
    return about, arrays
