"""From a plan to job arrays: shapes, the batch script, claims, cost; without a Slurm."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from experiments.config import folder_of, prepare_folder
from runfolder.errors import UserError
from runfolder.files import write_json
from runfolder.folder import RunFolder
from runfolder.process import this_process
from slurm import launch, ledger, preflight
from slurm.command import main
from slurm.cost import describe_cost
from slurm.packing import Shape, arrange, shape_of
from slurm.profile import Cluster, Scheduler
from tests.cases import tiny_config
from tests.slurm_cluster import incurious_python

ROOT = Path(__file__).parents[1]
TWO = ["model=resnet_small", "method=vanilla", "seed=0,1"]


def quickstart(*arguments: str) -> int:
    return main("quickstart", "", "quickstart", list(arguments))


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    """This process on a machine without Slurm's commands."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "git", "sh"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("TRACT_CLUSTER", raising=False)
    return tmp_path / "bin"


@pytest.fixture
def fake_slurm(no_slurm, tmp_path, monkeypatch):
    """A Slurm that takes every job and trains none; sbatch notes its script and its environment."""
    for name in ("cat", "env", "ls", "wc", "cp", "sed", "tail"):
        (no_slurm / name).symlink_to(f"/usr/bin/{name}")
    noted = tmp_path / "sbatch"
    noted.mkdir()
    for name in ("srun", "scancel", "sinfo", "sacctmgr"):
        program(no_slurm / name, "exit 0")
    program(no_slurm / "squeue", f"cat {noted}/queue 2>/dev/null")
    program(
        no_slurm / "scontrol",
        'case "$*" in\n*ping) echo "Slurmctld(primary) at here is UP";;\n'
        '*partition*) echo "PartitionName=low Default=YES MaxTime=UNLIMITED State=UP";;\n'
        '*config) echo "MaxArraySize = 1001";;\nesac',
    )
    program(
        no_slurm / "sbatch",
        f'case "$*" in *--test-only*) exit 0;; esac\ncd {noted}\nnumber=$(ls -d *.sh 2>/dev/null | wc -l)\n'
        'if [ -s refuse ] && [ "$number" -ge "$(cat refuse)" ]; then echo "sbatch: error: No, thanks" >&2; exit 1; fi\n'
        'for last; do :; done\ncp "$last" "$number.sh"\nenv > "$number.env"\n'
        'echo "Submitted batch job $((100 + number))"',
    )
    profile = {"base": "slurm", "python": incurious_python(tmp_path / "python")}
    (tmp_path / "profile.yaml").write_text(json.dumps(profile))
    monkeypatch.setenv("TRACT_CLUSTER", str(tmp_path / "profile.yaml"))
    monkeypatch.chdir(tmp_path)
    return noted


# -- shapes and arrays ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "gpus", "shape"),
    [
        ({}, 0, Shape(1, 1, 0, 2, 1)),
        ({}, 1, Shape(1, 1, 1, 6, 1)),
        ({}, 8, Shape(1, 8, 8, 6, 1)),
        ({}, 16, Shape(2, 8, 8, 6, 1)),
        ({}, 12, Shape(2, 6, 6, 6, 1)),
        ({"gpus_per_node": 0}, 1, Shape(1, 1, 0, 2, 1)),
        ({"runs_per_gpu": 4}, 1, Shape(1, 1, 1, 6, 4)),
        ({"runs_per_gpu": 4}, 0, Shape(1, 1, 0, 8, 4)),
        ({"cpus_without_gpu": 3}, 0, Shape(1, 1, 0, 3, 1)),
        ({"runs_per_gpu": 4, "gpus_per_job": 2}, 1, Shape(1, 1, 2, 12, 8)),
        ({"gpus_per_job": 4}, 1, Shape(1, 1, 4, 24, 4)),
        ({"nodes": 2}, 0, Shape(2, 1, 0, 2, 1)),
        ({"nodes": 2, "tasks_per_node": 4}, 1, Shape(2, 4, 4, 6, 1)),
        ({"nodes": 2}, 8, Shape(2, 4, 4, 6, 1)),
        ({"tasks_per_node": 4}, 8, Shape(2, 4, 4, 6, 1)),
    ],
)
def test_a_job_has_what_its_runs_need(profile, gpus, shape):
    assert shape_of(Cluster(cpus_per_task=6, **profile), gpus) == shape


@pytest.mark.parametrize(
    ("profile", "gpus", "words"),
    [
        ({}, 9, "9 GPUs on 2 nodes"),
        ({"nodes": 4}, 6, "6 GPUs on 4 nodes"),
        ({"gpus_per_node": 0}, 2, "cluster.gpus_per_node=0"),
    ],
)
def test_gpus_that_do_not_spread_evenly_are_refused(profile, gpus, words):
    with pytest.raises(UserError, match=words):
        shape_of(Cluster(**profile), gpus)


@pytest.mark.parametrize("seed", range(30))
def test_every_run_is_in_exactly_one_job_and_no_array_is_too_long(seed):
    draw = random.Random(seed)
    folders = {RunFolder(f"run-{number}"): draw.choice([0, 1, 1, 2, 8, 16]) for number in range(draw.randint(1, 60))}
    cluster = Cluster(runs_per_gpu=draw.randint(1, 4), gpus_per_job=draw.choice([None, 2, 8]))
    limit = draw.randint(1, 7)
    parts = arrange(folders, cluster, limit)
    assert sorted(folder for part in parts for job in part.jobs for folder in job) == sorted(folders)
    for part in parts:
        assert 0 < len(part.jobs) <= limit
        (gpus,) = {folders[folder] for job in part.jobs for folder in job}
        assert part.shape == shape_of(cluster, gpus)
        assert all(0 < len(job) <= part.shape.side_by_side for job in part.jobs)
        assert part.shape.gpus_per_node <= cluster.gpus_per_node
        assert gpus <= 1 or part.shape.gpus() == part.shape.nodes * part.shape.tasks_per_node == gpus
    counts = Counter(folders.values())
    fewest = sum(-(-count // shape_of(cluster, gpus).side_by_side) for gpus, count in counts.items())
    assert sum(len(part.jobs) for part in parts) == fewest


def test_without_a_scheduler_one_job_has_all_runs():
    folders = {RunFolder(f"run-{number}"): 0 for number in range(7)}
    (part,) = arrange(folders, Cluster(scheduler=Scheduler.local, parallel=2), limit=1)
    assert part.jobs == [list(folders)]


# -- the batch script -------------------------------------------------------------------


def script(capsys, *arguments: str, seeds: str = "seed=0,1") -> str:
    """The batch script that --dry-run prints, whatever has been trained in this checkout."""
    capsys.readouterr()
    elsewhere = [] if any(word.startswith("runtime.runs=") for word in arguments) else ["runtime.runs=absent"]
    assert quickstart("--dry-run", *TWO[:2], seeds, *elsewhere, *arguments) == 0
    said = capsys.readouterr().out
    return said[said.index("#!/bin/bash") :]


def options_in(text: str) -> dict[str, str]:
    """The options as Slurm reads them, without their quotes."""
    found = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)
    return {name: "".join(shlex.split(value)) for name, value in found}


def test_the_batch_script_asks_for_what_the_profile_says(no_slurm, capsys):
    words = ["cluster.partition='low,high'", "cluster.account=ours", "cluster.timeout_minutes=90", "cluster.parallel=1"]
    words += ["cluster.signal_seconds=77", "cluster.gpus_per_node=4", "runtime.gpus=8", "cluster.cpus_per_task=3"]
    words += [
        "cluster.qos=normal",
        "cluster.constraint='a&b'",
        "cluster.exclude='n[1-2]'",
        "cluster.reservation=course",
    ]
    words += ["cluster.memory_gb=1.5", "cluster.extra.mail-type=FAIL", "cluster.extra.exclusive=true"]
    text = script(capsys, *words, "cluster.setup=['module load cuda']")
    folder = "absent/quickstart/slurm/quickstart-DATE/jobs"
    said = options_in(text)
    assert Path(said.pop("output")).is_relative_to(Path.cwd() / folder)
    assert said == {
        "partition": "low,high",
        "account": "ours",
        "qos": "normal",
        "constraint": "a&b",
        "exclude": "n[1-2]",
        "reservation": "course",
        "time": "90",
        "signal": "USR2@77",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "3",
        "mem": "1536M",
        "array": "0-1%1",
        "requeue": "",
        "open-mode": "append",
        "job-name": "quickstart-DATE.0",
        "mail-type": "FAIL",
        "exclusive": "",
    }
    lines = text.splitlines()
    assert lines.index("trap '' USR2 TERM") < lines.index("module load cuda")
    (start,) = (line for line in lines if line.startswith("srun "))
    assert "--cpus-per-task=3 --kill-on-bad-exit=0" in start
    assert start.endswith(f"{folder}")


def test_the_batch_script_asks_for_nothing_else(no_slurm, capsys):
    """The least profile; a single job is no array; no workload key, which some sites would refuse."""
    said = options_in(script(capsys, "cluster.gpus_per_job=2", "cluster.gpus_per_node=2", seeds="seed=0"))
    assert set(said) == {"output", "time", "signal", "nodes", "ntasks-per-node", "cpus-per-task", "requeue"} | {
        "open-mode",
        "job-name",
    }
    assert "gpus-per-node" in options_in(script(capsys, "runtime.gpus=1"))
    assert "gpus-per-node" not in options_in(script(capsys, "runtime.gpus=1", "cluster.gpus_per_node=0"))


def test_the_batch_script_is_a_script(no_slurm, capsys, tmp_path):
    """Also with names that shells love to misread."""
    runs = tmp_path / "our $runs 'here' "
    text = script(capsys, f'runtime.runs="{runs}"', "cluster.container=apptainer exec image.sif")
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    exported = next(line for line in text.splitlines() if line.startswith("export PYTHONPATH"))
    shown = subprocess.run(["bash", "-c", f'{exported}; printf %s "$PYTHONPATH"'], text=True, capture_output=True)
    assert shown.stdout == f"{runs}/quickstart/slurm/quickstart-DATE/code"


# -- after the job's processes ----------------------------------------------------------

RUNNING = "JobId=7 JobState=RUNNING Restarts=0 X=1"


@pytest.fixture
def end_of_job(no_slurm, capsys, tmp_path, monkeypatch):
    """Runs the script's last lines in a real shell: (exit code, what scontrol and sleep were asked)."""
    log, answers, refusals = (tmp_path / name for name in ("log", "answers", "refusals"))
    for name in ("sed", "sort", "paste", "cat", "head", "tail", "mv", "rm"):
        (no_slurm / name).symlink_to(f"/usr/bin/{name}")
    program(no_slurm / "sleep", f'echo "sleep $1" >> {log}')
    program(
        no_slurm / "scontrol",
        f"""echo "$@" >> {log}
case "$1" in
show) head -n 1 {answers}; tail -n +2 {answers} > {answers}.rest; [ -s {answers}.rest ] && mv {answers}.rest {answers};;
requeue) if [ -s {refusals} ]; then tail -n +2 {refusals} > {refusals}.rest; mv {refusals}.rest {refusals}; exit 1; fi;;
esac
exit 0""",
    )

    def run(code, states=(RUNNING,), restarts=None, refused=0, bad=(), settings=(), begun=True, element=None):
        text = script(capsys, f"runtime.runs={tmp_path}/r", "cluster.max_requeues=3", *settings)
        log.write_text("")
        answers.write_text("\n".join(states) + "\n")
        refusals.write_text("no\n" * refused)
        submission = tmp_path / "r" / "quickstart" / "slurm" / "quickstart-DATE"
        me = "7" if element is None else f"5_{element}"
        (submission / "started").mkdir(parents=True, exist_ok=True)
        if begun:
            (submission / "started" / f"{me}-{restarts or 0}").touch()
        if bad:
            (submission / f"exclude-{me}").write_text("".join(f"{node}\n" for node in bad))
        environment = {"PATH": str(no_slurm), "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n9"}
        if element is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": str(element)}
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        words = f"(exit {code})\n" + text.partition("# teardown\n")[2]
        done = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, log.read_text().splitlines()

    return run


SHOW = "show job --oneliner 7"


@pytest.mark.parametrize("code", [75, 137, 138, 143])
def test_a_job_that_wants_to_go_on_or_was_killed_is_requeued(end_of_job, code):
    assert end_of_job(code) == (code, [SHOW, "requeue 7", "sleep 120"])
    again = RUNNING.replace("Restarts=0", "Restarts=2")
    assert end_of_job(code, [again], restarts=2) == (code, [SHOW, "requeue 7", "sleep 120"])


@pytest.mark.parametrize("code", [0, 1, 2, 69, 127, 128])
def test_a_job_that_is_done_is_not(end_of_job, code):
    assert end_of_job(code) == (code, [])


def test_not_beyond_the_budget(end_of_job):
    assert end_of_job(75, [RUNNING.replace("Restarts=0", "Restarts=3")], restarts=3) == (75, [])


def test_not_a_second_time_if_slurm_did_it_meanwhile(end_of_job):
    assert end_of_job(137, [RUNNING.replace("Restarts=0", "Restarts=1")]) == (137, [SHOW, "sleep 120"])


def test_not_if_a_person_cancelled_it(end_of_job):
    """Nor before it is known that nobody did: at first the controller does not answer."""
    states = ["", "", RUNNING.replace("RUNNING", "CANCELLED")]
    assert end_of_job(137, states) == (137, [SHOW, "sleep 5"] * 2 + [SHOW, "sleep 120"])


def test_again_until_the_controller_takes_it(end_of_job):
    code, asked = end_of_job(75, ["", RUNNING], refused=2)
    again = [SHOW, "requeue 7", "sleep 5"] * 2
    assert (code, asked) == (75, [SHOW, "sleep 5", *again, SHOW, "requeue 7", "sleep 120"])


def test_an_element_of_an_array_speaks_for_itself_alone(end_of_job):
    """SLURM_JOB_ID of one element is the array's own number, which would mean all elements."""
    assert end_of_job(75, element=3) == (75, ["show job --oneliner 5_3", "requeue 5_3", "sleep 120"])
    _, asked = end_of_job(75, element=3, bad=["n1"])
    assert asked[2] == "update JobId=5_3 ExcNodeList=n1"


def test_a_job_that_did_not_even_begin_is_tried_on_other_nodes(end_of_job):
    """No interpreter, no container, no shared folder: the node is broken, not the run."""
    update = "update JobId=7 ExcNodeList=n9"
    assert end_of_job(127, begun=False) == (127, [SHOW, "requeue 7", update, "sleep 120"])
    restarted = [RUNNING.replace("Restarts=0", "Restarts=3")]
    assert end_of_job(127, restarted, restarts=3, begun=False) == (127, [])
    assert end_of_job(0, begun=False) == (0, [])


def test_without_the_nodes_that_were_found_faulty(end_of_job):
    update = "update JobId=7 ExcNodeList=n1,n2"
    assert end_of_job(75, bad=["n2", "n1", "n2"]) == (75, [SHOW, "requeue 7", update, "sleep 120"])


def test_what_the_profile_excludes_stays_excluded(end_of_job):
    """The new list replaces the old one."""
    _, asked = end_of_job(75, bad=["n3"], settings=["cluster.exclude='n[1-2]'"])
    assert asked[2] == "update JobId=7 ExcNodeList=n[1-2],n3"


# -- claims -----------------------------------------------------------------------------

_SUBMITTER = """
import sys, time
from runfolder.folder import RunFolder
from slurm import ledger
folders = [RunFolder(word) for word in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
print(*(folder.name for folder in ledger.claim(folders, sys.argv[1])), flush=True)
sys.stdin.readline()
"""


def submitter(name: str, folders: list[RunFolder]) -> subprocess.Popen:
    """A process that claims once it is told to, and lives until it is told again."""
    command = [sys.executable, "-c", _SUBMITTER, name, *map(str, folders)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def runs(tmp_path):
    folders = [RunFolder(tmp_path / "r" / "demo" / f"run-{number:02}") for number in range(50)]
    for folder in folders:
        folder.path.mkdir(parents=True)
    return folders


def test_of_submitters_at_the_same_time_one_gets_each_run(no_slurm, runs):
    submitters = [submitter(name, runs) for name in ("first", "second", "third")]
    for process in submitters:
        tell(process)
    claimed = [process.stdout.readline().split() for process in submitters]
    assert sorted(name for names in claimed for name in names) == [folder.name for folder in runs]
    for name, process, names in zip(("first", "second", "third"), submitters, claimed, strict=True):
        assert [folder.name for folder in runs if ledger.is_claimed_by(folder, name)] == names
        process.communicate("\n")
    assert ledger.claim(runs, "fourth") == runs  # they died before they submitted anything


def test_a_claim_lives_as_long_as_its_submitter(no_slurm, runs):
    process = submitter("first", runs[:1])
    tell(process)
    assert process.stdout.readline().split() == ["run-00"]
    assert ledger.claim(runs[:2], "second") == runs[1:2]
    process.kill()
    process.wait()
    assert ledger.claim(runs[:2], "third") == runs[:1]
    assert not ledger.is_claimed_by(runs[0], "first")
    ledger.amend_claim(runs[0], "first", released="too late")
    assert ledger.is_claimed_by(runs[0], "third")


def test_a_claim_that_was_given_back_is_free(no_slurm, runs):
    assert ledger.claim(runs[:2], "first") == runs[:2]
    ledger.release(runs[0], "first", "failed")
    assert not ledger.is_claimed_by(runs[0], "first")
    assert ledger.claim(runs[:2], "second") == runs[:1]


def test_a_submitter_on_another_machine_has_ten_minutes(no_slurm, runs):
    elsewhere = this_process() | {"host": "elsewhere", "submission": "first"}
    for folder, age in zip(runs, (60, 3600), strict=False):
        (folder / "claims").mkdir()
        write_json(folder / "claims" / "00000001.json", elsewhere | {"made": time.time() - age})
    assert ledger.claim(runs[:2], "second") == [runs[1]]


def test_a_submitted_claim_lives_as_long_as_its_job(fake_slurm, runs):
    """Of two jobs one is in the queue; where Slurm does not answer nothing is taken away."""
    assert ledger.claim(runs[:2], "first") == runs[:2]
    for index in (0, 1):
        ledger.amend_claim(runs[index], "first", submitted=True, scheduler="slurm", job_name="first.0", index=index)
    squeue = Path(os.environ["PATH"]) / "squeue"
    program(squeue, "exit 1")
    assert ledger.claim(runs[:2], "second") == []
    program(squeue, "printf '7_1\\037RUNNING\\037None\\037n1\\0370\\0371:00\\037first.0\\037\\036\\n'")
    assert ledger.claim(runs[:2], "second") == runs[:1]


# -- cost -------------------------------------------------------------------------------


def test_the_cost_is_known_from_what_has_finished(tmp_path):
    """Two finished runs took 3 and 5 s per epoch, so 4 s are expected; half of the second new run is done."""
    for seed, seconds in ((0, 30.0), (1, 50.0)):
        folder = prepare_folder(tiny_config(tmp_path, seed=seed, epochs=10))
        write_json(folder / "result.json", {"seconds": seconds, "epochs": 10})
    new = {folder_of(config): config for config in (tiny_config(tmp_path, seed=s, epochs=90) for s in (2, 3))}
    half = list(new)[1]
    (half / "checkpoints").mkdir(parents=True)
    (half / "checkpoints" / "step-00000500.0123456789ab.pt").touch()
    write_json(half / "progress.json", {"steps": 1000})
    hours = (90 * 4 + 0.5 * 90 * 4) / 3600
    assert describe_cost(new) == f"About {hours:.3g} core-hours, by finished runs like them (2)."


def test_the_cost_is_that_of_all_gpus(tmp_path):
    """Wall seconds of finished runs count for each GPU; an estimate is in GPU-seconds already."""
    gpus = {"runtime__gpus": 4, "epochs": 900}
    given = tiny_config(tmp_path, seed=1, runtime__gpu_seconds_per_epoch=8.0, **gpus)
    assert describe_cost({folder_of(given): given}) == "About 2 GPU-hours, by runtime.gpu_seconds_per_epoch (1)."
    folder = prepare_folder(tiny_config(tmp_path, runtime__gpus=4, epochs=900))
    write_json(folder / "result.json", {"seconds": 1800.0, "epochs": 900})
    assert describe_cost({folder_of(given): given}) == "About 2 GPU-hours, by finished runs like them (1)."
    unlike = tiny_config(tmp_path, model="resnet_small", runtime__gpu_seconds_per_epoch=None)
    both = {folder_of(config): config for config in (given, unlike)}
    assert describe_cost(both).endswith("by finished runs like them (1); 1 runs of unknown cost.")
    assert describe_cost({folder_of(unlike): unlike}).startswith("Cost unknown")


# -- the command line -------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--dry-run"], ["--submit", "--dry-run"], ["--dry-run", "cluster=local"]])
def test_a_dry_run_makes_nothing_and_needs_no_slurm(no_slurm, tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert quickstart(*flags, *TWO) == 0
    assert list(Path.cwd().iterdir()) == []
    said = capsys.readouterr().out
    assert "2 runs: 2 missing" in said
    assert "--submit would send 2 runs in " in said
    assert ("#SBATCH" in said) == ("cluster=local" not in flags)


def test_a_dry_run_counts_what_is_to_be_done_only(no_slurm, tmp_path, capsys):
    choice = ["--dry-run", *TWO, f"runtime.runs={tmp_path}/r"]
    quickstart(*choice)
    names = [Path(name).name for name in re.findall(r"missing  (\S+)", capsys.readouterr().out)]
    for name, state in zip(names, ("result.json", "failure.json"), strict=True):
        (tmp_path / "r" / "quickstart" / name).mkdir(parents=True)
        write_json(tmp_path / "r" / "quickstart" / name / state, {"metrics": {}})
    quickstart(*choice)
    assert "--submit would submit nothing." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster.parallel=3"], "cluster.parallel= chooses how a grid is run; add --local, --submit or --dry-run"),
        (["cluster=local"], "cluster= chooses how a grid is run"),
        (["--local", "cluster.parallel=3"], "cluster.parallel= is for --submit"),
        (["--local", "cluster=slurm"], "cluster= is for --submit"),
        (["--submit", "jobs=3"], "jobs= is for --local"),
        (["--submit", "cluster.paralel=3"], "nearest: parallel"),
        (["--submit", "cluster=slum"], "nearest: slurm"),
        (["--submit", "cluster.parallel=1,2"], "expected one cluster.parallel"),
        (["--submit", "cluster.parallel=0"], "cluster.parallel"),
        (["--submit", "--local"], "not allowed with"),
    ],
)
def test_what_cannot_be_meant_is_answered_by_a_sentence(no_slurm, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert quickstart(*words, *TWO[:2]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# -- a submission -----------------------------------------------------------------------


def run_folders(tmp_path: Path) -> list[RunFolder]:
    return ledger.run_folders(tmp_path / "runs", "quickstart")


def submission(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "runs" / "quickstart" / "slurm").glob("*/submission.json")
    return path.parent


def test_a_submission_says_what_was_submitted(fake_slurm, tmp_path, capsys):
    """Seven jobs in arrays of three; what a job reads is what the claims say is its own."""
    assert quickstart("--submit", *TWO[:2], "seed=range(7)", "cluster.max_array_size=3", "cluster.parallel=6") == 0
    assert "Submitted 7 runs in 7 jobs, at most 5 at a time" in capsys.readouterr().out
    folder = submission(tmp_path)
    said = json.loads((folder / "submission.json").read_text())
    assert said["experiment"] == "quickstart"
    assert said["cwd"] == str(tmp_path)
    assert said["cluster"]["max_array_size"] == 3
    assert [len(part["jobs"]) for part in said["parts"]] == [3, 3, 1]
    assert [part["side_by_side"] for part in said["parts"]] == [1, 1, 1]
    assert sorted(run for part in said["parts"] for job in part["jobs"] for run in job) == sorted(
        run.name for run in run_folders(tmp_path)
    )
    for number, part in enumerate(said["parts"]):
        options = options_in((fake_slurm / f"{number}.sh").read_text())
        assert options["job-name"] == part["job_name"]
        assert options.get("array") == ("0-2%2" if len(part["jobs"]) == 3 else None)
        for index, (run,) in enumerate(part["jobs"]):
            claim = ledger.claim_of(RunFolder(tmp_path / "runs" / "quickstart" / run))
            assert (claim["submission"], claim["submitted"], claim["scheduler"]) == (folder.name, True, "slurm")
            assert (claim["job_name"], claim["index"]) == (part["job_name"], index)
            assert claim["job"] == (f"{100 + number}_{index}" if len(part["jobs"]) > 1 else f"{100 + number}")
    snapshot = json.loads((folder / "code" / "snapshot.json").read_text())
    head = subprocess.run(["/usr/bin/git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert snapshot["commit"] == head.strip()
    assert (folder / "code" / "experiments" / "quickstart.py").is_file()


def test_nothing_of_an_outer_job_is_passed_on(fake_slurm, tmp_path, monkeypatch):
    """A person may submit from within a job; the configuration of Slurm is no part of one."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SRUN_DEBUG", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "12")
    monkeypatch.setenv("SLURM_CONF", "/some/where/slurm.conf")
    monkeypatch.setenv("PYTHONPATH", "/other/code")
    assert quickstart("--submit", *TWO) == 0
    given = dict(line.partition("=")[::2] for line in (fake_slurm / "0.env").read_text().splitlines())
    left = {name for name in given if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    assert left == {"SLURM_CONF", "SBATCH_PARTITION"}  # a person's own default
    assert given["PYTHONPATH"] == f"{submission(tmp_path) / 'code'}:/other/code"
    assert os.environ["SLURM_NTASKS"] == "12"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_refused_submission_leaves_its_runs_free(fake_slurm, tmp_path, capsys):
    """The first array is taken, the second is not: the same command submits the rest."""
    (fake_slurm / "refuse").write_text("1")
    choice = ["--submit", *TWO[:2], "seed=range(4)", "cluster.max_array_size=2"]
    assert quickstart(*choice) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "got: sbatch: error: No, thanks; 1 of 2 arrays are queued" in said
    claims = [ledger.claim_of(folder) for folder in run_folders(tmp_path)]
    assert Counter(bool(claim.get("released")) for claim in claims) == {True: 2, False: 2}
    (fake_slurm / "refuse").unlink()
    name = options_in((fake_slurm / "0.sh").read_text())["job-name"]
    record = "100_{0}\\037PENDING\\037None\\037\\0370\\0370:00\\037{1}\\037\\036\\n"
    program(Path(os.environ["PATH"]) / "squeue", f"printf '{record.format(0, name)}{record.format(1, name)}'")
    assert quickstart(*choice) == 0
    said = capsys.readouterr().out
    assert "Submitted 2 runs in 2 jobs" in said
    assert "2 queued already" in said


def test_what_ends_while_the_cluster_is_looked_at_is_not_submitted(fake_slurm, tmp_path, capsys, monkeypatch):
    """Of two runs that were still being trained elsewhere when the plan was made, one is finished by now."""
    check = preflight.check

    def slow_check(cluster, runs, configs, **keywords):
        folder = folder_of(configs[0]).absolute()
        folder.path.mkdir(parents=True)
        (folder / "result.json").write_text('{"metrics": {}}')
        ended.append(folder)
        return check(cluster, runs, configs, **keywords)

    ended = []
    monkeypatch.setattr(preflight, "check", slow_check)
    assert quickstart("--submit", *TWO) == 0
    said = capsys.readouterr().out
    assert "Submitted 1 runs in 1 jobs" in said
    assert "The other runs of the plan: 1 finished." in said
    assert ledger.claim_of(ended[0])["released"] == "not submitted"


def test_retry_submits_as_before_but_for_the_changes(fake_slurm, tmp_path, capsys):
    assert quickstart("--submit", *TWO, "cluster.qos=long", "cluster.memory_gb=8") == 0
    folders = run_folders(tmp_path)
    for folder in folders:
        ledger.release(folder, submission(tmp_path).name, "failed")
    assert launch.retry(folders, {"memory_gb": 64, "timeout_minutes": 77}) == 0
    before, after = (options_in((fake_slurm / f"{number}.sh").read_text()) for number in (0, 1))
    assert (before["qos"], before["mem"], before["time"]) == ("long", "8192M", "1440")
    assert (after["qos"], after["mem"], after["time"]) == ("long", "65536M", "77")
    with pytest.raises(UserError, match="memory_gb"):
        launch.retry(folders, {"memory_gbb": 64})


def test_a_submission_without_runs_leaves_no_folder(fake_slurm, tmp_path, capsys):
    assert quickstart("--submit", *TWO) == 0
    name = options_in((fake_slurm / "0.sh").read_text())["job-name"]
    record = "100_{0}\\037PENDING\\037None\\037\\0370\\0370:00\\037{1}\\037\\036\\n"
    program(Path(os.environ["PATH"]) / "squeue", f"printf '{record.format(0, name)}{record.format(1, name)}'")
    before = submission(tmp_path)
    assert quickstart("--submit", *TWO) == 0
    assert "2 queued already" in capsys.readouterr().out
    assert submission(tmp_path) == before
    assert [path.name for path in fake_slurm.glob("*.sh")] == ["0.sh"]


def test_failed_and_cancelled_runs_are_left_to_retry(fake_slurm, tmp_path, capsys):
    assert quickstart("--submit", *TWO[:2], "seed=range(3)") == 0
    first, second, third = run_folders(tmp_path)
    write_json(first / "failure.json", {"kind": "code", "reason": "x"})
    (second / "cancelled").touch()
    write_json(third / "result.json", {"metrics": {}})
    capsys.readouterr()
    assert quickstart("--submit", *TWO[:2], "seed=range(3)") == 0
    said = capsys.readouterr().out
    assert "Submitted" not in said
    assert "1 failed" in said
    assert "1 cancelled" in said
    assert "1 finished" in said
    assert "status.py retry --experiment quickstart" in said


# -- a folder of runs belongs to many hands -----------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file another owner")
def test_another_users_shell_lines_are_shown_and_not_run(fake_slurm, tmp_path, capsys):
    assert quickstart("--submit", *TWO, 'cluster.setup=["echo theirs"]') == 0
    folders, theirs = run_folders(tmp_path), submission(tmp_path)
    for folder in folders:
        ledger.release(folder, theirs.name, "failed")
    os.chown(theirs / "submission.json", 12345, 12345)
    with pytest.raises(UserError, match=f"{theirs.name}, which user 12345 .*echo theirs.*--trust {theirs.name}"):
        launch.retry(folders)
    assert not (fake_slurm / "1.sh").exists()
    assert launch.retry(folders, trusted=[theirs.name]) == 0
    assert "echo theirs" in (fake_slurm / "1.sh").read_text()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", "."])
def test_a_claim_names_a_submission_below_the_runs_only(fake_slurm, tmp_path, name):
    assert quickstart("--submit", *TWO) == 0
    (folder, *_) = run_folders(tmp_path)
    ledger.release(folder, submission(tmp_path).name, "failed")
    path = ledger.newest_claim(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"submission": name}))
    assert "submission" not in ledger.claim_of(folder)
    with pytest.raises(UserError, match="expected runs that were submitted before"):
        launch.retry([folder])


def test_only_the_owner_can_write_what_jobs_execute(fake_slurm, tmp_path):
    before = os.umask(0)
    try:
        assert quickstart("--submit", *TWO) == 0
    finally:
        os.umask(before)
    made = [submission(tmp_path), *submission(tmp_path).rglob("*")]
    assert len(made) > 100
    assert not [path for path in made if not path.is_symlink() and path.stat().st_mode & 0o022]
    (folder, *_) = run_folders(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o777, "the runs themselves are as the umask says"


# -- limits and names ---------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 2, 64])
def test_the_plan_says_how_many_jobs_will_run_at_a_time(fake_slurm, tmp_path, capsys, parallel):
    """With more arrays than that, one of each."""
    words = [*TWO[:2], "seed=range(4)", f"cluster.parallel={parallel}", "cluster.max_array_size=1"]
    assert quickstart("--dry-run", *words) == 0
    planned = re.search(r"in 4 jobs to Slurm, at most (\d+) at a time", capsys.readouterr().out)[1]
    assert quickstart("--submit", *words) == 0
    assert f"Submitted 4 runs in 4 jobs, at most {planned} at a time" in capsys.readouterr().out
    assert int(planned) == 4


def test_submitting_what_is_queued_asks_nothing_of_the_cluster(fake_slurm, tmp_path, monkeypatch, capsys):
    assert quickstart("--submit", *TWO) == 0
    name = options_in((fake_slurm / "0.sh").read_text())["job-name"]
    record = "100_{0}\\037PENDING\\037None\\037\\0370\\0370:00\\037{1}\\037\\036\\n"
    program(Path(os.environ["PATH"]) / "squeue", f"printf '{record.format(0, name)}{record.format(1, name)}'")
    monkeypatch.setattr(preflight, "check", lambda *_, **__: pytest.fail("a preflight for nothing"))
    capsys.readouterr()
    assert quickstart("--submit", *TWO) == 0
    assert "2 queued already" in capsys.readouterr().out


def test_signs_that_slurm_reads_in_names_are_refused(fake_slurm, tmp_path, capsys):
    words = [*TWO, f"runtime.runs={tmp_path}/100%j"]
    assert main("quickstart", "", "quickstart", ["--submit", *words]) == 2
    assert "without % and backslash" in capsys.readouterr().err
    assert not list(tmp_path.glob("100%j/*/slurm"))


REFUSED = "note: --submit would refuse this now: "


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.partition=lwo"], "unknown partition cluster.partition=lwo; nearest: low"),
        (["cluster.account=nobody"], "expected jobs that Slurm takes, got: Invalid account"),
        ([], None),
    ],
)
def test_a_dry_run_says_what_submitting_would_refuse(fake_slurm, no_slurm, tmp_path, capsys, words, said):
    program(
        no_slurm / "sbatch",
        'case "$*" in *nobody*) echo "sbatch: error: Invalid account or combination" >&2; exit 1;; esac',
    )
    assert quickstart("--dry-run", *TWO, *words) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (said is not None)
    assert said is None or notes[0].startswith(REFUSED + said)
    assert not list(tmp_path.glob("runs"))
