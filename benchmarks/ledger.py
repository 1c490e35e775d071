"""How long `slurm/status.py` takes to list a grid, measured from outside on synthetic run folders.

python benchmarks/ledger.py --runs 1000 --repeat 5

Each repetition is one process: Python's start, one call of a `squeue` that answers at once, the folders,
the table. The folders have just been written, so they are in the memory of this machine.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time

from runfolder.place import cpu_name

ROOT = Path(__file__).resolve().parents[1]
PATTERN = ("finished",) * 12 + ("running", "queued", "queued", "queued", "resumable", "missing", "failed", "cancelled")
_STEPS = 1000


def main(arguments: list[str] | None = None) -> int:
    """Print the seconds; returns the exit code."""
    parser = argparse.ArgumentParser(description="Seconds that slurm/status.py takes for synthetic runs.")
    parser.add_argument("--runs", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="how often (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        make_grid(Path(root), options.runs)
        seconds = [seconds_to_list(Path(root)) for _ in range(options.repeat)]
    print(
        f"{options.runs} runs listed in {statistics.median(seconds):.2f} s (median of {len(seconds)}, "
        f"{min(seconds):.2f} to {max(seconds):.2f}); Python {platform.python_version()}, {cpu_name()}, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}"
    )
    return 0


def seconds_to_list(root: Path) -> float:
    """One call of status.py for the grid in ``root``, as a person makes it."""
    environment = os.environ | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "slurm" / "status.py"), "--runs", str(root / "runs"), "--all"]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 1, 75):
        raise SystemExit(f"expected a list of runs, got exit code {done.returncode}: {done.stderr}")
    return seconds


def make_grid(root: Path, count: int) -> dict[Path, str]:
    """Make ``root/runs/demo`` with so many runs, and ``root/bin/squeue`` that knows their jobs.

    Returns:
        {folder: the state it was made to have}.
    """
    states, tasks = {}, []
    for number in range(count):
        state = PATTERN[number % len(PATTERN)]
        folder = root / "runs" / "demo" / f"digits-resnet18-sgd-200ep-tract{number % 7 / 10:g}-s{number}-{number:08x}"
        states[folder] = state
        _make_run(folder, state, number)
        if state in ("running", "queued"):
            queued = state == "queued"
            where = ("PENDING", "Priority", "") if queued else ("RUNNING", "None", f"node{number % 9}")
            tasks.append("\x1f".join((f"77_{number}", *where, "0", "0:00", "demo-1", "\x1e\n")))
    (root / "bin").mkdir()
    (root / "bin" / "queue").write_text("".join(tasks))
    squeue = root / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\necho "$*" >> "${0%/*}/calls"\ncat "${0%/*}/queue"\n')
    squeue.chmod(0o755)
    return states


def _make_run(folder: Path, state: str, number: int) -> None:
    step = {"finished": _STEPS, "queued": 0, "missing": 0}.get(state, 10 + number % 900)
    for name in ("claims", "attempts", "checkpoints"):
        (folder / name).mkdir(parents=True)
    claim = {"submission": "1", "made": 0.0, "submitted": True, "job_name": "demo-1", "index": number}
    live = state in ("running", "queued")
    _write(folder / "claims" / "00000001.json", claim | ({} if live else {"released": state}))
    (folder / "config.yaml").write_text("experiment: demo\n" * 50)
    (folder / "log.txt").write_text("a line\n" * 100)
    if step:
        progress = {"step": step, "steps": _STEPS, "epoch": step / 10, "epochs": _STEPS / 10, "top1": 50.0}
        speed = {"images_per_second": 1234.5, "seconds_left": _STEPS - step, "host": f"node{number % 9}"}
        _write(folder / "progress.json", progress | speed)
        _write(folder / "attempts" / "00000001.json", {"from_step": 0, "outcome": state, "job": f"77_{number}"})
        for kept in (step - 5, step):
            (folder / "checkpoints" / f"step-{kept:08d}-00000000.pt").touch()
    if state == "finished":
        metrics = {"test/top1": number % 100}
        _write(folder / "result.json", {"metrics": metrics, "steps": _STEPS, "epochs": 100, "seconds": 1000.0})
    if state == "failed":
        failure = {"kind": "node", "reason": f"RuntimeError: CUDA error {number}", "host": f"node{number % 9}"}
        _write(folder / "failure.json", failure | {"traceback": ["Traceback", "a", "b", "c"]})
    if state == "cancelled":
        _write(folder / "cancelled", {"by": "me", "at": "2025-01-01 00:00:00"})
    if step:
        (folder / "lease").mkdir()
        holder = {"host": "elsewhere", "pid": 1, "beats_every": 1e9, "job": f"77_{number}", "restart": 0}
        _write(folder / "lease" / "00000001.json", holder | ({} if state == "running" else {"released": True}))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
