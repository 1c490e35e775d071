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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from runfolder.errors import UserError
from runfolder.files import write_atomically, write_json
from runfolder.folder import RunFolder
from runfolder.place import cpu_name
from runfolder.records import Attempt

if TYPE_CHECKING:
    import torch

SNAPSHOT = "snapshot.json"  # in a copy of the code that jobs run from: what it is a copy of
_ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "tensorboard")


@dataclass(frozen=True)
class Code:
    """The state of the source code: a commit and how the files differ from it."""

    commit: str | None  # None: unknown
    dirty: bool | None  # None: unknown
    untracked: list[str]
    patch: bytes  # uncommitted changes of tracked files
    unknown: str | None = None  # why it is unknown


def code_of(root: Path) -> Code:
    """What the code in a folder is: asked from git, or written down where it was copied from a checkout.

    Raises:
        UserError: the copy's record is damaged.
    """
    if (root / SNAPSHOT).exists():  # git would answer for the checkout that the copy happens to lie in
        return _code_of_snapshot(root)
    try:
        if not listed(root, "--cached"):
            raise GitError("git knows no file of it")
        patch = git(root, "diff", "--no-ext-diff", "--no-color", "HEAD")
        untracked = listed(root, "--others", "--exclude-standard")
        commit = git(root, "rev-parse", "HEAD").decode().strip()
    except GitError as error:
        return Code(None, None, [], b"", str(error))
    return Code(commit, bool(patch or untracked), untracked, patch)


def _code_of_snapshot(root: Path) -> Code:
    try:
        record = json.loads((root / SNAPSHOT).read_text())
        patch = (root / record["diff"]).read_bytes() if record["diff"] else b""
        return Code(record["commit"], record["dirty"], record["untracked"], patch, record.get("unknown"))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"expected in {root / SNAPSHOT} what this copy of the code was made from, got something else; submit again."
        ) from None


class GitError(Exception):
    """Git does not answer, and why."""


def git(root: Path, *arguments: str) -> bytes:
    """What git prints.

    A checkout of another owner is asked too: its code is what runs.

    Raises:
        GitError: there is no git or no repository, or git fails.
    """
    trusted = ["-c", f"safe.directory={root.resolve()}", "-c", "core.fsmonitor=false"]
    try:
        command = ["git", "-C", str(root), *trusted, *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="backslashreplace").strip().splitlines()
        raise GitError(said[0] if said else f"git has exit code {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise GitError("git takes more than 30 s") from None
    except OSError as error:
        raise GitError(f"git: {error.strerror}") from None


def listed(root: Path, *which: str) -> list[str]:
    """The names that ``git ls-files`` gives, relative to the root.

    Raises:
        GitError: as :func:`git`.
    """
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
    from experiments.training.torch_settings import Switches  # and torch

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
        "unknown": code.unknown,
        "untracked": code.untracked[:100],
        "packages": versions(),
        "hardware": hardware(device),
        "switches": asdict(Switches.now()),
        "world_size": ranks,
        "data": data,
        "resumed_from_step": step,
    }
    write_json(folder.provenance, {"attempts": [*attempts, attempt]})
    return len(attempts) + 1


def check_data(folder: RunFolder, data: str, where: str) -> None:
    """See that a run goes on with the data that it began with.

    Args:
        folder: the run folder.
        data: fingerprint of the data set that is there now.
        where: what to call it in an error.

    Raises:
        UserError: they are others.
    """
    begun = [attempt for attempt in _earlier_attempts(folder.provenance) if attempt.get("resumed_from_step") == 0]
    first = begun[-1].get("data", data) if begun else data
    if first != data:
        raise UserError(
            f"expected the data that {folder.name} began with (fingerprint {first}), got others in {where} "
            f"(fingerprint {data}): other classes, names, sizes or numbers of images; continue it where the first are."
        )


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
    import torch  # which those who ask about the code alone can do without

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
    }
