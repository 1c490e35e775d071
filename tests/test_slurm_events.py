"""Whatever happens to its job, a run ends with the same bytes and the same table, or can be retried.

On a real Slurm of this machine. Every test has a cluster of its own, sends it one run by
``quickstart.py --submit``, lets something happen in the middle, and compares the end with an
undisturbed run: weights, metrics, every TensorBoard point but times, the whole last
checkpoint, the table. `pytest -m slow tests/test_slurm_events.py -n 6`: mostly waiting.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from slurm import launch
from slurm.command import main
from tests.same_runs import assert_same, only_run
from tests.slurm_cluster import make_cluster, needs_slurm  # noqa: F401
from tests.slurm_events import SETTINGS, Submitted, contents, words
from tests.test_resume import Machine

pytestmark = needs_slurm
EVERY = 10  # steps between checkpoints
FEW = 3  # steps that an attempt has done when the next event comes
NEVER = 10**6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of runs in which the same run was trained without any interruption, made once per variant."""
    made = {}

    def runs(ranks, settings):
        key = (ranks, *words(settings))
        if key not in made:
            home = tmp_path_factory.mktemp("undisturbed")
            arguments = words(SETTINGS | {"runtime.progress": "false"} | settings)
            if ranks == 1:
                assert main("quickstart", "", "", [*arguments, f"runtime.runs={home}"]) == 0
            else:
                machine = Machine(home.parent)
                assert machine.start(arguments, runs=home, ranks=ranks) == [0] * ranks, machine.output()
                machine.server.stdin.close()
                machine.server.wait()
            made[key] = home
        return made[key]

    return runs


@pytest.fixture
def submit(make_cluster, tmp_path, monkeypatch):  # noqa: F811
    """Starts a cluster and submits a run to it; what it did is shown when the test fails."""
    started = []

    def start(ranks=1, bed=None, profile=None, brake=0.25, **settings):
        cluster = make_cluster(**({"nodes": ranks + 1, "gpus": 0} | (bed or {})))
        for key in [key for key in os.environ if key not in cluster.environment]:
            monkeypatch.delenv(key)
        for key in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(key, cluster.environment[key])
        started.append(Submitted(cluster, tmp_path, ranks, settings, dict(profile or {}), brake))
        return started[-1]

    yield start
    for run in started:
        print(run.bed.run("squeue", "-r", "-t", "all", check=False), run.output(), sep="\n")


@pytest.fixture
def check(undisturbed, capsys):
    """Compares a finished run with an undisturbed one and reports what the event has cost."""

    def compare(run, *events):
        settings = {key: value for key, value in run.settings.items() if not key.startswith("runtime.")}
        reference = undisturbed(run.ranks, settings)
        assert Path(run.folder) == Path(only_run(run.runs))
        assert_same(run.runs, reference, capsys)
        assert not run.failure()
        assert all(len(steps) == 1 for steps in run.steps_of_starts()), "all ranks begin at the same step"
        run.report(*events)

    return compare


# -- events after which the job is started again ------------------------------------------


def usr2(run):
    run.send("USR2")


def usr2_twice(run):
    run.send("USR2", "USR2")


def term_usr2(run):
    run.send("TERM", "USR2")


def requeue(run):
    run.bed.run("scontrol", "requeue", run.job)


def preempt(run):
    nodes = str(len(run.bed.nodes))
    run.bed.run("sbatch", "-p", "high", "--exclusive", "-N", nodes, "-o", "/dev/null", "--wrap", "sleep 1")


def kill_training(run, rank=0):
    run.kill(run.training(rank))


def kill_supervisor(run, rank=0):
    run.kill(run.supervisors(rank))


def kill_training_1(run):
    kill_training(run, 1)


def kill_supervisor_1(run):
    kill_supervisor(run, 1)


def set_node_down(run):
    node = run.attempts()[-1]["node"]
    run.bed.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def stop_slurmd(run):
    """For good. Slurm ends the step on the other nodes, so the rank that lives on alone gives up."""
    run.bed.stop_slurmd(run.attempts()[0]["node"])


def stop_slurmd_for_a_while(run):
    """Until its job has been given away."""
    node = run.attempts()[0]["node"]
    run.bed.stop_slurmd(node)
    run.until(lambda: run.in_queue().restarts == 1, "a requeue")
    run.bed.start_slurmd(node)


def stale_file(run):
    """What an attempt that was killed while submitit was saving leaves."""
    (jobs,) = run.runs.glob("quickstart/slurm/*/jobs")
    stale = jobs / f"{run.job}_submitted.pkl.save_tmp"
    stale.touch()
    count = len(run.attempts())
    usr2(run)
    run.until_attempts(count + 1)
    assert not stale.exists()


def stop_while_the_controller_is_away(run):
    """srun itself waits for the controller then."""
    run.save_controller()
    run.bed.stop_slurmctld()
    ranks = range(run.ranks)
    run.kill([pid for rank in ranks for pid in run.supervisors(rank) + run.training(rank)], signal.SIGUSR2)
    run.until(lambda: not any(run.supervisors(rank) for rank in ranks), "the supervisors' end")
    run.bed.start_slurmctld()


def cancel_and_retry(run):
    """scancel is no requeue: the job stays away until a person submits the run again."""
    first = run.in_queue()
    run.bed.run("scancel", run.job)
    run.until_state("CANCELLED")
    run.until(lambda: not any(run.training(k) + run.supervisors(k) for k in range(run.ranks)), "the processes' end")
    assert run.in_queue().restarts == first.restarts
    assert launch.retry([run.folder]) == 0
    assert run.job != first.id


def take_daemons_away_for_a_moment(run):
    """Killed or ended, the controller and the daemon of rank 0's node: the job does not notice."""
    node = run.attempts()[-1]["node"]
    run.save_controller()
    for number in (signal.SIGKILL, signal.SIGTERM):
        run.bed.stop_slurmctld(number)
        run.until_step(run.step() + 1)
        run.bed.start_slurmctld()
        run.bed.stop_slurmd(node, number)
        run.until_step(run.step() + 1)
        run.bed.start_slurmd(node)


@dataclass
class Event:
    name: str
    do: object
    saves: bool = True  # the run has notice and saves; else it goes back to the last checkpoint
    again: bool = True  # there is another attempt


@dataclass
class Story:
    """What happens to one run, one event after the other."""

    events: list[Event]
    ranks: int = 1
    bed: dict = field(default_factory=dict)
    profile: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    brake: float = 0.25
    quick: bool = False  # for the default tests

    def parameter(self):
        name = "; ".join(event.name for event in self.events) + f" ({self.ranks})"
        return pytest.param(self, id=name, marks=() if self.quick else pytest.mark.slow)


SLOWLY = 0.7  # half a minute passes until Slurm believes a node dead
ABRUPT = {"partition": "abrupt"}  # GraceTime=0
TERM_ONLY = {"user_signal": False}  # Slurm's default: preemption is announced by SIGTERM
OFTEN = {"runtime.checkpoint_steps": EVERY}
LOADER = {"data.in_memory": "false", "runtime.workers": 2}
USR2, TERM_USR2 = Event("USR2", usr2), Event("TERM, then USR2", term_usr2)
AWAY = Event("USR2 while the controller is away", stop_while_the_controller_is_away)
DAEMONS = Event("daemons away for a moment", take_daemons_away_for_a_moment, again=False)
REQUEUE, PREEMPT = Event("scontrol requeue", requeue), Event("preemption, USR2", preempt)
PREEMPT_TERM = Event("preemption, TERM only", preempt)
PREEMPT_ABRUPT = Event("preemption, GraceTime=0", preempt)
RETRY = Event("scancel, then retry", cancel_and_retry)
NODE_DOWN = Event("node of rank 0 set down", set_node_down)
STORIES = [
    Story([USR2], quick=True),
    Story([Event("USR2 twice", usr2_twice), TERM_USR2, Event("USR2 with a stale file of submitit", stale_file), AWAY]),
    Story([DAEMONS, REQUEUE, PREEMPT, RETRY]),
    Story(
        [
            Event("kill -9 of the training process", kill_training, saves=False),
            Event("kill -9 of the supervisor", kill_supervisor),
            NODE_DOWN,
        ]
    ),
    Story([PREEMPT_TERM, Event("USR2 where JobRequeue=0", usr2)], bed=TERM_ONLY | {"job_requeue": False}),
    Story([PREEMPT_ABRUPT, Event("USR2 with loader processes", usr2)], profile=ABRUPT, settings=LOADER),
    Story([Event("slurmd dead for a while", stop_slurmd_for_a_while, saves=False)], settings=OFTEN, brake=SLOWLY),
    Story([USR2, TERM_USR2, AWAY], ranks=2),
    Story([DAEMONS, REQUEUE, PREEMPT, RETRY], ranks=2),
    Story(
        [
            Event("kill -9 of rank 0's training process", kill_training, saves=False),
            Event("kill -9 of rank 1's training process", kill_training_1, saves=False),
            Event("kill -9 of rank 0's supervisor", kill_supervisor),
            Event("kill -9 of rank 1's supervisor", kill_supervisor_1),
            NODE_DOWN,
        ],
        ranks=2,
    ),
    Story([PREEMPT_TERM], ranks=2, bed=TERM_ONLY),
    Story([PREEMPT_ABRUPT], ranks=2, profile=ABRUPT),
    Story(
        [Event("slurmd of rank 0 dead", stop_slurmd, saves=False)],
        ranks=2,
        bed={"nodes": 4},
        settings=OFTEN,
        brake=SLOWLY,
    ),
]


@pytest.mark.parametrize("story", [story.parameter() for story in STORIES])
def test_a_disturbed_run_ends_as_if_undisturbed(story, submit, check):
    """Where there is notice the next attempt begins where the event came, else not before this one began."""
    settings = {"runtime.checkpoint_steps": NEVER} | story.settings
    run = submit(story.ranks, story.bed, story.profile, story.brake, **settings)
    for event in story.events:
        began, step = run.until_trained(FEW)
        attempts = len(run.attempts())
        event.do(run)
        if event.again:
            run.until_attempts(attempts + 1)
            begins = run.attempts()[-1]["from_step"]
            assert begins >= (step if event.saves else began), event.name
    run.until_finished()
    assert len(run.attempts()) == 1 + sum(event.again for event in story.events)
    check(run, *(event.name for event in story.events if event.again))


# -- time ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_time_limit(submit, check, ranks):
    """Slurm's own notice; it looks every 30 s, so that it comes between 70 and 100 s before the end."""
    profile = {"timeout_minutes": 2, "signal_seconds": 70}
    run = submit(ranks, profile=profile, brake=SLOWLY, **{"runtime.checkpoint_steps": NEVER})
    run.until_attempts(2)
    run.until_finished()
    stopped, finished = run.attempts()
    assert "SIGUSR2" in stopped["reason"]
    assert finished["from_step"] == stopped["reached_step"] > 0
    check(run, "time limit, Slurm's notice")


@pytest.mark.slow
def test_deadline(submit, check):
    """Where the notice would come too late, the runs look at the clock themselves."""
    profile = {"timeout_minutes": 1, "signal_seconds": 1}
    run = submit(profile=profile, brake=SLOWLY, **{"runtime.checkpoint_steps": NEVER})
    run.until_attempts(2)
    run.until_finished()
    stopped, finished = run.attempts()
    assert "deadline" in stopped["reason"]
    assert finished["from_step"] == stopped["reached_step"] > 0
    check(run, "time limit without notice")


# -- daemons ------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_live_copies(submit, check):
    """The node's daemon dies and its job lives: Slurm starts a second copy, to which the first one gives way."""
    run = submit(brake=SLOWLY, **{"runtime.checkpoint_steps": EVERY})
    run.until_step(EVERY + 4)
    (old,) = run.training()
    run.bed.stop_slurmd(run.attempts()[0]["node"])
    (new,) = run.until(lambda: [pid for pid in run.training() if pid != old], "a second copy")
    assert old in run.training()
    run.until(lambda: run.training() == [new], "the end of the first one")
    run.until_finished()
    old_one, new_one = run.attempts()
    assert old_one["outcome"] == "busy"
    assert f"trained by job {run.job} (start 2)" in old_one["reason"]
    assert f"has been taken over by job {run.job} (start 2)" in run.output()
    assert new_one["from_step"] >= EVERY
    assert new_one["node"] != old_one["node"]
    check(run, "slurmd dead, the job alive")


@pytest.mark.slow
def test_controller_dies_before_it_can_requeue(submit, check, tmp_path):
    """The batch script asks until somebody hears it. Here its scontrol first waits until the controller is gone."""
    real, script = shutil.which("scontrol"), tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    wait = f"while [ ! -e {tmp_path}/gone ]; do sleep 0.1; done"
    script.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked; {wait}\nexec {real} "$@"\n')
    script.chmod(0o755)
    profile = {"setup": [f"export PATH={script.parent}:$PATH"]}
    run = submit(profile=profile, **{"runtime.checkpoint_steps": NEVER})
    step = run.until_step(10)
    run.save_controller()
    run.send("USR2")
    run.until((tmp_path / "asked").exists, "a question")
    run.bed.stop_slurmctld()
    (tmp_path / "gone").touch()
    run.until(lambda: (tmp_path / "asked").read_text().split()[:2] == ["show", "show"], "a second try")
    run.bed.start_slurmctld()
    run.until_attempts(2)
    run.until_finished()
    assert run.attempts()[1]["from_step"] >= step
    check(run, "controller dies before the requeue")


# -- the beginning ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), (1, 1), (3, 2)])
def test_signals_before_anybody_listens(submit, check, seed, ranks):
    """At random moments of the job's first two seconds, at every one of three starts."""
    draw = random.Random(seed)
    run = submit(ranks, **{"runtime.checkpoint_steps": NEVER})
    for start in range(3):
        run.until(lambda start=start: run.in_queue()[1:3] == ("RUNNING", start), f"start {start}")
        for _ in range(draw.randint(1, 3)):
            time.sleep(draw.uniform(0, 0.7))
            with_shell = draw.choice([[], ["--full"]])
            run.bed.run("scancel", "--signal", draw.choice(["USR2", "USR2", "TERM"]), *with_shell, run.job, check=False)
        run.until(lambda start=start: run.step() or run.in_queue().restarts > start, "a step or a requeue")
        if run.step():
            break
    run.until_finished()
    check(run, "signals in the first seconds")


# -- the end ------------------------------------------------------------------------------


@pytest.mark.slow
def test_requeue_of_a_finished_run_changes_nothing(submit, check):
    run = submit(brake=0.0)
    run.until_finished()
    before, said = contents(run.folder), run.output()
    run.bed.run("scontrol", "requeue", run.job)
    run.until(lambda: run.in_queue()[1:3] == ("COMPLETED", 1), "the job's second end")
    assert contents(run.folder) == before
    assert "0 of 1 runs to train" in run.output().replace(said, "")
    check(run, "requeue of a finished run")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again(submit, check, ranks):
    """Without any progress a run counts as failed; a person may try again."""
    run = submit(ranks, profile={"max_fruitless": 2}, **{"runtime.checkpoint_steps": NEVER})
    for count in (1, 2):
        run.until_attempts(count)
        run.until(lambda count=count: len(run.starts()) == count * ranks, "all ranks to train")
        run.kill(run.training(ranks - 1))
    run.until(lambda: run.failure().get("kind") == "no-progress", "an end of the attempts")
    assert "2 attempts in a row" in run.failure()["reason"]
    run.until_state("FAILED", "COMPLETED")  # the killed rank's code starts the job once more, with nothing to do
    assert len(run.attempts()) == 2
    run.report("killed again and again")
    run.go_on()
    assert launch.retry([run.folder]) == 0
    run.until_finished()
    check(run, "killed again and again, then retry")


@pytest.mark.slow
def test_budget_of_requeues(submit, check):
    run = submit(profile={"max_requeues": 1}, **{"runtime.checkpoint_steps": NEVER})
    for restart in (0, 1):
        run.until(lambda restart=restart: len(run.starts()) > restart, f"start {restart}")
        usr2(run)
        run.until(lambda restart=restart: "outcome" in run.attempts()[restart], "its end")
    run.until(run.failure, "a failure")
    assert run.failure()["kind"] == "requeues"
    run.until_state("FAILED")
    assert launch.retry([run.folder]) == 0
    run.until_finished()
    check(run, "budget of requeues used up, then retry")


# -- failures -----------------------------------------------------------------------------


def break_code(run):
    run.until_step(5)
    run.plant_bug()


def lose_data(run):
    shutil.rmtree(run.runs.parent / "images")
    run.bed.run("scontrol", "release", run.job)


FAILURES = {
    "code": ({}, {}, break_code),
    "non-finite": ({"optim.lr": 1e20}, {}, Submitted.go_on),
    "data": ({"data": "imagefolder"}, {"extra": {"hold": True}}, lose_data),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_named_and_not_repeated(submit, tmp_path, kind):
    settings, profile, do = FAILURES[kind]
    if kind == "data":
        settings = settings | {"data.root": tmp_path / "images"}
        for name in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    run = submit(profile=profile, **settings)
    do(run)
    run.until_state("FAILED")
    assert run.failure()["kind"] == kind, run.output()
    assert run.in_queue().restarts == 0
    assert [attempt["outcome"] for attempt in run.attempts()] == ["failed"]
    run.report(f"failure of kind {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_faulty_node_is_avoided(submit, check, tmp_path, rank):
    """The node of this (the last) rank has lost the GPU that Slurm promises; the job goes on without that node."""
    python = tmp_path / "losing"
    python.write_text(f"""#!/bin/sh
[ -e {tmp_path}/faulty ] || [ "$SLURM_PROCID" != {rank} ] || echo "$SLURMD_NODENAME" > {tmp_path}/faulty
[ "$(cat {tmp_path}/faulty)" != "$SLURMD_NODENAME" ] || export SLURM_JOB_GPUS=0 CUDA_VISIBLE_DEVICES=
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    run = submit(rank + 1, profile={"python": str(python)}, brake=0.0)
    run.until_attempts(2)
    run.until_finished()
    name = (tmp_path / "faulty").read_text().strip()
    assert [attempt["outcome"] for attempt in run.attempts()] == ["node", "finished"]
    assert f"ExcNodeList={name}" in run.bed.run("scontrol", "show", "job", run.job)
    check(run, "a faulty node")
