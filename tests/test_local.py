"""Running a grid on this machine: every run once, whatever happens to single ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import compose_config, prepare_folder
from runfolder.folder import RunFolder
from runfolder.lease import is_held
from runfolder.process import is_dead
from runfolder.tickets import highest
from slurm import ledger, status
from slurm.command import main
from slurm.notices import Notices
from tests.holding import held_elsewhere

ROOT = Path(__file__).parents[1]
TINY = ["epochs=1", "max_steps=3", "model.width=8", "runtime.threads=1"]


def quickstart(*arguments: str) -> int:
    return main("quickstart", "", "quickstart", list(arguments))


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiments" / "quickstart.py"), *arguments]


def run_folders(runs: Path) -> list[RunFolder]:
    return ledger.run_folders(runs)


def test_dry_run_makes_nothing_and_names_every_run(tmp_path, capsys):
    assert quickstart("--dry-run", f"runtime.runs={tmp_path}") == 0
    assert not list(tmp_path.iterdir())
    assert "12 runs: 12 missing" in capsys.readouterr().out


def test_a_program_imports_what_it_uses(tmp_path):
    """What takes seconds: nothing for help, torch for a plan; a run what torch's own optimizers import."""
    choice = ["model=resnet_small", "method=tract", "seed=0", *TINY, f"runtime.runs={tmp_path}"]
    program = f"""
import sys
from slurm.command import main
for arguments in (["--help"], ["--dry-run", *{choice}], {choice}):
    try:
        main("quickstart", "", "quickstart", arguments)
    except SystemExit:
        pass
    slow = "matplotlib", "scipy", "sympy", "timm", "torch", "torch._dynamo", "torchvision"
    print("has:", *(name for name in slow if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    has = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("has:")]
    assert has == [[], ["torch"], ["sympy", "torch", "torch._dynamo"]]


def test_a_grid_is_trained_once(tmp_path, capsys):
    """Side by side; a second start finds everything finished; the plan agrees with the folders."""
    selection = [*TINY, "model=resnet_small", "seed=0,1", "method=vanilla", f"runtime.runs={tmp_path}"]
    assert quickstart("--local", "jobs=2", *selection) == 0
    results = {folder: (folder / "result.json").read_bytes() for folder in run_folders(tmp_path)}
    assert len(results) == 2
    assert quickstart("--local", *selection) == 0
    assert "2 runs, 2 finished already" in capsys.readouterr().out
    assert results == {folder: (folder / "result.json").read_bytes() for folder in run_folders(tmp_path)}
    quickstart("--dry-run", *selection)
    assert "2 runs: 2 finished" in capsys.readouterr().out


def test_local_trains_the_same_as_a_single_run(tmp_path):
    choice = [*TINY, "model=resnet_small", "seed=3", "method=tract"]
    assert quickstart("--local", *choice, f"runtime.runs={tmp_path / 'grid'}") == 0
    assert quickstart(*choice, f"runtime.runs={tmp_path / 'single'}") == 0
    (grid,), (single,) = (run_folders(tmp_path / name) for name in ("grid", "single"))
    assert grid.name == single.name
    digests = [json.loads((folder / "result.json").read_text())["weights_sha256"] for folder in (grid, single)]
    assert digests[0] == digests[1]


def test_a_failing_run_stops_no_other(tmp_path, capsys):
    """The first seed's folder holds a file where checkpoints belong; the second seed finishes."""
    selection = [*TINY, "model=resnet_small", "seed=0,1", "method=vanilla", f"runtime.runs={tmp_path}"]
    folder = prepare_folder(chosen(tmp_path))
    folder.checkpoints.write_text("not a folder")
    assert quickstart("--local", *selection) == 1
    said = capsys.readouterr().out
    assert "1 of 2 runs finished (1 failed" in said
    assert "output.txt" in said
    assert sorted(path.parent.name.split("-")[-2] for path in tmp_path.rglob("result.json")) == ["s1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_ask_a_grid_to_stop(number):
    before = signal.getsignal(number)
    with Notices() as notices:
        if number != signal.SIGUSR1:
            os.kill(os.getpid(), number)
            assert notices.take() == [number]
            assert notices.take() == []
        else:
            assert signal.getsignal(number) == before, "not ours"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_grid_that_is_stopped_leaves_checkpoints_and_no_process(tmp_path, number):
    """Also when the grid's own process is killed; the same command continues."""
    choice = ["model=resnet_small", "model.width=8", "seed=0", "method=tract", "epochs=20", "runtime.threads=1"]
    choice += [f"runtime.runs={tmp_path}", "--local"]
    process = subprocess.Popen(command(*choice), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: any("epoch 2/" in path.read_text() for path in tmp_path.rglob("log.txt")), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75), said
    (folder,) = run_folders(tmp_path)
    wait_until(lambda: not is_held(folder))
    assert list((folder / "checkpoints").glob("step-*.pt"))
    assert not (folder / "result.json").exists()
    assert quickstart(*choice) == 0
    assert "continues at step" in (folder / "log.txt").read_text()


def test_a_busy_run_is_named_and_stops_no_other(tmp_path, capsys):
    selection = [*TINY, "model=resnet_small", "seed=0,1", "method=vanilla", f"runtime.runs={tmp_path}"]
    folder = prepare_folder(chosen(tmp_path))
    with held_elsewhere(folder):
        assert quickstart("--local", *selection) == 75
    said = capsys.readouterr().out
    assert "busy      " in said
    assert "1 of 2 runs finished (1 busy" in said


def slow_grid(runs: Path, *words: str) -> list[str]:
    choice = ["--local", "model=resnet_small", "model.width=8", "method=vanilla", "runtime.threads=1"]
    return [*choice, "runtime.heartbeat_seconds=0.2", f"runtime.runs={runs}", *words]


def state_words(runs: Path, capsys) -> list[str]:
    """The states that status.py lists, by the runs' names."""
    capsys.readouterr()
    status.main(["--runs", str(runs), "--json"])
    return [run["state"] for run in json.loads(capsys.readouterr().out)["runs"]]


@pytest.mark.slow
def test_status_shows_a_local_grid_and_stops_single_runs(tmp_path, capsys):
    """Of three runs that would take hours the first is cancelled; the second, queued till then, takes its place."""
    process = subprocess.Popen(
        command(*slow_grid(tmp_path, "seed=0,1,2", "epochs=100000")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: any("epoch 2/" in path.read_text() for path in tmp_path.rglob("log.txt")), process)
        assert state_words(tmp_path, capsys) == ["running", "queued", "queued"]
        first, second, third = run_folders(tmp_path)
        assert status.main(["cancel", "--runs", str(tmp_path), first.name, third.name]) == 0
        wait_until(lambda: is_held(second), process)
        assert state_words(tmp_path, capsys) == ["cancelled", "running", "cancelled"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert "SIGINT: each run writes a checkpoint" in said
    assert f"cancelled {first.name}" in said
    assert f"stopped   {second.name}: stopped (" in said
    assert [attempt["outcome"] for attempt in ledger.attempts(second)] == ["stopped"]
    assert [attempt["outcome"] for attempt in ledger.attempts(first)] == ["cancelled"]
    assert not ledger.attempts(third)
    assert first.newest_checkpoint() is not None
    assert quickstart("--local", *slow_grid(tmp_path, "seed=0", "epochs=100000")[1:]) == 0
    assert "0 of 1 runs finished (1 cancelled)." in capsys.readouterr().out


def test_a_killed_run_of_a_local_grid_is_started_again(tmp_path):
    """And its folder tells so: attempts of the supervisor, attempts of training, the submission they belong to."""
    process = subprocess.Popen(command(*slow_grid(tmp_path, "seed=0", "epochs=20")), stdout=subprocess.PIPE, text=True)
    wait_until(lambda: any("epoch 2/" in path.read_text() for path in tmp_path.rglob("log.txt")), process)
    (folder,) = run_folders(tmp_path)
    (submission,) = folder.submissions.iterdir()
    os.kill(json.loads(highest(folder.lease)[1].read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"killed    {folder.name}: killed by SIGKILL" in said
    assert "1 of 1 runs finished." in said
    attempts = ledger.attempts(folder)
    assert [attempt["outcome"] for attempt in attempts] == ["killed", "finished"]
    assert {attempt["submission"] for attempt in attempts} == {submission.name}
    assert len(json.loads(folder.provenance.read_text())["attempts"]) == 2
    assert ledger.claim_of(folder)["released"] == "finished"
    assert not (submission / "code").exists(), "it runs the checkout itself"


def test_a_failed_run_of_a_local_grid_can_be_retried(tmp_path, capsys, monkeypatch):
    """By status.py, in the background, with today's code."""
    monkeypatch.chdir(tmp_path)
    selection = ["model=resnet_small", "seed=0", "method=vanilla", "optim.lr=1e30", "epochs=2", "runtime.threads=1"]
    assert quickstart("--local", *selection) == 1
    (folder,) = run_folders(tmp_path / "runs")
    assert json.loads(folder.failure.read_text())["kind"] == "non-finite"
    assert status.main(["retry", "cluster.free_gib=0"]) == 0
    worker = ledger.claim_of(folder)["worker"]
    wait_until(lambda: is_dead(worker) and folder.failure.exists())
    assert [attempt["outcome"] for attempt in ledger.attempts(folder)] == ["failed", "failed"]
    assert len(list(folder.submissions.iterdir())) == 2


def chosen(runs: Path):
    tiny = {"epochs": 1, "max_steps": 3, "model": "resnet_small", "model.width": 8, "runtime.threads": 1}
    return compose_config("quickstart", tiny | {"runtime.runs": str(runs)})


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_resume_continues_exactly_that_folder(tmp_path):
    choice = [*TINY, "model=resnet_small", "seed=5", f"runtime.runs={tmp_path}"]
    assert quickstart(*choice, "runtime.deadline_minutes=0.0001") == 75
    (folder,) = run_folders(tmp_path)
    assert not (folder / "result.json").exists()
    assert quickstart("--resume", str(folder)) == 0
    assert (folder / "result.json").exists()
    assert run_folders(tmp_path) == [folder]


def test_submit_without_slurm_says_what_to_do_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert quickstart("--submit", f"runtime.runs={tmp_path / 'runs'}") == 2
    assert "or give cluster=local" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
