"""A run as an HTML page holds it: thinned curves and everything that is known of it, in little space."""

from __future__ import annotations

import base64
import gzip
import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from analysis.comparison import commit_of, hardware_of
from analysis.load import Run
from runfolder import tags

MOST_POINTS = 500
_DIGITS = 6  # significant; events hold float32, which has seven


def thin(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Which points of a curve to draw: all, or the first, the last, the least and the greatest of each stretch.

    Args:
        values: finite, in the order of their steps.
        most: number of points at which a curve is thinned, at least 4.

    Returns:
        Indices, ascending: at most ``most``, with the first and the last, and those of the
        minimum and the maximum of all.

    Example:
        >>> thin([0, 1, 9, 1, 2, -5, 3, 4], most=4)
        [0, 2, 5, 7]
    """
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(1, len(values) - 1), (most - 2) // 2):
        part = np.asarray(values)[stretch]
        kept |= {int(stretch[part.argmin()]), int(stretch[part.argmax()])}
    return sorted(kept)


def curves_of(run: Run, most: int = MOST_POINTS) -> dict[str, dict[str, Any]]:
    """Each ``test/*`` and ``train/*`` curve: tests first, then by name.

    Returns:
        {tag: {"axis": step or epoch, "x": first step and increments, "y": values, "points": number of all points,
        "infinite": number of values that are not finite and left out}}.
    """
    shown = [tag for tag in run.events.series if tags.is_test(tag) or tags.counts_steps(tag)]
    shown.sort(key=lambda tag: (tags.counts_steps(tag), tag))
    return {tag: {"axis": tags.axis(tag), **_curve(run.curve(tag), most)} for tag in shown}


def _curve(points: dict[int, float], most: int) -> dict[str, Any]:
    finite = [(step, value) for step, value in points.items() if math.isfinite(value)]
    kept = [finite[i] for i in thin([value for _, value in finite], most)]
    steps = [step for step, _ in kept]
    return {
        "x": [b - a for a, b in zip([0, *steps], steps, strict=False)],
        "y": [float(f"{value:.{_DIGITS}g}") for _, value in kept],
        "points": len(points),
        "infinite": len(points) - len(finite),
    }


def packed(run: Run, most: int = MOST_POINTS) -> str:
    """Everything that the page shows of an opened run: JSON, gzipped, as base64 (which no markup can hide in)."""
    content = {
        "name": run.folder.name,
        "experiment": run.experiment,
        "folder": str(run.folder),
        "command": run.command,
        "problems": [problem.text for problem in run.problems],
        "traceback": _traceback(run),
        "attempts": [_attempt(attempt) for attempt in run.attempts],
        "config": "" if run.config is None else yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "curves": curves_of(run, most),
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _traceback(run: Run) -> str:
    lines = (run.failure or {}).get("traceback")
    return "\n".join(map(str, lines)) if isinstance(lines, list) else ""


def _attempt(attempt: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of an attempt, as pairs of words."""
    packages, hardware, untracked = (attempt.get(key) for key in ("packages", "hardware", "untracked"))
    known = {
        "started": attempt.get("started"),
        "from step": attempt.get("resumed_from_step"),
        "commit": commit_of(attempt),
        "untracked": shlex.join(map(str, untracked)) if isinstance(untracked, list) else None,
        "command": attempt.get("command"),
        "versions": _pairs(packages) if isinstance(packages, dict) else None,
        "device": hardware_of(attempt),
        "machine": _pairs(hardware, but="device") if isinstance(hardware, dict) else None,
        "ranks": attempt.get("world_size"),
        "data": attempt.get("data"),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "", [])]


def _pairs(known: dict[str, Any], but: str = "") -> str:
    return ", ".join(f"{name} {value}" for name, value in known.items() if name != but)
