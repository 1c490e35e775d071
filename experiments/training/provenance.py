"""What a run was made with: code, packages, hardware and command, once per attempt."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from runfolder.errors import UserError
from runfolder.files import write_atomically, write_json
from runfolder.folder import RunFolder
from runfolder.place import cpu_name
from runfolder.records import Attempt

SNAPSHOT = "snapshot.json"  # in a copy of the code that jobs run from: what it is a copy of
_ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "tensorboard")


@dataclass(frozen=True)
class Code:
    """The state of the source code: a commit and how the files differ from it."""

    commit: str | None  # None: not under git
    dirty: bool
    untracked: list[str]
    patch: bytes  # uncommitted changes of tracked files


def code_of(root: Path) -> Code:
    """What the code in a folder is: asked from git, or written down where it was copied from a checkout.

    Raises:
        UserError: the copy's record is damaged.
    """
    if (root / SNAPSHOT).exists():  # git would answer for the checkout that the copy happens to lie in
        return _code_of_snapshot(root)
    if not listed(root, "--cached"):
        return Code(None, False, [], b"")
    patch = git(root, "diff", "--no-ext-diff", "--no-color", "HEAD")
    untracked = listed(root, "--others", "--exclude-standard")
    commit = git(root, "rev-parse", "HEAD").decode().strip() or None
    return Code(commit, bool(patch or untracked), untracked, patch)


def _code_of_snapshot(root: Path) -> Code:
    try:
        record = json.loads((root / SNAPSHOT).read_text())
        patch = (root / record["diff"]).read_bytes() if record["diff"] else b""
        return Code(record["commit"], record["dirty"], record["untracked"], patch)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"expected in {root / SNAPSHOT} what this copy of the code was made from, got something else; submit again."
        ) from None


def git(root: Path, *arguments: str) -> bytes:
    """What git prints, or nothing where there is no git or no repository."""
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def listed(root: Path, *which: str) -> list[str]:
    """The names that ``git ls-files`` gives, relative to the root."""
    return [os.fsdecode(name) for name in git(root, "ls-files", "-z", *which).split(b"\0") if name]


def record_attempt(folder: RunFolder, device: torch.device, ranks: int, step: int, data: str) -> int:
    """Append this attempt to ``provenance.json``; uncommitted changes go into ``diff-<hash>.patch``.

    Args:
        folder: the run folder.
        device: where it trains.
        ranks: number of processes.
        step: the optimizer step it starts from.
        data: fingerprint of the data set.

    Returns:
        How many attempts there were, with this one.
    """
    attempts = _earlier_attempts(folder.provenance)
    code = code_of(_ROOT)
    patch = None
    if code.patch:
        patch = f"diff-{hashlib.sha256(code.patch).hexdigest()[:8]}.patch"
        write_atomically(folder / patch, code.patch)
    attempt: Attempt = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": code.commit,
        "dirty": code.dirty,
        "diff": patch,
        "untracked": code.untracked[:100],
        "packages": versions(),
        "hardware": hardware(device),
        "world_size": ranks,
        "data": data,
        "resumed_from_step": step,
    }
    write_json(folder.provenance, {"attempts": [*attempts, attempt]})
    return len(attempts) + 1


def _earlier_attempts(path: Path) -> list[Attempt]:
    if not path.exists():
        return []
    try:
        attempts = json.loads(path.read_text())["attempts"]
        if isinstance(attempts, list):
            return attempts
    except (ValueError, KeyError, TypeError):
        pass
    path.replace(path.with_name("provenance-damaged.json"))  # kept for a person to look at
    return []


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict:
    """The device, the machine's cores, torch's threads and the host."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
    }
