"""How long it takes to read run folders: first and later readings of ours, and TensorBoard's EventAccumulator.

python benchmarks/reading.py --runs 100 --epochs 200 --train-points 3000

The event files are synthetic: the records that a SummaryWriter writes, eight scalars an epoch and one tag of
training points a step, framed by this script because TensorBoard's own framing of so many takes an hour. All
readers take the same files in turns in one process, and must find the same number of points; EventAccumulator
keeps every scalar (size_guidance 0). The files have just been written, so they are in this machine's memory:
this measures processors, not disks. Memory is what a process of its own holds at most beyond what its imports
hold (Linux only). `--ours` leaves EventAccumulator out.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from analysis.cache import Cache
from analysis.events import masked_crc32c
from analysis.load import load_runs
from runfolder import tags
from runfolder.folder import RunFolder
from runfolder.place import cpu_name

TENSORBOARD, FIRST, LATER = "EventAccumulator", "ours, first", "ours, later"
_TAGS = (tags.TOP1, "test/top5", "test/loss", "epoch/loss", "epoch/seconds", "epoch/images", "epoch/lr", "epoch/mib")
_SETTLED = 11.0  # seconds after which a file's identity is trusted


def main(arguments: list[str] | None = None) -> int:
    """Print seconds, ratios and memory; returns the exit code."""
    parser = argparse.ArgumentParser(description="Seconds and memory for reading synthetic run folders.")
    parser.add_argument("--runs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=200, help="of eight scalars (default: %(default)s)")
    parser.add_argument("--train-points", type=int, default=3000, help="of one tag, a run (default: %(default)s)")
    parser.add_argument(
        "--repeat", type=int, default=5, help="rounds after one uncounted; 0: only one (default: %(default)s)"
    )
    parser.add_argument("--ours", action="store_true", help="without EventAccumulator")
    parser.add_argument("--only", nargs=2, metavar=("READER", "DIR"), help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args(arguments)
    if options.only:
        return _print_memory(options.only[0], Path(options.only[1]))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="reading-") as folder:
        root = Path(folder)
        for number in range(options.runs):
            make_run(root / "runs" / "demo" / f"s{number}", number, options.epochs, options.train_points)
        time.sleep(_SETTLED)
        readers = [FIRST, LATER] if options.ours else [TENSORBOARD, FIRST, LATER]
        seconds = _rounds(readers, root, options.repeat)
        memory = {reader: _memory(reader, root) for reader in readers}
        kept = sum(path.stat().st_size for path in (root / "cache").iterdir()) / 2**20
    _report(seconds, memory, options, kept, load)
    return 0


def make_run(folder: Path, seed: int, epochs: int, train_points: int) -> None:
    """A finished run folder of so many epochs and training points."""
    folder.mkdir(parents=True)
    frames = [_frame(Event(wall_time=1.7e9, file_version="brain.Event:2"))]
    done = 0
    for epoch in range(1, epochs + 1):
        steps = range(done, done := train_points * epoch // epochs)
        frames += [_point(tags.LOSS, 1 / (1 + step + seed), step) for step in steps]
        frames += [_point(tag, epoch + seed / 7 + number, epoch) for number, tag in enumerate(_TAGS)]
    (folder / "events.out.tfevents.1700000000.host.1.0").write_bytes(b"".join(frames))
    options = {f"option_{number}": number / 8 for number in range(50)}
    config = {"seed": seed, "epochs": epochs, "method": {"name": "tract", "lambda_": 0.1}, "data": options}
    run = RunFolder(folder)
    run.config.write_text(yaml.safe_dump(config))
    run.provenance.write_text(json.dumps({"attempts": [{"commit": "0" * 40, "packages": options}]}))
    run.result.write_text(json.dumps({"epochs": epochs, "metrics": {}}))


def _point(tag: str, value: float, step: int) -> bytes:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return _frame(Event(wall_time=1.7e9 + step / 7, step=step, summary=summary))


def _frame(event: Event) -> bytes:
    data = event.SerializeToString()
    length = len(data).to_bytes(8, "little")
    return b"".join(
        (length, masked_crc32c(length).to_bytes(4, "little"), data, masked_crc32c(data).to_bytes(4, "little"))
    )


def _tensorboard(root: Path) -> int:
    readers = [EventAccumulator(str(run), size_guidance={"scalars": 0}) for run in (root / "runs" / "demo").iterdir()]
    for reader in readers:
        reader.Reload()
    return sum(len(reader.Scalars(tag)) for reader in readers for tag in reader.Tags()["scalars"])


def _first(root: Path) -> int:
    for path in (root / "cache").glob("*"):
        path.unlink()
    return _later(root)


def _later(root: Path) -> int:
    runs = load_runs(root / "runs", cache=Cache(root / "cache"))["demo"]
    assert all(run.usable for run in runs), runs[0].problems
    return sum(len(points) for run in runs for points in run.events.series.values())


READERS: dict[str, Callable[[Path], int]] = {TENSORBOARD: _tensorboard, FIRST: _first, LATER: _later}


def _rounds(readers: list[str], root: Path, repeat: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {reader: [] for reader in readers}
    for turn in range(repeat + 1):
        found = {}
        for reader in readers:
            began = time.perf_counter()
            found[reader] = READERS[reader](root)
            if turn or not repeat:
                seconds[reader].append(time.perf_counter() - began)
        assert len(set(found.values())) == 1, found
    return seconds


def _memory(reader: str, root: Path) -> float:
    """MiB that a process of its own holds at most, beyond what its imports hold."""
    command = [sys.executable, __file__, "--only", reader, str(root)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _print_memory(reader: str, root: Path) -> int:
    before = _peak()
    READERS[reader](root)
    print(_peak() - before)
    return 0


def _peak() -> float:
    """MiB; a child's ru_maxrss would begin with that of its parent."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def _report(
    seconds: dict[str, list[float]], memory: dict[str, float], options: argparse.Namespace, kept: float, load: float
) -> None:
    reference = TENSORBOARD if TENSORBOARD in seconds else FIRST
    print(f"| reader | seconds | times as fast as {reference} | MiB |\n|---|---|---|---|")
    for reader, own in seconds.items():
        ratios = [theirs / mine for mine, theirs in zip(own, seconds[reference], strict=True)]
        ratio = statistics.median(seconds[reference]) / statistics.median(own)
        print(
            f"| {reader} | {statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f}) | "
            f"{ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | {memory[reader]:.0f} |"
        )
    points, rounds = options.epochs * len(_TAGS) + options.train_points, max(1, options.repeat)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("tensorboard", "protobuf", "google-crc32c")]
    print("Medians (range); ratios are of medians (range of the rounds' own).")
    print(
        f"n = {rounds} rounds of {options.runs} runs of {points} points, {kept:.0f} MiB in the cache; Python "
        f"{platform.python_version()}, {', '.join(versions)}; {cpu_name()}, {len(os.sched_getaffinity(0))} cores, "
        f"load {load:.1f} before"
    )


if __name__ == "__main__":
    sys.exit(main())
