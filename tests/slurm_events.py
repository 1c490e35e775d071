"""A run in a job of a real Slurm, and what can happen to it: the other half of test_slurm_events.py.

Training has a brake, so that an event hits the middle of a run that takes two seconds without:
every question for reasons to stop (one a step) waits while the file ``brake`` is there. It is
put into the training processes by Python's own ``sitecustomize``; nothing else differs from
what a person submits. The same hook notes where each rank of each start continues.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from runfolder.files import read_json
from slurm import ledger
from slurm.command import main
from slurm.testbed import Job, Testbed
from tests.slurm_cluster import incurious_python

SETTINGS = {
    "seed": 0, "model": "resnet_small", "model.width": 8, "method": "tract", "epochs": 5, "batch_size": 64,
    "runtime.threads": 1, "runtime.log_every": 7, "runtime.checkpoint_seconds": 3600, "runtime.heartbeat_seconds": 0.5,
}  # fmt: skip
REPORT = os.environ.get("SLURM_EVENTS_REPORT")  # a test's own environment has no SLURM_ variables of outside
PATIENCE = 150.0  # seconds for anything: ten times what it takes on two busy cores
_HOOK = """
import json, os, sys, time

if "--resume" in sys.orig_argv:
    from experiments.training import stop

    folder, wish, noted = os.path.dirname(__file__), stop.StopRequest.wish, []

    def slow_wish(self):
        if not noted:
            noted.append(True)
            place = [int(os.environ.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "RESTART_COUNT", "PROCID")]
            step = sys._getframe(1).f_locals["self"].progress.step
            with open(f"{folder}/starts", "a") as file:
                file.write(json.dumps([*place, step]) + "\\n")
        if os.path.exists(f"{folder}/bug"):
            raise RuntimeError("a bug")
        try:
            with open(f"{folder}/brake") as file:
                time.sleep(float(file.read() or 0))
        except OSError:
            pass
        return wish(self)

    stop.StopRequest.wish = slow_wish
"""


def words(settings: dict) -> list[str]:
    """The settings as a command line."""
    return [f"{key}={value}" for key, value in settings.items()]


class Submitted:
    """A run that ``quickstart.py --submit`` has sent to a cluster. This process's environment is the cluster's.

    Args:
        bed: the cluster.
        home: a folder for the run and what belongs to it.
        ranks: tasks of the job, each on a node of its own.
        settings: changes of SETTINGS.
        profile: keys of the cluster's profile.
        brake: seconds that a step takes.
    """

    def __init__(self, bed: Testbed, home: Path, ranks: int, settings: dict, profile: dict, brake: float):
        self.bed, self.ranks, self.settings = bed, ranks, settings
        self.runs, self._hook = home / "runs", home / "hook"
        self._hook.mkdir(parents=True)
        (self._hook / "sitecustomize.py").write_text(_HOOK)
        (self._hook / "brake").write_text(str(brake))
        usual = {"nodes": ranks, "cpus_without_gpu": 1, "timeout_minutes": 30, "free_gib": 0.1}
        usual["python"] = incurious_python(home / "python")
        setup = [f"export PYTHONPATH={self._hook}:$PYTHONPATH", *profile.pop("setup", [])]
        (home / "profile.yaml").write_text(yaml.safe_dump({"base": "slurm", **usual, **profile, "setup": setup}))
        chosen = SETTINGS | settings | {"cluster": home / "profile.yaml", "runtime.runs": self.runs}
        assert main("quickstart", "", "quickstart", ["--submit", *words(chosen)]) == 0
        (self.folder,) = ledger.run_folders(self.runs)

    # -- what is to be seen -------------------------------------------------------------

    @property
    def job(self) -> str:
        """The id of the job of the last submission."""
        return ledger.claim_of(self.folder)["job"]

    def in_queue(self) -> Job:
        (found,) = [job for job in self.bed.queue() if job.id == self.job]
        return found

    def step(self) -> int:
        """As the last heartbeat told."""
        return read_json(self.folder / "progress.json").get("step", 0)

    def attempts(self) -> list[dict]:
        return ledger.attempts(self.folder)

    def starts(self) -> list[tuple[int, int, int, int]]:
        """Job, restart, rank and step of every training process when it began to train."""
        try:
            return [tuple(json.loads(line)) for line in (self._hook / "starts").read_text().splitlines()]
        except OSError:
            return []

    def steps_of_starts(self) -> list[set[int]]:
        """For every start of a job the steps at which its ranks began."""
        found: dict[tuple[int, int], dict[int, int]] = {}
        for job, restart, rank, step in self.starts():
            found.setdefault((job, restart), {})[rank] = step
        assert all(len(by_rank) == self.ranks for by_rank in found.values())
        return [set(by_rank.values()) for by_rank in found.values()]

    def failure(self) -> dict:
        return read_json(self.folder / "failure.json")

    def training(self, rank: int = 0) -> list[int]:
        """The training processes of this rank, without their loader's workers."""
        parents = set(self.supervisors(rank))
        return [pid for pid in self._pythons("--resume", rank) if _parent(pid) in parents]

    def supervisors(self, rank: int = 0) -> list[int]:
        return self._pythons("submitit.core._submit", rank)

    def _pythons(self, word: str, rank: int) -> list[int]:
        return [
            pid
            for pid in self.bed.processes()
            if word.encode() in _read(f"/proc/{pid}/cmdline").split(b"\0")
            and b"python" in _read(f"/proc/{pid}/cmdline").split(b"\0")[0]
            and f"SLURM_PROCID={rank}".encode() in _read(f"/proc/{pid}/environ").split(b"\0")
        ]

    def output(self) -> str:
        """What the job and the training processes said."""
        logs = sorted(self.runs.glob("quickstart/slurm/*/jobs/*.out"))
        parts = [*logs, self.folder / "output.txt", *sorted((self.folder / "attempts").glob("*.json"))]
        return "\n".join(f"== {path.name}\n{_read(path).decode(errors='replace')}" for path in parts)

    # -- waiting ------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str):
        try:
            return self.bed.wait_for(condition, PATIENCE, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def until_step(self, step: int) -> int:
        """Wait until training has come so far; how far exactly."""
        self.until(lambda: self.step() >= step, f"step {step}")
        return self.step()

    def until_trained(self, steps: int) -> tuple[int, int]:
        """Wait until the latest attempt has done so many steps on all ranks; where it began, where it is."""
        self.until(lambda: len(self.starts()) >= self.ranks * max(1, len(self.attempts())), "all ranks to train")
        began = self.attempts()[-1]["from_step"]
        told = self.folder / "progress.json"
        started = (self._hook / "starts").stat().st_mtime
        self.until(
            lambda: told.exists() and told.stat().st_mtime > started + 0.1 and self.step() >= began + steps,
            f"{steps} steps from {began}",
        )
        return began, self.step()

    def until_attempts(self, count: int) -> None:
        self.until(lambda: len(self.attempts()) >= count, f"{count} attempts")

    def until_state(self, *states: str) -> Job:
        self.until(lambda: self.in_queue().state in states, f"job {self.job} {' or '.join(states)}")
        return self.in_queue()

    def until_finished(self) -> None:
        """Let go of the brake and wait for the result and the end of the job."""
        self.go_on()
        self.until((self.folder / "result.json").exists, "a result")
        self.until_state("COMPLETED")

    # -- doing --------------------------------------------------------------------------

    def go_on(self) -> None:
        (self._hook / "brake").unlink(missing_ok=True)

    def plant_bug(self) -> None:
        (self._hook / "bug").touch()

    def send(self, *names: str) -> None:
        for name in names:
            self.bed.run("scancel", f"--signal={name}", self.job)

    def save_controller(self) -> None:
        """Wait until the controller has written down what it knows; it does so seconds after every change."""
        state, now = self.bed.root / "state" / "job_state", time.time()
        self.bed.run("scontrol", "update", f"JobId={self.job}", "Comment=change")
        self.until(lambda: state.exists() and state.stat().st_mtime > now, "a saved state")

    def kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        assert pids, f"nothing to kill\n{self.output()}"
        for pid in pids:
            os.kill(pid, number)

    # -- the record ---------------------------------------------------------------------

    def lost(self) -> list[int]:
        """Per attempt but the last: steps that were done and had to be done again."""
        attempts = self.attempts()
        pairs = zip(attempts, attempts[1:], strict=False)
        return [max(0, (before.get("reached_step") or 0) - after["from_step"]) for before, after in pairs]

    def report(self, *events: str) -> None:
        """Append what the events have cost to the file that SLURM_EVENTS_REPORT names, for the documentation.

        An event belongs to an attempt, in order; a single one to all of them.
        """
        if not REPORT:
            return
        ends = [attempt.get("outcome", "running") for attempt in self.attempts()]
        state = self.failure().get("kind") or ("finished" if (self.folder / "result.json").exists() else "unfinished")
        lost = self.lost()
        with open(REPORT, "a") as file:
            for number, event in enumerate(events):
                part = slice(None) if len(events) == 1 else slice(number, number + 1)
                cost = f"{self.ranks} ranks, {', '.join(ends[part])}, lost {lost[part]} steps"
                file.write(f"EVENT {event}: {cost}, outcome {state}\n")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: its time of modification and its bytes."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _parent(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").decode().splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    return 0


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
