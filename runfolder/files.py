"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

TEMPORARY = ".tmp"


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write beside, flush to disk, rename, flush the folder: readers see all or nothing.

    Args:
        path: the file.
        content: its bytes.
        durable: False leaves out the flushes, for what a crash of the machine may lose.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk helps nobody
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict, durable: bool = True) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode(), durable)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is none or it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
