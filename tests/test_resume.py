"""A run that is stopped anywhere and started again ends as if it had never been stopped.

Compared with an undisturbed run, byte for byte: final weights, the whole last checkpoint,
every TensorBoard point but times, and the table.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.same_runs import assert_same, last_checkpoint, only_run
from tests.voc_folder import write_voc

ROOT = Path(__file__).parents[1]
# 4 epochs of 11 steps with 4 evaluation batches each; checkpoints and log points fall out of step with epochs.
SETTINGS = {
    "epochs": 4, "batch_size": 130, "eval_batch_size": 100, "model.width": 8, "method": "tract",
    "runtime.threads": 1, "runtime.checkpoint_steps": 5, "runtime.log_every": 4, "runtime.workers": 0,
}  # fmt: skip
VARIANTS = {
    "in memory": ({}, 1),
    "loader processes": ({"data.in_memory": "false"}, 1),
    "ema, bf16, accumulation": ({"ema_decay": 0.9, "precision": "bf16", "micro_batch": 50, "model": "vit_small"}, 1),
    "sgd, vanilla": ({"optim": "sgd", "optim.lr": 0.003, "method": "vanilla"}, 1),
    "proximal steps": ({"method": "proxprop", "method.mode": "prox_cg3"}, 1),
    "layerwise curve": ({"method": "curve", "method.layerwise": "true", "method.points": 3}, 1),
    "snapshots": ({"method": "swa", "method.count": 3, "method.samples": 2, "method.points": 0}, 1),
    "simplex on two ranks": ({"method": "simplex", "method.members": 2, "ema_decay": 0.9, "micro_batch": 30}, 2),
    "low rank": ({"method": "oialr", "method.delay": 4, "method.stability_frequency": 3, "ema_decay": 0.9}, 1),
    "low rank on two ranks": (
        {
            "method": "oialr",
            "method.freeze": "stability",
            "method.stability_threshold": 0.5,
            "method.delay": 2,
            "method.stability_frequency": 4,
            "model": "vit_small",
            "micro_batch": 30,
        },
        2,
    ),
    "whitening on two ranks": ({"method": "whitening", "ema_decay": 0.9}, 2),
    "two ranks": ({"ema_decay": 0.9, "drop_last": "true"}, 2),  # BatchNorm: its statistics differ between ranks
}


def words(changes: dict | None = None) -> list[str]:
    """The settings with these changes, as a command line."""
    return [f"{key}={value}" for key, value in (SETTINGS | (changes or {})).items()]


RUN = words()


class Machine:
    """Starts runs in processes of their own; see killable.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "killable.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def start(
        self, arguments, *, runs, ranks=1, event=None, delay=None, experiment="quickstart", prepare=None
    ) -> list[int]:
        """Exit codes of all ranks of one attempt."""
        request = {
            "experiment": experiment,
            "arguments": [*arguments, f"runtime.runs={runs}"],
            "ranks": ranks,
            "event": event,
            "delay": delay,
            "prepare": prepare,
            "output": str(self.folder / "output.txt"),
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def until_finished(self, arguments, *, runs, ranks=1, attempts=10) -> int:
        """Start again and again without disturbing; the number of attempts it took."""
        for attempt in range(1, attempts + 1):
            if all(code == 0 for code in self.start(arguments, runs=runs, ranks=ranks)):
                return attempt
        raise AssertionError(self.output())


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.server.stdin.close()
    machine.server.wait()


@pytest.fixture(scope="module")
def undisturbed(machine, tmp_path_factory):
    """The same run without any interruption, made once per variant."""
    made = {}

    def run(variant: str) -> Path:
        if variant not in made:
            extra, ranks = VARIANTS[variant]
            runs = tmp_path_factory.mktemp("undisturbed")
            codes = machine.start(words(extra), runs=runs, ranks=ranks)
            assert codes == [0] * ranks, machine.output()
            made[variant] = runs
        return made[variant]

    return run


KILLS = {
    "first step": [("forward", 1)],
    "before the first checkpoint": [("optimizer", 4)],
    "every few steps": [("forward", 7), ("optimizer", 6), ("forward", 9), ("optimizer", 13)],
    "during evaluations": [("evaluation", 2), ("evaluation", 3), ("evaluation", 8)],
    "after an evaluation": [("evaluated", 1), ("evaluated", 2)],
    "half a checkpoint": [("half a checkpoint", 1), ("half a checkpoint", 3), ("half a checkpoint", 4)],
    "around renaming a checkpoint": [(f"{moment} renaming step-*.pt", 2) for moment in 2 * ("before", "after")],
    "around renaming other files": [
        (f"{moment} renaming {name}", 1)
        for name in ("config.yaml", "provenance.json")
        for moment in ("before", "after")
    ],
    "while pruning": [("pruning", 4), ("pruning", 5)],
    "around the result": [("before renaming result.json", 1)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS.keys())
def test_killed_at_chosen_places(machine, undisturbed, tmp_path, capsys, kills):
    for place, count in kills:
        (code,) = machine.start(RUN, runs=tmp_path, event=(place, count, "SIGKILL"))
        assert code == -signal.SIGKILL, f"the run never came to {place} number {count}: {machine.output()}"
    assert machine.until_finished(RUN, runs=tmp_path) == 1
    assert_same(tmp_path, undisturbed("in memory"), capsys)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(machine, undisturbed, tmp_path, capsys, seed):
    """From outside, whatever the process is doing: at least twice, at most six times."""
    draw, longest, killed = random.Random(seed), 1.0, 0
    while killed < 6:
        (code,) = machine.start(RUN, runs=tmp_path, delay=draw.uniform(0.05, longest))
        if code == -signal.SIGKILL:
            killed += 1
        elif killed >= 2:
            break
        else:  # finished too soon to be killed twice: begin again with shorter lives
            shutil.rmtree(tmp_path / "quickstart")
            longest, killed = longest / 2, 0
    machine.until_finished(RUN, runs=tmp_path)
    assert_same(tmp_path, undisturbed("in memory"), capsys)


QUICK = ("loader processes", "ema, bf16, accumulation", "two ranks", "low rank")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS if name != "in memory"],
)
def test_killed_in_every_variant(machine, undisturbed, tmp_path, capsys, variant):
    extra, ranks = VARIANTS[variant]
    for place, count in [("forward", 8), ("evaluation", 3), ("half a checkpoint", 2)]:
        codes = machine.start(words(extra), runs=tmp_path, ranks=ranks, event=(place, count, "SIGKILL"))
        assert codes[0] == -signal.SIGKILL, machine.output()
    machine.until_finished(words(extra), runs=tmp_path, ranks=ranks)
    assert_same(tmp_path, undisturbed(variant), capsys)


@pytest.mark.parametrize("variant", ["in memory", "two ranks"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_signals_stop_at_a_step_with_a_checkpoint(machine, undisturbed, tmp_path, capsys, name, variant):
    """In a step, in an evaluation, between steps: exit code 75 and nothing is lost."""
    extra, ranks = VARIANTS[variant]
    arguments = words(extra | {"runtime.checkpoint_steps": "null"})  # only the signal makes checkpoints
    for place, count in [("forward", 3), ("evaluation", 2), ("optimizer", 8)]:
        codes = machine.start(arguments, runs=tmp_path, ranks=ranks, event=(place, count, name))
        assert codes == [75] * ranks, machine.output()
    assert machine.until_finished(arguments, runs=tmp_path, ranks=ranks) == 1
    assert_same(tmp_path, undisturbed(variant), capsys)


def test_mixed_copies_train_the_same_on_any_ranks_and_in_micro_batches(machine, tmp_path):
    """Repeated augmentation with Mixup and CutMix in three groups; a network without BatchNorm."""
    recipe = {"repeats": 3, "mixup": 0.8, "cutmix": 1.0, "mix_group": 40, "batch_size": 100, "drop_last": "true"}
    recipe |= {"model": "vit_small", "optim": "sgd", "optim.lr": 0.003, "max_steps": 12, "epochs": 1}
    weights = []
    for number, (ranks, changes) in enumerate([(1, {}), (1, {"micro_batch": 30}), (3, {"micro_batch": 7})]):
        runs = tmp_path / str(number)
        assert machine.start(words(recipe | changes), runs=runs, ranks=ranks) == [0] * ranks, machine.output()
        weights.append(last_checkpoint(only_run(runs))["model"])
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["proxprop", "method.mode=prox_exact"],
        ["proxprop", "method.mode=prox_cg3"],
        ["line", "method.points=3"],
        ["simplex", "method.layerwise=true", "method.members=2"],
        ["swa", "method.count=3"],
        ["oialr", "method.delay=3", "method.stability_frequency=2", "method.keep_first_layer=false"],
        [
            "oialr",
            "method.freeze=stability",
            "method.stability_threshold=-1",
            "method.delay=2",
            "method.stability_frequency=3",
        ],
        ["whitening"],
    ],
    ids=" ".join,
)
def test_relatives_train_the_same_on_any_ranks_and_in_micro_batches(method, machine, tmp_path):
    """A network without BatchNorm."""
    recipe = {"batch_size": 100, "model": "vit_small", "optim": "sgd", "optim.lr": 0.01, "max_steps": 10, "epochs": 1}
    found = []
    for number, (ranks, changes) in enumerate([(1, {}), (1, {"micro_batch": 30}), (2, {}), (2, {"micro_batch": 20})]):
        runs = tmp_path / str(number)
        arguments = words(recipe | {"method": method[0]} | changes) + method[1:]
        assert machine.start(arguments, runs=runs, ranks=ranks) == [0] * ranks, machine.output()
        result = json.loads(only_run(runs).result.read_text())
        found.append((last_checkpoint(only_run(runs))["model"], result["metrics"]))
    (weights, metrics), *others = found
    for its_weights, its_metrics in others:
        for name, tensor in weights.items():
            torch.testing.assert_close(its_weights[name], tensor, rtol=1e-3, atol=1e-5)
        assert its_metrics.keys() == metrics.keys()
        for tag in (tag for tag in metrics if tag.endswith("/loss")):
            assert its_metrics[tag] == pytest.approx(metrics[tag], rel=1e-3), tag


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_low_rank_goes_on_with_other_ranks(first, then, machine, tmp_path):
    """Killed after its layers were cut; the checkpoint has the ranks of the matrices for any number of processes."""
    recipe = {"batch_size": 100, "model": "vit_small", "optim": "sgd", "optim.lr": 0.01, "max_steps": 10, "epochs": 1}
    recipe |= {"method": "oialr", "method.delay": 3, "method.stability_frequency": 2, "runtime.checkpoint_steps": 1}
    assert machine.start(words(recipe), runs=tmp_path / "whole", ranks=1) == [0], machine.output()
    codes = machine.start(words(recipe), runs=tmp_path / "parts", ranks=first, event=("optimizer", 7, "SIGKILL"))
    assert codes[0] == -signal.SIGKILL
    assert machine.start(words(recipe), runs=tmp_path / "parts", ranks=then) == [0] * then, machine.output()
    whole, parts = (last_checkpoint(only_run(tmp_path / name))["model"] for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_ranks_estimate_the_statistics_that_one_does(machine, tmp_path):
    """Points of a finished line, evaluated by one rank and by two that share its 11 batches."""
    arguments = words({"method": "line", "max_steps": 6, "epochs": 1, "batch_size": 140}) + ["method.points=3"]
    assert machine.start(arguments, runs=tmp_path / "line") == [0], machine.output()
    start = [f"start_from={only_run(tmp_path / 'line')}", "eval_start=true", "max_steps=0"]
    found = []
    for ranks in (1, 2):
        arguments = words({"method": "line", "epochs": 1, "batch_size": 140})
        runs = tmp_path / str(ranks)
        codes = machine.start([*arguments, "method.points=3", *start], runs=runs, ranks=ranks)
        assert codes == [0] * ranks, machine.output()
        found.append(json.loads(only_run(runs).result.read_text())["metrics"])
    tags = [tag for tag in found[0] if tag.endswith("/loss")]
    assert len(tags) == 5
    assert [found[1][tag] for tag in tags] == pytest.approx([found[0][tag] for tag in tags], rel=1e-6)


def test_two_ranks_evaluate_what_a_checkpoint_holds(machine, tmp_path, capsys):
    """A checkpoint at the end of every epoch and a kill in every evaluation change no logged number."""
    extra, ranks = VARIANTS["two ranks"]
    arguments = words(extra | {"runtime.checkpoint_steps": 11})
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert machine.start(arguments, runs=undisturbed, ranks=ranks) == [0] * ranks, machine.output()
    for count in (1, 5):
        codes = machine.start(arguments, runs=disturbed, ranks=ranks, event=("evaluation", count, "SIGKILL"))
        assert codes[0] == -signal.SIGKILL, machine.output()
    machine.until_finished(arguments, runs=disturbed, ranks=ranks)
    assert_same(disturbed, undisturbed, capsys)


def test_detection_on_two_ranks_counts_every_image_once(machine, tmp_path):
    root = write_voc(tmp_path, train=4, test=5)
    sizes = {"model.width": 8, "model.hidden": 16, "model.min_size": 64, "model.max_size": 96, "start_from": "null"}
    changes = sizes | {"data.root": root, "batch_size": 2, "epochs": 1, "runtime.workers": 0, "method": "tract"}
    arguments = [f"{key}={value}" for key, value in changes.items()]
    runs = tmp_path / "runs"
    assert machine.start(arguments, runs=runs, ranks=2, experiment="detection_voc") == [0, 0], machine.output()
    (path,) = runs.rglob("result.json")
    assert 0 <= json.loads(path.read_text())["metrics"]["test/map"] <= 100


def test_a_stop_loses_no_step(machine, tmp_path):
    arguments = words({"runtime.checkpoint_steps": "null"})
    assert machine.start(arguments, runs=tmp_path, event=("forward", 7, "SIGTERM")) == [75]
    assert only_run(tmp_path).newest_checkpoint().name.startswith("step-00000007-")


def test_deadline_stops_in_time(machine, undisturbed, tmp_path, capsys):
    """Each attempt has too little time for the whole run, and the last one is given enough."""
    # The second that is always kept in reserve leaves 0.02 to 0.5 s.
    stopped = [machine.start([*RUN, f"runtime.deadline_minutes={s / 60}"], runs=tmp_path) for s in (1.02, 1.2, 1.5)]
    assert stopped[0] == [75], machine.output()
    machine.until_finished(RUN, runs=tmp_path)
    assert_same(tmp_path, undisturbed("in memory"), capsys)


def test_resumed_with_other_worker_counts(machine, undisturbed, tmp_path, capsys):
    extra, _ = VARIANTS["loader processes"]
    for workers, kill in [(2, ("forward", 9)), (0, ("forward", 8)), (1, ("evaluation", 3)), (2, ("optimizer", 4))]:
        arguments = words(extra | {"runtime.workers": workers})
        assert machine.start(arguments, runs=tmp_path, event=(*kill, "SIGKILL")) == [-signal.SIGKILL]
    machine.until_finished(words(extra | {"runtime.workers": 2}), runs=tmp_path)
    assert_same(tmp_path, undisturbed("loader processes"), capsys)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "bit flipped": lambda data: data[:1000] + bytes([data[1000] ^ 4]) + data[1001:],
    "empty": lambda data: b"",
    "foreign": lambda data: b"\x89PNG\r\n\x1a\n" + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("how_many", [1, 2])
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    machine, undisturbed, tmp_path, capsys, damage, how_many
):
    machine.start(RUN, runs=tmp_path, event=("forward", 14, "SIGKILL"))
    files = sorted(only_run(tmp_path).checkpoints.glob("step-*.pt"), reverse=True)
    assert [path.name[:13] for path in files] == ["step-00000010", "step-00000005"]
    for path in files[:how_many]:
        path.write_bytes(damage(path.read_bytes()))
    machine.until_finished(RUN, runs=tmp_path)
    log = only_run(tmp_path).log.read_text()
    for path in files[:how_many]:
        assert f"{path.name} is damaged" in log
    expected = {1: "continues at step 5", 2: "starts at step 0"}[how_many]
    assert expected in log.split("is damaged")[-1]
    assert_same(tmp_path, undisturbed("in memory"), capsys)


def test_starting_a_finished_run_changes_nothing(machine, undisturbed):
    runs = undisturbed("in memory")
    before = {path: path.stat().st_mtime_ns for path in only_run(runs).path.rglob("*") if path.name != "lock"}
    assert machine.start(RUN, runs=runs) == [0]
    assert "finished already" in machine.output()
    assert before == {path: path.stat().st_mtime_ns for path in only_run(runs).path.rglob("*") if path.name != "lock"}


def test_two_starts_at_once_train_once(machine, undisturbed, tmp_path, capsys):
    """The second start is refused (69) and names the first; together they make one run."""
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), *RUN, f"runtime.runs={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, "runtime.deadline_minutes=9"], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 69], [0, 0]), outputs
    if codes == [0, 69]:
        assert "is being trained by process" in outputs[0] + outputs[1]
    attempts = json.loads(only_run(tmp_path).provenance.read_text())["attempts"]
    assert len(attempts) == 1
    assert_same(tmp_path, undisturbed("in memory"), capsys)
