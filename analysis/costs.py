"""What runs cost: device-hours from their own clocks.

    device-hours = seconds of training and evaluation × ranks / 3600

One device per rank: a GPU-hour where the device is a GPU. ``result.json`` has the seconds of a
finished run over all its attempts. Of any other run ``time/epoch_seconds`` of the evaluated
epochs counts; what came after the last evaluation is unknown. So is what an attempt did after
its last checkpoint when it was cut off, and so is how many runs shared a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.comparison import hardware_of
from analysis.load import Run
from runfolder.records import is_number
from runfolder.tags import EPOCH_SECONDS


@dataclass(frozen=True)
class Cost:
    """The device-hours of several runs, and of which of them they are too few."""

    hours: float | None  # None where no run has a known time
    hardware: tuple[str, ...]
    unknown: int  # runs without a known time
    partial: int  # runs that are not finished: up to their last evaluation
    repeated: int  # runs of several attempts: without what was lost between them
    guessed: int  # runs whose number of ranks is not recorded (taken as 1) or changed (the last)


def cost_of(runs: Sequence[Run]) -> Cost:
    """Add up the device-hours of runs."""
    known = [run for run in runs if seconds_of(run) is not None]
    return Cost(
        hours=math.fsum(device_hours(run) for run in known) if known else None,
        hardware=tuple(sorted({hardware_of(attempt) for run in runs for attempt in run.attempts})),
        unknown=len(runs) - len(known),
        partial=sum(_whole_seconds(run) is None for run in known),
        repeated=sum(len(run.attempts) > 1 for run in known),
        guessed=sum(len(set(_ranks(run))) != 1 or None in _ranks(run) for run in known),
    )


def device_hours(run: Run) -> float | None:
    """The device-hours of one run, as far as they are known."""
    seconds, ranks = seconds_of(run), _ranks(run)
    return None if seconds is None else seconds * ((ranks[-1] if ranks else None) or 1) / 3600


def seconds_of(run: Run) -> float | None:
    """Seconds of training and evaluation: all of a finished run, of another one those of its evaluated epochs."""
    whole = _whole_seconds(run)
    if whole is not None:
        return whole
    epochs = [value for value in run.curve(EPOCH_SECONDS).values() if _is_time(value)]
    return math.fsum(epochs) if epochs else None


def _whole_seconds(run: Run) -> float | None:
    seconds = (run.result or {}).get("seconds")
    return float(seconds) if _is_time(seconds) else None


def _is_time(value: object) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 0


def _ranks(run: Run) -> list[int | None]:
    """The number of ranks of each attempt; None where it is not recorded."""
    sizes = [attempt.get("world_size") for attempt in run.attempts]
    return [size if isinstance(size, int) and size >= 1 else None for size in sizes]
