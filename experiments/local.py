"""A grid on this machine: one run after another, or several side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.config import Config
from experiments.errors import EXIT_TRY_AGAIN
from experiments.grid import relative
from experiments.training.checkpoint import newest
from experiments.training.run import folder_of, prepare_folder, state_of

_SCRIPTS = Path(__file__).parent


@dataclass
class _Started:
    folder: Path
    process: subprocess.Popen
    output: Path


def show_plan(configs: list[Config], jobs: int) -> None:
    """Print every run with its state; nothing is made or started."""
    states = Counter()
    for config in configs:
        folder = folder_of(config)
        state = state_of(folder)
        states[state] += 1
        checkpoint = newest(folder / "checkpoints")
        detail = f" ({checkpoint.stem.rsplit('-', 1)[0]})" if state == "resumable" and checkpoint else ""
        print(f"{state:>9}{detail}  {relative(folder)}")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{len(configs)} runs: {counts}. --local would train them here, {jobs} at a time.")


def run_grid(experiment: str, configs: list[Config], jobs: int) -> int:
    """Train what is not finished, each run in its own process; one that fails stops no other.

    Args:
        experiment: the script's name.
        configs: all runs of the plan.
        jobs: how many at a time; the machine's cores are shared among them.

    Returns:
        Exit code: 0 all finished, 1 some failed, 75 stopped; the same command continues.
    """
    folders = {prepare_folder(config): config for config in configs}
    waiting = [folder for folder in folders if state_of(folder) != "finished"]
    done = len(folders) - len(waiting)
    print(f"{len(folders)} runs, {done} finished already, {jobs} at a time.", flush=True)
    environment = _environment(jobs)
    active: list[_Started] = []
    outcomes: Counter[str] = Counter()
    stopping = False
    with tqdm(total=len(folders), initial=done, unit="run", dynamic_ncols=True, disable=None) as bar:
        try:
            while active or (waiting and not stopping):
                while waiting and len(active) < jobs and not stopping:
                    active.append(_start(experiment, waiting.pop(0), folders, environment))
                time.sleep(0.05)
                for started in [item for item in active if item.process.poll() is not None]:
                    active.remove(started)
                    outcome = _report(started)
                    outcomes[outcome] += 1
                    stopping |= outcome == "stopped"
                    bar.update(outcome == "finished")
        except KeyboardInterrupt:
            _pass_on(active)
            outcomes["stopped"] += len(active)
    print(f"{done + outcomes['finished']} of {len(folders)} runs finished" + _rest(outcomes))
    if outcomes["failed"]:
        return 1
    return EXIT_TRY_AGAIN if outcomes["stopped"] or outcomes["busy"] else 0


def _start(experiment: str, folder: Path, configs: dict[Path, Config], environment: dict[str, str]) -> _Started:
    command = [sys.executable, str(_SCRIPTS / f"{experiment}.py"), "--resume", str(folder), "runtime.progress=false"]
    deadline = configs[folder].runtime.deadline_minutes
    if deadline is not None:
        command.append(f"runtime.deadline_minutes={deadline}")
    output = folder / "output.txt"
    with open(output, "ab") as file:
        # Its own process group: a Ctrl-C reaches it through us, once.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return _Started(folder, process, output)


def _report(started: _Started) -> str:
    code, name = started.process.returncode, started.folder.name
    if state_of(started.folder) == "finished":
        tqdm.write(f"finished  {name}")
        return "finished"
    if code == EXIT_TRY_AGAIN:
        busy = "is being trained" in _last_line(started.output)
        tqdm.write(f"{'busy' if busy else 'stopped':<9} {name}: {_last_line(started.output)}")
        return "busy" if busy else "stopped"
    tqdm.write(
        f"failed    {name} (exit code {code}): {_last_line(started.output)}; all of it in {relative(started.output)}"
    )
    return "failed"


def _pass_on(active: list[_Started]) -> None:
    tqdm.write("stopping: each run writes a checkpoint; the same command continues")
    for started in active:
        started.process.send_signal(signal.SIGTERM)
    for started in active:
        started.process.wait()


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
