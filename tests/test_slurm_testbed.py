"""The one-machine Slurm: it does what a cluster does, and leaves nothing."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from runfolder.errors import UserError
from slurm import testbed
from slurm.testbed import ClusterError, MissingSlurmError, Testbed
from tests.slurm_cluster import cluster, make_cluster, needs_slurm  # noqa: F401

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "testbed.py"


def submit(bed: Testbed, script: str, *options: str) -> str:
    """The id of a job that runs a line of shell."""
    return bed.run("sbatch", "--parsable", *options, "--wrap", script)


def job(bed: Testbed, number: str) -> testbed.Job:
    (found,) = [job for job in bed.queue() if job.id == number]
    return found


def until(bed: Testbed, number: str, state: str) -> testbed.Job:
    bed.wait_for(lambda: job(bed, number).state == state, 20, f"job {number} {state}")
    return job(bed, number)


def related(root: Path) -> dict[int, str]:
    """All living processes with a folder in their environment or command line."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
            if f"{root}/".encode() in command + (place / "environ").read_bytes() and place.name != str(os.getpid()):
                found[int(place.name)] = command.decode()
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path_factory):
    """A folder with a short path; what a failed test left running in it is killed."""
    root = tmp_path_factory.mktemp("slurm")
    yield root
    for pid in related(root):
        os.kill(pid, signal.SIGKILL)


def command(*arguments: str, root: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(SCRIPT), *arguments, "--root", str(root)]
    return subprocess.run(words, capture_output=True, text=True, cwd="/", env=os.environ | environment, check=False)


# What a cluster does


@needs_slurm
def test_a_job_runs_on_each_node(cluster):  # noqa: F811
    output = f"{cluster.root}/said-%j"
    numbers = [submit(cluster, "echo $SLURMD_NODENAME", "-w", node, "-o", output) for node in cluster.nodes]
    ran = [until(cluster, number, "COMPLETED").node for number in numbers]
    said = [(cluster.root / f"said-{number}").read_text().strip() for number in numbers]
    assert ran == said == ["127.0.0.10", "127.0.0.11", "127.0.0.12"]


@needs_slurm
def test_jobs_on_one_node_get_different_gpus(cluster, tmp_path):  # noqa: F811
    """Each waits for the other, so both run at once; a third one has to wait for them."""
    script = f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_JOB_ID; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    options = ("-w", cluster.nodes[0], "--gres=gpu:1")
    pair = [submit(cluster, script, *options) for _ in range(2)]
    cluster.wait_for(lambda: all((tmp_path / number).exists() for number in pair), 20, "both jobs at work")
    both = submit(cluster, script, "-w", cluster.nodes[0], "--gres=gpu:2")
    assert sorted((tmp_path / number).read_text().strip() for number in pair) == ["0", "1"]
    assert job(cluster, both).state == "PENDING"
    (tmp_path / "go").touch()
    until(cluster, both, "COMPLETED")
    assert (tmp_path / both).read_text().strip() == "0,1"


@needs_slurm
def test_a_requeued_job_comes_back(cluster, tmp_path):  # noqa: F811
    number = submit(cluster, f"echo $SLURM_RESTART_COUNT >> {tmp_path}/starts; sleep 60", "--array=3")
    task = f"{number}_3"
    wait_until((tmp_path / "starts").exists)
    assert job(cluster, task)[1:3] == ("RUNNING", 0)
    cluster.run("scontrol", "requeue", task)
    until(cluster, task, "PENDING")
    time.sleep(1.1)  # in the second of the requeue the node revokes every credential of this job
    cluster.run("scontrol", "update", f"jobid={task}", "StartTime=now")
    until(cluster, task, "RUNNING")
    assert job(cluster, task).restarts == 1
    cluster.wait_for(lambda: (tmp_path / "starts").read_text() == "\n1\n", 20, "the second start")
    cluster.run("scancel", number)
    assert until(cluster, task, "CANCELLED").restarts == 1


@needs_slurm
def test_a_job_survives_the_daemons(cluster, tmp_path):  # noqa: F811
    """The controller and the node's daemon are killed; the job goes on, and its end is noticed when they are back."""
    node = cluster.nodes[1]
    number = submit(cluster, "exec sleep 1000", "-w", node)
    until(cluster, number, "RUNNING")
    saved, now = cluster.root / "state" / "job_state", time.time()
    other = submit(cluster, "true", "--hold")  # so that there is something to save; it does so every five seconds
    cluster.wait_for(lambda: saved.exists() and saved.stat().st_mtime > now, 20, "the controller to save its state")
    at_work = set(cluster.processes())
    cluster.stop_slurmctld()
    cluster.stop_slurmd(node)
    with pytest.raises(ClusterError, match="expected slurmctld to be running, found it stopped"):
        cluster.stop_slurmctld()
    assert len(at_work) == 2  # the step's daemon and the job
    assert at_work <= set(cluster.processes())
    cluster.start_slurmd(node)
    cluster.start_slurmctld()
    with pytest.raises(ClusterError, match=f"expected slurmd-{node} to be stopped, found it running"):
        cluster.start_slurmd(node)
    assert job(cluster, number)[1:] == ("RUNNING", 0, node)
    cluster.run("scancel", number, other)
    until(cluster, number, "CANCELLED")
    cluster.wait_for(lambda: not at_work & set(cluster.processes()), 20, "the end of the job's processes")


@needs_slurm
@pytest.mark.parametrize("user_signal", [True, False])
def test_preemption(make_cluster, tmp_path, user_signal):  # noqa: F811
    """With time to leave, a job gets the signal it asked for, or SIGTERM if the site is so; without, it is requeued."""
    bed = make_cluster(nodes=2, cpus=1, gpus=0, user_signal=user_signal)
    traps = "".join(f"trap 'echo {name} >> {tmp_path}/got-$1' {name}\n" for name in ("USR2", "TERM"))
    (tmp_path / "task").write_text(f"{traps}touch {tmp_path}/ready-$1\nwhile true; do sleep 0.05; done\n")
    options = ("--signal=USR2@60", "--time=60")
    low, abrupt = [submit(bed, f"srun sh {tmp_path}/task {p}", "-p", p, *options) for p in ("low", "abrupt")]
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    bed.run("sbatch", "-N2", "-p", "high", "--wrap", "true")
    wait_until(lambda: len(list(tmp_path.glob("got-*"))) == 2)
    assert job(bed, abrupt).restarts == 1
    assert job(bed, low)[1:3] == ("RUNNING", 0)
    assert (tmp_path / "got-low").read_text().split() == ["USR2" if user_signal else "TERM"]


@needs_slurm
def test_settings_reach_slurm(make_cluster):  # noqa: F811
    settings = {"max_array_size": 20001, "kill_wait": 7, "slurmd_timeout": 33, "job_requeue": False}
    bed = make_cluster(nodes=1, cpus=3, gpus=0, extra_lines=["WaitTime=17"], **settings)
    said = dict(line.split("=", 1) for line in bed.run("scontrol", "show", "config").splitlines() if "=" in line)
    said = {key.strip(): value.strip() for key, value in said.items()}
    for key, value in {
        "MaxArraySize": "20001", "KillWait": "7 sec", "SlurmdTimeout": "33 sec", "JobRequeue": "0",
        "WaitTime": "17 sec", "GresTypes": "(null)",
    }.items():  # fmt: skip
        assert said[key] == value
    assert int(said["AuthInfo"].split("cred_expire=")[1]) > 7 + 2
    submit(bed, "true", "--hold", "--array=0-20000")
    assert "CPUTot=3" in bed.run("scontrol", "show", "node")


@needs_slurm
def test_the_queue_has_a_line_for_every_task(cluster):  # noqa: F811
    number = submit(cluster, "true", "--hold", "--array=2-4")
    tasks = [job for job in cluster.queue() if job.id.startswith(f"{number}_")]
    assert sorted(tasks) == [(f"{number}_{task}", "PENDING", 0, "") for task in (2, 3, 4)]
    cluster.run("scancel", number)


@needs_slurm
def test_an_outer_job_is_not_seen(cluster, monkeypatch):  # noqa: F811
    """Else Slurm's commands would act on the job in which the tests run."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SQUEUE_PARTITION", "abrupt")
    assert "4711" not in cluster.environment.values()
    number = submit(cluster, "true")
    assert job(cluster, number)


@needs_slurm
def test_what_fails_says_why(cluster):  # noqa: F811
    with pytest.raises(
        ClusterError, match="expected exit code 0 from 'sbatch --wrap true -p no', got 1: .*invalid part"
    ):
        cluster.run("sbatch", "--wrap", "true", "-p", "no")
    assert cluster.run("sbatch", "--wrap", "true", "-p", "no", check=False) == ""
    with pytest.raises(ClusterError, match=r"expected 'sleep 9' to end within 0.1 s"):
        cluster.run("sleep", "9", timeout=0.1)
    number = submit(cluster, "true", "--hold")
    with pytest.raises(AssertionError, match=rf"expected a miracle within 0.1 s\n(?s:.*) {number} (?s:.*)slurmctld:\n"):
        cluster.wait_for(lambda: False, 0.1, "a miracle")
    cluster.run("scancel", number)


# What is left of it


@needs_slurm
def test_down_leaves_nothing(folder):
    """Neither jobs that ignore SIGTERM and left their session, nor an srun that waits; also without the daemons."""
    bed = Testbed(folder, nodes=2).up()
    submit(bed, "trap '' TERM; setsid sleep 1000 & srun -N2 sleep 1000", "-N2")
    waiting = subprocess.Popen(
        ["srun", "-N2", "--exclusive", "true"], env=bed.environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    bystander = subprocess.Popen(["sleep", "1000"], env=bed.environment)  # an editor, say
    bed.wait_for(lambda: sum("sleep" in command for command in related(folder).values()) >= 4, 20, "all at work")
    assert {waiting.pid, bystander.pid} < set(bed.processes())
    bed.stop_slurmctld(signal.SIGTERM)
    bed.stop_slurmd(bed.nodes[0])
    bed.down()
    assert not bed.is_up()
    assert waiting.wait(10) != 0
    assert set(related(folder)) == {bystander.pid} == set(bed.processes())
    bystander.kill()
    bystander.wait()
    bed.down()  # again: nothing happens
    with bed:
        assert bed.queue() == []  # a new cluster, without the old one's jobs
    assert not related(folder)


@needs_slurm
def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(folder):
    bed = Testbed(folder, nodes=1, extra_lines=["NoSuchLine=1"])
    with pytest.raises(ClusterError, match=r"expected slurmctld to answer, got: slurmctld ended(?s:.*)NoSuchLine"):
        bed.up()
    assert not related(folder)


@needs_slurm
def test_the_daemons_end_with_their_owner(folder):
    """Its jobs do not; the next one to use the folder ends them."""
    script = (
        "import sys, time\nfrom slurm.testbed import Testbed\n"
        "bed = Testbed(sys.argv[1], nodes=2).up()\n"
        "bed.run('sbatch', '--wrap', 'sleep 1000')\n"
        "bed.wait_for(lambda: any('RUNNING' in job for job in bed.queue()), 20, 'a job')\n"
        "print('up', flush=True)\ntime.sleep(100)\n"
    )
    words = [sys.executable, "-c", script, str(folder)]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout.readline() == "up\n"
    assert sum("slurmd" in command for command in related(folder).values()) == 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    daemons = ("slurmd\0", "slurmctld\0", "munged\0", "slurmscriptd")
    wait_until(
        lambda: not [command for command in related(folder).values() if any(name in command for name in daemons)]
    )
    Testbed(folder).down()
    assert not related(folder)


@needs_slurm
def test_it_is_started_in_the_main_thread(folder):
    """The daemons would end with another one."""
    errors = []

    def start():
        with pytest.raises(UserError, match="expected up\\(\\) in the main thread") as caught:
            Testbed(folder).up()
        errors.append(caught)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert errors


# The command line


@needs_slurm
def test_up_status_down(folder):
    """Each in a process of its own; the cluster outlives the first."""
    up = command("up", "--nodes", "2", "--gpus", "1", root=folder)
    assert up.returncode == 0, up.stderr
    environment = os.environ | {"SLURM_CONF": up.stdout.split("SLURM_CONF=")[1].split()[0]}
    said = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%N %T %G"], env=environment, capture_output=True)
    assert said.stdout.decode().splitlines() == ["127.0.0.10 idle gpu:1", "127.0.0.11 idle gpu:1"]
    script = "import sys; from slurm.testbed import Testbed; print(Testbed(sys.argv[1]).processes())"
    words = [sys.executable, "-c", script, str(folder)]
    assert subprocess.run(words, env=environment, cwd=ROOT, capture_output=True).stdout == b"[]\n"
    again = command("up", root=folder)
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: expected no cluster in {folder}, found one that runs; stop it by")
    assert again.stderr.count("\n") == 1
    with pytest.raises(UserError, match="expected no cluster"):
        Testbed(folder).up()
    subprocess.run(["sbatch", "--wrap", "sleep 1000"], env=environment, cwd=folder, capture_output=True, check=True)
    wait_until(lambda: any("sleep" in command for command in related(folder).values()))
    status = command("status", root=folder)
    assert status.returncode == 0
    assert "127.0.0.11" in status.stdout
    assert "wrap" in status.stdout
    down = command("down", root=folder, **environment)  # as typed in a shell that knows SLURM_CONF
    assert (down.returncode, down.stderr) == (0, "")
    assert not related(folder)
    for words in (["down"], ["status"]):
        nothing = command(*words, root=folder)
        assert nothing.returncode == 2
        assert nothing.stderr.startswith(f"error: expected a cluster in {folder}, found none; start it by")


def pretend_slurm(monkeypatch) -> None:
    """As if it were installed; nothing of it can be started."""
    monkeypatch.setattr(testbed, "missing", lambda: None)
    monkeypatch.setattr(Testbed, "_start", None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        (["start"], "invalid choice: 'start'"),
        (["up", "--nodes", "0"], "expected 1 to 200 nodes, got 0"),
        (["up", "--gpus", "6"], "expected 0 to 5 GPUs per node, got 6"),
        (["up", "--nodes", "two"], "invalid int value: 'two'"),
        (["up", "--root", "/tmp/a folder"], "expected a root of letters, digits"),
        (["up", "--root", "/tmp/" + 61 * "x"], "expected a root of at most 65 characters"),
        (["up", "--root", "/dev/null/x"], "expected a root that can be made"),
        (["down", "--root", "/nowhere"], "expected a cluster in /nowhere, found none"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(monkeypatch, capsys, arguments, sentence):
    pretend_slurm(monkeypatch)
    assert testbed.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_folder_with_other_things_is_left_alone(monkeypatch, capsys, folder):
    pretend_slurm(monkeypatch)
    (folder / "log").mkdir()
    (folder / "log" / "mine").touch()
    assert testbed.main(["up", "--root", str(folder)]) == 2
    assert f"expected an empty root or an earlier testbed's, got {folder} with log in it" in capsys.readouterr().err
    assert (folder / "log" / "mine").exists()


def test_missing_programs_are_named_with_the_cure(monkeypatch, capsys, tmp_path, folder):
    monkeypatch.setattr(testbed, "_SBIN", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in testbed._PROGRAMS[1:]:
        program = tmp_path / name  # as if in an sbin folder that is not in PATH
        program.touch(mode=0o755)
    assert testbed.missing() == (
        "expected Slurm and munge, found no munged; on Debian or Ubuntu: apt-get install slurm-wlm munge"
    )
    with pytest.raises(MissingSlurmError):
        Testbed(folder).up()
    assert testbed.main(["up", "--root", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {testbed.missing()}\n"
    (tmp_path / "munged").touch(mode=0o755)
    assert testbed.missing() is None


def test_it_imports_the_standard_library_only():
    """So that any Python can start it, for example one of an ordinary user without torch."""
    script = "import sys, slurm.testbed; print([name for name in ('torch', 'hydra', 'numpy') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


@needs_slurm
def test_an_ordinary_user_needs_no_root(folder):
    """Only root can become one to try it."""
    python, become = shutil.which("python3", path="/usr/bin"), shutil.which("setpriv")
    if os.getuid() or not python or not become:
        pytest.skip("needs root, setpriv and a Python that all users may execute")
    ordinary = [become, "--reuid=nobody", "--regid=nogroup", "--clear-groups", python, "-B"]
    code = "import sys; assert sys.version_info >= (3, 11); import slurm.testbed"
    if subprocess.run([*ordinary, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("needs a Python 3.11 and a checkout that all users may read")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are closed to others
    shutil.chown(root, "nobody", "nogroup")
    script = (
        "import sys\nfrom slurm.testbed import Testbed\n"
        "with Testbed(sys.argv[1], nodes=1) as bed:\n"
        "    number = bed.run('sbatch', '--parsable', '--wrap', 'id -un')\n"
        "    bed.wait_for(lambda: bed.queue()[0].state == 'COMPLETED', 20, 'the end of the job')\n"
        "    print((bed.root / f'slurm-{number}.out').read_text())\n"
    )
    try:
        said = subprocess.run(
            [*ordinary, "-c", script, str(root)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert said.stdout.split() == ["nobody"], said.stderr
        assert not related(root)
    finally:
        shutil.rmtree(root)
