"""How long it takes to submit a grid, measured on a real Slurm on this machine (slurm/testbed.py).

python benchmarks/submission.py --runs 500

The jobs may begin in an hour only, so that nothing is trained. First the steps of ``--submit`` one by
one, each once and in this process, which has imported torch already; then what a person waits for: the
command in a process of its own, for runs that are queued already and for new ones.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator

from experiments.config import folder_of, parse_overrides, prepare_folder
from experiments.grid import plan
from runfolder.place import cpu_name
from slurm import batch, launch, ledger, preflight, queue, snapshot
from slurm.profile import load_cluster
from slurm.testbed import Testbed

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Print the seconds; returns the exit code."""
    parser = argparse.ArgumentParser(description="Seconds that --submit takes for a grid.")
    parser.add_argument("--runs", type=int, default=500, help="how many, an even number (default: %(default)s)")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Testbed(Path(folder) / "slurm", nodes=2) as bed:
        os.environ.update({key: bed.environment[key] for key in ("SLURM_CONF", "PATH")})
        with contextlib.chdir(folder):
            _measure(options.runs)
        slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "hydra-core", "submitit")]
    print(
        f"Python {platform.python_version()}, {', '.join(versions)}, {slurm}; {cpu_name()}, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}; "
        f"load average before: {load:.1f}"
    )
    return 0


def choices(runs: int) -> list[str]:
    """The command line's words for so many runs that begin in an hour."""
    words = ["model=resnet_small", "method=vanilla,tract", f"seed=range({runs // 2})", "epochs=2"]
    return [*words, "cluster.extra.begin=now+1hour", "cluster.free_gib=0"]


def _measure(runs: int) -> None:
    overrides = parse_overrides([word for word in choices(runs) if not word.startswith("cluster.")])
    cluster = load_cluster(None, {"extra.begin": "now+1hour", "free_gib": 0})
    with _timed(f"planning {runs} runs"):
        configs = plan("quickstart", "quickstart", overrides)
    folders = {folder_of(config).absolute(): config for config in configs}
    with _timed("preflight"):
        script = launch.first_script(Path("submission"), launch.arranged(folders, cluster), cluster)
        preflight.check(cluster, Path("runs"), configs, batch.options_of(script))
    with _timed("claiming"):
        assert len(ledger.claim(list(folders), "benchmark")) == runs
    for folder in folders:
        ledger.release(folder, "benchmark", "measured")
    with _timed("making the run folders"):
        for config in configs:
            prepare_folder(config)
    with _timed("copying the code"):
        snapshot.take(Path("copy").absolute() / "code", skip=[Path("runs").absolute()])
    with _timed("all of this and the queue, in one process"), contextlib.redirect_stdout(io.StringIO()):
        launch.submit("quickstart", configs, cluster)
    assert len(queue.jobs() or []) == runs
    with _timed(f"the state of {runs} runs, as status.py asks for it"):
        found = ledger.entries(Path("runs"))
    assert {entry.state for entry in found} == {"queued"}
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), "--submit", *choices(runs)]
    with _timed("the command once more, which submits nothing"):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{runs} queued" in said, said
    with _timed("the command for other runs"):
        other = [word.replace("epochs=2", "epochs=3") for word in command]
        said = subprocess.run(other, capture_output=True, text=True, check=True).stdout
    assert f"Submitted {runs} runs" in said, said


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:7.2f} s  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
