"""A run folder has one owner; the newest ticket wins, and the older one damages nothing."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.config import folder_of
from experiments.training import checkpoint
from experiments.training.loop import Trainer
from experiments.training.run import run
from runfolder import process
from runfolder.errors import RunBusyError, SupersededError
from runfolder.folder import RunFolder
from runfolder.lease import Heartbeat, describe, is_held, take
from runfolder.records import Holder, read_record
from runfolder.states import state_of
from runfolder.tickets import highest, issue, now_in, temporary
from tests.cases import tiny_config
from tests.holding import held_elsewhere

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


RACE = """
import sys, time
from pathlib import Path
from runfolder.tickets import highest, issue, now_in, temporary
folder = Path(sys.argv[1])
won = []
print("ready", flush=True)
begin = float(input())
for number in range(1, 201):
    while time.time() < begin + 0.003 * number: time.sleep(0)
    if issue(folder, number, {"by": sys.argv[2]}): won.append(number)
print(won)
"""


def test_of_many_processes_one_gets_each_ticket(tmp_path):
    """Four processes try for the same 200 numbers at the same time; links and exclusive creation alike."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), str(k)], cwd=ROOT, **pipes) for k in range(4)
    ]
    assert [racer.stdout.readline() for racer in racers] == 4 * ["ready\n"]
    begin = time.time() + 0.2
    for racer in racers:
        racer.stdin.write(f"{begin}\n")
        racer.stdin.flush()
    won = [json.loads(racer.communicate()[0]) for racer in racers]
    assert sorted(sum(won, [])) == list(range(1, 201))
    assert sum(map(bool, won)) > 1
    for k, numbers in enumerate(won):
        for number in numbers:
            assert json.loads((tmp_path / f"{number:08d}.json").read_text()) == {"by": str(k)}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_system_without_hard_links_serves_as_well(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert issue(tmp_path, 1, {"a": 1}).name == "00000001.json"
    assert issue(tmp_path, 1, {"a": 2}) is None
    assert json.loads((tmp_path / "00000001.json").read_text()) == {"a": 1}


def test_a_link_that_was_made_but_reported_as_failed_counts(tmp_path, monkeypatch):
    """Over NFS a repeated request can be answered with "exists" although it was the first that made it."""
    link = os.link

    def repeated(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert issue(tmp_path, 1, {}) == tmp_path / "00000001.json"


def test_what_killed_processes_leave_goes_with_the_next_holder(folder):
    """At once where the process is known to be dead, else after an hour."""
    leases = folder.lease
    leases.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = temporary(leases, "00000009")
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{gone.pid}."))
    foreign, old, odd = leases / "now.n7.cluster-1-2.99.1.tmp", leases / "00000003.n7-1-2.99.1.tmp", leases / "x.tmp"
    for path in (mine, dead, foreign, old, odd):
        path.touch()
    os.utime(old, (0, time.time() - 4000))
    take(folder, 10.0)
    assert {path.name for path in leases.glob("*.tmp")} == {mine.name, foreign.name, odd.name}


def test_a_second_process_is_refused_until_the_first_is_gone(folder):
    with held_elsewhere(folder) as holder:
        assert state_of(folder) == "running"
        with pytest.raises(RunBusyError, match=f"process {holder.pid} on "):
            take(folder, 10.0)
        holder.kill()
        holder.wait()
        assert not is_held(folder)
        assert take(folder, 10.0).number == 2


def test_what_is_given_back_is_free_at_once(folder):
    for number in (1, 2, 3):
        mine = take(folder, 10.0)
        assert mine.number == number
        assert is_held(folder)
        mine.release()
        assert not is_held(folder)


def _elsewhere(folder, number, **said):
    """The lease of a process on another machine, whose death cannot be seen from here."""
    there = {"host": "elsewhere", "boot": "x", "processes": "", "pid": 1, "began": "1", "beats_every": 10.0}
    return issue(folder.lease, number, there | said)


@pytest.mark.parametrize(("age", "held"), [(0, True), (55, True), (70, False), (1e6, False)])
def test_a_process_elsewhere_counts_as_gone_after_six_missing_beats(folder, age, held):
    path = _elsewhere(folder, 1)
    os.utime(path, (time.time() - age,) * 2)
    assert is_held(folder) is held
    if held:
        with pytest.raises(RunBusyError, match="on elsewhere"):
            take(folder, 10.0)
    else:
        assert take(folder, 10.0).number == 2


def test_patience_waits_for_the_missing_beats(folder):
    _elsewhere(folder, 1, beats_every=0.1)
    path = highest(folder.lease)[1]
    beat = path.stat().st_mtime
    assert take(folder, 0.1, patience=60).number == 2
    assert now_in(folder.lease) - beat > 6 * 0.1


def test_the_later_start_of_the_same_job_wins_at_once(folder, monkeypatch):
    """slurmd died, its job lives on, and Slurm has started the job again elsewhere."""
    _elsewhere(folder, 1, job="7", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    newer = take(folder, 10.0)
    assert newer.number == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(SupersededError, match=r"taken over by job 7 \(start 2\)"):
        take(folder, 10.0, patience=60)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(RunBusyError, match="is being trained by job 7"):
        take(folder, 10.0)


def test_the_older_one_notices_before_it_writes(folder):
    older = take(folder, 10.0)
    older.check()
    _elsewhere(folder, 2)
    for action in (older.check, older.beat):
        with pytest.raises(SupersededError, match="taken over by .*elsewhere"):
            action()
    older.release()
    assert is_held(folder), "the older one has given back what is not its own"


def test_a_removed_run_folder_is_noticed(folder):
    mine = take(folder, 10.0)
    mine.path.unlink()
    with pytest.raises(SupersededError, match="lost its lease"):
        mine.check()


def test_the_heartbeat_keeps_the_lease_and_tells_when_it_is_lost(folder):
    mine, told, lost, gone = take(folder, 0.05), [], [], threading.Event()
    os.utime(mine.path, (0, 0))
    with Heartbeat(mine, 0.05, lambda: told.append(1), lambda reason: (lost.append(reason), gone.set())):
        time.sleep(0.5)
        assert mine.path.stat().st_mtime > time.time() - 5
        assert told
        _elsewhere(folder, 2)
        assert gone.wait(5)
    assert len(lost) == 1


def test_the_heartbeat_survives_a_file_system_that_fails_for_a_moment(folder, monkeypatch):
    mine, told, failed = take(folder, 0.05), [], []
    check = mine.check

    def fail_twice():
        if len(failed) < 2:
            failed.append(True)
            raise OSError(116, "Stale file handle")
        check()

    monkeypatch.setattr(mine, "check", fail_twice)
    with Heartbeat(mine, 0.05, lambda: told.append(1), pytest.fail):
        while not told:
            time.sleep(0.01)
    assert len(failed) == 2


def test_a_superseded_run_leaves_without_damage_and_the_newer_one_ends_the_same(tmp_path, monkeypatch):
    """The older copy writes on until it looks; a third start continues and equals the undisturbed run."""
    settings = {"runtime__checkpoint_steps": 3, "runtime__log_every": 2, "epochs": 2}
    expected = run(tiny_config(tmp_path / "undisturbed", **settings))
    config = tiny_config(tmp_path / "disturbed", **settings)
    folder, after_step = folder_of(config), Trainer.after_step

    def taken_over(trainer, at_end):
        if trainer.progress.step == 7:
            _elsewhere(folder, 2, released=True)  # somebody was here and has gone again
        after_step(trainer, at_end)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_step", taken_over)
        with pytest.raises(SupersededError, match="taken over"):
            run(config)
    assert not (folder / "result.json").exists()
    assert not (folder / "failure.json").exists()
    assert folder.newest_checkpoint().name.startswith("step-00000006-")
    assert run(config)["weights_sha256"] == expected["weights_sha256"]
    assert "continues at step 6" in (folder / "log.txt").read_text()


def test_what_a_superseded_process_still_says_reaches_no_record(folder):
    """TensorBoard's writer appends by name, so it may write only after a look at the lease."""
    from experiments.training.log import RunLog, cut_events

    mine = take(folder, 10.0)
    older = RunLog(folder, guard=mine.check)
    older.begin({}, {}, "test/top1")
    older.scalar("train/loss", 1.0, 1)
    sizes = older.sizes()
    _elsewhere(folder, 2)
    cut_events(folder, sizes)
    for step in range(100):
        older.scalar("train/loss", 3.0, step)
    older.close()
    time.sleep(0.2)
    assert {path.name: path.stat().st_size for path in folder.path.glob("events*")} == sizes


def test_a_checkpoint_of_a_superseded_process_is_passed_over(tmp_path):
    """Written in the moment between its look and its write: the record it belongs to is cut already."""
    config = tiny_config(tmp_path, runtime__checkpoint_steps=3, epochs=2)
    expected = run(config)
    folder = folder_of(config)
    (folder / "result.json").unlink()
    last = folder.newest_checkpoint()
    content = checkpoint.load(last, expected["config_hash"])
    content["events"] = {name: size + 100 for name, size in content["events"].items()}
    keeper = checkpoint.Keeper(folder.checkpoints, expected["config_hash"], 9, last)
    keeper.save(content["step"], {key: content[key] for key in content if key not in ("format", "config_hash", "step")})
    assert run(config)["weights_sha256"] == expected["weights_sha256"]
    assert "it is passed over" in (folder / "log.txt").read_text()


def test_a_lease_dated_in_the_future_is_no_sign_of_life(folder):
    path = _elsewhere(folder, 1)
    os.utime(path, (time.time() + 3600,) * 2)
    assert not is_held(folder)
    assert take(folder, 10.0).number == 2


def test_words_for_numbers_in_a_lease_are_as_if_they_were_not_there(folder):
    path = _elsewhere(folder, 1, beats_every="soon", pid="many", restart=[], job="7")
    assert is_held(folder)
    assert "process ? on elsewhere" in describe(read_record(path, Holder))
    os.utime(path, (time.time() - 70,) * 2)
    assert take(folder, 10.0).number == 2


# -- processes that may not be seen -------------------------------------------------------


def _hidden(monkeypatch, number):
    """As with hidepid: no file in /proc, and signals are refused (EPERM) or, of none, unknown (ESRCH)."""
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: "" if path.name == "stat" else read(path, **how))

    def kill(pid, signal):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "kill", kill)


@pytest.mark.parametrize(("number", "dead"), [(errno.EPERM, None), (errno.ESRCH, True)])
def test_a_process_that_may_not_be_seen_is_not_dead(monkeypatch, number, dead):
    _hidden(monkeypatch, number)
    assert process.is_dead(process.this_process(12345) | {"began": "77"}) is dead
    assert process.is_gone(12345) is dead


def test_the_live_run_of_another_user_is_not_taken_until_its_heartbeat_is_old(folder, monkeypatch):
    _hidden(monkeypatch, errno.EPERM)
    holder = process.this_process(12345) | {"began": "77", "beats_every": 10.0}
    path = issue(folder.lease, 1, holder)
    with pytest.raises(RunBusyError):
        take(folder, 10.0)
    os.utime(path, (time.time() - 70,) * 2)
    assert take(folder, 10.0).number == 2


def test_this_process_is_seen():
    assert process.is_dead(process.this_process()) is False
    assert process.is_gone(os.getpid()) is False
