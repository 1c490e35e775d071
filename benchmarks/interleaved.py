"""What the speed benchmarks share: contenders that take turns in one process, ratios of medians, and bars."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from runfolder.place import cpu_name

Run = Callable[[], object]


@dataclass
class Ratio:
    """One contender against another.

    Attributes:
        ratio: of the medians.
        low, high: quartiles of the ratios of the single turns.
        bar: what it should not exceed; None: nothing is promised.
        n: turns.
    """

    case: str
    against: str
    ratio: float
    low: float
    high: float
    bar: float | None
    n: int
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within the bar."""
        return None if self.bar is None else self.ratio <= self.bar


def take_turns(runs: Mapping[str, Run], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender, turn by turn, after one uncounted turn; the order is reversed every other turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            _wait(device)
            began = time.perf_counter()
            runs[name]()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(case: str, seconds: Mapping[str, list[float]], name: str, against: str, bar: float | None) -> Ratio:
    """The ratio of the medians of two contenders that took turns."""
    pairs = [mine / theirs for mine, theirs in zip(seconds[name], seconds[against], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    medians = {each: 1e3 * statistics.median(times) for each, times in seconds.items()}
    return Ratio(case, against, medians[name] / medians[against], low, high, bar, len(pairs), medians)


def peak_bytes(run: Run, device: torch.device) -> int:
    """The peak of what torch holds during a run beyond what it held before, in bytes."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def verdict(value: float, bar: float | None, digits: int = 2) -> str:
    """A value and whether its bar holds, for a cell of a table."""
    if bar is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({'holds' if value <= bar else 'missed'}: {bar:.{digits}f})"


def machine(device: torch.device) -> str:
    """Hardware, versions and threads, for the line below a table."""
    where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"{where}; torch {torch.__version__}, Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} before"
    )


def write(path: str | None, ratios: list[Ratio], **more: object) -> None:
    """Everything measured as JSON, where a path is given."""
    if path:
        Path(path).write_text(json.dumps({**more, "ratios": [asdict(ratio) for ratio in ratios]}, indent=1) + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
