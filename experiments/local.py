"""A grid on this machine: one run after another, or several side by side."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.config import Config
from experiments.errors import EXIT_BUSY, EXIT_TRY_AGAIN
from experiments.grid import relative
from experiments.training.folder import folder_of, prepare_folder
from experiments.training.state import newest, start_of, state_of, step_of

_SCRIPTS = Path(__file__).parent
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class _Started:
    folder: Path
    process: subprocess.Popen
    output: Path


def show_plan(states: dict[Path, str], jobs: int) -> None:
    """Print every run folder with its state; nothing is made or started."""
    for folder, state in states.items():
        checkpoint = newest(folder / "checkpoints")
        detail = f" (step {step_of(checkpoint)})" if state == "resumable" else ""
        print(f"{state:>9}{detail}  {relative(folder)}")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states.values()).items()))
    print(f"{len(states)} runs: {counts}. --local would train them here, {jobs} at a time.")


def run_grid(experiment: str, configs: list[Config], jobs: int) -> int:
    """Train what is not finished, each run in its own process; one that fails stops no other.

    A run that starts from another one of the plan comes after it.

    Ctrl-C, SIGTERM, SIGHUP and USR2 make every run write a checkpoint and leave; on Linux so
    does the end of this process by any other means.

    Args:
        experiment: the script's name.
        configs: all runs of the plan.
        jobs: how many at a time; the machine's cores are shared among them.

    Returns:
        Exit code: 0 all finished, 1 some failed, 75 stopped or busy; the same command continues.
    """
    folders = {folder_of(config): config for config in configs}
    states = {folder: state_of(folder) for folder in folders}
    for folder, state in states.items():
        if state not in ("finished", "running"):
            prepare_folder(folders[folder])
    waiting = [folder for folder, state in states.items() if state != "finished"]
    starts = {folder: start_of(folder, config.start_from) for folder, config in folders.items()}

    def waits(folder: Path) -> bool:
        before = {other.absolute() for other in [*waiting, *(started.folder for started in active)]}
        return starts[folder] in before

    done = len(folders) - len(waiting)
    print(f"{len(folders)} runs, {done} finished already, {jobs} at a time.", flush=True)
    environment, active, outcomes = _environment(jobs), [], Counter()
    with tqdm(total=len(folders), initial=done, unit="run", dynamic_ncols=True, disable=None) as bar, _told() as stop:
        while active or (waiting and not stop):
            while waiting and len(active) < jobs and not stop:
                folder = next((folder for folder in waiting if not waits(folder)), None)
                if folder is None:
                    break
                waiting.remove(folder)
                active.append(_start(experiment, folder, folders, environment))
            time.sleep(0.05)
            if stop and not outcomes["told"]:
                outcomes["told"] = 1
                tqdm.write(f"{stop[0]}: each run writes a checkpoint; the same command continues")
                _pass_on(active)
            for started in [item for item in active if item.process.poll() is not None]:
                active.remove(started)
                outcome = _report(started)
                outcomes[outcome] += 1
                bar.update(outcome == "finished")
    del outcomes["told"]
    outcomes["not started"] = len(waiting)
    print(f"{done + outcomes['finished']} of {len(folders)} runs finished" + _rest(outcomes))
    if outcomes["failed"]:
        return 1
    return 0 if done + outcomes["finished"] == len(folders) else EXIT_TRY_AGAIN


@contextmanager
def _told() -> Iterator[list[str]]:
    """A list that gets the name of each signal that asks to stop."""
    names: list[str] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    before = {n: signal.signal(n, lambda number, _: names.append(signal.Signals(number).name)) for n in numbers}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """In a child: SIGTERM when the parent is gone, however it went (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)


def _start(experiment: str, folder: Path, configs: dict[Path, Config], environment: dict[str, str]) -> _Started:
    command = [sys.executable, str(_SCRIPTS / f"{experiment}.py"), "--resume", str(folder), "runtime.progress=false"]
    deadline = configs[folder].runtime.deadline_minutes
    if deadline is not None:
        command.append(f"runtime.deadline_minutes={deadline}")
    output = folder / "output.txt"
    with open(output, "ab") as file:
        # Its own process group: a Ctrl-C reaches it through us, once.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    return _Started(folder, process, output)


def _report(started: _Started) -> str:
    code, name = started.process.returncode, started.folder.name
    if state_of(started.folder) == "finished":
        tqdm.write(f"finished  {name}")
        return "finished"
    outcome = {EXIT_TRY_AGAIN: "stopped", -signal.SIGTERM: "stopped", EXIT_BUSY: "busy"}.get(code, "failed")
    place = f" (exit code {code}; all of it in {relative(started.output)})" if outcome == "failed" else ""
    tqdm.write(f"{outcome:<9} {name}: {_last_line(started.output)}{place}")
    return outcome


def _pass_on(active: list[_Started]) -> None:
    for started in active:
        started.process.send_signal(signal.SIGTERM)


def _environment(jobs: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // jobs))
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _rest(outcomes: Counter[str]) -> str:
    words = [f"{count} {name}" for name, count in outcomes.items() if count and name != "finished"]
    return f" ({', '.join(words)}; the same command tries again)." if words else "."
