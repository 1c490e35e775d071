import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runfolder.errors import UserError
from slurm import queue
from slurm.queue import Partition, QueuedJob
from tests.slurm_cluster import cluster, make_cluster, needs_slurm  # noqa: F401

LONG = 'ViT, "size"=16|x:%j {a} ü ' * 8 + "END"


@pytest.fixture
def inside(cluster, monkeypatch):  # noqa: F811
    """This process as one of the cluster's login node; the queue is empty before and after."""
    enter(cluster, monkeypatch)
    yield cluster
    cluster.run("scancel", "--user", str(cluster.run("id", "-u")))
    cluster.wait_for(lambda: queue.jobs() == [], 20, "an empty queue")


def enter(bed, monkeypatch):
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, bed.environment[key])


def submit(bed, *options, seconds=60):
    words = ["sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", f"sleep {seconds}"]
    return bed.run(*words)


def states(jobs):
    return {job.id: job.state for job in queue.jobs() if job.id in jobs}


@needs_slurm
def test_tasks_are_what_was_submitted_name_for_name(inside, monkeypatch):
    for name in ("SQUEUE_STATES", "SQUEUE_FORMAT", "SQUEUE_FORMAT2", "SQUEUE_PARTITION"):
        monkeypatch.setenv(name, "nonsense")  # what a person likes to see is not what we ask
    assert queue.jobs() == []
    array = submit(inside, f"--job-name={LONG}", "--array=0,2,4%2")
    single = submit(inside, "--hold", "--job-name=held")
    inside.wait_for(
        lambda: list(states([f"{array}_{i}" for i in (0, 2)]).values()) == ["RUNNING"] * 2, 20, "two to run"
    )
    found = {job.id: job for job in queue.jobs()}
    assert sorted(found) == sorted([*(f"{array}_{i}" for i in (0, 2, 4)), single])
    assert {job.name for job in found.values()} == {LONG, "held"}
    waiting = QueuedJob(f"{array}_4", LONG, "PENDING", "JobArrayTaskLimit", "", 0, 0)
    assert found[f"{array}_4"] == waiting
    assert found[single].reason == "JobHeldUser"
    running = found[f"{array}_0"]
    assert (running.state, running.reason, running.restarts) == ("RUNNING", "", 0)
    assert running.nodes in inside.nodes
    assert 0 <= running.seconds < 60


@needs_slurm
def test_a_slurm_that_cannot_count_restarts_gives_the_rest(inside, monkeypatch, tmp_path):
    """Where the newer format prints something else, the older one is asked."""
    array = submit(inside, f"--job-name={LONG}", "--array=0-1", "--hold")
    today = [QueuedJob(f"{array}_{index}", LONG, "PENDING", "JobHeldUser", "", 0, 0) for index in (0, 1)]
    assert sorted(queue.jobs(), key=lambda job: job.id) == today
    old = tmp_path / "squeue"  # whose columns have widths and no suffixes
    real = shutil.which("squeue", path=inside.environment["PATH"])
    old.write_text(f"""#!/bin/sh
case "$*" in *--Format*) {real} -h -r -O JobArrayID:20,State:20;; *) exec {real} "$@";; esac
""")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{inside.environment['PATH']}")
    assert sorted(queue.jobs(), key=lambda job: job.id) == [replace(job, restarts=None) for job in today]


@needs_slurm
def test_restarts_are_counted(inside):
    job = submit(inside)
    inside.wait_for(lambda: states([job]).get(job) == "RUNNING", 20, "the job to run")
    inside.run("scontrol", "requeue", job)
    inside.wait_for(lambda: [job.restarts for job in queue.jobs()] == [1], 20, "a restart")
    (job,) = queue.jobs()
    assert (job.state, job.reason) in (("PENDING", "BeginTime"), ("COMPLETING", ""))


@needs_slurm
def test_cancel_takes_elements_and_forgives_what_has_ended(inside, monkeypatch):
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")  # would ask, and wait for ever
    array, other = submit(inside, "--array=0-6", "--hold"), submit(inside, "--hold")
    ended = submit(inside, "--hold")
    queue.cancel([ended])
    queue.cancel([*(f"{array}_{index}" for index in range(5)), *[ended, "999"] * 150, f"{array}_5"])
    assert sorted(states([f"{array}_{i}" for i in range(7)] + [ended, other])) == sorted([f"{array}_6", other])
    queue.cancel([f"{array}_[6-6]"])
    assert [job.id for job in queue.jobs()] == [other]
    queue.cancel([])
    assert [job.id for job in queue.jobs()] == [other]


@pytest.mark.parametrize("job", ["", "--user=root", "12_", "a", "1 2", "12.0"])
def test_cancel_wants_ids(job, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nothing is cancelled
    with pytest.raises(UserError, match="expected the id of a job such as 12 or 12_3, got"):
        queue.cancel(["12", job])


@needs_slurm
def test_limits_partitions_and_nodes(inside):
    assert queue.missing_commands() == []
    assert queue.answers()
    assert queue.max_array_size() == inside.max_array_size
    assert queue.accounts() == []
    parts = {name: Partition(name, name == "low", True, None) for name in ("low", "abrupt", "high")}
    assert queue.partitions() == parts
    inside.run("scontrol", "update", "partitionname=low", "maxtime=1-02:03:00", "hidden=yes")
    inside.run("scontrol", "update", "partitionname=high", "state=down")
    inside.run("scontrol", "update", f"nodename={inside.nodes[0]}", "state=drain", "reason=test")
    try:
        assert queue.partitions()["low"].max_minutes == 24 * 60 + 2 * 60 + 3
        assert not queue.partitions()["high"].up
        assert queue.nodes_out_of_service("low") == queue.nodes_out_of_service() == (1, 3)
    finally:
        inside.run("scontrol", "update", "partitionname=low", "maxtime=infinite", "hidden=no")
        inside.run("scontrol", "update", "partitionname=high", "state=up")
        inside.run("scontrol", "update", f"nodename={inside.nodes[0]}", "state=resume")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("UNLIMITED", None), ("00:30:00", 30), ("01:00:30", 60), ("25:59", 25), ("2-03:04:00", 3064), ("NONE", None)],
)
def test_times(text, minutes):
    assert queue.minutes_of(text) == minutes


@needs_slurm
def test_a_controller_that_is_away_is_not_an_empty_queue(make_cluster, monkeypatch):  # noqa: F811
    bed = make_cluster(nodes=1)
    enter(bed, monkeypatch)
    assert queue.jobs() == []
    bed.stop_slurmctld()
    before = time.monotonic()
    assert queue.jobs(timeout=0.5) is None
    assert time.monotonic() - before < 5
    assert not queue.answers()
    bed.start_slurmctld()
    assert queue.jobs() == []


def test_without_slurm_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.missing_commands() == ["sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo"]
    assert not queue.answers()
    for ask in (queue.jobs, queue.max_array_size, queue.partitions, queue.nodes_out_of_service):
        assert ask() is None
    assert queue.accounts() == []
    with pytest.raises(UserError, match=r"expected scancel to cancel 1 jobs, got: .*No such file"):
        queue.cancel(["12"])


def test_a_command_that_fails_is_not_an_empty_queue(monkeypatch, tmp_path):
    script = tmp_path / "squeue"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.jobs() is None
    script.write_text("#!/bin/sh\n")
    assert queue.jobs() == []


def test_slurms_own_words_are_passed_on(monkeypatch, tmp_path):
    script = tmp_path / "scancel"
    script.write_text('#!/bin/sh\nfor job in "$@"; do echo "scancel: error: no $job" >&2; done\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"cancel 2 jobs, got: scancel: error: no --quiet \(and 2 more\)\."):
        queue.cancel(["12", "13_1"])


def test_asking_needs_the_standard_library_only():
    code = "import sys, slurm.queue; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=Path(queue.__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert set(done.stdout.split()) - sys.stdlib_module_names <= {"__main__", "slurm", "runfolder"}
