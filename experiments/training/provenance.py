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
from datetime import UTC, datetime
from pathlib import Path

import torch

from experiments.training.files import write_atomically, write_json

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "hydra-core", "tensorboard")


def record_attempt(folder: Path, device: torch.device, ranks: int, step: int, data: str) -> int:
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
    path = folder / "provenance.json"
    attempts = _earlier_attempts(path)
    diff = _git("diff", "HEAD")
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    patch = None
    if diff:
        patch = f"diff-{hashlib.sha256(diff.encode()).hexdigest()[:8]}.patch"
        write_atomically(folder / patch, diff.encode())
    attempt = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _git("rev-parse", "HEAD").strip() or None,
        "dirty": bool(diff or untracked),
        "diff": patch,
        "untracked": untracked[:100],
        "packages": _versions(),
        "hardware": _hardware(device),
        "world_size": ranks,
        "data": data,
        "resumed_from_step": step,
    }
    write_json(path, {"attempts": [*attempts, attempt]})
    return len(attempts) + 1


def _earlier_attempts(path: Path) -> list[dict]:
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


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device) -> dict:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
