"""What the files in a run folder say of the run. Nothing here is slow to import or to call."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.training.lease import is_held

TIMM = "timm:"  # what start_from begins with where weights are timm's


def state_of(folder: Path, now: float | None = None) -> str:
    """In a word: finished, running, cancelled, failed, resumable, or missing.

    Args:
        folder: the run folder.
        now: the file system's time, where it is known already.
    """
    if (folder / "result.json").exists():
        return "finished"
    if is_held(folder, now):
        return "running"
    if (folder / "cancelled").exists():
        return "cancelled"
    if (folder / "failure.json").exists():
        return "failed"
    return "resumable" if newest(folder / "checkpoints") else "missing"


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint file by step, unread."""
    return next(iter(newest_first(checkpoints)), None)


def newest_first(checkpoints: Path) -> list[Path]:
    """All checkpoint files, the highest step first."""
    found = (path for path in checkpoints.glob("step-*.pt") if path.is_file())
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path | None) -> int:
    """The optimizer step in a checkpoint's name; 0 without one."""
    match = re.match(r"step-(\d+)", path.name) if path else None
    return int(match[1]) if match else 0


def start_of(folder: Path, start_from: str | None) -> Path | None:
    """The run folder that a run's ``start_from`` names, whether it is there yet or not; None if it names no run.

    EXPERIMENT/NAME is a run in the same folder of runs, NAME alone one of the same experiment.

    Args:
        folder: the folder of the run that has ``start_from`` in its configuration.
        start_from: a run, a checkpoint file (.pt, .pth), timm:NAME or None.
    """
    if start_from is None or start_from.startswith(TIMM) or start_from.endswith((".pt", ".pth")):
        return None
    path = Path(start_from).expanduser()
    base = folder.absolute().parents[1] if "/" in start_from else folder.absolute().parent
    return base / path  # which is path itself where that is absolute
