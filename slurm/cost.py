"""What a plan will cost, in GPU-hours, before it is submitted."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

from experiments.config import Config, load_config
from runfolder.errors import UserError
from runfolder.files import read_json
from runfolder.folder import RunFolder
from runfolder.states import is_finished

_SAMPLE = 40  # finished runs that are looked at


def describe_cost(configs: dict[RunFolder, Config]) -> str:
    """One sentence: GPU-hours of these runs (core-hours count as GPU-hours of runs without a GPU), and from what.

    A run is taken to need as many seconds per epoch as finished runs of the same experiment
    with the same network, data and batch size did; else ``runtime.gpu_seconds_per_epoch``.
    """
    measured = _measured(next(iter(configs)).path.parent)
    hours, sources = 0.0, Counter()
    for folder, config in configs.items():
        ranks = max(1, config.runtime.gpus)
        seconds = measured.get(_kind(config))
        if seconds is not None:
            sources["finished runs like them"] += 1
            seconds *= ranks
        elif config.runtime.gpu_seconds_per_epoch is not None:
            sources["runtime.gpu_seconds_per_epoch"] += 1
            seconds = config.runtime.gpu_seconds_per_epoch
        else:
            sources[""] += 1
            continue
        hours += config.epochs * seconds * (1 - _done(folder)) / 3600
    unknown = sources.pop("", 0)
    if not sources:
        return (
            "Cost unknown: no run like these has finished here; "
            "runtime.gpu_seconds_per_epoch=SECONDS gives an estimate."
        )
    per = "GPU" if any(config.runtime.gpus for config in configs.values()) else "core"
    basis = " and ".join(f"{name} ({count})" for name, count in sources.items())
    return f"About {hours:.3g} {per}-hours, by {basis}" + (f"; {unknown} runs of unknown cost." if unknown else ".")


def _measured(experiment: Path) -> dict[tuple, float]:
    """{kind of run: seconds per epoch}, the mean over some finished runs."""
    sums: dict[tuple, list[float]] = {}
    folders = map(RunFolder, sorted(experiment.glob("*")))
    for folder in islice(filter(is_finished, folders), _SAMPLE):
        result = read_json(folder.result)
        try:
            kind = _kind(load_config(folder.config))
            sums.setdefault(kind, []).append(result["seconds"] / result["epochs"])
        except (UserError, KeyError, TypeError, ZeroDivisionError):
            continue
    return {kind: sum(values) / len(values) for kind, values in sums.items()}


def _kind(config: Config) -> tuple:
    return (config.model["name"], config.data["name"], config.batch_size, config.runtime.gpus, config.max_steps)


def _done(folder: RunFolder) -> float:
    """The share of a run that its newest checkpoint holds."""
    steps = read_json(folder.progress).get("steps")
    return min(1.0, folder.last_step() / steps) if steps else 0.0
