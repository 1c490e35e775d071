"""What a checkpoint costs the training loop, and how much of the time that is at default settings.

python benchmarks/checkpoints.py
python benchmarks/checkpoints.py --settings deit_base --folder /scratch

A checkpoint is what a run writes: weights, optimizer and counters, serialised, hashed, written and synchronised with
the disk; nothing goes on meanwhile. The optimizer has made a step, so its state is whole. The folder's disk decides.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import statistics
import tempfile
import time

import torch

from benchmarks.interleaved import machine
from experiments.config import compose_config
from experiments.runtime import SETTINGS, trainer_of
from experiments.training.checkpoint import Keeper
from experiments.training.loop import SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES

BY_DEFAULT = ["cifar_resnet", "cifar_vit", "imagenet_resnet50", "deit_small", "deit_base"]


def main(arguments: list[str] | None = None) -> int:
    """Print a table of costs; returns the exit code."""
    parser = argparse.ArgumentParser(description="What checkpoints cost.")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), metavar="NAME", default=BY_DEFAULT)
    parser.add_argument("--repeat", type=int, default=5, help="checkpoints, after one uncounted (default: %(default)s)")
    parser.add_argument("--folder", help="where they are written (default: a temporary folder)")
    options = parser.parse_args(arguments)
    line = machine(torch.device("cpu"))
    print("| setting | MiB | ms | seconds to the next | of the time |\n|---|---|---|---|---|", flush=True)
    for name in options.settings:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            mib, seconds = _saved(name, Path(folder), options.repeat)
        took = statistics.median(seconds)
        wait = max(SECONDS_BETWEEN_SAVES, took / SHARE_OF_SAVES)
        spread = f"{1e3 * took:.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
        print(f"| {name} | {mib:.0f} | {spread} | {wait:.0f} | {100 * took / wait:.2f} % |", flush=True)
    print(f"\nMedian (range) of {options.repeat} checkpoints; {line}")
    return 0


def _saved(name: str, folder: Path, repeat: int) -> tuple[float, list[float]]:
    """The size of a checkpoint in MiB, and the seconds that each took."""
    setting = SETTINGS[name]
    given = {"runtime.device": "cpu", "precision": "fp32", "method": "tract", "batch_size": 2}
    config = compose_config(setting.experiment, setting.changes | given)
    trainer = trainer_of(setting, config, 1, torch.device("cpu"))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    keeper, seconds = Keeper(folder, "benchmark", keep=2), []
    for step in range(repeat + 1):
        began = time.perf_counter()
        path = keeper.save(step, trainer.state())
        seconds.append(time.perf_counter() - began)
    return path.stat().st_size / 2**20, seconds[1:]


if __name__ == "__main__":
    sys.exit(main())
