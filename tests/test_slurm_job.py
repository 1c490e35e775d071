"""What a job does with its runs: tried with training scripts that only pretend, without a Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from runfolder.files import read_json, write_json
from runfolder.folder import RunFolder
from slurm import ledger, supervisor
from slurm.job import Job
from slurm.notices import Notices
from slurm.profile import Cluster, to_tree
from slurm.submission import Submission
from slurm.supervisor import Place, Supervisor

ROOT = Path(__file__).parents[1]
# The submission's training script: what a run does stands in its folder.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[2])
started = folder / "started"
started.open("a").write(json.dumps({"argv": sys.argv[3:], "env": dict(os.environ)}) + "\\n")
attempt = len(started.read_text().splitlines())
def finish(): (folder / "result.json").write_text('{"metrics": {}}')
def save(step): (folder / "checkpoints").mkdir(exist_ok=True); (folder / f"checkpoints/step-{step:08d}.x.pt").touch()
def wait(path):
    while not path.exists(): time.sleep(0.02)
exec((folder / "what.py").read_text())
"""
FOREVER = "time.sleep(1000)"
# Stops with a checkpoint on USR2 once it has started, which takes it a while.
STOPPABLE = """
def stop(*_):
    save(7)
    print("stopped")
    sys.exit(75)
signal.signal(signal.SIGUSR2, stop)
(folder / "ready").touch()
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA_VISIBLE", "OMP_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def make_job(tmp_path):
    """Makes a submission of one job with runs that do what they are told."""

    def make(*deeds: str, slots: int = 4, scheduler: str = "slurm", **profile) -> Path:
        submission = tmp_path / "runs" / "demo" / "slurm" / "demo-1"
        scripts = submission / "code" / "experiments"
        scripts.mkdir(parents=True)
        (scripts / "demo.py").write_text(SCRIPT)
        names = [f"run-{number}" for number in range(len(deeds))]
        for name, deed in zip(names, deeds, strict=True):
            folder = RunFolder(tmp_path / "runs" / "demo" / name)
            folder.path.mkdir()
            (folder / "what.py").write_text(deed)
            (folder / "config.yaml").write_text(yaml.safe_dump({"data": {}, "runtime": {"data_dir": "data"}}))
            assert ledger.claim([folder], submission.name) == [folder]
            ledger.amend_claim(folder, submission.name, submitted=True, scheduler=scheduler)
        content = {
            "experiment": "demo",
            "cwd": str(tmp_path),
            "cluster": to_tree(Cluster(**profile)),
            "parts": [{"job_name": "demo-1.0", "side_by_side": slots, "jobs": [names]}],
        }
        write_json(submission / "submission.json", content)
        return submission

    return make


def run_of(submission: Path, number: int) -> RunFolder:
    return RunFolder(submission.parents[1] / f"run-{number}")


def starts(submission: Path, number: int) -> list[dict]:
    path = run_of(submission, number) / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outcomes(submission: Path, number: int) -> list[str | None]:
    return [attempt.get("outcome") for attempt in ledger.attempts(run_of(submission, number))]


def failure(submission: Path, number: int) -> dict:
    return read_json(run_of(submission, number) / "failure.json")


def is_free(submission: Path, number: int) -> bool:
    return not ledger.is_claimed_by(run_of(submission, number), submission.name)


def train(submission: Path) -> int:
    with pytest.raises(SystemExit) as end:
        Job(str(submission), 0, 0)()
    return end.value.code


@pytest.fixture
def in_background(tmp_path):
    """Runs the job in a process of its own; none of its processes outlives the test."""
    started = []

    def start(submission: Path, **environment: str) -> subprocess.Popen:
        words = [sys.executable, "-c", "import sys; from slurm.job import Job; Job(sys.argv[1], 0, 0)()"]
        process = subprocess.Popen(
            [*words, str(submission)],
            env=os.environ | {"MARK": str(tmp_path)} | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    left = [pid for pid in marked(tmp_path) if pid != os.getpid()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()
        process.stdout.close()
    assert not left, f"processes that outlived the job: {left}"


def marked(tmp_path: Path) -> list[int]:
    """Processes of a test's job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={tmp_path}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"expected {what} within a minute"
        time.sleep(0.02)


# -- what becomes of runs ---------------------------------------------------------------


def test_of_packed_runs_one_fails_and_the_others_finish(make_job, capsys):
    """Side by side: each waits until all four have started."""
    together = 'for n in range(4): wait(folder.parent / f"run-{n}/started")\n'
    good, bad = together + "save(5); finish()", together + "print('no'); print('not with me'); sys.exit(3)"
    submission = make_job(good, bad, good, good)
    assert train(submission) == 1
    assert [outcomes(submission, number) for number in range(4)] == [
        ["finished"],
        ["failed"],
        ["finished"],
        ["finished"],
    ]
    assert failure(submission, 1) | {"host": "", "when": ""} == {
        "kind": "code",
        "reason": "exit code 3: not with me",
        "traceback": ["no", "not with me"],
        "host": "",
        "when": "",
    }
    assert all(is_free(submission, number) for number in range(4))
    (attempt,) = ledger.attempts(run_of(submission, 0))
    assert (attempt["from_step"], attempt["saved_step"], attempt["submission"]) == (0, 5, "demo-1")
    assert (run_of(submission, 1) / "output.txt").read_text() == "no\nnot with me\n"
    assert "3 of 4 runs finished, 1 failed, 0 left" in capsys.readouterr().out


def test_more_runs_than_slots_take_turns(make_job):
    """No slot is used twice at a time; every slot is used."""
    deed = """
slot = folder.parent / ("slot-" + os.environ["CUDA_VISIBLE_DEVICES"])
slot.mkdir()
time.sleep(0.2)
slot.rmdir()
finish()
"""
    submission = make_job(*[deed] * 5, slots=2)
    os.environ["CUDA_VISIBLE_DEVICES"] = "3,5"
    try:
        assert train(submission) == 0
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    gpus = [starts(submission, number)[0]["env"]["CUDA_VISIBLE_DEVICES"] for number in range(5)]
    assert set(gpus) == {"3", "5"}


def test_a_killed_run_is_started_again_here(make_job, capsys):
    deed = "save(attempt)\nif attempt < 3: os.kill(os.getpid(), signal.SIGKILL)\nfinish()"
    submission = make_job(deed, "finish()")
    assert train(submission) == 0
    assert outcomes(submission, 0) == ["killed", "killed", "finished"]
    assert [attempt["from_step"] for attempt in ledger.attempts(run_of(submission, 0))] == [0, 1, 2]
    assert "SIGKILL" in ledger.attempts(run_of(submission, 0))[0]["reason"]
    assert outcomes(submission, 1) == ["finished"]


def test_attempts_without_a_checkpoint_come_to_an_end(make_job):
    """Five good ones before do not count, and neither do those of another submission."""
    deed = "if attempt <= 5: save(attempt)\nos.kill(os.getpid(), signal.SIGSEGV)"
    submission = make_job(deed, max_fruitless=3)
    for _ in range(4):
        ledger.begin_attempt(run_of(submission, 0), submission="demo-0")
    assert train(submission) == 1
    assert len(starts(submission, 0)) == 5 + 3
    said = failure(submission, 0)
    assert said["kind"] == "no-progress"
    assert said["reason"].startswith(
        "3 attempts in a row wrote no checkpoint after step 5; the last one: killed by SIGSEGV"
    )
    assert is_free(submission, 0)


def test_attempts_that_were_cut_off_without_a_word_count(make_job):
    """As if this job had been killed as a whole twice."""
    submission = make_job("finish()", "finish()", max_fruitless=2)
    for _ in range(2):
        ledger.begin_attempt(run_of(submission, 0), submission="demo-1")
    assert train(submission) == 1
    assert not starts(submission, 0)
    assert failure(submission, 0)["kind"] == "no-progress"
    assert outcomes(submission, 1) == ["finished"]


def test_runs_that_are_not_ours_to_train_are_not_started(make_job):
    submission = make_job(*[FOREVER] * 4, "finish()")
    write_json(run_of(submission, 0) / "result.json", {"metrics": {}})
    (run_of(submission, 1) / "cancelled").touch()
    ledger.release(run_of(submission, 2), submission.name, "by hand")
    path = ledger.newest_claim(run_of(submission, 3))
    write_json(path.with_name("00000002.json"), {"submission": "demo-2"})
    assert train(submission) == 0
    assert [len(starts(submission, number)) for number in range(5)] == [0, 0, 0, 0, 1]
    assert is_free(submission, 0)
    assert is_free(submission, 1)
    assert ledger.is_claimed_by(run_of(submission, 3), "demo-2")


@pytest.mark.parametrize(("kind", "excluded"), [("node", True), ("peer", False)])
def test_a_fault_of_the_node_is_tried_elsewhere(make_job, monkeypatch, kind, excluded):
    """The other run of the job finishes first; the node is excluded for this job."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    reason = {"kind": kind, "reason": "no GPU"}
    submission = make_job(f"(folder / 'failure.json').write_text({json.dumps(reason)!r}); sys.exit(2)", "finish()")
    assert train(submission) == 75
    assert outcomes(submission, 0) == ["node"]
    assert not failure(submission, 0)
    assert not is_free(submission, 0)
    assert outcomes(submission, 1) == ["finished"]
    exclude = submission / "exclude-12"
    assert exclude.exists() == excluded
    assert not excluded or exclude.read_text() == "n7\n"


def test_the_node_that_failed_is_excluded_not_the_first_ranks(make_job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    reason = {"kind": "node", "reason": "no GPU", "host": "n8"}
    submission = make_job(f"(folder / 'failure.json').write_text({json.dumps(reason)!r}); sys.exit(2)")
    assert train(submission) == 75
    assert (submission / "exclude-12").read_text() == "n8\n"


@pytest.mark.parametrize("number", ["12", "15"])
def test_an_element_of_an_array_is_named_as_such(make_job, monkeypatch, number):
    """Its SLURM_JOB_ID may be the array's own number."""
    for name, value in {"JOB_ID": number, "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    submission = make_job("finish()")
    assert train(submission) == 0
    assert [attempt["job"] for attempt in ledger.attempts(run_of(submission, 0))] == ["12_2"]
    assert (submission / "started" / "12_2-0").exists()


def test_a_folder_that_this_node_does_not_have_is_a_fault_of_the_node(make_job, monkeypatch, tmp_path):
    """The folder that jobs are started from is not mounted: nothing is lost, other nodes are tried."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    submission = make_job("finish()", "finish()", max_fruitless=2)
    said = read_json(submission / "submission.json")
    write_json(submission / "submission.json", said | {"cwd": str(tmp_path / "missing")})
    assert train(submission) == 75
    assert outcomes(submission, 0) == outcomes(submission, 1) == ["node"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(submission) == 1
    assert failure(submission, 0)["kind"] == "no-progress"
    assert "is this folder shared" in failure(submission, 0)["reason"]


def test_a_file_system_that_fails_for_a_moment_ends_in_a_requeue(make_job, monkeypatch):
    """What is being trained saves and leaves; all of it is left for the next start."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    submission = make_job(STOPPABLE, "finish()", slots=1)

    class Failing(Notices):
        def take(self):
            if (run_of(submission, 0) / "ready").exists():
                raise OSError(116, "Stale file handle")
            return super().take()

    place = Place({"job": "12", "restart": 0})
    with Failing() as notices:
        job = Supervisor(Submission.read(submission), 0, 0, notices, place, submission / "code")
        assert job.run() == 75
    assert run_of(submission, 0).last_step() == 7
    assert not starts(submission, 1)
    assert not is_free(submission, 0)


def test_other_ranks_train_what_the_first_one_says(make_job, monkeypatch):
    """The first one speaks for all; of a process that was killed they write down that it was."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    submission = make_job("if attempt == 2: os.kill(os.getpid(), 9)\nsys.exit(1)")
    monkeypatch.setenv("SLURM_PROCID", "1")
    (submission / "ranks").mkdir()
    write_json(submission / "ranks" / "12-0.json", {"runs": [str(run_of(submission, 0))]})
    assert train(submission) == 0
    assert not failure(submission, 0)
    assert train(submission) == 0
    assert failure(submission, 0)["kind"] == "peer"
    assert "rank 1 was killed by SIGKILL" in failure(submission, 0)["reason"]
    assert not outcomes(submission, 0), "attempts are the first rank's to note"


def test_a_rank_that_waits_for_one_that_is_gone_is_ended(make_job, monkeypatch):
    """As NCCL's may wait for long; the job is started again, and no node is to blame."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(supervisor, "SECONDS_TO_NOTICE", 0.3)
    reason = json.dumps({"kind": "peer", "reason": "rank 1 was killed"})
    submission = make_job(f"(folder / 'failure.json').write_text({reason!r}); " + FOREVER)
    assert train(submission) == 75
    assert outcomes(submission, 0) == ["node"]
    assert not failure(submission, 0)
    assert not (submission / "exclude-12").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_one_that_was_told_to_stop_before_it_could_train(make_job, monkeypatch, rank):
    """A signal of the first second may reach some ranks only: one leaves its run alone, the other has begun it."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(supervisor, "_POLL_RANKS", 0.1)
    submission = make_job(FOREVER)
    (submission / "ranks").mkdir()
    write_json(submission / "ranks" / "12-0.json", {"runs": [str(run_of(submission, 0))]})

    class Told(Notices):
        def interrupting(self):
            self._heard.append(signal.SIGUSR2)
            return super().interrupting()

    def supervise(rank, kind):
        with kind() as notices:
            place = Place({"job": "12", "restart": 0}, rank, 2)
            return Supervisor(Submission.read(submission), 0, 0, notices, place, submission / "code").run()

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert supervise(1 - rank, Told) == (75 if rank else 0)
    assert not starts(submission, 0)
    assert supervise(rank, Notices) == (0 if rank else 75)
    assert len(starts(submission, 0)) <= 1
    assert not failure(submission, 0)


def test_staging_that_fails_on_this_node_is_tried_on_others(make_job, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "file").write_text("")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "image").write_text("")
    profile = {"stage_from": str(tmp_path / "source"), "stage_to": str(tmp_path / "file" / "scratch")}
    submission = make_job("finish()", **profile)
    assert train(submission) == 75
    assert (submission / "exclude-12").read_text() == "n7\n"
    assert outcomes(submission, 0) == ["node"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    (submission / "ranks").mkdir()
    write_json(submission / "ranks" / "12-0.json", {"runs": [str(run_of(submission, 0))]})
    assert train(submission) == 0
    assert failure(submission, 0) | {"host": "n7", "kind": "node"} == failure(submission, 0)


def test_the_runs_own_account_of_its_failure_is_kept(make_job, capsys):
    reason = {"kind": "non-finite", "reason": "loss nan at step 3"}
    submission = make_job(f"(folder / 'failure.json').write_text({json.dumps(reason)!r}); sys.exit(1)")
    assert train(submission) == 1
    assert failure(submission, 0) == reason
    assert "run-0: failed: non-finite: loss nan at step 3" in capsys.readouterr().out


def test_a_run_that_another_process_trains_is_left_to_it(make_job):
    submission = make_job("print('busy: somebody'); sys.exit(69)", "finish()")
    assert train(submission) == 0
    assert outcomes(submission, 0) == ["busy"]
    assert not failure(submission, 0)


@pytest.mark.parametrize("broken", ["attempts", "output.txt", "claims"])
def test_a_folder_that_cannot_be_written_stops_no_other_run(make_job, broken):
    """There is a file where a folder should be, or a folder where a file should be; no process is left alone."""
    submission = make_job("finish()", "finish()", "finish()", slots=2)
    path = run_of(submission, 1) / broken
    if broken == "output.txt":
        path.mkdir()
    else:
        if path.exists():
            path.rename(path.with_name("away"))
        path.write_text("")
    assert train(submission) == (0 if broken == "claims" else 1)
    assert outcomes(submission, 0) == outcomes(submission, 2) == ["finished"]
    assert not starts(submission, 1)
    assert failure(submission, 1).get("kind") == (None if broken == "claims" else "disk")


def test_a_note_that_cannot_be_written_stops_no_other_run(make_job):
    """The folder becomes unusable while its run is going on."""
    deed = "import shutil\nshutil.rmtree(folder / 'attempts'); (folder / 'attempts').touch()\nsys.exit(1)"
    submission = make_job(deed, "wait(folder.parent / 'run-0/failure.json'); time.sleep(0.5); finish()")
    assert train(submission) == 1
    assert outcomes(submission, 1) == ["finished"]
    assert failure(submission, 0)["kind"] == "code"


# -- what a run is given ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "slots", "shared"),
    [
        ("0", 4, ["0", "0", "0", "0"]),
        ("0,1", 4, ["0", "1", "0", "1"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]),
        ("0,1", 1, ["0,1"] * 4),
        (None, 4, [None] * 4),
    ],
)
def test_gpus_are_shared_out(make_job, monkeypatch, gpus, slots, shared):
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    all_started = 'for n in range(4): wait(folder.parent / f"run-{n}/started")\n'
    submission = make_job(*[("" if slots < 4 else all_started) + "finish()"] * 4, slots=slots)
    assert train(submission) == 0
    given = [starts(submission, number)[0]["env"].get("CUDA_VISIBLE_DEVICES") for number in range(4)]
    assert sorted(map(str, given)) == sorted(map(str, shared))


@pytest.mark.parametrize(
    ("cores", "slots", "threads", "before"),
    [("8", 4, "2", None), ("8", 1, "8", None), ("2", 4, "1", None), ("7", 2, "3", ""), ("", 10**6, "1", "")],
)
def test_cores_are_shared_out(make_job, monkeypatch, cores, slots, threads, before):
    """An empty variable says no more than none."""
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", cores)
    if before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    submission = make_job("finish()", slots=slots)
    assert train(submission) == 0
    assert starts(submission, 0)[0]["env"]["OMP_NUM_THREADS"] == threads


def test_a_persons_choice_of_threads_holds(make_job, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    submission = make_job("finish()")
    assert train(submission) == 0
    assert starts(submission, 0)[0]["env"]["OMP_NUM_THREADS"] == "5"


def settings(submission: Path) -> dict[str, str]:
    return dict(word.split("=") for word in starts(submission, 0)[0]["argv"])


def test_settings_of_this_start(make_job, monkeypatch):
    """Without Slurm SIGTERM stops a run and there is no deadline; in a job it saves, and the job's end is known."""
    submission = make_job("finish()", timeout_minutes=10)
    train(submission)
    outside = settings(submission)
    assert outside == {"runtime.progress": "false", "runtime.patience_seconds": "120.0"}
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("result.json", "started"):
        (run_of(submission, 0) / name).unlink()
    ledger.amend_claim(run_of(submission, 0), submission.name, released=None)
    train(submission)
    inside = settings(submission)
    left = float(inside.pop("runtime.deadline_at")) - time.time()
    assert 9 < left / 60 <= 9.5  # half a minute before the job's end
    assert inside == outside | {"runtime.on_term": "save"}


# -- time and signals -------------------------------------------------------------------


def test_usr2_reaches_a_run_that_does_not_listen_yet(make_job, in_background):
    """Told while it is deaf, again until it hears; runs that wait for a slot are left for the next start."""
    starting = "(folder / 'deaf').touch(); time.sleep(1.5)\n"
    submission = make_job(starting + STOPPABLE, "finish()", slots=1)
    process = in_background(submission, SLURM_JOB_ID="12")
    wait_until((run_of(submission, 0) / "deaf").exists, "the first run to start")
    process.send_signal(signal.SIGUSR2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert outcomes(submission, 0) == ["preempted"]
    assert run_of(submission, 0).last_step() == 7
    assert not starts(submission, 1)
    assert "0 of 2 runs finished, 0 failed, 2 left" in said
    assert not is_free(submission, 0)
    assert not is_free(submission, 1)


def test_term_is_passed_on_and_work_goes_on(make_job, in_background):
    """In a job SIGTERM may mean much: runs save; the supervisor stays until Slurm kills it."""
    deed = "signal.signal(signal.SIGTERM, lambda *_: (save(3), finish()))\n(folder / 'ready').touch()\n"
    deed += "wait(folder / 'result.json')"
    submission = make_job(deed, "finish()", slots=1)
    process = in_background(submission, SLURM_JOB_ID="12")
    wait_until((run_of(submission, 0) / "ready").exists, "the run to listen")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert outcomes(submission, 0) == outcomes(submission, 1) == ["finished"]
    assert run_of(submission, 0).last_step() == 3


def test_without_slurm_term_stops(make_job, in_background):
    deed = STOPPABLE.replace("signal.SIGUSR2", "signal.SIGTERM")
    submission = make_job(deed, "finish()", slots=1)
    process = in_background(submission)
    wait_until((run_of(submission, 0) / "ready").exists, "the run to listen")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert outcomes(submission, 0) == ["stopped"]
    assert not starts(submission, 1)


def test_a_cancelled_run_is_stopped_and_no_other(make_job, in_background):
    listening = "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n(folder / 'ready').touch()\n"
    waiting = "wait(folder.parent / 'run-0/checkpoints'); time.sleep(0.5); finish()"
    submission = make_job(STOPPABLE, listening + waiting)
    process = in_background(submission)
    for number in (0, 1):
        wait_until((run_of(submission, number) / "ready").exists, "the runs to listen")
    (run_of(submission, 0) / "cancelled").touch()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert outcomes(submission, 0) == ["cancelled"]
    assert outcomes(submission, 1) == ["finished"]
    assert is_free(submission, 0)


def test_runs_leave_with_a_checkpoint_when_their_supervisor_is_killed(make_job, in_background, tmp_path):
    submission = make_job(STOPPABLE, STOPPABLE)
    process = in_background(submission)
    for number in (0, 1):
        wait_until((run_of(submission, number) / "ready").exists, "the runs to listen")
    process.kill()
    process.wait()
    wait_until(lambda: not marked(tmp_path), "the runs to leave")
    assert [run_of(submission, number).last_step() for number in (0, 1)] == [7, 7]


def test_the_next_start_goes_on_with_what_was_left(make_job, in_background, monkeypatch):
    """The same job again, as Slurm starts it after a requeue."""
    submission = make_job("if attempt > 1: finish(); sys.exit()\n" + STOPPABLE, "finish()")
    process = in_background(submission, SLURM_JOB_ID="12")
    wait_until((run_of(submission, 0) / "ready").exists, "the run to listen")
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=60)
    assert process.returncode == 75
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(submission) == 0
    assert outcomes(submission, 0) == ["preempted", "finished"]
    assert [(a["job"], a["restart"]) for a in ledger.attempts(run_of(submission, 0))] == [("12", 0), ("12", 1)]
    assert len(starts(submission, 1)) == 1
    assert train(submission) == 0  # and once more, as after a requeue of an ended job
    assert len(starts(submission, 0)) == 2


def test_a_used_up_budget_is_a_failure_of_what_is_left(make_job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    submission = make_job("save(4); print('stopped'); sys.exit(75)", max_requeues=3)
    assert train(submission) == 1
    assert failure(submission, 0)["kind"] == "requeues"
    assert is_free(submission, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    (run_of(submission, 0) / "failure.json").unlink()
    ledger.amend_claim(run_of(submission, 0), submission.name, released=None)
    assert train(submission) == 75


# -- what the job's process is ----------------------------------------------------------


def test_the_jobs_own_process_is_light():
    """Quick to start, and alive when a training process is not: neither torch nor Hydra."""
    words = (
        "import sys, slurm.job; print(sorted({'torch', 'hydra', 'omegaconf', 'numpy', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_folder_that_is_no_submission_is_named(tmp_path, in_background):
    process = in_background(tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"expected a submission in {tmp_path}" in said
