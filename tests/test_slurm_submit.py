"""--submit on a real Slurm: grids, packing, trouble with disks and data, what code runs, ranks by srun.

What can happen to a job is tested in test_slurm_events.py. `pytest -m slow` runs most of this file.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from runfolder.files import read_json
from runfolder.folder import RunFolder
from runfolder.process import is_dead
from runfolder.states import state_of
from slurm import ledger
from slurm.command import main
from tests.slurm_cluster import cluster, make_cluster, needs_slurm  # noqa: F401

ROOT = Path(__file__).parents[1]
TINY = ["epochs=2", "runtime.threads=1"]
ONE = ["model=resnet_small", "method=vanilla", "seed=0"]
PROFILE = ["cluster.cpus_without_gpu=1", "cluster.timeout_minutes=20", "cluster.free_gib=0"]
HELD = "cluster.extra.hold=true"


class Login:
    """A person's shell on the cluster, in a folder of its own."""

    def __init__(self, bed, folder: Path):
        self.bed, self.folder = bed, folder
        kept = {key: value for key, value in bed.environment.items() if not key.startswith("TRACT_")}
        self.environment = kept | {"OMP_NUM_THREADS": "1"}

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def start(self, *command: object) -> subprocess.Popen:
        words = [str(word) for word in command]
        return subprocess.Popen(
            words,
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: object, code: int = 0) -> str:
        process = self.start(*command)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code, said
        return said

    def submit(self, *words: str, root: Path = ROOT, code: int = 0) -> str:
        return self.run(*self.submitting(*words, root=root), code=code)

    def submitting(self, *words: str, root: Path = ROOT) -> list[str]:
        return [sys.executable, str(root / "experiments" / "quickstart.py"), "--submit", *TINY, *PROFILE, *words]

    def status(self, *words: str, code: int = 0) -> str:
        return self.run(sys.executable, ROOT / "slurm" / "status.py", *words, code=code)

    def folders(self) -> list[Path]:
        return ledger.run_folders(self.runs, "quickstart")

    def submissions(self) -> list[Path]:
        return sorted((self.runs / "quickstart" / "slurm").iterdir())

    def jobs(self) -> list[str]:
        return self.bed.run("squeue", "-h", "-r", "-o", "%i").split()

    def release(self) -> None:
        self.bed.run("scontrol", "release", ",".join(self.jobs()))

    def wait(self) -> None:
        """Until no job is left."""
        self.bed.wait_for(lambda: not self.jobs(), 240, "all jobs to end")

    def end_of(self, job: str) -> tuple[str, str]:
        """A job's state and exit code."""
        text = self.bed.run("scontrol", "show", "job", "--oneliner", job)
        return tuple(re.search(rf" {name}=(\S+)", text)[1] for name in ("JobState", "ExitCode"))

    def said(self) -> str:
        """The logs of all jobs."""
        return "".join(path.read_text() for path in self.runs.glob("quickstart/slurm/*/jobs/*_log.out"))


@pytest.fixture
def login(cluster, tmp_path):  # noqa: F811
    """The queue is empty before and after."""
    yield Login(cluster, tmp_path)
    cluster.run("scancel", "--user", str(os.geteuid()))
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"), 60, "an empty queue")


def result(folder: Path) -> dict:
    return read_json(folder / "result.json")


def weights(folder: Path) -> str:
    return result(folder)["weights_sha256"]


def attempts(folder: Path) -> list[dict]:
    return read_json(folder / "provenance.json").get("attempts", [])


def trained_here(runs: Path, *words: str) -> None:
    assert main("quickstart", "", "quickstart", [*TINY, *words, f"runtime.runs={runs}"]) == 0


def table(login: Login, runs: Path) -> str:
    command = [sys.executable, ROOT / "analysis" / "tables.py", "--experiment", "quickstart", "--runs", runs]
    return login.run(*command)


# -- a grid -----------------------------------------------------------------------------


@needs_slurm
@pytest.mark.slow
def test_a_grid_is_trained_as_on_this_machine(login, tmp_path):
    """Twelve runs, three at a time; submitted again at once and at the end; the table is that of a run without jobs."""
    assert "Submitted 12 runs in 12 jobs, at most 3 at a time" in login.submit("cluster.parallel=3")
    most = 0
    with ThreadPoolExecutor() as beside:
        again = beside.submit(login.submit, "cluster.parallel=3")
        while jobs := login.bed.run("squeue", "-h", "-r", "-o", "%T").split():
            most = max(most, jobs.count("RUNNING"))
            time.sleep(0.1)
        assert "Submitted" not in again.result()
    assert most == 3
    folders = login.folders()
    assert [state_of(folder) for folder in folders] == ["finished"] * 12, login.said()
    assert all(len(attempts(folder)) == 1 == len(ledger.attempts(folder)) for folder in folders)
    assert "The other runs of the plan: 12 finished." in login.submit("cluster.parallel=3")
    (submission,) = login.submissions()
    snapshot = read_json(submission / "code" / "snapshot.json")
    for folder in folders:
        (attempt,) = attempts(folder)
        assert (attempt["commit"], attempt["dirty"]) == (snapshot["commit"], snapshot["dirty"])
    for model in ("resnet_small", "vit_small"):
        for method in ("vanilla", "tract"):
            for seed in (0, 1, 2):
                trained_here(tmp_path / "here", f"model={model}", f"method={method}", f"seed={seed}")
    here = {folder.name: weights(folder) for folder in (tmp_path / "here" / "quickstart").iterdir()}
    assert {folder.name: weights(folder) for folder in folders} == here
    submitted = table(login, login.runs)
    assert "resnet_small" in submitted
    assert submitted == table(login, tmp_path / "here")


@pytest.mark.slow
@needs_slurm
def test_two_submitters_at_once_submit_everything_once(login):
    """Every run has one job in the queue, and it is the one that its claim names."""
    processes = [login.start(*login.submitting("seed=range(20)", HELD)) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    counts = [int(number) for text in said for number in re.findall(r"Submitted (\d+) runs", text)]
    folders = login.folders()
    assert sum(counts) == len(folders) == 80
    jobs = [read_json(ledger.newest_claim(folder))["job"] for folder in folders]
    assert sorted(jobs) == sorted(login.jobs())
    listed = [
        run
        for path in login.submissions()
        for part in read_json(path / "submission.json")["parts"]
        for job in part["jobs"]
        for run in job
    ]
    assert sorted(listed) == [folder.name for folder in folders]


@needs_slurm
@pytest.mark.slow
def test_what_happens_to_one_element_of_an_array_happens_to_no_other(login):
    """The raw number of one element is the array's own; the last one is stopped, killed and requeued by its job."""
    words = [word.replace("epochs=2", "epochs=15") for word in login.submitting(*ONE[:2], "seed=0,1,2")]
    login.run(*words, "runtime.heartbeat_seconds=0.5")
    folders = login.folders()
    jobs = {read_json(ledger.newest_claim(folder))["job"]: folder for folder in folders}
    raw = {job: login.bed.run("squeue", "-h", "-j", job, "-o", "%A") for job in jobs}
    (special,) = [job for job, number in raw.items() if number == job.partition("_")[0]]
    folder = jobs[special]
    login.bed.wait_for(lambda: read_json(folder / "progress.json").get("step", 0) > 5, 120, "a step")
    login.bed.run("scancel", "--signal=USR2", special)
    login.wait()
    assert [state_of(folder) for folder in folders] == ["finished"] * 3, login.said()
    assert {job: len(ledger.attempts(folder)) for job, folder in jobs.items()} == dict.fromkeys(jobs, 1) | {special: 2}
    restarts = {job.id: job.restarts for job in login.bed.queue() if job.id in jobs}
    assert restarts == dict.fromkeys(jobs, 0) | {special: 1}


@needs_slurm
def test_a_grid_larger_than_an_array_is_several(login):
    choice = [*ONE[:2], "seed=range(5)", "cluster.max_array_size=2", "cluster.parallel=6", HELD]
    assert "Submitted 5 runs in 5 jobs, at most 5 at a time" in login.submit(*choice)
    jobs = [read_json(ledger.newest_claim(folder))["job"] for folder in login.folders()]
    assert sorted(jobs) == sorted(login.jobs())
    assert len({job.split("_")[0] for job in jobs}) == 3


# -- packing ----------------------------------------------------------------------------


@needs_slurm
@pytest.mark.slow
def test_of_four_runs_on_a_gpu_one_fails_alone(login):
    """One job, one (pretended) GPU for all four; the learning rate of one is absurd."""
    choice = [*ONE, "optim.lr=0.003,0.004,0.005,1e20", "runtime.gpus=1", "runtime.device=cpu"]
    said = login.submit(*choice, *("cluster.gpus_per_node=2", "cluster.runs_per_gpu=4", "cluster.cpus_per_task=1"))
    assert "Submitted 4 runs in 1 jobs" in said
    (job,) = login.jobs()
    login.wait()
    states = {read_config(folder)["optim"]["lr"]: state_of(folder) for folder in login.folders()}
    assert states == {0.003: "finished", 0.004: "finished", 0.005: "finished", 1e20: "failed"}
    (failed,) = (folder for folder in login.folders() if state_of(folder) == "failed")
    assert read_json(failed / "failure.json")["kind"] == "non-finite"
    assert login.end_of(job) == ("FAILED", "1:0")
    listed = login.status(code=1)
    assert failed.name[:30] in listed
    assert "non-finite" in listed


def read_config(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


# -- disks ------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *words: str):
    """A file system of the test's own."""
    Path(folder).mkdir(exist_ok=True)
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        end = time.monotonic() + 30
        while subprocess.run(["umount", str(folder)], capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.2)


@needs_slurm
@pytest.mark.slow
def test_a_full_disk_is_a_failure_that_retry_cures(login, tmp_path):
    """Two checkpoints fit, the third does not; when there is room the run goes on from the second."""
    small = tmp_path / "small"
    choice = [*ONE[1:], "model=vit_small", f"runtime.runs={small}", "runtime.keep_checkpoints=20"]
    with mounted(small, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        login.submit(*choice, "runtime.checkpoint_steps=5", HELD)
        (folder,) = ledger.run_folders(small, "quickstart")
        free = shutil.disk_usage(small).free
        (small / "filler").write_bytes(bytes(free - 5 * 2**20))
        login.release()
        login.wait()
        assert state_of(folder) == "failed"
        said = read_json(folder / "failure.json")
        assert said["kind"] == "disk"
        assert "No space left on device" in said["reason"]
        saved = folder.newest_checkpoint()
        assert saved is not None
        subprocess.run(["mount", "-o", "remount,size=128m", str(small)], check=True)
        login.status("retry", "--runs", str(small))
        login.release()
        login.wait()
        assert state_of(folder) == "finished", login.said()
        assert [attempt["resumed_from_step"] for attempt in attempts(folder)] == [0, int(saved.name[5:13])]
        trained_here(tmp_path / "here", *ONE[1:], "model=vit_small")
        (here,) = (tmp_path / "here" / "quickstart").iterdir()
        assert weights(folder) == weights(here)


@needs_slurm
@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_in_the_jobs_log(login):
    """Nothing can be recorded in the folder itself; the job does not hang, and later the run can be submitted."""
    login.submit(*ONE, HELD)
    (folder,), (job,) = login.folders(), login.jobs()
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        login.release()
        login.wait()
        assert login.end_of(job) == ("FAILED", "1:0")
        assert "0 of 1 runs finished, 1 failed, 0 left" in login.said()
        assert re.search(r"failed: disk: .*Read-only file system", login.said())
        assert "missing" in login.status(code=1)
    assert "Submitted 1 runs" in login.submit(*ONE, HELD)


# -- data -------------------------------------------------------------------------------


def make_images(root: Path) -> Path:
    """Two classes of coloured noise."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 128, (8, 8, 3)) + (128 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{number}.png")
    return root


IMAGES = ["data=imagefolder", "batch_size=8", "eval_batch_size=8"]


@needs_slurm
@pytest.mark.slow
def test_data_that_a_node_lacks_is_a_failure_that_retry_cures(login, tmp_path):
    images = make_images(tmp_path / "images")
    login.submit(*ONE, *IMAGES, f"data.root={images}", HELD)
    (folder,) = login.folders()
    images.rename(tmp_path / "away")
    login.release()
    login.wait()
    said = read_json(folder / "failure.json")
    assert said["kind"] == "data"
    assert said["host"] in login.bed.nodes
    assert str(images) in said["reason"]
    assert f"1 x data on {said['host']}: expected train/" in login.status(code=1)
    (tmp_path / "away").rename(images)
    login.status("retry")
    login.release()
    login.wait()
    assert state_of(folder) == "finished", login.said()


@needs_slurm
@pytest.mark.slow
def test_data_are_copied_to_a_node_once(login, tmp_path):
    """Two jobs on one node share a copy, which a third uses and removes."""
    images, disk = make_images(tmp_path / "images"), tmp_path / "disk of the node"
    words = [*ONE[:2], *IMAGES, f"data.root={images}", f"cluster.stage_to='{disk}'"]
    words.append(f"cluster.extra.nodelist={login.bed.nodes[0]}")
    login.submit(*words, "seed=0,1", "cluster.stage_keep_hours=1")
    login.wait()
    said = login.said()
    assert said.count("reused ") == 1
    (copy,) = disk.glob("staged/*/data")
    assert sum(path.is_file() for path in copy.rglob("*")) == 32
    login.submit(*words, "seed=2", "cluster.stage_keep_hours=0")
    login.wait()
    assert login.said().count("reused ") == 2
    assert not list(disk.glob("staged/*"))
    for folder in login.folders():
        (attempt,) = attempts(folder)
        assert f"runtime.data_copy='{copy}'" in attempt["command"].replace("\\", "").replace("'\"'\"'", "'")
        assert state_of(folder) == "finished"
    assert len({attempts(folder)[0]["data"] for folder in login.folders()}) == 1


# -- code -------------------------------------------------------------------------------


@needs_slurm
def test_what_runs_is_what_was_submitted(login, tmp_path):
    """The checkout is edited and then gone before the job starts."""
    checkout = tmp_path / "checkout"
    for name in ("runfolder", "tract", "experiments", "slurm", "analysis"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    login.submit(*ONE, HELD, root=checkout)
    (checkout / "experiments" / "training" / "run.py").write_text("raise SystemExit('edited')")
    checkout.rename(tmp_path / "gone")
    login.release()
    login.wait()
    (folder,) = login.folders()
    assert state_of(folder) == "finished", login.said()
    (submission,) = login.submissions()
    (attempt,) = attempts(folder)
    assert f"{submission}/code/experiments/quickstart.py" in attempt["command"]


# -- without a scheduler ----------------------------------------------------------------


@pytest.mark.slow
def test_without_a_scheduler_runs_go_on_here(tmp_path):
    """Returns while the second run, which would take hours, goes on; `cancelled` ends it."""
    words = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), "--submit", *ONE, "runtime.threads=1"]
    words += ["epochs=1,100000", "cluster=local", "cluster.parallel=2", "cluster.free_gib=0"]
    words += ["runtime.heartbeat_seconds=0.5"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TRACT_"))}

    def submit() -> str:
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "Submitted 2 runs in 1 jobs" in submit()
    short, long = sorted(ledger.run_folders(tmp_path / "runs", "quickstart"), key=lambda path: "-1ep-" not in path.name)
    worker = read_json(ledger.newest_claim(short))["worker"]
    try:
        assert is_dead(worker) is False
        assert "Submitted" not in submit()
        wait_until(lambda: state_of(short) == "finished" and state_of(long) == "running", "one finished, one running")
        assert "Submitted" not in submit()
        (long / "cancelled").touch()
        wait_until(lambda: is_dead(worker), "the supervisor to end")
    finally:
        (long / "cancelled").touch()
        wait_until(lambda: is_dead(worker), "the supervisor to end")
    assert state_of(long) == "cancelled"
    assert long.newest_checkpoint() is not None
    assert [len(ledger.attempts(folder)) for folder in (short, long)] == [1, 1]


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"expected {what}"
        time.sleep(0.1)


# -- ranks by srun ----------------------------------------------------------------------


@needs_slurm
@pytest.mark.slow
def test_ranks_of_steps_find_each_other(login, tmp_path):
    """Two steps of two ranks at the same time on one node, then one over two nodes, then one of one rank."""
    script = tmp_path / "steps.sh"
    run = f"{sys.executable} {ROOT}/experiments/quickstart.py {' '.join([*TINY, *ONE[:2]])} runtime.device=cpu"
    script.write_text(f"""set -e
srun -N1 -n2 --exact -c1 -w {login.bed.nodes[0]} {run} seed=0 & first=$!
srun -N1 -n2 --exact -c1 -w {login.bed.nodes[0]} {run} seed=1 & second=$!
wait $first; wait $second
srun -N2 -n2 --exact -c1 {run} seed=2
srun -N1 -n1 --exact -c1 {run} seed=3
""")
    nodes = ",".join(login.bed.nodes[:2])
    said = login.run("salloc", "-N2", "--ntasks-per-node=4", "-w", nodes, "bash", script)
    found = {read_config(folder)["seed"]: folder for folder in (login.runs / "quickstart").glob("digits*")}
    sizes = {seed: [attempt["world_size"] for attempt in attempts(folder)] for seed, folder in found.items()}
    assert sizes == {0: [2], 1: [2], 2: [2], 3: [1]}, said
    assert all(state_of(RunFolder(folder)) == "finished" for folder in found.values())
    assert said.count("finished: ") == 4  # of each run one rank speaks
    trained_here(tmp_path / "here", *ONE[:2], "seed=3")
    (here,) = (tmp_path / "here" / "quickstart").iterdir()
    assert weights(found[3]) == weights(here)
    assert not list(login.runs.rglob("meeting-*"))


# -- runs that start from others ----------------------------------------------------------


@needs_slurm
@pytest.mark.slow
def test_fine_tuning_waits_for_its_pre_training(login, tmp_path):
    """Also while that is requeued; fine-tuning alone is refused as long as nobody trains what it starts from."""
    toy = ["model=deit3_small", "method=vanilla", "recipe.pretrain_epochs=400", "model.width=24", "model.depth=1"]
    toy += ["model.heads=3", "model.patch=8", "data.image_size=16", "data=imagefolder", "batch_size=8", "max_steps=600"]
    toy += [f"data.root={make_images(tmp_path / 'images')}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.3,0.3,0.3]"]
    toy += ["precision=bf16", "runtime.gpus=0", "runtime.workers=0", "runtime.threads=1", "runtime.checkpoint_steps=20"]
    deit = [sys.executable, ROOT / "experiments" / "imagenet_deit.py", "--submit", *PROFILE, *toy]
    assert "to be finished or in the queue, got a run that is missing" in login.run(*deit, "stage=finetune", code=2)
    assert "Submitted 2 runs in 2 jobs" in login.run(*deit, "runtime.heartbeat_seconds=0.2")
    folders = {result.name.split("-")[3]: result for result in ledger.run_folders(login.runs, "imagenet_deit")}
    before, after = folders["400ep"], folders["50ep"]
    jobs = {folder: read_json(ledger.newest_claim(folder))["job"] for folder in folders.values()}
    login.bed.wait_for(lambda: read_json(before / "progress.json").get("step", 0) > 1, 120, "a step")
    login.bed.run("scontrol", "requeue", jobs[before])
    login.bed.wait_for(lambda: len(ledger.attempts(before)) == 2, 120, "a second attempt")
    assert login.bed.run("squeue", "-h", "-j", jobs[after], "-o", "%T %r").split() == ["PENDING", "Dependency"]
    assert not ledger.attempts(after)
    login.wait()
    assert [state_of(folder) for folder in (before, after)] == ["finished"] * 2, login.said()
    assert f"starts from {before}" in (after / "log.txt").read_text()
